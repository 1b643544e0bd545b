"""What a machine must show before it gives a score: that its verdicts mean something.

A fixed loop measures how slow the machine is, all references must pass, and solutions known to be
wrong must fail. The timeouts follow from it: --timeout_s times the slowdown, and no less than
SLOWER times what the problem's reference took. All of it is CPU time.
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

SLOW_FRAC = 0.01  # of the references may time out
SLOWER = 4.0  # times its reference's time that a sample may take (EvalPlus's default, too)
PATIENCE = 5.0  # times the timeout that a reference may take
LOOP = "total = 0\nfor i in range(1_000_000):\n    total += i * i % 7\n"
LOOP_S = 0.1  # 0.09 s of CPU time for LOOP on the Xeon of LOG.md, Python 3.11, and the check's own
SLOWEST = 4.0  # times LOOP_S: on a slower machine references time out, and the user is told
BOOT = Path("/proc/sys/kernel/random/boot_id")  # a machine since it was started
# Definitions that no test should accept, put behind a reference to replace it.
WRONG = (
    "def {0}(*args, **kwargs): pass",
    "def {0}(*args, **kwargs): return 'wrong'",
    "def {0}(*args, **kwargs): raise ValueError",
)


def check(problem: dict, sample: dict | str, timeout_s: float) -> Check:
    """Make the check of a completion, or of a sample whose "solution" is a whole program.

    It enters the sandbox with the prompt; the test does not.
    """
    sample = {"completion": sample} if isinstance(sample, str) else sample
    setup, prompt, test = problem.get("setup", ""), problem["prompt"], problem["test"]
    # An empty line ends a completion that ends in a backslash, as in the official harness.
    whole = "solution" in sample
    source = sample["solution"] if whole else f"{prompt}{sample['completion']}\n\n"
    return Check(source, test, problem["entry_point"], prompt, timeout_s, setup)


def slowdown(workers: int, **limits) -> float:
    """Measure how many times LOOP_S this machine takes with all workers busy: 1 to SLOWEST."""
    verdicts = run_all([Check(LOOP, timeout_s=120)] * 3 * workers, workers=workers, **limits)
    return min(max(1.0, statistics.median(v.seconds for v in verdicts) / LOOP_S), SLOWEST)


def self_check(problems: list[dict], timeout_s: float, **limits) -> dict[str, float]:
    """Return {task_id: the seconds that its reference took, inf if it timed out}.

    Runs the references, with PATIENCE, and wrong solutions of all problems. Raises UserError if a
    reference fails, a wrong solution passes, or more than SLOW_FRAC of the references time out: a
    score from this machine, or of these problems, would mean nothing.
    """
    jobs = [("reference", p, p["canonical_solution"], PATIENCE * timeout_s) for p in problems]
    for wrong in WRONG:
        kind = f"wrong solution ({wrong.split(': ')[1]})"
        for p in problems:
            if p["test"] == p.get("plus_test"):
                continue  # asked of what passed the base tests, which these fail
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
            "Mend the problems, or raise --timeout_s"
        )
    return seconds


def remembered(path: Path | None, problems: list[dict], work: Callable[[], dict], **limits) -> dict:
    """Return `work()`, or what `path` has of it under the same circumstances.

    The circumstances are the machine since it was started, Python, the code that runs programs, the
    `limits` (tier and nominal timeout among them) and the problems, word by word.
    """
    if path is None or not BOOT.exists():
        return work()
    here = [BOOT.read_text(), platform.node(), os.geteuid(), sys.executable, sys.version]
    here += [code_hash("sandbox.self_check"), limits, problems]
    key = hashlib.sha256(json.dumps(here).encode()).hexdigest()
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # none to be read
        return json.loads(path.read_text())[key]
    found = work()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {key: found})
    return found


def run_all(checks: list[Check], **limits) -> list[Verdict]:
    """Run the checks. Raises UserError if any verdict is "infrastructure": no score then."""
    verdicts = run_checks(checks, **limits)
    broken = [v.detail for v in verdicts if v.status == "infrastructure"]
    if broken:
        raise UserError(
            f"no score, as {len(broken)} of {len(verdicts)} programs could not be run on this "
            f"machine: {broken[0]}"
        )
    return verdicts
