"""Write token shards from documents: each document, then <|endoftext|>, back to back.

    python -m data.pack --source out/demo/filtered --tokenizer out/demo/tokenizer \
        --out out/demo/tokens/filtered
    python -m data.pack --source filtered --epochs 1 --source textbooks --epochs 4 ...  # a mixture

Writes `train_00000.bin`, ..., `val_00000.bin` (format: data/shards.py) and a copy of the tokenizer.
The first bytes of a document's sha256 decide its split, so equal texts fall on the same side in
every packing, and no document is in both.

With `--epochs` or `--weight`, given once per source, the folder is a mixture: each source starts
its own train shards, and `mixture.json` tells data/loader.py how often to repeat it per epoch.
`--epochs 4` means four times. `--weight` is a share of the training tokens; the most heavily drawn
source then has one pass per epoch. Validation documents of all sources are sorted by hash, so any
prefix is a fair sample.
"""

import itertools
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.config import UserError, parse, run
from common.files import write_json
from data.base.documents import batched, chars, source_shards
from data.base.ranks import say
from data.base.stage import Part, Stage, total
from data.shards import MIXTURE, write_shard
from tokenizer import Tokenizer

SHARD_TOKENS = 100_000_000  # tokens per shard
BATCH_CHARS = 4 << 20  # encoded per batch: keeps threads busy and memory flat


@dataclass(frozen=True)
class Config:
    """Encode documents and write them as token shards for train.py."""

    out: Path  # folder to write
    source: tuple[Path, ...]  # files or folders of documents; repeatable
    tokenizer: Path  # folder with tokenizer.model
    val_frac: float = 0.02  # share of documents held out for the validation loss
    epochs: tuple[float, ...] = ()  # a source's passes per epoch of the mixture; one per --source
    weight: tuple[float, ...] = ()  # a source's share of the training tokens; one per --source
    threads: int = 2  # encoder threads


def pack(config: Config) -> dict:
    """Write `config.out` and return its summary. Raises UserError for a split without documents."""
    given = config.epochs or config.weight
    mixed = bool(given)
    if not 0 < config.val_frac < 1:
        raise UserError(f"--val_frac {config.val_frac}: want a share between 0 and 1")
    if config.epochs and config.weight:
        raise UserError("--epochs and --weight both set how often a source repeats; give one")
    if mixed and len(given) != len(config.source):
        n = len(config.source)
        raise UserError(f"--epochs, --weight: got {len(given)} for {n} sources; give one each")
    if not all(0 < value < math.inf for value in given):
        raise UserError(f"--epochs, --weight: got {min(given):g}, want more than 0")
    tokenizer = Tokenizer(config.tokenizer)
    by_source = [source_shards(source) for source in config.source]
    inputs = list(itertools.chain(*by_source))
    with Stage(config, inputs, [tokenizer.path]) as stage:
        encoded = stage.map("encode", inputs, lambda part: encode_shard(config, tokenizer, part))
        count = total(encoded)
        for split in ("train", "val"):
            if not count[f"{split}_documents"]:
                raise UserError(
                    f"no document in the {split} split ({count['train_documents']} to train on); "
                    "add documents or change --val_frac"
                )
        everything = list(range(len(inputs)))
        ends = np.cumsum([0, *map(len, by_source)]).tolist()
        groups = [everything[a:b] for a, b in itertools.pairwise(ends)] if mixed else [everything]
        train = [list(cut(stage, "train", group)) for group in groups]
        val = cut(stage, "val", everything, by_hash=mixed)
        files = [("train", n, *shard) for n, shard in enumerate(itertools.chain(*train))]
        files += [("val", n, *shard) for n, shard in enumerate(val)]
        stage.map("write", files, lambda part: write_tokens(tokenizer, part))
        tokens = count["train_tokens"] + count["val_tokens"]
        summary = {
            **count,
            "bytes_per_token": round(count["bytes"] / tokens, 3),
            "vocab_size": tokenizer.vocab_size,
            "tokenizer": tokenizer.fingerprint,
        }
        if mixed:
            tokens = [sum(encoded[i]["train_tokens"] for i in group) for group in groups]
            summary["mixture"] = mixture(config, tokens, [len(shards) for shards in train])
        if stage.ranks.rank == 0:
            tokenizer.save(stage.result)
            if mixed:
                write_json(stage.result / MIXTURE, {"sources": summary["mixture"]})
        return stage.finish(summary)


