"""make gpu-check, gpu-bench and gpu-tune at toy size on a CPU, in processes as on a GPU."""

import json
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.gpu import Part

# Of each kind of part one; the rest differs in its flags.
TOYS = {"check": "", "bench": "^(phi1 torch|layernorm|decode)$", "tune": "^layernorm$"}


@pytest.fixture(scope="module")
def toys(cli, tmp_path_factory) -> dict:
    """(what it printed, its folder) for each of the three commands."""
    outs, command = {do: tmp_path_factory.mktemp(do) for do in TOYS}, ["-m", "bench.gpu", "--toy"]
    with ThreadPoolExecutor(3) as pool:
        runs = {
            do: pool.submit(cli, *command, f"--do={do}", f"--only={only}", f"--out={outs[do]}")
            for do, only in TOYS.items()
        }
    for run in runs.values():
        assert run.result().returncode == 0, run.result().stdout[-3000:]
    return {do: (run.result().stdout, outs[do]) for do, run in runs.items()}


def test_check(toys):
    said, out = toys["check"]
    part = json.loads((out / "gpu.json").read_text())["check"]["parts"]["tests"]
    skipped = 0 if torch.cuda.is_available() else 6
    assert part["tests"] == {"passed": 7, "skipped": skipped}
    assert re.search(r"tests +7 passed, 6 skipped\n", said)
    assert re.search(r"passed .*resumes_bitwise\S+ +loss( \d\.\d+){6}\n", said)
    with tarfile.open(out / "logs.tar.gz") as tar:
        assert tar.getnames() == ["logs-check", "logs-check/tests.log"]


def test_bench(toys):
    said, out = toys["bench"]
    record = json.loads((out / "gpu.json").read_text())["bench"]
    assert list(record["parts"]) == ["phi1 torch", "layernorm", "decode"]
    roof, *rows = record["parts"]["layernorm"]["rows"]
    assert roof["matmul_tflops"] > 0
    assert {r["provider"] for r in rows} >= {"eager", "ours", "compile"}
    step, profiled = record["parts"]["phi1 torch"]["rows"]
    assert (step["micro_batch"], profiled["profiled"]) == (2, "torch")
    table = said[said.rindex("device cpu") :]
    assert re.search(r"phi1 torch +micro-batch 2 +[\d,]+ tokens/s +\d+\.\d% MFU", table)
    assert re.search(r"layernorm +layernorm +fwd\+bwd +ours .* of the roof, +\d\.\d\dx", table)
    assert re.search(
        r"decode +batch 64 +transformers +[\d,]+ tokens/s, the same tokens 100%", table
    )
    assert "failed" not in table


def test_tune(toys):
    said, out = toys["tune"]
    tables = json.loads((out / "tuning.json").read_text())
    for row in json.loads((out / "gpu.json").read_text())["tune"]["parts"]["layernorm"]["rows"]:
        assert tables["sm_80"][row["kernel"]][0] == row["best"]
        assert re.search(rf"layernorm +{row['kernel']} +[\d.]+ ms", said)


def test_limits_fit():
    limits = {do: sum(s for s, _ in plan(Path("out"), True)) for do, plan in gpu.PLANS.items()}
    for do, seconds in limits.items():
        assert seconds < 600
        assert re.search(rf"make gpu-{do} .* {seconds} ", gpu.__doc__)


def running(pid: str) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().split()[2] != "Z"


def test_one_that_hangs_or_fails_costs_no_other_its_turn(tmp_path, capsys):
    sleeps = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); "
    hangs = Part("hangs", ["-c", sleeps + "print(p.pid, flush=True); time.sleep(60)"])
    fails = Part("fails", ["-c", "print('{\"a\": 1}'); raise SystemExit('a reason')"])
    works = Part("works", ["-c", "print('x')"])
    saved = []
    gpu.run_plan([(1, [hangs, fails]), (5, [works])], tmp_path, lambda p: saved.append(p.name))
    assert saved == ["hangs", "fails", "works"]
    assert [p.exit for p in (hangs, fails, works)] == [None, 1, 0]
    assert not running(hangs.said)
    assert (fails.rows, fails.said) == ([{"a": 1}], "a reason")
    assert "fails: a reason\n" in capsys.readouterr().out
    assert (tmp_path / "works.log").read_text() == "x\n"
    record = dict.fromkeys(("device", "torch", "triton", "commit", "date"), "x")
    record |= {"parts": {p.name: p.outcome() for p in (hangs, fails, works)}}
    assert "failed or ended by force: hangs" in gpu.table(record)
    assert "fails (a reason)" in gpu.table(record)


def test_a_dead_context_fails_one_test(tmp_path):
    """The next test begins in a new process, and what a test said first is what is told."""
    pytest.importorskip("xdist")
    (tmp_path / "test_x.py").write_text(
        "held = []\n"
        "def test_a():\n    held.append(1)\n    raise RuntimeError('CUDA error: illegal address')\n"
        "def test_b():\n    assert not held\n"
    )
    command = ["-m", "pytest", "-q", "-pbench.gpu", "-n1", "--dist=worksteal"]
    part = Part("tests", [*command, f"--rootdir={tmp_path}", str(tmp_path)])
    gpu.run_plan([(90, [part])], tmp_path, lambda part: None)
    assert part.outcome()["tests"] == {"failed": 1, "passed": 1}
    assert "illegal address" in part.outcome()["rows"][0]["why"]


def test_a_test_that_never_ended_is_told():
    part = Part("tests", [], rows=[{"test": t, "outcome": "unfinished"} for t in "ab"], exit=None)
    part.rows.append({"test": "a", "outcome": "passed"})
    assert part.outcome()["tests"] == {"passed": 1, "unfinished": 1}
    assert [row["test"] for row in part.outcome()["rows"]] == ["b"]


def test_every_gpu_test_is_in_it():
    tests = Path(__file__).parents[1].rglob("test_*.py")
    marked = [p for p in tests if "pytest.mark.gpu" in p.read_text()]
    tested = set(gpu.TESTED) | {Path(t.partition(".py")[0]).name[5:] for t in gpu.ALONE}
    here = Path(__file__).name
    assert {p.stem.removeprefix("test_") for p in marked if p.name != here} <= tested


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_wrong_use(cli):
    for flag, says in (("--do=check", "no CUDA device"), ("--do=x", "one of check, bench, tune")):
        done = cli("-m", "bench.gpu", flag)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert says in done.stderr
