"""make gpu as far as a CPU allows: its parts' commands are right, its record and table are read."""

from pathlib import Path

import pytest
import torch
from three_way import DEVICE

from kernels import bench, cases, gpu
from kernels.gpu import Part


def test_parts_are_commands_that_exist(cli, tmp_path):
    """Without a GPU each ends in an error that says so, or in skipped tests: there is no typo."""
    for part in gpu.parts(tmp_path):
        if "pytest" in part.command:
            done = cli(*part.command, "--collect-only")
            assert done.returncode == 0
            assert done.stdout.count("tests/test_") == len(gpu.TESTED)
        elif part.name == "kernels":
            done = cli(*part.command, env={"CUDA_VISIBLE_DEVICES": ""})
            assert "no CUDA device" in done.stderr
        else:
            done = cli(*part.command, "--device=cuda", env={"CUDA_VISIBLE_DEVICES": ""})
            assert "no CUDA device" in done.stderr, done.stderr


def test_every_gpu_test_is_in_it():
    marked = [
        p for p in Path(__file__).parent.glob("test_*.py") if "pytest.mark.gpu" in p.read_text()
    ]
    here = Path(__file__).name
    assert {p.stem.removeprefix("test_") for p in marked if p.name != here} == set(gpu.TESTED)


def test_one_that_hangs_or_fails_costs_no_other_its_turn(tmp_path, capsys):
    todo = [
        Part("hangs", ["-c", "import time; time.sleep(60)"], 0.02),
        Part("fails", ["-c", "raise SystemExit('a reason')"], 1),
        Part("works", ["-c", "print('x')"], 1),
    ]
    done = gpu.run_all(todo, tmp_path, 5)
    assert [p.rc for p in done] == [None, 1, 0]
    assert "a reason" in capsys.readouterr().out
    assert "failed or stopped: hangs, fails" in gpu.table(gpu.collect(tmp_path, done))
    assert gpu.run_all(todo, tmp_path, 0.1) == []


def test_record_and_table(cli, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "compiled", lambda fn: fn)
    monkeypatch.setattr(bench, "measured_roof", lambda *args: bench.Rates(1e12, 1e12, 1e12, 1e9))
    shape = {"vocab_size": 96, "seq_len": 32, "n_layer": 1, "n_head": 2, "width": 64}
    shape |= {"mlp_width": 128, "rotary_dim": 16, "batch": 1, "dtype": "float16"}
    config = bench.Config(**shape, op="layernorm", csv=tmp_path / "kernels.csv")

    def timer(prepare, run):
        run(prepare())
        return 1.0, 2.0, 3.0

    bench.bench(config, DEVICE, "a GPU", timer)
    step = ["bench.py", "configs/demo.toml", *tiny, "--dtype=float32", "--steps=1", "--json"]
    small = ["--n_head=1", "--n_layer=1", "--seq_len=8"]  # and a head dim that the kernels take
    todo = [
        Part("tests", ["-c", "print('3 passed, 1 skipped')"], 1),
        Part("demo ours", [*step, *small, "--impl=ours"], 1),
        Part("demo torch", [*step, *small, "--impl=torch"], 1),
        Part(
            "decode",
            [
                "-m",
                "eval.decode_bench",
                "configs/demo.toml",
                *small[:2],
                "--seq_len=64",
                "--vocab_size=512",
                "--batch=1",
                "--rounds=1",
                "--new_tokens=4",
                "--json",
            ],
            1,
        ),
    ]
    done = gpu.run_all(todo, tmp_path, 5)
    assert [p.rc for p in done] == [0, 0, 0, 0]
    text = gpu.table(gpu.collect(tmp_path, done))
    assert "3 passed, 1 skipped" in text
    assert "1.00x eager" in text
    assert text.count("tokens/s") > 3, text
    assert "decode, batch 1" in text
    assert "failed" not in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_wants_a_gpu(cli):
    done = cli("-m", "kernels.gpu")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no CUDA device" in done.stderr
