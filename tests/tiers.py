"""Helpers for sandbox tests: the tiers this machine must support."""

import re

import pytest

from sandbox import execute

# Reasons a machine may lack a tier. Anything else is our bug.
ABSENT = "is not installed|has no Landlock|bwrap: "


def need(tier: str) -> str:
    """Return `tier`; skip the test if the machine cannot support it, fail if it is broken."""
    missing = execute._missing(tier)
    if missing and re.search(ABSENT, missing):
        pytest.skip(f"tier {tier}: {missing}")
    assert not missing
    return tier


def best() -> str:
    """Return the best tier this machine supports."""
    return next(t for t in "ABC" if not re.search(ABSENT, execute._missing(t)))
