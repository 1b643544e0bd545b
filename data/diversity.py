"""Compare document sets by variety, balance, difficulty and redundancy, side by side.

    python -m data.diversity --source out/raw --source out/filtered --source out/exercises/train \\
        --out out/diversity

The phi-1 paper says that good measures of diversity and redundancy are missing (arXiv 2306.11644,
section 6). No number here is one; together they show what a set lacks, and they compare sets.
Measures that grow with the amount of text use the same amount of each set, as much as the smallest
can give: the documents with the smallest hashes, each cut to EACH_CHARS characters.
OUT/summary.json holds the table, diversity.png the topics. data.dedup counts near-copies.
"""

import keyword
import math
import re
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from common.config import UserError, parse, run
from common.files import read_jsonl, write_jsonl
from data.base.documents import batched, source_shards
from data.base.features import Features, words
from data.base.ranks import say
from data.base.stage import Part, Stage
from data.base.syntax import TOPICS, facts

SAMPLE = 2_000  # documents analysed per set
BUDGET_CHARS, EACH_CHARS = 1_000_000, 2_000  # per set, per document
VENDI_DOCUMENTS = 1_000
TOKEN = re.compile(r"[^\W\d]\w*|\d+|[^\w\s]")
NAME = re.compile(r"[^\W\d]\w*")
STOP = {*keyword.kwlist, *keyword.softkwlist, "self"}  # words in every program

TITLES = {
    "documents": "documents",
    "mb": "text, MB",
    "distinct_4": "distinct 4-grams of tokens",  # share; low: repeated phrases
    "compression": "compression ratio",  # of zstd at level 19; high: redundant
    "vendi": "Vendi score",  # number of documents with no common word that are as diverse
    "vendi_states": "Vendi score of states",  # the same, on an --encoder's states
    "names": "distinct names",  # without keywords
    "complexity": "cyclomatic complexity",  # per function: 10th, 50th and 90th percentile
    "topics_covered": "topics covered",  # topics of at least 1% of the documents
}


@dataclass(frozen=True)
class Config:
    """Compare document sets by variety, balance, difficulty and redundancy."""

    source: tuple[Path, ...]  # file or folder of documents, one per set; repeatable
    out: Path  # folder to write
    encoder: Path | None = None  # Hugging Face model folder: adds a Vendi score of hidden states


def diversity(config: Config) -> dict:
    """Write `config.out` and return its summary. Raises UserError for a set without documents."""
    names, sets = list(map(str, config.source)), [source_shards(path) for path in config.source]
    if len(set(names)) < len(names):
        raise UserError(f"--source {names[0]}: a set is given twice")
    with Stage(config, chain.from_iterable(sets), filter(None, [config.encoder])) as stage:
        encoder = config.encoder and Features(stage.ranks.rank, encoder=config.encoder)
        looks = stage.map("look", sets, look)
        for name, found in zip(names, looks):
            if found["documents"] < 2:
                raise UserError(f"--source {name}: {found['documents']} documents, want 2 or more")
        chars = min(BUDGET_CHARS, *(found.pop("cut_chars") for found in looks))
        compared = min(VENDI_DOCUMENTS, *(found["documents"] for found in looks))
        measures = stage.map("measure", sets, lambda part: measure(part, chars, compared, encoder))
        measured = {n: {**found, **more} for n, found, more in zip(names, looks, measures)}
        if stage.ranks.rank == 0:
            draw(measured, stage.result / "diversity.png")
        alike = {"chars": chars, "vendi_documents": compared, "sample": SAMPLE}
        return stage.finish({"measured_on": alike, "sets": measured})


def look(part: Part) -> dict:
    """Save the set's documents with the smallest hashes; return its size."""
    count, sample = Counter(documents=0, bytes=0), []
    for batch in batched(chain.from_iterable(map(part.documents, part.item)), SAMPLE):
        count.update(documents=len(batch), bytes=sum(len(r["text"].encode()) for r in batch))
        sample = sorted(sample + batch, key=lambda record: record["sha256"])[:SAMPLE]
    write_jsonl(part.scratch / f"sample-{part.index:05d}.jsonl", sample)
    return {
        "documents": count["documents"],
        "mb": round(count["bytes"] / 1e6, 2),
        "cut_chars": sum(len(record["text"][:EACH_CHARS]) for record in sample),
    }


def measure(part: Part, chars: int, compared: int, encoder: Features | None) -> dict:
    """Measure a set on its sample, the first `chars` characters and `compared` documents of it."""
    import zstandard

    sample = list(read_jsonl(part.stage.scratch / f"sample-{part.index:05d}.jsonl"))
    texts = [record["text"][:EACH_CHARS] for record in sample]
    together = "\n".join(texts)[:chars]
    tokens = TOKEN.findall(together)
    grams = list(zip(*(tokens[i:] for i in range(4))))
    known = [facts(record["text"]) for record in sample]
    topics = Counter(topic for fact in known for topic in fact["topics"])
    complexity = [c for fact in known for c in fact["complexity"]] or [0]
    compressed = zstandard.ZstdCompressor(level=19).compress(together.encode())
    states = {"vendi_states": round(vendi(encoder.pooled(texts[:compared])), 1)} if encoder else {}
    return {
        "distinct_4": round(len(set(grams)) / max(len(grams), 1), 4),
        "compression": round(len(together.encode()) / len(compressed), 2),
        "vendi": round(vendi(of_words(texts[:compared])), 1),
        **states,
        "names": len({*NAME.findall(together)} - STOP),
        "topics_covered": sum(n >= len(sample) / 100 for n in topics.values()),
        "complexity": [round(float(q)) for q in np.quantile(complexity, [0.1, 0.5, 0.9])],
        "topics": {topic: round(topics[topic] / len(sample), 4) for topic in TOPICS},
    }


def of_words(texts: list[str]):
    """Return normalised sparse rows [texts, words] of word presence."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer=lambda text: set(words(text)) - STOP, use_idf=False)
    return vectorizer.fit_transform(texts)


def vendi(rows) -> float:
    """Compute the Vendi score (Friedman and Dieng 2023, arXiv 2210.02410) of vectors [n, width].

    It is exp(entropy of the eigenvalues of cosines / n): 1 for n equal texts, n if no two of them
    share a word.
    """
    from sklearn.metrics.pairwise import cosine_similarity

    p = np.linalg.eigvalsh(cosine_similarity(rows) / rows.shape[0])
    p = p[p > 1e-12] / p.sum()
    return math.exp(-(p * np.log(p)).sum())


def draw(sets: dict[str, dict], path: Path) -> None:
    """Plot the share of each set's documents that touch each topic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), layout="constrained")
    axes, height = figure.subplots(), 0.8 / len(sets)
    for i, (name, found) in enumerate(sets.items()):
        shares = [100 * found["topics"][topic] for topic in TOPICS]
        axes.barh(np.arange(len(TOPICS)) + i * height, shares, height, label=name)
    axes.set_yticks(np.arange(len(TOPICS)) + 0.4 - height / 2, TOPICS)
    axes.invert_yaxis()
    axes.set_xlabel("% of documents that touch the topic")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    config = parse(Config)
    sets = diversity(config)["sets"]
    width = max(24, *map(len, sets)) + 2
    say("".ljust(28) + "".join(f"{name:>{width}}" for name in sets))
    for key, title in TITLES.items():
        if key not in sets[str(config.source[0])]:
            continue
        say(f"{title:28}" + "".join(f"{measured[key]!s:>{width}}" for measured in sets.values()))
    say(f"figure: {config.out / 'diversity.png'}")


if __name__ == "__main__":
    run(main)
