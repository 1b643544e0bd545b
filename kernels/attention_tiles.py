"""Tiles of attention's kernels by device, and the types of their arguments for `resources`."""

from kernels.launch import Kernel, types


def tile(BM: int, BN: int, num_warps: int, num_stages: int, TMA: int = 0) -> dict:
    """Return a tile of BM queries and BN keys, powers of 2 from 16 (BN from 32) to 128.

    Backward's BN is a multiple of its BM. TMA: load by descriptor, unless the head dim is padded.
    """
    return {"BM": BM, "BN": BN, "num_warps": num_warps, "num_stages": num_stages, "TMA": TMA}


# By kernel and compute capability, the default first; tuning may reorder them.
TILES = {
    "fwd_d64": {
        80: [tile(128, 64, 4, 2), tile(128, 64, 4, 3), tile(128, 64, 8, 3), tile(64, 64, 4, 3)],
        90: [tile(128, 128, 8, 2, 1), tile(128, 64, 8, 3, 1), tile(128, 64, 4, 3, 1),
             tile(64, 128, 4, 2, 1), tile(64, 64, 4, 3, 1), tile(128, 64, 8, 3)],
    },
    "fwd_d64_dropout": {
        80: [tile(128, 64, 4, 2), tile(128, 32, 4, 3), tile(128, 64, 8, 2), tile(64, 64, 4, 2)],
        90: [tile(128, 128, 8, 2, 1), tile(64, 128, 4, 2, 1), tile(128, 64, 8, 3, 1)],
    },
    "bwd_d64": {
        80: [tile(32, 128, 4, 3), tile(16, 128, 4, 2), tile(16, 128, 4, 3), tile(32, 128, 8, 2)],
        90: [tile(64, 128, 8, 2, 1), tile(64, 64, 4, 2, 1), tile(64, 128, 8, 3, 1),
             tile(32, 128, 8, 2, 1), tile(32, 128, 4, 2, 1), tile(64, 128, 8, 2)],
    },
    "bwd_d64_dropout": {
        80: [tile(32, 128, 4, 3), tile(16, 128, 4, 2), tile(32, 128, 8, 2)],
        90: [tile(64, 128, 8, 2, 1), tile(64, 64, 4, 2, 1), tile(64, 128, 8, 3, 1)],
    },
    "fwd_d128": {
        80: [tile(128, 32, 4, 3), tile(128, 64, 8, 2), tile(64, 64, 4, 2)],
        90: [tile(128, 128, 8, 2, 1), tile(128, 64, 8, 3, 1)],
    },
    "fwd_d128_dropout": {
        80: [tile(128, 64, 8, 2), tile(128, 32, 8, 3)],
        90: [tile(128, 64, 8, 2, 1), tile(128, 128, 8, 2, 1)],
    },
    "bwd_d128": {
        80: [tile(32, 64, 4, 2), tile(16, 128, 8, 2), tile(64, 64, 8, 2)],
        90: [tile(32, 128, 8, 2, 1), tile(32, 64, 4, 2, 1)],
    },
    "bwd_d128_dropout": {
        80: [tile(16, 128, 8, 2), tile(32, 64, 4, 2), tile(64, 64, 8, 2)],
        90: [tile(32, 128, 8, 2, 1), tile(32, 64, 4, 2, 1), tile(32, 64, 8, 2, 1)],
    },
}  # fmt: skip
# Of rotate_k; delta and dq are launched with backward's BM.
ROWS = {sm: [{"BM": 64, "num_warps": 4}] for sm in (80, 90)}

SIGNATURE = types(
    "qkv_ptr out_ptr dout_ptr dqkv_ptr q kv dout",
    "T TP stride_qkv stride_out stride_dout stride_dqkv",
    **{f"{n}_ptr": "*fp32" for n in ("cos", "sin", "lse", "delta", "row_scale", "dim_scale")},
    **dict.fromkeys(("doc_ptr", "doc_end_ptr", "peak_ptr", "dq_ptr", "dq"), "*i32"),
    seed_ptr="*i64", scale="fp32", scale_log2e="fp32",
)  # fmt: skip
DESCRIPTORS = {
    "kv": "T[1,{BN},{DP}]", "q": "T[1,{BM},{DP}]", "dout": "T[1,{BM},{DP}]", "dq": "i32[{BM},{DP}]"
}  # fmt: skip


def kernels(**functions) -> list[Kernel]:
    """Return every kernel with its tiles; functions: rotate_k, fwd, delta, bwd and dq."""
    found = []
    for op, fn in functions.items():
        tables = {n: t for n, t in TILES.items() if n.startswith(op)} or {op: ROWS}
        for name, table in tables.items():
            head = {"D": 128, "DP": 128} if "d128" in name else {"D": 64, "DP": 64}
            shape = head | {"R": 32, "HALF": 16, "DROP": 0.1 if "dropout" in name else 0.0}
            shape |= {"FIXED": True, "PEAK": 128}
            shape, used = ({k: d[k] for k in d if k in fn.arg_names} for d in (shape, DESCRIPTORS))
            masks = ({"DOC": False}, {"DOC": True}) if "DOC" in fn.arg_names else ({},)
            found.append(
                Kernel(f"attention_{name}", fn, table, SIGNATURE, shape, op in ("fwd", "bwd"),
                       masks, used)
            )  # fmt: skip
    return found
