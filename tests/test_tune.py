"""kernels.tune on a CPU in the interpreter: what it times is faked, what it runs is not."""

import json

import pytest
import torch
from three_way import DEVICE

from kernels import cases, mlp, spec, tune
from kernels.spec import TUNING, capability

SHAPE = {"vocab_size": 96, "seq_len": 32, "n_layer": 2, "n_head": 2, "width": 64}
SHAPE |= {"mlp_width": 128, "rotary_dim": 16, "batch": 1}
SM = capability(torch.empty(0, device=DEVICE))


@pytest.fixture
def tuning(monkeypatch, tmp_path):
    """Tables that a test may reorder, written to a file of its own."""
    monkeypatch.setattr(cases, "compiled", lambda fn: fn)
    monkeypatch.setattr(spec, "TUNING_FILE", tmp_path / "tuning.json")
    before = json.loads(json.dumps(TUNING))
    yield tmp_path / "tuning.json"
    TUNING.clear()
    TUNING.update(before)


def slow_first(prepare, run):
    """A timer by which every call is faster than the one before."""
    run(prepare())
    slow_first.ms *= 0.5
    return 0.0, slow_first.ms, 0.0


slow_first.ms = 1.0


def test_the_fastest_goes_first_and_nothing_is_lost(tuning, capsys):
    before = list(TUNING[f"sm_{SM}"]["layernorm_fwd"])
    tune.tune(tune.Config(**SHAPE, op="layernorm"), DEVICE, "a GPU", SM, slow_first)
    after = json.loads(tuning.read_text())[f"sm_{SM}"]["layernorm_fwd"]
    assert after[0] == before[-1]
    assert sorted(map(str, after)) == sorted(map(str, before))
    assert "layernorm_bwd" in capsys.readouterr().out


def test_a_wrong_candidate_never_wins(tuning, monkeypatch):
    before = list(TUNING[f"sm_{SM}"]["layernorm_fwd"])
    wrong = [[c] for c in before[1:]]

    def error(ours, exact) -> float:
        return float(TUNING[f"sm_{SM}"]["layernorm_fwd"] in wrong)

    monkeypatch.setattr(tune, "relative_error", error)
    tune.tune(tune.Config(**SHAPE, op="layernorm"), DEVICE, "a GPU", SM, slow_first)
    assert json.loads(tuning.read_text())[f"sm_{SM}"]["layernorm_fwd"] == before


def test_the_faster_gemm_is_taken_from_then_on(tuning, monkeypatch):
    monkeypatch.setattr(
        tune,
        "time_ms",
        lambda case, fn, timer: {True: 1.0, False: 2.0}[fn is case.providers["ours cublas"]],
    )
    tune.tune(tune.Config(**SHAPE, op="gelu_bwd"), DEVICE, "a GPU", SM, slow_first)
    x = torch.empty(0, device=DEVICE, dtype=torch.float16)
    assert mlp.choice("gelu_bwd", x) == "cublas"
    assert "gelu_bwd cublas" in mlp.describe(torch.device(DEVICE))
    assert "measured on a GPU" in mlp.describe(torch.device(DEVICE))


def test_out_of_time_changes_nothing(tuning):
    before = list(TUNING[f"sm_{SM}"]["cross_entropy"])
    tune.tune(tune.Config(**SHAPE, op="cross_entropy", minutes=0), DEVICE, "a GPU", SM, slow_first)
    assert TUNING[f"sm_{SM}"]["cross_entropy"] == before
    assert not tuning.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_wants_a_gpu(cli):
    done = cli("-m", "kernels.tune")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no CUDA device" in done.stderr
