"""Resource report: some defaults compile and fit; the gate catches what does not."""

import json
import os
import re
from dataclasses import replace
from importlib import import_module
from pkgutil import iter_modules

import pytest
from three_way import DEVICE  # noqa: F401  sets TRITON_INTERPRET before kernels are imported

import kernels
from bench import resources
from bench.resources import Row, hold_bounds, occupancy_frac
from kernels import launch

COMPILED = {"TRITON_INTERPRET": "0"}
CONFIG = launch.TUNING["sm_80"]["gelu_fwd"][0]
ROW = Row("gelu_fwd", 80, CONFIG, {}, (), 99, 0, 0, 0.5, 1, 1)


def test_defaults_fit(cli):
    flags = "--kernel=out_proj_fwd_drop", "--defaults", "--sm=80"
    done = cli("-m", "bench.resources", *flags, env=COMPILED)
    assert done.returncode == 0, done.stderr
    row = re.search(r"sm_80 out_proj_fwd_dropout +default +(\d+) +0 .*\n +loop: tensor "
                    r"([\d,]+) .*bound, (\d+) TFLOP/s", done.stdout)  # fmt: skip
    registers, tensor, tflops = (int(x.replace(",", "")) for x in row.groups())
    assert 16 <= registers <= 255
    assert tensor == 2**21 / 2048  # 2 x 128 x 128 x 64 FLOP a block
    assert 0.7 < tflops / 312 <= 1


def test_spills_and_shared_memory_are_seen(cli):
    """4 stages of 128 x 128 x 128 exceed shared memory; dropout in 4 warps spills in loops."""
    code = (
        "from bench.resources import measure\n"
        "tile = {'BLOCK_M': 128, 'BLOCK_N': 128, 'BLOCK_K': 128, 'GROUP_M': 8, 'TMA': False}\n"
        "row = measure('out_proj_fwd_dropout', 80, tile | {'num_warps': 4, 'num_stages': 4}, {})\n"
        "print(row.default, row.shared_bytes, *row.problems, sep='; ')\n"
    )
    done = cli("-c", code, env=COMPILED)
    said = r"False; 196608; spills \d+ bytes in a loop; shared memory above 166,912 bytes\n"
    assert re.fullmatch(said, done.stdout), done.stdout + done.stderr


@pytest.mark.parametrize("default", [True, False])
def test_gate_fails_for_a_default_only(default, monkeypatch, capsys):
    class Pool:
        __init__ = __exit__ = lambda *args: None
        __enter__ = lambda self: self  # noqa: E731
        map = staticmethod(lambda fn, *args: [ROW, bad])

    bad = replace(ROW, config=CONFIG if default else {"num_warps": 1}, problems=("bad",))
    monkeypatch.setattr(resources, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr("sys.argv", ["resources", "--kernel=gelu_fwd"])
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "0")
    with pytest.raises(SystemExit) as exit_:
        resources.main()
    assert exit_.value.code == int(default)
    assert ("bad" in capsys.readouterr().err) == default


@pytest.mark.parametrize(("default", "bound", "held"), [(1, 79, 0), (1, 78, 1), (0, 78, 0)])
def test_bounds_are_held_for_defaults_with_little_slack(
    default, bound, held, tmp_path, monkeypatch
):
    monkeypatch.setattr(resources, "BOUNDS_FILE", tmp_path / "bounds.json")
    (tmp_path / "bounds.json").write_text("{}")
    recorded = replace(ROW, loops=({"tensor": 80.0, "issue": 100.0},), variant={"DOC": True})
    assert hold_bounds([recorded], record=True) == [recorded]
    [bounds] = json.loads((tmp_path / "bounds.json").read_text()).values()
    assert bounds == {"sm_80 gelu_fwd DOC=True": 0.8}
    row = replace(recorded, loops=({"tensor": bound, "issue": 100.0},))
    row = row if default else replace(row, config={"num_warps": 1})
    assert [len(r.problems) for r in hold_bounds([row], record=False)] == [held]


def test_occupancy():
    """Check by hand: 128 registers x 256 threads fill half an SM; 100 KiB shared fits once."""
    assert occupancy_frac(80, 128, 0, 8) == 2 * 8 / 64
    assert occupancy_frac(80, 129, 0, 8) == 1 * 8 / 64  # registers come in units of 8 a thread
    assert occupancy_frac(80, 32, 100 * 1024, 4) == 1 * 4 / 64
    assert occupancy_frac(90, 32, 100 * 1024, 4) == 2 * 4 / 64
    assert occupancy_frac(90, 16, 0, 1) == 32 / 64  # 32 blocks an SM


def test_every_kernel_is_reported_and_has_configurations():
    modules = (import_module(f"kernels.{m.name}") for m in iter_modules(kernels.__path__))
    functions = {f for m in modules for name, f in vars(m).items() if name.endswith("_kernel")}
    assert functions == {kernel.fn for kernel in resources.KERNELS.values()}
    fixed = {"attention_rotate_k", "attention_delta", "attention_dq"}  # one launch configuration
    for sm in (80, 90):
        table = json.loads(launch.TUNING_FILE.read_text())[f"sm_{sm}"]
        assert table.keys() == resources.KERNELS.keys() - fixed
