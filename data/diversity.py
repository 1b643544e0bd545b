"""Measure how varied, balanced, hard and redundant sets of documents are, side by side.

    python -m data.diversity --source out/raw --source out/filtered --source out/exercises/train \\
        --out out/diversity

The phi-1 paper says that good ways to measure diversity and redundancy are missing (arXiv
2306.11644, section 6). No number here is one; together they tell what a set lacks, and they compare
sets. So what grows with the amount of text is measured on the same amount of each set: of the
documents with the smallest hashes, each cut to EACH_CHARS characters, as many as the smallest set
can give. OUT has the numbers in summary.json and topics and vocabulary in diversity.png.
"""

import keyword
import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from common.config import UserError, parse, run
from common.files import read_jsonl, write_jsonl
from data.base import minhash
from data.base.documents import batched, source_shards
from data.base.features import words
from data.base.ranks import say
from data.base.stage import Part, Stage
from data.base.syntax import TOPICS, facts

SAMPLE = 2_000  # documents of a set that are looked at closely
BUDGET_CHARS, EACH_CHARS = 1_000_000, 2_000  # of a set, of a document
NEAR_DOCUMENTS = 50_000  # signatures of these are held in memory: 25 MB
NEAR = 0.8  # as in data/dedup.py
BATCH = 1024  # documents signed at once
VENDI_DOCUMENTS = 1_000
COLORS = ["#1f6feb", "#d9730d", "#2da44e", "#8250df", "#bf3989", "#6e7781"]
TOKEN = re.compile(r"[^\W\d]\w*|\d+|[^\w\s]")
NAME = re.compile(r"[^\W\d]\w*")
STOP = {*keyword.kwlist, *keyword.softkwlist, "self"}  # words that tell no two programs apart

