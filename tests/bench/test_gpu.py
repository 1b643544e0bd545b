"""make gpu-check, gpu-bench and gpu-tune at toy size on a CPU, with the same processes."""

import json
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench import gpu
from bench.gpu import Part

# One part of each kind; the others differ only in flags.
TOYS = {"check": "layernorm|train", "bench": "^(phi1 torch|layernorm|decode)$",
        "tune": "cross_entropy"}  # fmt: skip


@pytest.fixture(scope="module")
def toys(cli, tmp_path_factory) -> dict:
    """Return {command: (stdout, record, folder)} of the three commands."""
    outs, command = {do: tmp_path_factory.mktemp(do) for do in TOYS}, ["-m", "bench.gpu", "--toy"]
    with ThreadPoolExecutor(3) as pool:
        runs = {
            do: pool.submit(cli, *command, f"--do={do}", f"--only={only}", f"--out={outs[do]}")
            for do, only in TOYS.items()
        }
    for run in runs.values():
        assert run.result().returncode == 0, run.result().stdout[-3000:]
    records = {do: json.loads((out / "gpu.json").read_text())[do] for do, out in outs.items()}
    return {do: (run.result().stdout, records[do], outs[do]) for do, run in runs.items()}


def test_check(toys):
    said, record, out = toys["check"]
    assert list(record["parts"]) == ["layernorm", "train"]
    assert re.search(r"layernorm +exit 0 after \d+ s: =+ 4 passed, 6 skipped", said)
    with tarfile.open(out / "logs-check.tar.gz") as tar:
        assert "logs-check/layernorm.log" in tar.getnames()
        assert b'name="told" value="loss ' in tar.extractfile("logs-check/train.xml").read()


def test_bench(toys):
    said, record, _ = toys["bench"]
    assert list(record["parts"]) == ["phi1 torch", "layernorm", "decode"]
    roof, *rows = record["parts"]["layernorm"]["rows"]
    assert roof["matmul_tflops"] > 0
    assert {r["provider"] for r in rows if "provider" in r} == {"eager", "ours", "compile"}
    step, *profiled = record["parts"]["phi1 torch"]["rows"]
    assert (step["micro_batch"], profiled[0]["profiled"]) == (2, "torch")
    assert re.search(r"phi1 torch +torch +2 +[\d,.]+ ", said)
    assert re.search(r"layernorm +layernorm +bwd +.* of the roof, \d\.\d\dx", said)
    assert re.search(r"decode +64 +transformers .* 100.0% ", said)


def test_tune(toys):
    said, record, out = toys["tune"]
    [row] = record["parts"]["cross_entropy"]["rows"]
    found = json.loads((out / "tuning.json").read_text())["sm_80"]["cross_entropy"][0]
    assert json.loads(row["best"]) == found
    assert re.search(r"cross_entropy +cross_entropy +[\d.,]+ +\d", said)


def test_limits_fit():
    for do, plan in gpu.PLANS.items():
        seconds = sum(s for s, _ in plan(Path("out"), Path("logs"), True))
        assert seconds < 600
        assert re.search(rf"make gpu-{do} .* {seconds} ", gpu.__doc__)


def running(pid: str) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().split()[2] != "Z"


def test_one_that_hangs_or_fails_costs_no_other_its_turn(tmp_path, capsys):
    sleeps = "import subprocess as s; p = s.Popen(['sleep', '60']); print(p.pid, flush=True); "
    hangs = Part("hangs", ["-c", sleeps + "p.wait()"])
    fails = Part("fails", ["-c", "print('{\"a\": 1}'); raise SystemExit('a reason')"])
    works = Part("works", ["-c", "print('x')"])
    saved = []
    gpu.run_plan([(5, [hangs, fails]), (60, [works])], tmp_path, lambda p: saved.append(p.name))
    assert saved == ["hangs", "fails", "works"]
    assert [p.exit for p in (hangs, fails, works)] == [None, 1, 0]
    assert not running(hangs.said)
    assert (fails.rows, fails.said) == ([{"a": 1}], "a reason")
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"hangs killed after \d+ s", said)
    assert re.search(r"fails exit 1 after \d+ s: a reason", said)
    assert (tmp_path / "works.log").read_text() == "x\n"


def test_a_dead_context_fails_one_test(tmp_path, capsys):
    """The next test starts in a new process."""
    pytest.importorskip("xdist")
    (tmp_path / "test_x.py").write_text(
        "held = []\n"
        "def test_a():\n    held.append(1)\n    raise RuntimeError('CUDA error: illegal address')\n"
        "def test_b():\n    assert not held\n"
    )
    command = ["-m", "pytest", "-q", "-rf", "-pbench.gpu", "-n1", "--dist=worksteal"]
    part = Part("tests", [*command, f"--rootdir={tmp_path}", str(tmp_path)])
    gpu.run_plan([(300, [part])], tmp_path, lambda part: None)
    assert "1 passed" in part.said
    assert "test_x.py::test_a" in capsys.readouterr().out
