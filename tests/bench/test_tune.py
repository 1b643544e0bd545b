"""bench.tune on a CPU in the interpreter: real runs, fake times."""

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
def tuned(tmp_path, monkeypatch):
    """Return tuned(op, kernel): tables after tuning with a clock where each call is faster."""
    before, was, ms = json.loads(json.dumps(TUNING)), launch.TUNING_FILE, [1.0]

    def faster(kernel, run_all, device) -> float:
        ms[0] *= 0.5
        return ms[0]

    def run(op, kernel) -> dict:
        out = tmp_path / "tuning.json"
        run.fine = tune.tune(tune.Config(**SHAPE, op=(op,), kernel=kernel, out=out), "a GPU", SM)
        return json.loads(out.read_text())

    monkeypatch.setattr(tune, "kernel_ms", faster)
    monkeypatch.setattr(tune, "make_timer", lambda *_: lambda run: {"p50_ms": 1.0})
    yield run
    launch.TUNING_FILE = was
    TUNING.clear()
    TUNING.update(before)


def test_the_fastest_goes_first_and_nothing_is_lost(tuned, capsys):
    before, source = list(TUNING[f"sm_{SM}"]["cross_entropy"]), launch.TUNING_FILE.read_text()
    after = tuned("cross_entropy", "")[f"sm_{SM}"]["cross_entropy"]
    assert after[0] == before[-1]
    assert sorted(map(str, after)) == sorted(map(str, before))
    [row] = map(json.loads, capsys.readouterr().out.splitlines())
    assert (json.loads(row["best"]), row["gain_frac"] > 0, tuned.fine) == (after[0], True, True)
    assert Path(launch.__file__).with_name("tuning.json").read_text() == source


def test_a_wrong_candidate_never_wins(tuned, monkeypatch, capsys):
    before = list(TUNING[f"sm_{SM}"]["cross_entropy"])

    for right in [before[0]], []:
        wrong = [[c] for c in before if c not in right]
        error = lambda *_: float(TUNING[f"sm_{SM}"]["cross_entropy"] in wrong)  # noqa: E731, B023
        monkeypatch.setattr(tune.Judge, "error", error)
        assert tuned("cross_entropy", "")[f"sm_{SM}"]["cross_entropy"] == before
    assert not tuned.fine
    assert "WRONG" in capsys.readouterr().err


@pytest.mark.parametrize("faster", ["triton", "cublas"])
def test_the_faster_version_is_taken_from_then_on(tuned, monkeypatch, faster):
    half = torch.empty(0, device=DEVICE, dtype=torch.float16)
    times = lambda *_: lambda run: {"p50_ms": 1 + (mlp.choice("gelu_bwd", half) != faster)}  # noqa: E731
    monkeypatch.setattr(tune, "make_timer", times)
    tables = tuned("block", "^gelu_bwd$")
    assert tables["measured"][f"sm_{SM}"] == {"device": "a GPU", "gemm": {"gelu_bwd": faster}}
    assert mlp.choice("gelu_bwd", half) == faster
    assert f"gelu_bwd {faster}" in mlp.describe(torch.device(DEVICE))


def test_every_kernel_of_training_is_tuned():
    """Tuned in a block, with or without dropout, or in the loss; decode tables are separate."""
    launch.LAUNCHED.clear()
    for op, dropout in (("block", 0.0), ("block", 0.1), ("cross_entropy", 0.0)):
        case = tune.Config(**SHAPE, dropout=dropout).case(op)
        for version in tune.VERSIONS:
            with tune.forced(version):
                tune.whole(case, case.providers["ours"], tune.copies(case), [case.inputs[0]])
    for name, candidates in TUNING[f"sm_{SM}"].items():
        if len(candidates) > 1:
            assert name in launch.LAUNCHED or name.startswith("decode") or "d128" in name, name


def test_another_file_is_read(cli, tmp_path):
    """NANOPHI_TUNING selects the file that bench.tune wrote."""
    tables = TUNING | {f"sm_{SM}": {"layernorm_fwd": [{"num_warps": 16}]}}
    (tmp_path / "mine.json").write_text(json.dumps(tables))
    code = f"from kernels.launch import TUNING; print(TUNING['sm_{SM}']['layernorm_fwd'])"
    done = cli("-c", code, env={"NANOPHI_TUNING": str(tmp_path / "mine.json")})
    assert done.stdout == "[{'num_warps': 16}]\n"
