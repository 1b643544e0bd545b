"""Read and write token shards: llm.c's `.bin` format, plus checks in header slots it ignores.

A shard is a header of 256 little-endian int32, then tokens as little-endian uint16:

    slot 0   magic 20240520        slot 3     vocabulary size
    slot 1   version 1             slot 4     documents
    slot 2   number of tokens      slot 5     CRC-32 of the file with this slot zero
                                   slots 8-15 tokenizer fingerprint (32 hex digits as ASCII)

llm.c's tools check slots 0-2 only, so they read our shards; llm.c leaves the other slots zero.
"""

import zlib
from pathlib import Path

import numpy as np

from common.config import UserError

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_INTS
MIXTURE = "mixture.json"  # maps shards to sources, with passes per epoch
VERIFY_TOKENS = 1 << 24  # tokens read per verification step: 32 MiB


def write_shard(
    path: Path, parts: list[np.ndarray], vocab_size: int, documents: int, fingerprint: str
) -> None:
    """Write `parts`, arrays of token ids below `vocab_size`, as one shard."""
    header = np.zeros(HEADER_INTS, "<i4")
    header[:5] = MAGIC, VERSION, sum(map(len, parts)), vocab_size, documents
    header[8:16] = np.frombuffer(fingerprint.encode(), "<i4")
    checksum = zlib.crc32(header.data)
    assert 0 < header[2] < 2**31, "a shard holds 1 to 2^31 - 1 tokens"
    with open(path, "wb") as f:
        f.write(header.data)
        for part in parts:
            assert 0 <= int(part.min()) <= int(part.max()) < min(vocab_size, 65536)
            part = np.ascontiguousarray(part, "<u2")
            checksum = zlib.crc32(part.data, checksum)
            f.write(part.data)
        header[5] = np.uint32(checksum).view(np.int32)
        f.seek(0)
        f.write(header.data)


def read_header(path: Path) -> np.ndarray:
    """Read a shard's header, int32 [256]. Raises UserError if the file has none."""
    header = np.fromfile(path, "<i4", HEADER_INTS)
    if len(header) < HEADER_INTS or header[:2].tolist() != [MAGIC, VERSION]:
        raise UserError(f"{path} is not a token shard (magic {MAGIC}, version {VERSION})")
    return header


def open_shard(path: Path, vocab_size: int, fingerprint: str) -> np.ndarray:
    """Verify a whole shard (about 1 GB/s); return a memory map, uint16 [tokens].

    Raises UserError if it is no shard, truncated, damaged, or made with another tokenizer.
    """
    header = read_header(path)
    n, size = int(header[2]), Path(path).stat().st_size
    if size != HEADER_BYTES + 2 * n:
        said = f"its header says {n:,} tokens, but the file has {size:,} bytes"
        raise UserError(f"{path} is damaged: {said}; rebuild it with data.pack")
    tokens = np.memmap(path, "<u2", "r", offset=HEADER_BYTES)
    checksum, header[5] = int(header[5:6].view(np.uint32)[0]), 0
    found, largest = zlib.crc32(header.data), 0
    for i in range(0, n, VERIFY_TOKENS):
        part = tokens[i : i + VERIFY_TOKENS]
        found, largest = zlib.crc32(part.data, found), max(largest, int(part.max()))
    if found != checksum:
        raise UserError(f"{path} is damaged: checksum mismatch; rebuild it with data.pack")
    made_by = header[8:16].tobytes().decode("ascii", "replace")
    if made_by != fingerprint or largest >= vocab_size:
        raise UserError(
            f"{path} was made by tokenizer {made_by[:8]}..., not {fingerprint[:8]}...; "
            "run data.pack again with this tokenizer"
        )
    return tokens
