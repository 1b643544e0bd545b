import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiers import best, need

from data.base.benchmarks import read_mbpp, read_problems
from eval.mbpp import problem
from sandbox import execute
from sandbox.execute import Check, run_checks, run_programs
from sandbox.self_check import check

FAIL = {
    "raise": "raise ValueError('no')",
    "assert": "assert 1 == 2",
    "syntax error": "def f(:",
    "surrogate": "x = '\ud800'",
    "exit code 0": "import os\nos._exit(0)",
    "sys.exit(0)": "import sys\nsys.exit(0)",
}
PASS = {
    "nothing": "",
    "stdlib": "import decimal, email.message, random, sqlite3.dbapi2, encodings.idna, dataclasses\n"
    "import hashlib, json, re, collections, statistics, zoneinfo, uuid, difflib, ast, inspect",
    "no environment": "import os\nassert not os.environ",
    "null device": "import os\nprint('x', file=open(os.devnull, 'w'))",
    "dataclass": "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    "@dataclass\nclass P:\n x: int\nassert P(1) == P(1)",
    "not main": "if __name__ == '__main__': raise ValueError",
    "clock": "import time, datetime\ntime.sleep(0.001)\ndatetime.datetime.now()",
}
ADD = "def f(a, b=0):\n    return a + b\n"


@pytest.fixture(params=["A", "B", "C"])
def tier(request):
    return need(request.param)


@pytest.fixture
def any_tier():
    return best()


def parents() -> dict[int, int]:
    """Return {pid: parent pid} of all processes except zombies."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent, *_ = path.read_bytes().rpartition(b")")[2].split()  # proc(5)
            if state != b"Z":
                found[int(path.parent.name)] = int(parent)
    return found


def descendants(pid: int) -> set[int]:
    """Return the descendants of `pid`."""
    running, family = parents(), {pid}
    while more := {p for p, parent in running.items() if parent in family} - family:
        family |= more
    return family - {pid}


LIMIT = "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (%s))\nwhile True: pass"


def one(source: str, test: str, tier: str, entry_point: str = "f", prompt: str = "", **fields):
    return run_checks([Check(source, test, entry_point, prompt, **fields)], 1, tier=tier)[0]


def test_passes_and_fails(tier):
    programs = FAIL | PASS
    verdicts = run_programs(list(programs.values()), 60, memory_mb=512, tier=tier)
    statuses = dict(zip(programs, (v.status for v in verdicts)))
    assert statuses == dict.fromkeys(FAIL, "failed") | dict.fromkeys(PASS, "passed")


def test_check_sees_values(any_tier):
    source = ADD + "from collections import Counter\nclass Node:\n    def __init__(s, v): s.v = v\n"
    source += "def sum_of(nodes): return sum(n.v for n in nodes)\ndef same(x): return x\n"
    source += "def change(x, c): x.sort(); c.clear(); c.update(b=0)\n"
    test = """
def check(candidate):
    assert candidate(2, b=3) == 5 and candidate([1], [2]) == [1, 2]
    assert candidate("\\ud83d", "\\ude00") == "\\ud83d\\ude00"
    assert same({(1, 2): {3.5, None}}) == {(1, 2): {3.5, None}}
    assert same(int) is int and list(same(iter("ab"))) == ["a", "b"]
    a, b = Node(1), Node(2)
    b.v = 7
    b.next = a
    assert sum_of([a, b]) == 8 and b.next.v == 1
    assert same(a) != a and not isinstance(same(a), int)
    changed, kept = [3, 1], {"a": [1]}
    assert change(changed, c=kept) is None and changed == [1, 3] and kept == {"b": 0}
    nodes = [a, b]
    assert sum_of(nodes) == 8 and nodes[0] is a
    try:
        candidate(1, "x")
    except TypeError as e:
        assert "unsupported operand" in str(e)
    else:
        raise ValueError
