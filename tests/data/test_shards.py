import numpy as np
import pytest

from common.config import UserError
from data.shards import HEADER_BYTES, open_shard, write_shard

FINGERPRINT = "0123456789abcdef" * 2


@pytest.fixture
def shard(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 500, 3000)
    write_shard(tmp_path / "a.bin", [tokens[:9], tokens[9:]], 500, 7, FINGERPRINT)
    return tmp_path / "a.bin", tokens


def test_round_trip_and_llm_c_layout(shard):
    path, tokens = shard
    np.testing.assert_array_equal(open_shard(path, 500, FINGERPRINT), tokens)
    raw = path.read_bytes()  # read as llm.c's dataloader does
    assert np.frombuffer(raw[:12], "<i4").tolist() == [20240520, 1, 3000]
    np.testing.assert_array_equal(np.frombuffer(raw[1024:], "<u2"), tokens)


def test_every_flipped_bit_and_every_cut_is_caught(shard):
    path, _ = shard
    good = path.read_bytes()
    rng = np.random.default_rng(1)
    header = [(byte, bit) for byte in range(64) for bit in (0, 5)]
    body = zip(rng.integers(0, len(good), 100), rng.integers(0, 8, 100))
    for byte, bit in [*header, *body]:
        bad = bytearray(good)
        bad[byte] ^= 1 << int(bit)
        path.write_bytes(bad)
        with pytest.raises(UserError, match=r"a\.bin"):
            open_shard(path, 500, FINGERPRINT)
    for bad in [*(good[:size] for size in (0, 1, HEADER_BYTES, len(good) - 2)), good + b"\0"]:
        path.write_bytes(bad)
        with pytest.raises(UserError, match=r"a\.bin"):
            open_shard(path, 500, FINGERPRINT)


def test_other_tokenizer_and_vocabulary(shard):
    path, _ = shard
    with pytest.raises(UserError, match="made by tokenizer 01234567"):
        open_shard(path, 500, "f" * 32)
    with pytest.raises(UserError, match="made by tokenizer"):
        open_shard(path, 100, FINGERPRINT)
