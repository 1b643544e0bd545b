"""bench.tune on a CPU in the interpreter: what it times is faked, what it runs is not."""

import json
from pathlib import Path

import pytest
import torch
from three_way import DEVICE

from bench import tune
from kernels import launch, mlp
from kernels.launch import TUNING, capability

SHAPE = {"vocab_size": 96, "seq_len": 16, "n_layer": 2, "n_head": 2, "width": 64}
SHAPE |= {"mlp_width": 128, "rotary_dim": 16, "batch": 1, "device": DEVICE, "dtype": "float16"}
SM = capability(torch.empty(0, device=DEVICE))


@pytest.fixture
def tuned(tmp_path):
    """tuned(op): the tables after tuning it, read from the file."""
    before = json.loads(json.dumps(TUNING))

    def run(*ops, timer=slow_first, **changes) -> dict:
        out = tmp_path / "tuning.json"
        config = tune.Config(**SHAPE | changes, op=ops, out=out)
        run.fine = tune.tune(config, "a GPU", SM, timer)
        return json.loads(out.read_text())

    was = launch.TUNING_FILE
    yield run
    launch.TUNING_FILE = was
    TUNING.clear()
    TUNING.update(before)


def slow_first(prepare, run):
    """A timer by which every call is faster than the one before."""
    run(prepare())
    slow_first.ms *= 0.5
    return 0.0, slow_first.ms, 0.0


slow_first.ms = 1.0


def test_the_fastest_goes_first_and_nothing_is_lost(tuned, capsys):
    before, source = list(TUNING[f"sm_{SM}"]["layernorm_fwd"]), launch.TUNING_FILE.read_text()
    after = tuned("layernorm")[f"sm_{SM}"]["layernorm_fwd"]
    assert after[0] == before[-1]
    assert sorted(map(str, after)) == sorted(map(str, before))
    rows = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert [r["kernel"] for r in rows] == ["layernorm_fwd", "layernorm_bwd"]
    assert (rows[0]["best"], rows[0]["gain"] > 0, tuned.fine) == (after[0], True, True)
    assert Path(launch.__file__).with_name("tuning.json").read_text() == source


def test_a_wrong_candidate_never_wins(tuned, monkeypatch, capsys):
    before = list(TUNING[f"sm_{SM}"]["layernorm_fwd"])

    def only(good):
        wrong = [[c] for c in before if c not in good]

        def error(*_) -> float:
            return float(TUNING[f"sm_{SM}"]["layernorm_fwd"] in wrong)

        monkeypatch.setattr(tune, "relative_error", error)

    only(before[:1])
    assert tuned("layernorm")[f"sm_{SM}"]["layernorm_fwd"] == before
    only([])
    assert tuned("layernorm")[f"sm_{SM}"]["layernorm_fwd"] == before
    assert not tuned.fine
    assert "WRONG" in capsys.readouterr().err


@pytest.mark.parametrize("cublas_ms", [1.0, 3.0])
def test_the_faster_version_is_taken_from_then_on(tuned, monkeypatch, cublas_ms):
    ms = {"ours cublas": cublas_ms, "ours triton": 2.0}
    monkeypatch.setattr(tune, "time_ms", lambda case, name, timer: ms[name])
    tables, version = tuned("gelu_bwd"), "cublas" if cublas_ms < 2 else "triton"
    assert tables["measured"][f"sm_{SM}"] == {"device": "a GPU", "gemm": {"gelu_bwd": version}}
    assert mlp.choice("gelu_bwd", torch.empty(0, device=DEVICE, dtype=torch.float16)) == version
    assert f"gelu_bwd {version}" in mlp.describe(torch.device(DEVICE))
    assert "measured on a GPU" in mlp.describe(torch.device(DEVICE))


def test_every_kernel_of_training_is_tuned():
    """By an op of OPS, with dropout or without; decoding has tables of its own."""
    launch.LAUNCHED.clear()
    for op, dropout in [(op, 0.0) for op in tune.OPS] + [(op, 0.1) for op in tune.DROPOUT_OPS]:
        case = tune.Config(**SHAPE, dropout=dropout).case(op)
        for name in tune.mine(case):
            with case.running(name):
                tune.results(case, case.providers[name], tune.upstream_of(case))
    for name, candidates in TUNING[f"sm_{SM}"].items():
        if len(candidates) > 1:
            assert name in launch.LAUNCHED or name.startswith("decode") or "d128" in name, name


def test_another_file_is_read(cli, tmp_path):
    """What bench.tune wrote is used by naming it."""
    tables = TUNING | {f"sm_{SM}": {"layernorm_fwd": [{"num_warps": 16}]}}
    (tmp_path / "mine.json").write_text(json.dumps(tables))
    code = f"from kernels.launch import TUNING; print(TUNING['sm_{SM}']['layernorm_fwd'])"
    done = cli("-c", code, env={"NANOPHI_TUNING": str(tmp_path / "mine.json")})
    assert done.stdout == "[{'num_warps': 16}]\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_wants_a_gpu(cli):
    done = cli("-m", "bench.tune")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no CUDA device" in done.stderr