def encode_shard(config: Config, tokenizer: Tokenizer, part: Part) -> dict:
    """Save the tokens of a shard's documents, and a row (hash, length, held out) for each."""
    rows, bytes_ = array("Q"), 0
    with open(part.scratch / f"{part.name}.tokens", "wb") as f:
        for batch in batched(part.documents(), BATCH_CHARS, chars):
            texts = [document["text"] for document in batch]
            bytes_ += sum(len(text.encode()) for text in texts)
            for document, ids in zip(batch, tokenizer.encode_batch(texts, config.threads)):
                tokens = np.array([*ids, tokenizer.end_of_text], "<u2")
                f.write(tokens.data)
                hash_ = int(document["sha256"][:16], 16)
                rows.extend((hash_, len(tokens), hash_ >> 32 < config.val_frac * 2**32))
    rows = np.array(rows, np.uint64).reshape(-1, 3)
    np.save(part.scratch / f"{part.name}.npy", rows)
    count = {"bytes": bytes_}
    for split, lengths in (("train", rows[rows[:, 2] == 0, 1]), ("val", rows[rows[:, 2] == 1, 1])):
        count |= {f"{split}_tokens": int(lengths.sum()), f"{split}_documents": len(lengths)}
    return count


def cut(
    stage: Stage, split: str, inputs: list[int], by_hash: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Cut a split's documents into token shards; each ends with the document that fills it.

    Yields arrays (input, first token, number of tokens) per shard, in input order or by hash.
    """
    rows = [np.load(stage.scratch / f"shard-{i:05d}.npy") for i in inputs]
    source = np.repeat(np.array(inputs, np.uint32), [len(of_input) for of_input in rows])
    firsts = np.concatenate([np.cumsum(n) - n for n in (of_input[:, 1] for of_input in rows)])
    keys, lengths, held_out = np.concatenate(rows).T
    order = np.flatnonzero(held_out == (split == "val"))
    if by_hash:
        order = order[np.argsort(keys[order], kind="stable")]
    ends, a = np.cumsum(lengths[order].astype(np.int64)), 0
    while a < len(order):
        filled = ends[a - 1] + SHARD_TOKENS if a else SHARD_TOKENS
        b = int(np.searchsorted(ends, filled)) + 1
        yield tuple(column[order[a:b]] for column in (source, firsts, lengths))
        a = b


def write_tokens(tokenizer: Tokenizer, part: Part) -> None:
    """Write one token shard from the tokens in scratch."""
    split, number, *documents = part.item
    inputs = {
        i: np.memmap(part.stage.scratch / f"shard-{i:05d}.tokens", "<u2", "r")
        for i in np.unique(documents[0]).tolist()
    }
    rows = zip(*(column.tolist() for column in documents))
    tokens = [inputs[i][first : first + n] for i, first, n in rows]
    path = part.result / f"{split}_{number:05d}.bin"
    write_shard(path, tokens, tokenizer.vocab_size, len(tokens), tokenizer.fingerprint)


def mixture(config: Config, tokens: list[int], shards: list[int]) -> list[dict]:
    """Return the mixture.json entry of each source, from its train tokens and shard counts."""
    if 0 in tokens:
        source = config.source[tokens.index(0)]
        raise UserError(f"--source {source}: no document in the train split")
    drawn = [weight / n for weight, n in zip(config.weight, tokens)]
    epochs = config.epochs or [d / max(drawn) for d in drawn]
    names = (f"train_{n:05d}.bin" for n in itertools.count())
    rows = list(zip(config.source, tokens, shards, epochs))
    seen = sum(n * epochs for _, n, _, epochs in rows)
    return [
        {
            "source": str(source),
            "shards": list(itertools.islice(names, n_shards)),
            "tokens": n,
            "epochs": round(epochs, 6),
            "share": round(n * epochs / seen, 6),
        }
        for source, n, n_shards, epochs in rows
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