"""
    verdict = one(source, test, any_tier)
    assert verdict.status == "passed", verdict


def test_odd_tests(any_tier):
    named = "assert check(2) == 3\n\ndef check(candidate):\n    pass\n"
    excuse = "def check(candidate):\n    try: candidate(1)\n    except BaseException: pass\n"
    callback = "def check(candidate):\n    candidate(open, 1)\n"
    cases = [
        ("def check(x):\n    return x + 1\n", named, "check", "passed", ""),
        ("def check(x):\n    return x + 2\n", named, "check", "failed", "AssertionError"),
        ("import os\ndef f(x):\n    os._exit(3)\n", excuse, "f", "failed", "exit status 3"),
        (ADD, callback, "f", "failed", "cannot enter the sandbox"),
    ]
    checks = [Check(source, test, name) for source, test, name, *_ in cases]
    for (*_, status, detail), verdict in zip(cases, run_checks(checks, tier=any_tier)):
        assert verdict.status == status
        assert detail in verdict.detail


def test_order_is_kept_and_the_hash_seed_is_fixed(any_tier):
    programs = [f"raise ValueError({i}, hash('a'))" for i in range(20)]
    verdicts = [run_programs(programs, tier=any_tier) for _ in range(2)]
    first, again = ([v.detail for v in of] for of in verdicts)
    assert first == again
    assert [d.split("(")[1].split(",")[0] for d in first] == [str(i) for i in range(20)]
    assert run_checks([], tier=any_tier) == []


def test_failing_sandbox_is_infrastructure(monkeypatch, any_tier):
    def fails(detail, **limits):
        verdicts = run_programs(["", "raise ValueError"], workers=1, tier=any_tier, **limits)
        assert {v.status for v in verdicts} == {"infrastructure"}
        assert all(detail in v.detail for v in verdicts)

    fails("limits not set", memory_mb=1 << 60)
    monkeypatch.setattr("sys.executable", "/no/such/python")  # the tier's trial is cached
    fails("No such file")


@pytest.mark.parametrize("times", [1, 2])
def test_a_sandbox_that_dies_is_started_again(tier, monkeypatch, times):
    """Retry a check once after its sandbox was killed from outside (e.g. by the OOM killer); a
    second kill counts as the candidate's failure."""
    real, killed = execute._Supervisor.run, []

    def run(self, check):
        if self.process and check.source == "a = 1" and len(killed) < times:
            killed.append(self.process.pid)
            os.kill(self.process.pid, signal.SIGKILL)
        return real(self, check)

    monkeypatch.setattr(execute._Supervisor, "run", run)
    verdicts = run_programs(["", "a = 1", "raise ValueError", ""], workers=1, tier=tier)
    last = "passed" if times == 1 else "failed"
    assert [v.status for v in verdicts] == ["passed", last, "failed", "passed"]
    assert len(killed) == times


def test_no_program_makes_the_sandbox_fail(tier):
    """Not even with limits that the kernel enforces by SIGKILL."""
    kill = "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nos.kill(os.getpid(), 9)"
    programs = [LIMIT % "1, 1", LIMIT % "0, 0", kill, "import os\nos.abort()"]
    verdicts = run_programs(programs, 1, tier=tier)
    assert {v.status for v in verdicts} <= {"failed", "timeout"}, verdicts


def test_time_is_cpu_time(any_tier):
    """A waiting program may exceed its limit in wall time, as on a busy machine."""
    programs = ["import time\ntime.sleep(1.2)", "while True: pass"]
    verdicts = run_programs(programs, 1, workers=1, tier=any_tier)
    assert [v.status for v in verdicts] == ["passed", "timeout"]
    assert verdicts[0].seconds < 0.5 < verdicts[1].seconds


def test_setup_precedes_the_source(any_tier):
    source = "from __future__ import annotations\ndef f(): return math.pi"
    verdict = one(source, "def check(f):\n    assert f() > 3", any_tier, setup="import math")
    assert verdict.status == "passed", verdict


def test_a_test_may_import_numpy(any_tier):
    source = ADD + "class Array:\n    __array_interface__ = {'shape': (1,), 'typestr': '<i8', "
    source += "'data': (id(None), True), 'version': 3}\ndef array(): return Array()\n"
    test = "import numpy as np\ndef check(f):\n    assert np.allclose(f([1.0]), [1.0])\n    "
    for call, status in (("f([], [1.0])", "passed"), ("f([], [2.0])", "failed"),
                         ("array()", "failed")):  # fmt: skip
        verdict = one(source, test.replace("f([1.0])", call), any_tier)
        assert verdict.status == status, verdict


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_evaluator_ends(any_tier, number):
    """Running programs end soon after the evaluator, however it ends."""
    script = (  # background shells make commands ignore SIGINT
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from sandbox import execute\n"
        f"execute.run_programs(['while True: pass'] * 9, 300, tier={any_tier!r})"
    )
    evaluator = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    # Per worker: a supervisor, a sandbox, and a fork of each. The trial's have ended by then.
    while len(left := descendants(evaluator.pid)) < 8:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    evaluator.send_signal(number)
    evaluator.wait(60)
    while left & parents().keys():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_benchmark_files_pass_under_every_tier(shared_eval, tier):
    """Run demanding references: helpers, classes, modules, odd names and results."""
    problems = read_problems(shared_eval / "HumanEval.jsonl.gz")
    chosen = [problems[i] for i in (32, 33, 38, 50, 0, 2, 160)]
    rows, odd = read_mbpp(shared_eval / "mbpp.jsonl")[1], {56, 137, 349, 367, 533, 596, 601, 927}
    chosen += [problem(row, "") for row in rows if row.id in odd]
    verdicts = run_checks([check(p, p["canonical_solution"], 30) for p in chosen], tier=tier)
    bad = {p["task_id"]: v for p, v in zip(chosen, verdicts) if v.status != "passed"}
    assert bad == {}
