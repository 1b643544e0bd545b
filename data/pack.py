"""Token shards from documents: every document, then <|endoftext|>, end to end.

    python -m data.pack --source out/demo/filtered --tokenizer out/demo/tokenizer \
        --out out/demo/tokens/filtered
    python -m data.pack --source filtered --epochs 1 --source textbooks --epochs 4 ...  # a mixture

Writes `train_00000.bin`, ..., `val_00000.bin` (format: data/shards.py) and a copy of the tokenizer.
A document is in the validation split if the first bytes of its sha256 say so, so that equal texts
fall on the same side in every packing, and no document is in both.

With `--epochs` or `--weight`, given once for each source, the folder is a mixture: every source
starts train shards of its own, and `mixture.json` says how often a pass over the mixture sees it.
`--epochs 4` is four times; `--weight` is a share of the tokens that training sees, in proportion to
the other weights, and the source that this draws on most is seen once a pass. data/loader.py reads
it. The validation documents of all sources are in the order of their hashes, so that the first ones
are a fair sample.
"""

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.config import UserError, parse, run
from common.files import write_json
from data.base.documents import batched, source_shards
from data.base.ranks import say
from data.base.stage import Part, Stage, total
from data.shards import MIXTURE, write_shard_parts
from tokenizer import Tokenizer

# Encoded at once, so that threads have work and memory stays flat.
BATCH_DOCUMENTS, BATCH_BYTES = 512, 4 << 20
COPY_TOKENS = 1 << 20  # copied at once

# Documents among what encode_shard wrote, a row each: input, first token, tokens.
Run = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Config:
    """Encode documents and write them as token shards for train.py."""

    out: Path  # folder to write
    source: tuple[Path, ...]  # document shards, files or folders; may be given several times
    tokenizer: Path  # folder with tokenizer.model
    val_frac: float = 0.02  # share of the documents held out for the validation loss
    epochs: tuple[float, ...] = ()  # of each source, in a pass over the mixture of them
    weight: tuple[float, ...] = ()  # of each source, as a share of the tokens that training sees
    shard_tokens: int = 100_000_000  # tokens in a shard
    threads: int = 2  # threads that encode


def pack(config: Config) -> dict:
    """Write `config.out` and return its summary. Raises UserError for a split without documents."""
    check(config)
    tokenizer = Tokenizer(config.tokenizer)
    by_source = [source_shards(source) for source in config.source]
    inputs = list(itertools.chain(*by_source))
    with Stage(config, inputs, [tokenizer.path]) as stage:
        encoded = stage.map("encode", inputs, lambda part: encode_shard(config, tokenizer, part))
        count = total(encoded)
        for split in ("train", "val"):
            if not count[f"{split}_documents"]:
                documents = count["train_documents"] + count["val_documents"]
                raise UserError(
                    f"no document in the {split} split ({documents} in all); add documents or "
                    "change --val_frac"
                )

        numbers = iter(range(len(inputs)))
        groups = [list(itertools.islice(numbers, len(of))) for of in by_source]
        everything, mixed = list(range(len(inputs))), bool(config.epochs or config.weight)
        train = [
            list(cut(by_input(stage, "train", group), config.shard_tokens))
            for group in (groups if mixed else [everything])
        ]
        val = (by_hash if mixed else by_input)(stage, "val", everything)
        files = [("train", n, *shard) for n, shard in enumerate(itertools.chain(*train))]
        files += [("val", n, *shard) for n, shard in enumerate(cut(val, config.shard_tokens))]
        stage.map("write", files, lambda part: write_tokens(tokenizer, part))

        summary = {
            **{k: count[k] for k in ("train_tokens", "train_documents", "val_tokens")},
            "val_documents": count["val_documents"],
            "bytes": count["bytes"],
            "bytes_per_token": round(
                count["bytes"] / (count["train_tokens"] + count["val_tokens"]), 3
            ),
            "vocab_size": tokenizer.vocab_size,
            "tokenizer": tokenizer.fingerprint,
            "sources": [str(source) for source in config.source],
        }
        if mixed:
            tokens = [sum(encoded[i]["train_tokens"] for i in group) for group in groups]
            summary["mixture"] = mixture(config, tokens, [len(shards) for shards in train])
        if stage.ranks.rank == 0:
            tokenizer.save(stage.result)
            if mixed:
                write_json(stage.result / MIXTURE, {"sources": summary["mixture"]})
        return stage.finish(summary)


def check(config: Config) -> None:
    if not 0 < config.val_frac < 1:
        raise UserError(f"--val_frac {config.val_frac}: want a share between 0 and 1")
    if config.shard_tokens < 1:
        raise UserError(f"--shard_tokens {config.shard_tokens}: want at least 1")
    if config.epochs and config.weight:
        raise UserError("--epochs and --weight both say how often a source is seen; give one")
    for option in ("epochs", "weight"):
        given = getattr(config, option)
        if given and len(given) != len(config.source):
            raise UserError(
                f"--{option}: got {len(given)} for {len(config.source)} sources; give one for each"
            )
        if not all(0 < value < math.inf for value in given):
            raise UserError(f"--{option}: got {min(given):g}, want more than 0")


