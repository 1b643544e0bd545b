"""SASS counts: loops, pipes, bytes and spills of a small program, by hand."""

import pytest

from bench import sass

# Outer loop .L_1, inner loop .L_2, where a branch to .L_3 skips a mask. Out of line: an optional
# part, .L_7, and a wait past the end, .L_5.
PROGRAM = """
IADD3 R1, R1, 0x1, RZ
.L_1:
STL.64 [R1], R2
BRA `(.L_2)
.L_7:
MUFU.EX2 R9, R9
BRA `(.L_8)
.L_2:
LDSM.16.M88.4 R4, [R8]
HMMA.16816.F32.BF16 R12, R4, R6, R12
@P1 BRA `(.L_7)
.L_8:
@P0 BRA `(.L_3)
@P2 FSEL R12, R12, -INF, P0
.L_3:
@P2 LDL.LU R3, [R1]
STL.128 [R1+0x8], R4
@!P0 BRA `(.L_5)
.L_4:
@P0 BRA `(.L_2)
@!P3 CALL.REL.NOINC `(.L_9)
BRA `(.L_1)
.L_9:
EXIT
.L_5:
SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2
@!P0 BRA `(.L_5)
BRA `(.L_4)
.L_6:
BRA `(.L_6)
.L_10:
"""


def test_inner_loop_without_what_it_skips():
    (loop,) = sass.inner_loops(PROGRAM.split("\n")[1:-1])
    assert [line.split(".")[0].split()[0] for line in loop] == [
        "LDSM", "HMMA", "BRA", "BRA", "LDL", "STL", "BRA", "BRA"
    ]  # fmt: skip
    assert sass.spill_bytes(loop) == 4 + 16


@pytest.mark.parametrize(
    ("instruction", "flop", "shared"),
    [
        ("HMMA.16816.F32.BF16 R12, R4, R6, R12", 2 * 16 * 8 * 16, 0),
        # a quarter of 64 x 128 x 16; A [64, 16] and B [16, 128] in 2 bytes, or B alone
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24", 2 * 16 * 128 * 16, (64 + 128) * 8),
        ("HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR8].tnspB, R24", 2 * 16 * 128 * 16, 128 * 8),
        ("LDSM.16.MT88.4 R4, [R8]", 0, 512),
        ("LDS.U8 R4, [R8]", 0, 128),
        ("LDGSTS.E.BYPASS.128 [R8], [R4.64]", 0, 512),
        ("SHFL.BFLY PT, R4, R4, 0x1, 0x1f", 0, 128),
        ("LDG.E.128 R4, [R8.64]", 0, 0),
    ],
)
def test_flop_and_shared_bytes_of_a_warp(instruction, flop, shared):
    assert sass.tensor_flop(instruction) == flop
    assert sass.shared_bytes(instruction) == shared


@pytest.mark.parametrize(("sm", "tensor", "fma"), [(80, 8, 16), (90, 4, 12)])
def test_cycles_by_pipe(sm, tensor, fma):
    """Four warps; IMAD.HI takes two slots, and sm_90 has half as many IMAD as float lanes."""
    loop = ["HMMA.16816.F32.BF16 R12, R4, R6, R12", "FFMA R1, R2, R3, R4", "MUFU.EX2 R1, R1"]
    loop += ["IMAD.HI.U32 R1, R2, R3, RZ"] * 3 + ["FADD R1, R2, R3", "LOP3.LUT R1, R2, R3"]
    busy = sass.cycles(loop, sm, 4, tma_bytes=1280)
    want = {"tensor": tensor, "shared": 10, "issue": 8, "fma": fma, "alu": 2, "xu": 8}
    assert busy == want
    assert sass.bound_frac(busy) == tensor / fma


def test_tma_bytes_of_the_inner_loop():
    """Count two loads and one reduction in the loop, not loads before it."""
    load = "ttng.async_tma_copy_global_to_local %q[%1] %s : !tt.tensordesc<tensor<{}, #s>>, x"
    ttgir = "\n".join([
        "  " + load.format("128x64xbf16"),
        "  %1 = scf.for %i = %a to %b step %c {",
        "    %2 = scf.for %j = %a to %b step %c {",
        "      " + load.format("1x64x64xbf16"),
        "      " + load.format("1x64xf32"),
        "      %3 = ttng.warp_group_dot %4, %5, %6 : tensor<128x64xbf16>",
        "      ttng.async_tma_reduce add, %dq[%1] %2 : !tt.tensordesc<64x64xsi32, #s>, x",
        "    }",
        "    " + load.format("64x64xbf16"),
        "  }",
        "",
    ])  # fmt: skip
    assert sass.tma_bytes(ttgir) == 64 * 64 * 2 + 64 * 4 + 64 * 64 * 4
    assert sass.tma_bytes("") == 0
