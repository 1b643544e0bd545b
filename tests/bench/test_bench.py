"""The benchmarks' flow, on a CPU in Triton's interpreter at tiny shapes; the times mean nothing."""

import dataclasses
import json
import math
import re
from functools import partial

import pytest
import torch
from three_way import DEVICE  # sets TRITON_INTERPRET before kernels are imported

from bench import cases
from bench import ops as kernel_bench
from bench import step as step_bench
from bench.cases import Case
from bench.cost import Rates, training_ops
from bench.ops import Row, ratios
from bench.timing import (
    GROUPS,
    WallTimer,
    emit,
    floors_us,
    group,
    measured_roof,
    percentiles,
    show_profile,
)
from kernels import mlp
from model import ModelConfig

TINY = ModelConfig(
    vocab_size=96, seq_len=32, n_layer=1, n_head=2, width=64, mlp_width=128, rotary_dim=16
)
ROOF = Rates(1e12, 1e12, 1e12, 1e9)  # everything is memory bound, by 1 GB/s


def timer(prepare, run):
    """One call, said to take 2 ms."""
    run(prepare())
    return 1.0, 2.0, 4.0


def run_case(case, roof, c, timer) -> list[Row]:
    return list(kernel_bench.run_case(case, roof, c, timer))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("op", list(cases.CASES))
def test_every_op_runs_and_ours_is_right(op, dropout):
    c = dataclasses.replace(TINY, dropout=dropout)
    torch.manual_seed(0)
    case = cases.CASES[op](c, 1, torch.float16, DEVICE)
    if dropout and not case.dropout:
        pytest.skip("an op that knows no dropout")
    rows = run_case(case, ROOF, c, timer)
    ours = [r for r in rows if r.provider.startswith("ours") and r.roof_frac]
    eager = [r for r in rows if r.provider == "eager"]
    assert len(ours) >= len(eager) >= 1
    for row in eager + ours:
        assert row.ok, row
        assert row.p50_ms == 2.0
        assert row.roof_frac < 1
    for row in ours:
        assert 0 <= row.error < 4e-3
    assert [r.phase for r in ours[: len(eager)]] == [r.phase for r in eager]
    assert ratios(rows)
    if case.backward:  # what the profiler saw beneath
        names = "Attention", "_Block", "_LayerNorm", "Projections"
        assert {r.phase for r in rows if not r.roof_frac and not r.note}.intersection(names)


def test_dropout_of_another_seed_is_wrong(monkeypatch):
    c = dataclasses.replace(TINY, dropout=0.1)
    case = cases.CASES["residual_bwd"](c, 1, torch.float16, DEVICE)
    case.providers["ours"] = partial(case.providers["ours"], seed=cases.SEED + 1)
    *_, row = [r for r in run_case(case, ROOF, c, timer) if r.provider == "ours" and r.roof_frac]
    assert not row.ok