# The table: a measure, its name, and how to read it.
MEANINGS = {
    "documents": ("documents", ""),
    "mb": ("text, MB", ""),
    "near_duplicate_frac": ("near-duplicates", "documents that are like an earlier one, by "
                            f"MinHash over shingles of {minhash.SHINGLE} tokens"),
    "distinct_4": ("distinct 4-grams of tokens", "different ones over all, in the same amount of "
                   "text; low: the same phrases again and again"),
    "compression": ("compression ratio", "of zstd at level 19, of the same amount of text; high: "
                    "redundant"),
    "vendi": ("Vendi score", "so many documents with no word in common would be as diverse"),
    "names": ("different names", "in the same amount of text, keywords left out"),
    "topics_covered": ("topics covered", f"of {len(TOPICS)}, those that 1% of the documents have; "
                       "long documents have more of them"),
    "complexity": ("cyclomatic complexity", "of a function: 10th, 50th and 90th percentile"),
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Measure how varied, balanced, hard and redundant sets of documents are."""

    source: tuple[Path, ...]  # document shards, a file or folder; each is a set
    out: Path  # folder to write


def diversity(config: Config) -> dict:
    """Write `config.out` and return its summary. Raises UserError for a set without documents."""
    sets, names = [source_shards(source) for source in config.source], set_names(config.source)
    with Stage(config, [shard for shards in sets for shard in shards]) as stage:
        looks = stage.map("look", sets, look)
        for name, found in zip(names, looks):
            if found["documents"] < 2:
                raise UserError(f"--source {name}: {found['documents']} documents, want 2 or more")
        chars = min(BUDGET_CHARS, *(found.pop("cut_chars") for found in looks))
        compared = min(VENDI_DOCUMENTS, *(found["documents"] for found in looks))
        measures = stage.map("measure", sets, lambda part: measure(part, chars, compared))
        measured = {n: {**found, **more} for n, found, more in zip(names, looks, measures)}
        if stage.ranks.rank == 0:
            draw(measured, stage.result / "diversity.png")
        alike = {"chars": chars, "vendi_documents": compared, "sample": SAMPLE}
        return stage.finish({"measured_on": alike, "sets": measured})


def set_names(sources: tuple[Path, ...]) -> list[str]:
    """Name the sets by their paths, without the folders that all of them are in."""
    paths = [source.resolve() for source in sources]
    if len(set(paths)) < len(paths):
        raise UserError(f"--source {sources[0]}: a set is given twice")
    above = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(above).as_posix() for path in paths]


def look(part: Part) -> dict:
    """Leave the set's documents with the smallest hashes; compare the signatures of more."""
    count, sample = Counter(documents=0, bytes=0), []
    keys, signatures = np.zeros(0, np.uint64), np.zeros((0, minhash.PERMUTATIONS), np.uint32)
    for batch in batched(chain.from_iterable(map(part.documents, part.item)), BATCH):
        texts = [record["text"].encode() for record in batch]
        count.update(documents=len(texts), bytes=sum(map(len, texts)))
        sample = sorted(sample + batch, key=lambda record: record["sha256"])[:SAMPLE]
        keys = np.append(keys, np.array([int(record["id"], 16) for record in batch], np.uint64))
        signed = minhash.signatures(*minhash.shingles(texts), minhash.PERMUTATIONS)
        smallest = np.argsort(keys, kind="stable")[:NEAR_DOCUMENTS]
        keys, signatures = keys[smallest], np.concatenate([signatures, signed])[smallest]
    write_jsonl(part.scratch / f"sample-{part.index:05d}.jsonl", sample)
    return {
        "documents": count["documents"],
        "mb": round(count["bytes"] / 1e6, 2),
        "near_duplicate_frac": round(near_duplicates(signatures), 4),
        "cut_chars": sum(len(record["text"][:EACH_CHARS]) for record in sample),
    }


def measure(part: Part, chars: int, compared: int) -> dict:
    """Measure a set's sample, its first `chars` characters and `compared` documents."""
    import zstandard  # here: ladder_page, which takes the table from this file, needs none

    sample = list(read_jsonl(part.stage.scratch / f"sample-{part.index:05d}.jsonl"))
    texts = [record["text"][:EACH_CHARS] for record in sample]
    together = "\n".join(texts)[:chars]
    tokens = TOKEN.findall(together)
    names = [name for name in NAME.findall(together) if name not in STOP]
    grams = list(zip(*(tokens[i:] for i in range(4))))
    known = [facts(record["text"]) for record in sample]
    topics = Counter(topic for fact in known for topic in fact["topics"])
    complexity = [c for fact in known for c in fact["complexity"]] or [0]
    compressed = zstandard.ZstdCompressor(level=19).compress(together.encode())
    return {
        "distinct_4": round(len(set(grams)) / max(len(grams), 1), 4),
        "compression": round(len(together.encode()) / len(compressed), 2),
        "vendi": round(vendi(texts[:compared]), 1),
        "names": len(set(names)),
        "topics_covered": sum(n >= len(sample) / 100 for n in topics.values()),
        "complexity": [round(float(q)) for q in np.quantile(complexity, [0.1, 0.5, 0.9])],
        "topics": {topic: round(topics[topic] / len(sample), 4) for topic in TOPICS},
        "curves": {"names": growth(names)},
    }


def near_duplicates(signatures: np.ndarray) -> float:
    """Return the share of documents that a chain of near-duplicates connects to an earlier one.

    The Jaccard index is estimated from the signatures uint32 [n, PERMUTATIONS], to +- 0.035.
    """
    bands, pairs = minhash.choose_bands(NEAR), [np.zeros((2, 0), np.int64)]
    for band in range(bands.bands):
        keys = minhash.band_keys(signatures, bands, band)
        for i, j in minhash.bucket_pairs(keys, np.arange(len(signatures))):
            alike = (signatures[i] == signatures[j]).mean(1) >= NEAR
            pairs.append(np.stack([i[alike], j[alike]]))
    group = minhash.components(len(signatures), *np.concatenate(pairs, axis=1))
    return 1 - len(np.unique(group)) / max(len(group), 1)


def vendi(texts: list[str]) -> float:
    """Compute the Vendi score (Friedman and Dieng 2023, arXiv 2210.02410) of texts by their words.

    exp of the entropy of the eigenvalues of their cosines over n: 1 for n equal texts, n for n
    that have no word in common.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer=lambda text: set(words(text)) - STOP, use_idf=False)
    x = vectorizer.fit_transform(texts)  # rows of length 1
    p = np.linalg.eigvalsh((x @ x.T).toarray() / len(texts))
    p = p[p > 1e-12] / p.sum()
    return math.exp(-(p * np.log(p)).sum())


def growth(names: list[str]) -> list[list[int]]:
    """Return (names seen, different ones among them) at 50 points."""
    seen, points, step = set(), [[0, 0]], max(1, len(names) // 50)
    for i, name in enumerate(names, 1):
        seen.add(name)
        if i % step == 0:
            points.append([i, len(seen)])
    return points


def show(measured: str, value) -> str:
    """Format a value of the table."""
    if isinstance(value, list):
        return " / ".join(map(str, value))
    return f"{100 * value:.3g}%" if measured.endswith("_frac") else f"{value:,}"


def draw(sets: dict[str, dict], path: Path) -> None:
    """Draw the topics' shares and the growth of the vocabulary."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    left, right = figure.subplots(1, 2)
    place, height = np.arange(len(TOPICS)), 0.8 / len(sets)
    for i, (name, found) in enumerate(sets.items()):
        shares = [100 * found["topics"][topic] for topic in TOPICS]
        left.barh(place + i * height, shares, height, color=COLORS[i % len(COLORS)], label=name)
    left.set_yticks(place + 0.4 - height / 2, TOPICS)
    left.invert_yaxis()
    left.set_xlabel("% of documents with something of the topic")
    draw_growth(right, list(sets.items()), COLORS)
    figure.savefig(path, dpi=110)


def draw_growth(axes, sets: list[tuple[str, dict]], colors: list[str]) -> None:
    """Draw how many different names are met; a set that runs out of new ones bends."""
    for i, (name, found) in enumerate(sets):
        axes.plot(*zip(*found["curves"]["names"]), color=colors[i % len(colors)], label=name)
    axes.set_xlabel("names seen")
    axes.set_ylabel("different ones")
    axes.legend(frameon=False)


def main() -> None:
    config = parse(Config)
    sets = diversity(config)["sets"]
    width = max(24, *map(len, sets)) + 2
    say("".ljust(28) + "".join(f"{name:>{width}}" for name in sets))
    for key, (title, _) in MEANINGS.items():
        say(f"{title:28}" + "".join(f"{show(key, m[key]):>{width}}" for m in sets.values()))
    say(f"figure: {config.out / 'diversity.png'}")


if __name__ == "__main__":
    run(main)
