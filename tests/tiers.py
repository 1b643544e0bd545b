"""Shared by the tests of the sandbox: which tiers this machine must have."""

import re

import pytest

from sandbox import execute

# What a machine may lack. Whatever else is wrong with a tier is a fault of ours.
ABSENT = "is not installed|has no Landlock|bwrap: "


def need(tier: str) -> str:
    """`tier`; the test is skipped where the machine cannot have it, and fails if it is broken."""
    missing = execute._missing(tier)
    if missing and re.search(ABSENT, missing):
        pytest.skip(f"tier {tier}: {missing}")
    assert not missing
    return tier


def best() -> str:
    """The best tier that this machine can have."""
    return next(t for t in "ABC" if not re.search(ABSENT, execute._missing(t)))
