"""Hold out whole packages of raw code, to score models on code they were not trained on.

    python -m experiments.holdout --source out/collected --heldout_mb 1 --out out/raw
    python -m experiments.holdout --source out/collected --heldout_mb 1 --out out/heldout \
        --keep heldout

The two commands split one folder's documents: each package ("stdlib:json", "site-packages:numpy")
goes whole to one side. Packages are held out in the order of their name's hash; those larger than
MAX_SHARE of the wanted bytes stay in training.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from common.config import UserError, parse, run
from data.base.documents import source_shards
from data.base.ranks import say
from data.base.stage import Part, Stage, total
from data.classify import group

MAX_SHARE = 0.2  # maximum share of the held-out bytes in one package


@dataclass(frozen=True)
class Config:
    """Write the documents of held-out packages, or of all others."""

    source: tuple[Path, ...]  # documents: file or folder; repeatable
    out: Path  # folder to write
    heldout_mb: float = 1.0  # text to hold out, MB
    keep: str = "rest"  # which side to write: rest or heldout


def holdout(config: Config) -> dict:
    """Write `config.out` and return its summary. Raises UserError if a side would be empty."""
    if config.keep not in ("rest", "heldout"):
        raise UserError(f"--keep {config.keep!r}: want rest or heldout")
    with Stage(config, source_shards(*config.source)) as stage:
        sizes = total(stage.map("weigh", stage.shards, weigh))
        chosen = choose(sizes, config.heldout_mb * 1e6)
        if not 0 < len(chosen) < len(sizes):
            raise UserError(f"--heldout_mb {config.heldout_mb:g}: cannot split {sizes}; change it")
        count = total(stage.map("write", stage.shards, lambda part: write(part, config, chosen)))
        return stage.finish({**count, "packages": len(sizes), "heldout_packages": sorted(chosen)})


def choose(sizes: dict[str, int], wanted_bytes: float) -> set[str]:
    """Choose the packages to hold out from {package: bytes}."""
    chosen, bytes_ = set(), 0
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if bytes_ < wanted_bytes and sizes[name] <= MAX_SHARE * wanted_bytes:
            chosen.add(name)
            bytes_ += sizes[name]
    return chosen


def weigh(part: Part) -> dict:
    """Return {package: bytes of text} of a shard."""
    return total({group(d["origin"]): len(d["text"].encode())} for d in part.documents())


def write(part: Part, config: Config, chosen: set[str]) -> dict:
    """Write the shard's documents on the side to keep."""
    with part.writer() as out:
        for record in part.documents():
            if (group(record["origin"]) in chosen) == (config.keep == "heldout"):
                out.write(record)
    return {"documents": out.documents, "bytes": out.bytes}


def main() -> None:
    config = parse(Config)
    s = holdout(config)
    held_out = f"{len(s['heldout_packages'])} of {s['packages']} packages are held out"
    say(f"{config.out}: {s['documents']:,} documents, {s['bytes'] / 1e6:.1f} MB; {held_out}")


if __name__ == "__main__":
    run(main)
