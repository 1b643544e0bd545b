"""Check, before scoring, that this machine's verdicts mean something.

A fixed loop measures the machine's slowdown, all references must pass, and known wrong solutions
must fail. A sample's timeout is --timeout_s times the slowdown, and at least SLOWER times its
reference's time. All times are CPU time.
"""

import contextlib
import hashlib
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from common.code import code_hash
from common.config import UserError
from common.files import write_json
from sandbox.execute import Check, Verdict, run_checks

SLOW_FRAC = 0.01  # share of references that may time out
SLOWER = 4.0  # a sample may take this many times its reference's time (EvalPlus's default)
PATIENCE = 5.0  # a reference may take this many times the timeout
LOOP = "total = 0\nfor i in range(1_000_000):\n    total += i * i % 7\n"
LOOP_S = 0.1  # CPU time: LOOP takes 0.09 on the Xeon of LOG.md, Python 3.11, plus the check
SLOWEST = 4.0  # cap, times LOOP_S: on slower machines references time out, with an error
BOOT = Path("/proc/sys/kernel/random/boot_id")  # identifies machine and boot
# Definitions every test should reject, appended to a reference to override it.
WRONG = (
    "def {0}(*args, **kwargs): pass",
    "def {0}(*args, **kwargs): return 'wrong'",
    "def {0}(*args, **kwargs): raise ValueError",
)


def check(problem: dict, sample: dict | str, timeout_s: float) -> Check:
    """Make the check of a completion, or of a sample with a whole program as "solution".

    The sandbox gets prompt and completion, or the whole program; never the test.
    """
    sample = {"completion": sample} if isinstance(sample, str) else sample
    setup, prompt, test = problem.get("setup", ""), problem["prompt"], problem["test"]
    # The empty line closes a trailing backslash, as in the official harness.
    whole = "solution" in sample
    source = sample["solution"] if whole else f"{prompt}{sample['completion']}\n\n"
    return Check(source, test, problem["entry_point"], prompt, timeout_s, setup)


def slowdown(workers: int, **limits) -> float:
    """Time LOOP with all workers busy; return the median over LOOP_S, clamped to 1..SLOWEST."""
    verdicts = run_all([Check(LOOP, timeout_s=120)] * 3 * workers, workers=workers, **limits)
    return min(max(1.0, statistics.median(v.seconds for v in verdicts) / LOOP_S), SLOWEST)


def self_check(problems: list[dict], timeout_s: float, **limits) -> dict[str, float]:
    """Return {task_id: CPU seconds of its reference, inf if it timed out}.

    Run references, with PATIENCE, and wrong solutions of all problems. Raises UserError if a
    reference fails, a wrong solution passes, or more than SLOW_FRAC of the references time out:
    a score from this machine, or on these problems, would mean nothing.
    """
    jobs = [("reference", p, p["canonical_solution"], PATIENCE * timeout_s) for p in problems]
    for wrong in WRONG:
        kind = f"wrong solution ({wrong.split(': ')[1]})"
        for p in problems:
            if p["test"] == p.get("plus_test"):
                continue  # asked only of samples that pass the base tests
            body = f"{p['canonical_solution']}\n\n{wrong.format(p['entry_point'])}\n"
            jobs.append((kind, p, body, timeout_s))
    checks = [check(p, body, limit_s) for _, p, body, limit_s in jobs]
    seconds, bad = {}, []
    for (kind, p, *_), v in zip(jobs, run_all(checks, progress="self-check", **limits)):
        if kind == "reference" and v.status in ("passed", "timeout"):
            seconds[p["task_id"]] = v.seconds if v.status == "passed" else math.inf
        elif kind == "reference" or v.status == "passed":
            bad.append(f"{p['task_id']}: the {kind} {v.status} {v.detail}".strip())
    slow = [task_id for task_id, s in seconds.items() if s == math.inf]
    if len(slow) > SLOW_FRAC * len(problems):
        bad += [f"{task_id}: the reference timed out" for task_id in slow]
    if bad:
        more = f" (and {len(bad) - 3} more)" if len(bad) > 3 else ""
        raise UserError(
            f"no score, as the self-check failed for {'; '.join(bad[:3])}{more}. "
            "Fix the problems, or raise --timeout_s"
        )
    return seconds


def remembered(path: Path | None, problems: list[dict], work: Callable[[], dict], **limits) -> dict:
    """Return `work()`, from the cache at `path` if nothing relevant changed.

    The cache key covers machine and boot, Python, the code that runs programs, the `limits` (tier
    and nominal timeout included) and the full text of the problems.
    """
    if path is None or not BOOT.exists():
        return work()
    here = [BOOT.read_text(), platform.node(), os.geteuid(), sys.executable, sys.version]
    here += [code_hash("sandbox.self_check"), limits, problems]
    key = hashlib.sha256(json.dumps(here).encode()).hexdigest()
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # no cached result
        return json.loads(path.read_text())[key]
    found = work()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {key: found})
    return found


def run_all(checks: list[Check], **limits) -> list[Verdict]:
    """Run the checks. Raises UserError if any verdict is "infrastructure"."""
    verdicts = run_checks(checks, **limits)
    broken = [v.detail for v in verdicts if v.status == "infrastructure"]
    if broken:
        raise UserError(
            f"no score, as {len(broken)} of {len(verdicts)} programs could not run on this "
            f"machine: {broken[0]}"
        )
    return verdicts
