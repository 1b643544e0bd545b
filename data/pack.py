"""Write token shards from documents: every document, then <|endoftext|>, end to end.

    python -m data.pack --source out/demo/filtered --tokenizer out/demo/tokenizer \
        --out out/demo/tokens/filtered
    python -m data.pack --source filtered --epochs 1 --source textbooks --epochs 4 ...  # a mixture

Writes `train_00000.bin`, ..., `val_00000.bin` (format: data/shards.py) and a copy of the tokenizer.
A document is in the validation split if the first bytes of its sha256 say so, so that equal texts
fall on the same side in every packing, and no document is in both.

With `--epochs`, given once for each source, the folder is a mixture: every source starts train
shards of its own, and `mixture.json` tells data/loader.py how often a pass sees it. The validation
documents of all sources are in the order of their hashes: the first ones are a fair sample.
"""

import contextlib
import itertools
import math
from collections import Counter
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

SHARD_TOKENS = 100_000_000  # tokens in a shard
BATCH_CHARS = 4 << 20  # encoded at once, so that threads have work and memory stays flat


@dataclass(frozen=True)
class Config:
    """Encode documents and write them as token shards for train.py."""

    out: Path  # folder to write
    source: tuple[Path, ...]  # document shards, files or folders; may be given several times
    tokenizer: Path  # folder with tokenizer.model
    val_frac: float = 0.02  # share of the documents held out for the validation loss
    epochs: tuple[float, ...] = ()  # of each source, in a pass over the mixture of them
    threads: int = 2  # threads that encode


def pack(config: Config) -> dict:
    """Write `config.out` and return its summary. Raises UserError for a split without documents."""
    mixed = bool(config.epochs)
    if not 0 < config.val_frac < 1:
        raise UserError(f"--val_frac {config.val_frac}: want a share between 0 and 1")
    if mixed and len(config.epochs) != len(config.source):
        given = f"{len(config.epochs)} for {len(config.source)} sources"
        raise UserError(f"--epochs: got {given}; give one each")
    if not all(0 < epochs < math.inf for epochs in config.epochs):
        raise UserError(f"--epochs: got {min(config.epochs):g}, want more than 0")
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
    """Write the tokens of one shard's documents to scratch, with a row of numbers for each.

    shard-I.SPLIT.tokens is uint16; .rows is uint64 [documents, 2], hash and length.
    """
    keys = ("train_tokens", "train_documents", "val_tokens", "val_documents", "bytes")
    count = Counter(dict.fromkeys(keys, 0))
    with contextlib.ExitStack() as stack:
        files = {
            (split, what): stack.enter_context(
                open(part.scratch / f"{part.name}.{split}.{what}", "wb")
            )
            for split in ("train", "val")
            for what in ("tokens", "rows")
        }
        for batch in batched(part.documents(), BATCH_CHARS, chars):
            texts = [document["text"] for document in batch]
            count["bytes"] += sum(len(text.encode()) for text in texts)
            for document, ids in zip(batch, tokenizer.encode_batch(texts, config.threads)):
                held_out = int(document["sha256"][:8], 16) < config.val_frac * 2**32
                split = "val" if held_out else "train"
                tokens = np.array([*ids, tokenizer.end_of_text], "<u2")
                row = np.array([int(document["sha256"][:16], 16), len(tokens)], "<u8")
                files[split, "tokens"].write(tokens.data)
                files[split, "rows"].write(row.data)
                count[f"{split}_tokens"] += len(tokens)
                count[f"{split}_documents"] += 1
    return count


def cut(
    stage: Stage, split: str, inputs: list[int], by_hash: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Cut a split's documents into token shards, each behind the document that fills it.

    Yields the (input, first token, tokens) of a shard's documents: in their order, or by hash.
    """
    files = [stage.scratch / f"shard-{i:05d}.{split}.rows" for i in inputs]
    rows = [np.fromfile(file, "<u8").reshape(-1, 2) for file in files]
    source = np.repeat(np.array(inputs, np.uint32), [len(of_input) for of_input in rows])
    firsts = np.concatenate([np.cumsum(n) - n for n in (of_input[:, 1] for of_input in rows)])
    keys, lengths = np.concatenate(rows).T
    order = np.argsort(keys, kind="stable") if by_hash else np.arange(len(keys))
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
        i: np.memmap(part.stage.scratch / f"shard-{i:05d}.{split}.tokens", "<u2", "r")
        for i in np.unique(documents[0]).tolist()
    }
    rows = zip(*(column.tolist() for column in documents))
    tokens = [inputs[i][first : first + n] for i, first, n in rows]
    path = part.result / f"{split}_{number:05d}.bin"
    write_shard(path, tokens, tokenizer.vocab_size, len(tokens), tokenizer.fingerprint)


def mixture(config: Config, tokens: list[int], shards: list[int]) -> list[dict]:
    """Describe each source for mixture.json, by its train tokens and train shards."""
    names = (f"train_{n:05d}.bin" for n in itertools.count())
    rows = list(zip(config.source, tokens, shards, config.epochs))
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