def encode_shard(config: Config, tokenizer: Tokenizer, part: Part) -> dict:
    """Write the tokens of one shard's documents to scratch, with the length of each document.

    shard-I.SPLIT.tokens is uint16, .lengths uint32; .keys are the first 64 bits of the hashes.
    """
    keys = ("train_tokens", "train_documents", "val_tokens", "val_documents", "bytes")
    count = Counter(dict.fromkeys(keys, 0))
    with contextlib.ExitStack() as stack:
        files = {
            (split, kind): stack.enter_context(
                open(part.scratch / f"{part.name}.{split}.{kind}", "wb")
            )
            for split in ("train", "val")
            for kind in ("tokens", "lengths", "keys")
        }
        for batch in batched(part.documents(), BATCH_BYTES, weight):
            texts = [document["text"] for document in batch]
            count["bytes"] += sum(len(text.encode()) for text in texts)
            for document, ids in zip(batch, tokenizer.encode_batch(texts, config.threads)):
                held_out = int(document["sha256"][:8], 16) < config.val_frac * 2**32
                split = "val" if held_out else "train"
                tokens = np.array([*ids, tokenizer.end_of_text], "<u2")
                files[split, "tokens"].write(tokens.data)
                files[split, "lengths"].write(np.uint32(len(tokens)).tobytes())
                files[split, "keys"].write(np.uint64(int(document["sha256"][:16], 16)).tobytes())
                count[f"{split}_tokens"] += len(tokens)
                count[f"{split}_documents"] += 1
    return count


def weight(document: dict) -> int:
    """Return a document's share of BATCH_BYTES: its size, or what lets BATCH_DOCUMENTS fit."""
    return max(len(document["text"].encode()), BATCH_BYTES // BATCH_DOCUMENTS)


def column(stage: Stage, i: int, split: str, kind: str, dtype: str) -> np.ndarray:
    """Return what encode_shard wrote of each document of input `i`."""
    return np.fromfile(stage.scratch / f"shard-{i:05d}.{split}.{kind}", dtype)


def by_input(stage: Stage, split: str, inputs: list[int]) -> Iterator[Run]:
    """Yield the documents of each input, one after the other."""
    for i in inputs:
        lengths = column(stage, i, split, "lengths", "<u4")
        yield np.full(len(lengths), i), np.cumsum(lengths, dtype=np.int64) - lengths, lengths


def by_hash(stage: Stage, split: str, inputs: list[int]) -> Iterator[Run]:
    """Yield the documents of all inputs in the order of their hashes."""
    runs = list(by_input(stage, split, inputs))
    keys = np.concatenate([column(stage, i, split, "keys", "<u8") for i in inputs])
    order = np.argsort(keys, kind="stable")
    yield tuple(np.concatenate(columns)[order] for columns in zip(*runs))


def cut(runs: Iterable[Run], shard_tokens: int) -> Iterator[tuple[int, np.ndarray]]:
    """Cut token shards behind the document that fills each: documents, stretches of tokens.

    Stretches are int64 [n, 3]: input, first token, tokens.
    """
    stretches, documents, room = [], 0, shard_tokens
    for inputs, firsts, lengths in runs:
        ends = np.cumsum(lengths, dtype=np.int64)
        a = 0
        while a < len(ends):
            before = int(ends[a - 1]) if a else 0
            b = min(int(np.searchsorted(ends, before + room)) + 1, len(ends))
            stretches.append(join(inputs[a:b], firsts[a:b], lengths[a:b]))
            documents, room = documents + b - a, room - (int(ends[b - 1]) - before)
            if room <= 0:
                yield documents, np.concatenate(stretches)
                stretches, documents, room = [], 0, shard_tokens
            a = b
    if stretches:
        yield documents, np.concatenate(stretches)


def join(inputs: np.ndarray, firsts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Join documents into stretches where they follow each other in one input."""
    follows = (inputs[1:] == inputs[:-1]) & (firsts[1:] == firsts[:-1] + lengths[:-1])
    starts = np.flatnonzero(np.concatenate([[True], ~follows]))
    tokens = np.add.reduceat(lengths, starts, dtype=np.int64)
    return np.stack([inputs[starts], firsts[starts], tokens], 1)


def write_tokens(tokenizer: Tokenizer, part: Part) -> None:
    """Write one token shard from what encode_shard left."""
    split, number, documents, stretches = part.item

    def tokens() -> Iterator[np.ndarray]:
        for i, first, n in stretches.tolist():
            path = part.stage.scratch / f"shard-{i:05d}.{split}.tokens"
            for at in range(first, first + n, COPY_TOKENS):
                yield np.fromfile(path, "<u2", min(COPY_TOKENS, first + n - at), offset=2 * at)

    path, n_tokens = part.result / f"{split}_{number:05d}.bin", int(stretches[:, 2].sum())
    vocab_size, fingerprint = tokenizer.vocab_size, tokenizer.fingerprint
    write_shard_parts(path, tokens(), n_tokens, vocab_size, documents, fingerprint)


def mixture(config: Config, tokens: list[int], shards: list[int]) -> list[dict]:
    """Describe each source for mixture.json, by its train tokens and train shards."""
    if 0 in tokens:
        raise UserError(
            f"--source {config.source[tokens.index(0)]}: no document in the train split"
        )
    epochs = list(config.epochs)
    if not epochs:
        drawn = [weight / n for weight, n in zip(config.weight, tokens)]
        epochs = [d / max(drawn) for d in drawn]
    seen = sum(e * n for e, n in zip(epochs, tokens))
    names = (f"train_{n:05d}.bin" for n in itertools.count())
    return [
        {
            "source": str(source),
            "shards": list(itertools.islice(names, n_shards)),
            "tokens": n,
            "epochs": round(e, 6),
            "share": round(e * n / seen, 6),
        }
        for source, n, n_shards, e in zip(config.source, tokens, shards, epochs)
    ]


def main() -> None:
    config = parse(Config)
    s = pack(config)
    for m in s.get("mixture", []):
        say(f"{m['source']}: {m['tokens']:,} tokens x {m['epochs']:g} epochs, {m['share']:.1%}")
    say(
        f"pack: {s['train_tokens']:,} train and {s['val_tokens']:,} val tokens, "
        f"{s['bytes_per_token']} bytes each -> {config.out}"
    )


if __name__ == "__main__":
    run(main)
