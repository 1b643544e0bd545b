"""The benchmarks' flow, on a CPU in Triton's interpreter at tiny shapes; the times mean nothing."""

import csv
import json
import math

import pytest
import torch
from three_way import DEVICE  # sets TRITON_INTERPRET before kernels are imported

import bench
from kernels import bench as kernel_bench
from kernels import cases, mlp
from kernels.bench import Row, ratios, run_case, write_csv
from kernels.cases import Case
from kernels.timing import WallTimer, measured_roof, percentiles
from kernels.trace import GROUPS, floors_us, group, show_profile
from kernels.work import Rates, training_ops
from model import ModelConfig

TINY = ModelConfig(
    vocab_size=96, seq_len=32, n_layer=1, n_head=2, width=64, mlp_width=128, rotary_dim=16
)
ROOF = Rates(1e12, 1e12, 1e12, 1e9)  # everything is memory bound, by 1 GB/s


def timer(prepare, run):
    """One call, said to take 2 ms."""
    run(prepare())
    return 1.0, 2.0, 4.0


@pytest.mark.parametrize("op", list(cases.CASES))
def test_every_op_runs_and_ours_is_right(op, monkeypatch):
    monkeypatch.setattr(cases, "compiled", lambda fn: fn)
    torch.manual_seed(0)
    rows = run_case(cases.CASES[op](TINY, 1, torch.float16, DEVICE), ROOF, TINY, timer)
    ours = [r for r in rows if r.provider.startswith("ours")]
    eager = [r for r in rows if r.provider == "eager"]
    assert len(ours) >= len(eager) >= 1
    for row in eager + ours:
        assert row.ok, row
        assert row.p50_ms == 2.0
        assert 0 < row.roof_frac < 1
    assert [r.phase for r in ours[: len(eager)]] == [r.phase for r in eager]
    assert ratios(rows)


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
    right, wrong = run_case(case_of(ours=fn), ROOF, TINY, timer)
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
                             ("ours a", 2.0, True), ("ours b", 4.0, True))
    ]  # fmt: skip
    assert ratios(rows) == ["op fwd: ours a is 1.50x flash"]


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


def test_gemm_versions_are_forced_and_restored():
    before = mlp.choice("gelu_bwd", torch.zeros(1))
    with cases.every_gemm("either"):
        assert mlp.choice("gelu_bwd", torch.zeros(1)) == "either"
    assert mlp.choice("gelu_bwd", torch.zeros(1)) == before != "either"


def test_csv_grows(tmp_path):
    path = tmp_path / "rows.csv"
    for op in "ab":
        write_csv(path, [Row(op, "ours", "fwd", p50_ms=2.0)], "a GPU, of a kind")
    with open(path, newline="") as f:
        rows = list(csv.DictReader(f))
    assert [r["op"] for r in rows] == ["a", "b"]
    assert (rows[0]["device"], len(rows[0]["kernels_sha256"])) == ("a GPU, of a kind", 12)


def test_the_whole_flow(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cases, "compiled", lambda fn: fn)
    monkeypatch.setattr(kernel_bench, "measured_roof", lambda *args: ROOF)
    shape = {"vocab_size": 96, "seq_len": 32, "n_layer": 1, "n_head": 2, "width": 64}
    shape |= {"mlp_width": 128, "rotary_dim": 16, "batch": 1, "dtype": "float16"}
    config = kernel_bench.Config(**shape, op="cross_entropy", csv=tmp_path / "rows.csv")
    rows = kernel_bench.bench(config, DEVICE, "a GPU", timer)
    out = capsys.readouterr().out
    assert [r.provider for r in rows][:3] == ["eager", "ours", "compile"]
    assert "cross_entropy fwd+bwd: ours is 1.00x eager" in out
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 1 + len(rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernel_bench_wants_a_gpu(cli):
    done = cli("-m", "kernels.bench")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no CUDA device" in done.stderr
    done = cli("-m", "kernels.bench", "--op=atention")
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
    done = cli("bench.py", "configs/demo.toml", *tiny, *flags)
    assert done.returncode == 0, done.stderr
    r = json.loads(done.stdout[done.stdout.index("{") :])
    by_impl = {x["impl"]: x for x in r["results"]}
    assert list(by_impl) == ["ours", "torch", "transformers"]
    for name in ("torch", "transformers"):
        assert by_impl[name]["note"] == "", by_impl[name]
        assert by_impl[name]["loss"] == pytest.approx(math.log(512), abs=0.1)
        assert by_impl[name]["tokens_per_s"] > 0
        assert by_impl[name]["micro_batch"] == 2
    assert r["kernels"]
    assert r["floors_us"]["gemm"] > 0


def test_step_bench_halves_what_does_not_fit(monkeypatch):
    tried = []

    def make_step(c, impl, micro_batch):
        tried.append(micro_batch)
        if micro_batch > 2:
            raise torch.OutOfMemoryError("too large")
        return lambda: torch.tensor(1.0)

    monkeypatch.setattr(bench, "make_step", make_step)
    config = bench.Config(device="cpu", micro_batch=8, steps=2, micro_steps=3, seq_len=10)
    result, step = bench.measure(config, "torch", peak=1e12)
    assert tried == [8, 4, 2]
    assert result.micro_batch == 2
    assert result.tokens_per_s == pytest.approx(3 * 2 * 10 / result.p50_ms * 1e3)
    assert step is not None


def test_step_bench_wrong_use(cli):
    done = cli("bench.py", "configs/phi1.toml", "--impl=jax")
    assert done.returncode == 2
    assert "ours, torch, transformers" in done.stderr
