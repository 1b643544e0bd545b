"""Benchmark flow on a CPU in Triton's interpreter at tiny shapes; times mean nothing."""

import dataclasses
import json
import math

import pytest
import torch
from three_way import DEVICE  # sets TRITON_INTERPRET before kernels are imported

from bench import decode, ops, table
from bench import step as step_bench
from bench.cases import CASES, Case, make_case
from bench.cost import Rates
from bench.ops import ratios
from common.config import UserError
from model import ModelConfig
from train import TrainConfig

TINY = ModelConfig(
    vocab_size=96, seq_len=32, n_layer=1, n_head=2, width=64, mlp_width=128, rotary_dim=16
)
ROOF = Rates(1e12, 1e12, 1e12, 1e9)  # everything is memory bound at 1 GB/s


def timer(run, prepare=None):
    """Run once and report 2 ms."""
    run(*[prepare()] if prepare else [])
    return {"p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 4.0}


def run_case(case) -> list[dict]:
    """Return the timed and failed rows."""
    return [r for r in ops.run_case(case, ROOF, TINY, timer) if "kernel" not in r]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("op", list(CASES))
def test_every_op_runs_and_ours_is_right(op, dropout):
    torch.manual_seed(0)
    case = make_case(op, dataclasses.replace(TINY, dropout=dropout), 1, torch.float16, DEVICE)
    if dropout and not case.dropout:
        pytest.skip("an op that knows no dropout")
    rows = run_case(case)
    ours, eager = ([r for r in rows if r["provider"] == name] for name in ("ours", "eager"))
    assert [r["phase"] for r in ours] == [r["phase"] for r in eager] == list(case.phases)
    assert all(r["fails"] == "" for r in ours + eager)
    assert all(0 <= r["error"] < 4e-3 for r in ours)
    assert len(ratios(rows)) == len(case.phases)


def case_of(**providers):
    """Return a case y = 2x at TINY's size, timed as a LayerNorm."""
    x = torch.randn(32, 64)
    providers = {"eager": lambda x: 2 * x, **providers}
    return Case("double", [x], providers, lambda x: 2 * x, {"fwd": ["ln_f_fwd"]}, 1)


def unwritten(x):
    """Return 2x with column 0 left uninitialized."""
    out = torch.empty_like(x)
    out[:, 1:] = 2 * x.detach()[:, 1:]
    return out + 0 * x


def wrong_gradient(x):
    return 2 * x.detach() + (x - x.detach())


def refuses(x):
    raise RuntimeError("no kernel for this\nand a long trace")


@pytest.mark.parametrize(
    ("fn", "told"),
    [(unwritten, "WRONG"), (lambda x: 2.0001 * x, "WRONG"), (wrong_gradient, "WRONG"),
     (refuses, "RuntimeError: no kernel for this")],
)  # fmt: skip
def test_a_wrong_kernel_is_told(fn, told):
    right, wrong = run_case(case_of(ours=fn))
    assert (right["fails"], wrong["fails"]) == ("", told)
    assert ratios([right, wrong]) == [f"{'double':<15}ours: {told}"]  # it wins nothing
    assert not torch.are_deterministic_algorithms_enabled()


def test_peers_get_fresh_inputs():
    def overwrites(x):
        y = 2 * x
        x.detach().zero_()
        return y

    rows = run_case(case_of(ours=overwrites, peer=lambda x: 2 * x))
    assert [(r["fails"], r["error"]) for r in rows] == [("", 0.0)] * 3


def test_rates_and_share_of_the_roof():
    row = run_case(case_of())[0]
    moved = 2 * 2 * 32 * 64  # LayerNorm: each element in and out, 2 bytes
    assert row["gb_per_s"] == pytest.approx(moved / 2e-3 / 1e9)
    assert row["roof_frac"] == pytest.approx(moved / 1e9 / 2e-3)


def test_ratios_take_the_fastest():
    row = {"op": "op", "phase": "fwd", "roof_frac": 0.5}
    rows = [
        row | {"provider": name, "p50_ms": ms, "fails": fails}
        for name, ms, fails in (("eager", 9.0, ""), ("flash", 3.0, ""), ("cheat", 1.0, "WRONG"),
                                ("ours", 2.0, ""), ("ours fp32 adds", 1.9, ""))
    ]  # fmt: skip
    [line] = ratios(rows)
    want = "op fwd 2.000 ms, 50.0% of the roof, 1.50x flash, 0.950x fp32 adds"
    assert " ".join(line.split()) == want


def test_table(capsys):
    show = table.Table(as_json=True)
    show(summary=True, name="a", b_frac=1 / 3, c=math.nan, n=12345.6)
    out, err = capsys.readouterr()
    summary = err.splitlines()[-1].strip()
    assert summary.split() == ["a", "33.3%", "nan", "12,346"]
    assert json.loads(out) == {"name": "a", "b_frac": 0.33333, "n": 12346.0, "summary": summary}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr("sys.argv", ["ops", "--op=attention"])
    with pytest.raises(UserError, match="no CUDA device"):
        ops.main()


def test_step_bench(in_process, tiny):
    flags = ["configs/demo.toml", *tiny, "--steps=2", "--dtype=float32", "--json"]
    status, out, _ = in_process(step_bench.main, *flags)
    assert status == 0
    rows = list(map(json.loads, out.splitlines()))
    by_impl = {x["impl"]: x for x in rows if "impl" in x}
    assert list(by_impl) == ["ours", "ours fp8", "torch", "transformers"]
    assert all("head dim" in by_impl[name]["note"] for name in ("ours", "ours fp8"))
    for name in ("torch", "transformers"):
        assert by_impl[name]["loss"] == pytest.approx(math.log(512), abs=0.1)
        rate = 2 * 32 / by_impl[name]["p50_ms"] * 1e3
        assert by_impl[name]["tokens_per_s"] == pytest.approx(rate, rel=1e-3)
    assert {x["profiled"] for x in rows if "kernel" in x} == {"torch"}


def test_step_bench_halves_what_does_not_fit_and_says_so(monkeypatch):
    def make_step(c, impl, micro_batch):
        if micro_batch > 2:
            raise torch.OutOfMemoryError("too large")
        return lambda: torch.tensor(1.0)

    monkeypatch.setattr(step_bench, "make_step", make_step)
    c = TrainConfig(device="cpu", micro_batch=8, seq_len=10)
    first, second, (row, step) = step_bench.measure(c, "torch", 2, peak=1e12)
    assert [r["micro_batch"] for r, _ in (first, second)] == [8, 4]
    assert first[0]["note"] == "out of memory at micro-batch 8"
    assert row["tokens_per_s"] == pytest.approx(2 * 10 / row["p50_ms"] * 1e3)
    assert step is not None


def test_decode():
    shape = {"vocab_size": 64, "seq_len": 48, "n_layer": 2, "width": 32, "mlp_width": 64}
    c = TrainConfig(**shape, n_head=2, rotary_dim=8, device="cpu")
    rows = list(decode.measure(c, 2, 6))
    assert [r["impl"] for r in rows] == ["ours", "ours, fast", "transformers"]
    for row in rows:
        assert row["same_frac"] == 1
        assert row["tokens_per_s"] == pytest.approx(2 * 6 / row["p50_ms"] * 1e3)
    with pytest.raises(UserError, match="32 \\+ 60 tokens exceed seq_len 48"):
        next(decode.measure(c, 2, 60))