def test_documents_of_a_quarter_leave_three_quarters_of_the_flops_out(monkeypatch):
    monkeypatch.setattr(cases, "DOCUMENT", TINY.seq_len // 4)
    roof = Rates(1e9, 1e9, 1e9, 1e12)  # all is compute bound
    whole, apart = (
        run_case(cases.CASES[op](TINY, 1, torch.float16, DEVICE), roof, TINY, timer)[0]
        for op in ("attention", "attention_docs")
    )
    assert apart.roof_frac == pytest.approx(whole.roof_frac / 4)
    assert apart.tflops == pytest.approx(whole.tflops / 4)


def case_of(**providers):
    """y = 2x at TINY's size, timed as a LayerNorm."""
    x = torch.randn(32, 64)
    providers = {"eager": lambda x: 2 * x, **providers}
    return Case("double", [x], providers, lambda x: 2 * x, {"fwd": ["ln_f_fwd"]}, 1)


def unwritten(x):
    """2x but for one element, which stays as torch.empty made it."""
    out = torch.empty_like(x)
    mask = torch.arange(64) < 63
    out[:, mask] = 2 * x.detach()[:, mask]
    return out + 0 * x


def slightly_wrong(x):
    return 2.0001 * x


def wrong_gradient(x):
    return 2 * x.detach() + (x - x.detach())


def refuses(x):
    raise RuntimeError("no kernel for this\nand a long trace")


@pytest.mark.parametrize("fn", [unwritten, slightly_wrong, wrong_gradient])
def test_a_wrong_kernel_is_told(fn):
    right, wrong = (r for r in run_case(case_of(ours=fn), ROOF, TINY, timer) if r.roof_frac)
    assert right.ok
    assert not wrong.ok
    assert "WRONG" in kernel_bench.show(wrong)
    assert ratios([right, wrong]) == []  # a wrong one wins nothing
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_kernel_that_fails_leaves_a_row():
    _, row = run_case(case_of(ours=refuses), ROOF, TINY, timer)
    assert (row.ok, row.note) == (False, "RuntimeError: no kernel for this")
    assert "no kernel for this" in kernel_bench.show(row)


def test_only_ours_gets_poisoned_memory():
    seen = {}

    def spy(name):
        def call(x):
            filled = torch.are_deterministic_algorithms_enabled()  # then torch fills new memory
            seen.setdefault(name, filled and torch.empty(1000).isnan().all().item())
            return 2 * x

        return call

    run_case(case_of(ours=spy("ours"), peer=spy("peer")), ROOF, TINY, timer)
    assert seen == {"ours": True, "peer": False}


def test_inputs_are_fresh_for_everyone():
    def overwrites(x):
        y = 2 * x
        x.detach().zero_()
        return y

    rows = run_case(case_of(ours=overwrites, peer=lambda x: 2 * x), ROOF, TINY, timer)
    rows = [r for r in rows if r.roof_frac]
    assert [r.ok for r in rows] == [True, True, True]
    assert rows[2].error == 0.0


def test_rates_and_share_of_the_roof():
    row = run_case(case_of(), ROOF, TINY, timer)[0]
    moved = 2 * 2 * 32 * 64  # a LayerNorm's: each element in and out, 2 bytes
    assert row.gb_per_s == pytest.approx(moved / 2e-3 / 1e9)
    assert row.roof_frac == pytest.approx(moved / 1e9 / 2e-3)
    assert (row.p20_ms, row.p80_ms) == (1.0, 4.0)


def test_ratios_take_the_fastest():
    rows = [
        Row("op", name, "fwd", p50_ms=ms, ok=ok)
        for name, ms, ok in (("eager", 9.0, True), ("flash", 3.0, True), ("cheat", 1.0, False),
                             ("ours a", 2.0, True), ("ours b", 4.0, True),
                             ("ours fp32 adds", 1.9, True))
    ]  # fmt: skip
    [line] = ratios(rows)
    want = "op fwd ours a 2.000 ms, 0.0% of the roof, 1.50x flash, 0.950x fp32 adds"
    assert " ".join(line.split()) == want


def test_timing():
    assert percentiles([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == pytest.approx((2.0, 3.5, 5.0))
    made = []
    rates = measured_roof(
        lambda prepare, run: made.append(run(prepare())) or (1.0, 2.0, 3.0),
        "cpu", torch.float32, 8, 1000,
    )  # fmt: skip
    assert rates.gemm == pytest.approx(2 * 8**3 / 2e-3)
    assert rates.memory == pytest.approx(2 * 1000 / 2e-3)
    assert len(made) == 2
    assert all(t > 0 for t in WallTimer(3)(lambda: 9, lambda n: math.factorial(n)))


def test_emit(capsys):
    emit({"a": 1 / 3, "b": math.nan, "c": "", "d": math.inf, "e": 0.0, "f": [1], "g": True})
    assert json.loads(capsys.readouterr().out) == {"a": 0.33333, "f": [1], "g": True}


def test_gemm_versions_are_forced_and_restored():
    before = mlp.choice("gelu_bwd", torch.zeros(1))
    case = cases.CASES["gelu_bwd"](TINY, 1, torch.float16, DEVICE)
    for version in ("triton", "cublas"):
        with case.running(f"ours {version}"):
            assert mlp.choice("gelu_bwd", torch.zeros(1)) == version
    assert mlp.choice("gelu_bwd", torch.zeros(1)) == before


def test_fp32_adds_are_a_provider():
    case = cases.CASES["attention"](TINY, 1, torch.float16, DEVICE)
    assert "ours fp32 adds" in case.providers
    with case.running("ours fp32 adds"):
        assert not cases.attention_module.FIXED_POINT
    assert cases.attention_module.FIXED_POINT


def test_the_whole_flow(cli):
    shape = ["--vocab_size=96", "--seq_len=32", "--n_layer=1", "--n_head=2", "--width=64",
             "--mlp_width=128", "--rotary_dim=16", "--batch=1", "--dtype=float16"]  # fmt: skip
    args = [*shape, "--op=cross_entropy", "--op=residual_bwd", "--device=cpu", "--json"]
    done = cli("-m", "bench.ops", *args)
    assert done.returncode == 0, done.stderr
    roof, *rows = map(json.loads, done.stdout.splitlines())
    assert roof["copy_gb_per_s"] > 0
    timed = [r["provider"] for r in rows if "roof_frac" in r]
    assert timed == ["eager", "ours", "compile", "eager", "compile", "ours"]
    assert re.search(r"cross_entropy +fwd\+bwd +ours .*x (eager|compile)", done.stderr)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernel_bench_wants_a_gpu(cli):
    done = cli("-m", "bench.ops")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no CUDA device" in done.stderr
    done = cli("-m", "bench.ops", "--op=atention")
    assert "attention" in done.stderr


@pytest.mark.parametrize(
    ("kernel", "name"),
    [("_fwd_kernel", "attention fwd"), ("_layernorm_fwd_kernel", "layernorm"),
     ("_bwd_kernel", "attention bwd"), ("_residual_bwd_kernel", "elementwise"),
     ("_out_proj_fwd_kernel", "gemm"), ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_NNT", "gemm"),
     ("ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_64x3_tn", "gemm"),
     ("_cross_entropy_kernel", "cross entropy"), ("Memset (Device)", "other")],
)  # fmt: skip
def test_groups(kernel, name):
    assert group(kernel) == name


def test_floors_of_a_step():
    floors = floors_us(TINY, 2, 3, ROOF)
    ops = training_ops(TINY, 2)
    assert floors["optimiser"] == pytest.approx(sum(o.bytes for o in ops[-2:]) / 1e3)
    assert sum(floors.values()) == pytest.approx(
        sum(o.bytes * o.calls * (1 if o.phase == "optimiser" else 3) for o in ops) / 1e3
    )
    assert {n for *_, names in GROUPS for n in names} <= {o.name for o in ops}
    text = show_profile([("_fwd_kernel", 4, 10.0), ("_odd", 1, 30.0)], floors, 1)
    assert "25.0%" in text
    assert "_odd" not in text


def test_step_bench(cli, tiny):
    flags = ["--steps=2", "--dtype=float32", "--json"]
    done = cli("-m", "bench.step", "configs/demo.toml", *tiny, *flags)
    assert done.returncode == 0, done.stderr
    *results, profiled = map(json.loads, done.stdout.splitlines())
    by_impl = {x["impl"]: x for x in results}
    assert list(by_impl) == ["ours", "torch", "transformers"]
    assert "head dim" in by_impl["ours"]["note"]
    for name in ("torch", "transformers"):
        assert "note" not in by_impl[name]
        assert by_impl[name]["loss"] == pytest.approx(math.log(512), abs=0.1)
        assert by_impl[name]["tokens_per_s"] > 0
        assert by_impl[name]["micro_batch"] == 2
    assert profiled["kernels_us"]
    assert profiled["floors_us"]["gemm"] > 0


def test_step_bench_halves_what_does_not_fit_and_says_so(monkeypatch):
    def make_step(c, impl, micro_batch):
        if micro_batch > 2:
            raise torch.OutOfMemoryError("too large")
        return lambda: torch.tensor(1.0)

    monkeypatch.setattr(step_bench, "make_step", make_step)
    config = step_bench.Config(device="cpu", micro_batch=8, steps=2, micro_steps=3, seq_len=10)
    (first, none), (second, _), (result, step) = step_bench.measure(config, "torch", peak=1e12)
    assert [r.micro_batch for r in (first, second, result)] == [8, 4, 2]
    assert first.note.startswith("out of memory at micro-batch 8 (")
    assert none is None
    assert result.tokens_per_s == pytest.approx(3 * 2 * 10 / result.p50_ms * 1e3)
    assert step is not None


def test_step_bench_wrong_use(cli):
    done = cli("-m", "bench.step", "configs/phi1.toml", "--impl=jax")
    assert done.returncode == 2
    assert "ours, torch, transformers" in done.stderr
