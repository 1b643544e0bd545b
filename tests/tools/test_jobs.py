"""Jobs that need one another: tiny programs in place of the project's commands."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from conftest import ROOT

from experiments.jobs import Job, Runner, identity

STEP = """
import json, pathlib, sys, time
out, word, *inputs = sys.argv[1:]
if word == "fail":
    sys.exit("no such luck")
if word == "sleep":
    print("sleeping", flush=True)
    time.sleep(60)
texts = [pathlib.Path(i, "data.jsonl").read_text() for i in inputs]
folder = pathlib.Path(out)
folder.mkdir(parents=True, exist_ok=True)
(folder / "data.jsonl").write_text(word[:1] + "".join(texts))
(folder / "summary.json").write_text(json.dumps({"when": time.time()}))
with open(folder.parent / "order", "a") as f:
    f.write(folder.name + " ")
"""


@pytest.fixture
def step(tmp_path, monkeypatch):
    """step(name, word, *needs): a job whose data is the first letter of `word` and its inputs'."""
    (tmp_path / "step.py").write_text(STEP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(name: str, word: str, *needs: str, **more) -> Job:
        inputs = [str(tmp_path / "out" / n) for n in needs]
        command = ["step", str(tmp_path / "out" / name), word, *inputs]
        return Job(name, tmp_path / "out" / name, command, needs, **more)

    return make


@pytest.fixture
def run(tmp_path):
    """run(job, ...): the runner after it, and the names of the jobs that were run, in order."""
    out = tmp_path / "out"
    out.mkdir()

    def call(*jobs: Job, at_once: int = 1):
        (out / "order").write_text("")
        runner = Runner({job.name: job for job in jobs}, out, at_once, threads=1)
        with open(tmp_path / "lock", "w") as lock:
            runner.ok = runner.run(lock.fileno())
        return runner, (out / "order").read_text().split()

    return call


def test_what_changed_is_done_again_and_nothing_else(step, run):
    def jobs(a="apple", b="beet", reads=()):
        return (step("a", a), step("b", b, reads=reads), step("ab", "x", "a", "b"),
                step("c", "x", "b"), step("abc", "x", "ab", "c"))  # fmt: skip

    runner, order = run(*jobs())
    assert runner.ok
    assert sorted(order) == ["a", "ab", "abc", "b", "c"]
    assert order.index("ab") > max(order.index("a"), order.index("b"))
    assert order[-1] == "abc"
    assert run(*jobs())[1] == []
    assert run(*jobs(a="pear"))[1] == ["a", "ab", "abc"]
    assert run(*jobs(a="plum"))[1] == ["a"]  # another command, the same data: none need it anew
    (runner.out / "c" / "summary.json").unlink()
    assert run(*jobs(a="plum"))[1] == ["c"]
    (runner.out / "b" / "summary.json").write_text("{}")  # written by something else
    assert run(*jobs(a="plum"))[1] == ["b"]
    file = runner.out / "benchmark"
    file.write_text("one")
    assert run(*jobs(a="plum", reads=(file,)))[1] == ["b"]
    file.write_text("two")
    assert run(*jobs(a="plum", reads=(file,)))[1] == ["b"]


def test_a_failure_is_told_and_costs_only_what_needs_it(step, run, capfd):
    runner, order = run(step("bad", "fail"), step("more", "x", "bad"), step("good", "x"))
    assert not runner.ok
    assert order == ["good"]
    assert runner.state == {"bad": "failed", "more": "failed", "good": "done"}
    said = capfd.readouterr().err
    assert "bad failed (exit 1)" in said
    assert "no such luck" in said
    assert f"-m step {runner.out}/bad fail" in said
    assert "failed: more (it needs bad)" in said
    _, order = run(step("bad", "x"), step("more", "x", "bad"), step("good", "x"))
    assert order == ["bad", "more"]


def test_a_command_that_writes_nothing_has_failed(step, run):
    job = step("a", "x")
    job.out = job.out.with_name("elsewhere")
    runner, _ = run(job)
    assert runner.state == {"a": "failed"}
    assert "elsewhere/summary.json" in runner.why["a"]


@pytest.mark.parametrize("optional", [False, True])
def test_what_is_skipped(step, run, optional):
    asked = []

    def few():
        asked.append((run_out / "a" / "summary.json").exists())
        return "too few"

    a = step("a", "x")
    run_out = a.out.parent
    runner, order = run(a, step("b", "x", "a", skip=few, optional=optional), step("c", "x", "a"),
                        Job("d", run_out / "d.json", ["d"], ("b", "c"),
                            call=lambda: (run_out / "d.json").write_text("{}")))  # fmt: skip
    assert runner.ok
    assert asked == [True]  # when what it needs is there, not before
    assert order == ["a", "c"]
    assert runner.state == {"a": "done", "b": "skipped", "c": "done",
                            "d": "done" if optional else "skipped"}  # fmt: skip
    assert runner.why["b"] == "too few"


def test_jobs_run_side_by_side(step, run):
    words = [step(str(i), "x") for i in range(4)]
    for job in words:  # each waits until another one has begun
        job.command = ["meet", str(job.out), *[str(j.out) for j in words if j is not job]]
    Path(os.environ["PYTHONPATH"], "meet.py").write_text(
        textwrap.dedent("""
        import pathlib, sys, time
        me, *others = map(pathlib.Path, sys.argv[1:])
        me.mkdir()
        until = time.monotonic() + 60
        while not any(o.exists() for o in others):
            assert time.monotonic() < until
            time.sleep(0.01)
        (me / "summary.json").write_text("{}")
        """)
    )
    runner, _ = run(*words, at_once=2)
    assert runner.ok


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_what_runs(step, tmp_path, number):
    """Also SIGKILL, of which the kernel tells the children; they hold the lock until they end."""
    step("a", "sleep")
    out = tmp_path / "out"
    out.mkdir()
    program = f"""
        import sys
        from pathlib import Path
        from data.base.stage import lock
        from experiments.jobs import Job, Runner
        out = Path({str(out)!r})
        job = Job("a", out / "a", ["step", str(out / "a"), "sleep"])
        Runner({{"a": job}}, out, 1, 1).run(lock(out / "lock", out))
    """
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], env=environment,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    log = out / "logs" / "a.log"
    wait_for(lambda: log.exists() and "sleeping" in log.read_text())
    mine = children(process.pid)
    assert len(mine) == 1
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    wait_for(lambda: not Path(f"/proc/{mine[0]}").exists() or is_zombie(mine[0]))
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert "the same command goes on from here" in said


def children(pid: int) -> list[int]:
    """The processes whose parent is `pid`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for(what, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_identity_is_of_data_alone(tmp_path):
    def folder(name: str, data: str, summary: dict) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard.bin").write_text(data)
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
        return identity(tmp_path / name)

    one = folder("one", "x", {"seconds": 1})
    assert folder("two", "x", {"seconds": 2}) == one
    assert folder("three", "y", {"seconds": 1}) != one
    assert folder("run", "x", {"weights": "0f34fbf6"}) == "0f34fbf6"
