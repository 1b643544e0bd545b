"""How varied sets of documents are, how balanced, how hard and how redundant; side by side.

    python -m data.diversity --source out/raw --source out/filtered --source out/exercises/train \\
        --out out/diversity

The phi-1 paper says that good ways to measure diversity and redundancy are missing (arXiv
2306.11644, section 6). No number here is one; together they tell what a set lacks, and they compare
sets. So all that grows with the amount of text is measured on the same amount of each set: of the
documents with the smallest hashes, each cut to EACH_CHARS characters, as many as the smallest set
can give. `index.html` has the tables and pictures, and says what each number means.

A set may also be a file of problems (HumanEval's format); then their solutions are run.
"""

import keyword
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.config import UserError, parse, run
from common.files import read_jsonl
from data.base import minhash
from data.base.benchmarks import FIELDS
from data.base.documents import DocumentFile, batched, document, source_shards
from data.base.features import Hidden, words
from data.base.ranks import digest_key, say
from data.base.readers import read_records
from data.base.stage import Part, Stage, total
from data.base.syntax import TOPICS, facts
from sandbox.execute import run_checks
from sandbox.self_check import check

BUDGET_CHARS, EACH_CHARS = 1_000_000, 2_000  # of a set, of a document
NEAR_DOCUMENTS, NEAR_BATCH = 50_000, 256  # signatures of these are held in memory: 25 MB
NEAR = 0.8  # as in data/dedup.py
VENDI_DOCUMENTS, VENDI_DIMS = 1_000, 4_096
RUN_PROBLEMS = 200  # solutions that are run
TIMEOUT_S = 15.0  # for a solution and its test
TOKEN = re.compile(r"[^\W\d]\w*|\d+|[^\w\s]")
NAME = re.compile(r"[^\W\d]\w*")
STOP = {*keyword.kwlist, *keyword.softkwlist, "self"}  # words that tell no two programs apart

# The table: a measure, its name, and how to read it.
MEANINGS = {
    "documents": ("documents", ""),
    "mb": ("text, MB", ""),
    "topics_covered": ("topics covered", f"of {len(TOPICS)}, those that 1% of the documents have; "
                       "long documents have more of them"),
    "topic_balance": ("balance of topics", "1 where all are as frequent: the entropy of topics "
                      "over its largest value, a document's weight shared among its topics"),
    "near_duplicate_frac": ("near-duplicates", "documents that are like an earlier one, by "
                            f"MinHash over shingles of {minhash.SHINGLE} tokens"),
    "distinct_1": ("distinct tokens", "different ones over all, in the same amount of text"),
    "distinct_2": ("distinct pairs of tokens", "the same; high: varied"),
    "distinct_4": ("distinct 4-grams of tokens", "the same; low: the same phrases again and again"),
    "compression": ("compression ratio", "of zstd at level 19, of the same amount of text; high: "
                    "redundant"),
    "vendi": ("Vendi score", "so many documents with no likeness at all would be as diverse"),
    "names": ("different names", "in the same amount of text, keywords left out"),
    "imports_frac": ("documents that import", ""),
    "modules": ("different modules", "that the sample imports"),
    "parses_frac": ("Python", "documents that are, or that hold fenced blocks that are"),
    "chars": ("characters", "of a document: 10th, 50th and 90th percentile"),
    "functions": ("functions", "of a document: the same percentiles"),
    "complexity": ("cyclomatic complexity", "of a function: the same percentiles"),
    "depth": ("depth of the syntax tree", "of a document: the same percentiles"),
    "runs_frac": ("solutions that run", "of problem records alone: those that pass their tests"),
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Measure how varied, balanced, hard and redundant sets of documents are."""

    source: tuple[Path, ...]  # a set: documents or problems, a file or folder; several to compare
    out: Path  # folder to write
    checkpoint: Path | None = None  # run whose hidden states the Vendi score compares documents by;
    # without it by the words that they share
    sample: int = 2000  # documents of each set that are looked at closely
    device: str = "auto"  # of the model: auto, cpu or cuda


def diversity(config: Config) -> dict:
    """Write `config.out` and return its summary. Raises UserError for a set without documents."""
    if config.sample < 2:
        raise UserError(f"--sample {config.sample}: want 2 or more")
    sets = [source_shards(source) for source in config.source]
    of_set = [number for number, shards in enumerate(sets) for _ in shards]
    names = set_names(config.source)
    reads = [config.checkpoint] if config.checkpoint else []
    with Stage(config, [shard for shards in sets for shard in shards], reads) as stage:
        stage.map("keys", stage.shards, save_keys)
        keys = [
            np.sort(np.concatenate([np.load(f) for f in scratch(stage, of_set, s, "keys", "npy")]))
            for s in range(len(sets))
        ]
        for name, found in zip(names, keys):
            if len(found) < 2:
                raise UserError(f"--source {name}: {len(found)} documents, want 2 or more")
        last = [(int(k[: config.sample][-1]), int(k[:NEAR_DOCUMENTS][-1])) for k in keys]
        read = stage.map("look", stage.shards, lambda part: look(part, *last[of_set[part.index]]))
        totals = [total(r for r, of in zip(read, of_set) if of == s) for s in range(len(sets))]
        budget = min(BUDGET_CHARS, *(t["cut_chars"] for t in totals), BUDGET_CHARS)
        compared = min(VENDI_DOCUMENTS, *(t["sample"] for t in totals), VENDI_DOCUMENTS)
        measured = stage.map(
            "measure",
            list(range(len(sets))),
            lambda part: measure(part, config, of_set, totals[part.item], budget, compared),
        )
        if stage.ranks.rank == 0:
            (stage.result / "index.html").write_text(html_page(names, measured), encoding="utf-8")
        alike = {"chars": budget, "vendi_documents": compared, "sample": config.sample}
        alike["vendi_by"] = "hidden states" if config.checkpoint else "words"
        return stage.finish({"measured_on": alike, "sets": dict(zip(names, measured))})


def set_names(sources: tuple[Path, ...]) -> list[str]:
    """Return what to call the sets: their paths, without the folders that all of them are in."""
    paths = [source.resolve() for source in sources]
    if len(set(paths)) < len(paths):
        raise UserError(f"--source {sources[0]}: a set is given twice")
    above = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(above).as_posix() for path in paths]


def scratch(stage: Stage, of_set: list[int], wanted: int, name: str, suffix: str) -> list[Path]:
    """List the files that the parts of one set left, in the order of its shards."""
    files = [stage.scratch / f"{name}-{i:05d}.{suffix}" for i in range(len(of_set))]
    return [f for f, of in zip(files, of_set) if of == wanted and f.exists()]


# ---- Reading


def records(part: Part, count_bad: bool) -> Iterator[dict]:
    """Yield the documents of a shard; of a problem, its prompt and solution."""
    if is_problems(part.item):
        for number, record in read_records(part.item, progress=part.progress):
            if all(isinstance(record.get(field), str) for field in FIELDS):
                text = record["prompt"] + record["canonical_solution"]
                yield record | document(text, record["task_id"])
            elif count_bad:
                part.bad("no problem", str(part.item), number, repr(record))
    else:
        yield from part.documents()


def is_problems(path: Path) -> bool:
    """Return whether a file's first record is a problem of HumanEval's format."""
    if ".jsonl" not in path.name:
        return False
    for _, record in read_records(path):
        return "canonical_solution" in record and "text" not in record
    return False


def key(record: dict) -> int:
    """Return where a document stands in the order of the sample, a hash of 64 bits."""
    return digest_key(record["sha256"])[0]


def save_keys(part: Part) -> None:
    found = [key(record) for record in records(part, count_bad=False)]
    np.save(part.scratch / f"keys-{part.index:05d}.npy", np.array(found, np.uint64))


def look(part: Part, last_sample: int, last_near: int) -> dict:
    """Leave the sample's documents with their facts, and the signatures of more."""
    count = Counter(documents=0, bytes=0, sample=0, cut_chars=0)

    def near() -> Iterator[bytes]:
        for record in records(part, count_bad=True):
            text, encoded = record["text"], record["text"].encode()
            count.update(documents=1, bytes=len(encoded))
            if key(record) <= last_sample:
                count.update(sample=1, cut_chars=min(len(text), EACH_CHARS))
                problem = {f: record[f] for f in FIELDS if f in record}
                line = {"key": key(record), "text": text, "problem": problem, **facts(text)}
                sample.write(line)
            if key(record) <= last_near:
                yield encoded

    found = [np.zeros((0, minhash.PERMUTATIONS), np.uint32)]
    with DocumentFile(part.scratch / f"sample-{part.index:05d}.jsonl.zst") as sample:
        for batch in batched(near(), NEAR_BATCH):
            found.append(minhash.signatures(*minhash.shingles(batch), minhash.PERMUTATIONS))
    np.save(part.scratch / f"near-{part.index:05d}.npy", np.concatenate(found))
    return dict(count)


# ---- Measuring


def measure(
    part: Part, config: Config, of_set: list[int], totals: dict, budget: int, compared: int
) -> dict:
    """Measure all numbers of one set."""
    import zstandard  # here: tools/report.py, which takes the table from this file, needs none

    files = scratch(part.stage, of_set, part.item, "sample", "jsonl.zst")
    sample = sorted((r for f in files for r in read_jsonl(f)), key=lambda r: r["key"])
    texts = [record["text"][:EACH_CHARS] for record in sample]
    together = "\n".join(texts)[:budget]
    tokens = TOKEN.findall(together)
    names = [name for name in NAME.findall(together) if name not in STOP]
    near = [np.load(f) for f in scratch(part.stage, of_set, part.item, "near", "npy")]
    topics = Counter(topic for record in sample for topic in record["topics"])
    modules = Counter(module for record in sample for module in record["modules"])
    of_functions = [c for record in sample for c in record["complexity"]]
    python = [record for record in sample if record["depth"] is not None]
    compressed = zstandard.ZstdCompressor(level=19).compress(together.encode())
    found = {
        "documents": totals["documents"],
        "mb": round(totals["bytes"] / 1e6, 2),
        "topics_covered": sum(n >= len(sample) / 100 for n in topics.values()),
        "topic_balance": round(balance([record["topics"] for record in sample]), 3),
        "near_duplicate_frac": round(near_duplicates(np.concatenate(near)), 4),
        **{f"distinct_{n}": round(distinct(tokens, n), 4) for n in (1, 2, 4)},
        "compression": round(len(together.encode()) / len(compressed), 2),
        "vendi": round(vendi(vectors(texts[:compared], config)), 1),
        "names": len(set(names)),
        "imports_frac": round(sum(bool(r["modules"]) for r in sample) / len(sample), 3),
        "modules": len(modules),
        "parses_frac": round(len(python) / len(sample), 3),
        "chars": spread([len(record["text"]) for record in sample]),
        "functions": spread([len(record["complexity"]) for record in python]),
        "complexity": spread(of_functions),
        "depth": spread([record["depth"] for record in python]),
        "runs_frac": solutions_that_run([r["problem"] for r in sample if r["problem"]]),
        "topics": {topic: round(topics[topic] / len(sample), 4) for topic in TOPICS},
        "top_modules": dict(sorted(modules.items(), key=lambda m: (-m[1], m[0]))[:12]),
        "curves": {
            "chars": quantiles([len(record["text"]) for record in sample]),
            "complexity": quantiles(of_functions),
            "names": growth(names),
        },
    }
    return found


def balance(topics: list[list[str]]) -> float:
    """Divide the entropy of topics by its largest value; a document's topics share its weight."""
    weight = dict.fromkeys(TOPICS, 0.0)
    for of_document in topics:
        for topic in of_document:
            weight[topic] += 1 / len(of_document)
    p = np.array([w for w in weight.values() if w])
    return entropy(p / p.sum()) / math.log(len(TOPICS)) if len(p) else 0.0


def entropy(p: np.ndarray) -> float:
    return float(-(p * np.log(p)).sum())


def near_duplicates(signatures: np.ndarray) -> float:
    """Return the share of documents that a chain of near-duplicates connects to an earlier one.

    The Jaccard index is estimated from the signatures uint32 [n, PERMUTATIONS], to +- 0.035.
    """
    bands = minhash.choose_bands(NEAR, minhash.PERMUTATIONS, minhash.RECALL)
    left, right = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for band in range(bands.bands):
        keys = minhash.band_keys(signatures, bands, band)
        for i, j in minhash.bucket_pairs(keys, np.arange(len(signatures))):
            alike = (signatures[i] == signatures[j]).mean(1) >= NEAR
            left.append(i[alike])
            right.append(j[alike])
    root = minhash.components(len(signatures), np.concatenate(left), np.concatenate(right))
    return float((root != np.arange(len(root))).mean())


def distinct(tokens: list[str], n: int) -> float:
    """Divide the number of different n-grams by that of all."""
    grams = list(zip(*(tokens[i:] for i in range(n))))
    return len(set(grams)) / max(len(grams), 1)


def vectors(texts: list[str], config: Config) -> np.ndarray:
    """Return unit vectors [texts, dims]: hidden states, or the set of words, hashed."""
    if config.checkpoint:
        return Hidden(config.checkpoint, [], config.device).vectors(texts).astype(float)
    x = np.zeros((len(texts), VENDI_DIMS))
    for row, text in zip(x, texts):
        of_text = sorted(set(words(text)) - STOP)
        hashes, _ = minhash.shingles([word.encode() for word in of_text], width=1)
        row[hashes % VENDI_DIMS] = 1
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)


def vendi(x: np.ndarray) -> float:
    """Compute the Vendi score (Friedman and Dieng 2023, arXiv 2210.02410) of unit vectors [n, d].

    exp of the entropy of the eigenvalues of their cosines over n: 1 for n equal documents, n for n
    that have nothing in common.
    """
    values = np.linalg.eigvalsh((x @ x.T if len(x) < x.shape[1] else x.T @ x) / len(x))
    values = values[values > 1e-12]
    return math.exp(entropy(values / values.sum())) if len(values) else 1.0


def spread(values: list[int]) -> list[int]:
    return [round(float(q)) for q in np.quantile(values or [0], [0.1, 0.5, 0.9])]


def quantiles(values: list[int]) -> list[float]:
    return [round(float(q), 1) for q in np.quantile(values or [0], np.linspace(0, 1, 51))]


def growth(names: list[str]) -> list[list[int]]:
    """Return (names seen, different ones among them) at 50 points."""
    seen, points, step = set(), [[0, 0]], max(1, len(names) // 50)
    for i, name in enumerate(names, 1):
        seen.add(name)
        if i % step == 0:
            points.append([i, len(seen)])
    return points


def solutions_that_run(problems: list[dict]) -> float | None:
    """Return the share of reference solutions that pass their tests, None where there are none."""
    complete = [p for p in problems if len(p) == len(FIELDS)][:RUN_PROBLEMS]
    if not complete:
        return None
    verdicts = run_checks([check(p, p["canonical_solution"], TIMEOUT_S) for p in complete])
    if any(v.status == "infrastructure" for v in verdicts):
        raise UserError(f"solutions cannot be run here: {verdicts[0].detail}")
    return round(sum(v.status == "passed" for v in verdicts) / len(verdicts), 3)


# ---- The page


def html_page(names: list[str], measured: list[dict]) -> str:
    """Draw tables and pictures of all sets."""
    try:
        from common import pages
    except ImportError:
        raise UserError("the page needs matplotlib: pip install matplotlib") from None
    sets = list(zip(names, measured))
    rows = [[title, *(show(k, m[k]) for m in measured)] for k, (title, _) in MEANINGS.items()]
    meanings = [[title, meaning] for title, meaning in MEANINGS.values() if meaning]
    modules = [[name, ", ".join(f"{m} {n}" for m, n in s["top_modules"].items())]
               for name, s in sets]  # fmt: skip
    number = range(1, len(sets) + 1)
    body = f"""<h1>Diversity</h1>
<p class="note">{pages.escape(", ".join(names))}. Sets are compared on the same amount of text of
each; see data/diversity.py.</p>
{pages.table(["", *names], rows, number)}
<details><summary>How to read it</summary>{pages.table(["", ""], meanings)}</details>
<h2>Topics</h2><p>Share of the documents that have something of each topic.</p>
{pages.figure(draw_topics, sets, pages.COLORS, height=9)}
<h2>Length</h2>
{pages.figure(draw_quantiles, sets, pages.COLORS, "chars", "characters of a document")}
<h2>Difficulty</h2>
{pages.figure(draw_quantiles, sets, pages.COLORS, "complexity", "complexity of a function")}
<h2>Vocabulary</h2><p>A set that runs out of new names bends; one that goes on inventing does
not.</p>{pages.figure(draw_growth, sets, pages.COLORS)}
<h2>Modules</h2><p>How many documents of the sample import them.</p>
{pages.table(["set", "most imported"], modules)}
"""
    return pages.page("Diversity", body)


def show(measured: str, value) -> str:
    if measured.endswith("_frac") and value is not None:
        return f"{100 * value:.3g}%"
    match value:
        case None:
            return "-"
        case list():
            return " / ".join(f"{v:,}" for v in value)
        case int():
            return f"{value:,}"
        case _:
            return f"{value:g}"


def draw_topics(axes, sets: list[tuple[str, dict]], colors: list[str]) -> None:
    height, order = 0.8 / len(sets), list(TOPICS)
    for i, (name, found) in enumerate(sets):
        y = np.arange(len(order)) + (i - (len(sets) - 1) / 2) * height
        shares = [100 * found["topics"][topic] for topic in order]
        axes.barh(y, shares, height, color=colors[i % len(colors)], label=name)
    axes.set_yticks(range(len(order)), order)
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.set_xlabel("% of documents")
    axes.legend(frameon=False, loc="lower right")


def draw_quantiles(axes, sets, colors: list[str], measure: str, label: str) -> None:
    for i, (name, found) in enumerate(sets):
        values = found["curves"][measure]
        shares = np.linspace(0, 100, len(values))
        axes.plot(values, shares, color=colors[i % len(colors)], label=name)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.set_xlabel(label)
    axes.set_ylabel("% that have at most")
    axes.legend(frameon=False)


def draw_growth(axes, sets, colors: list[str]) -> None:
    for i, (name, found) in enumerate(sets):
        axes.plot(*zip(*found["curves"]["names"]), color=colors[i % len(colors)], label=name)
    axes.set_xlabel("names seen")
    axes.set_ylabel("different ones")
    axes.legend(frameon=False)


def main() -> None:
    config = parse(Config)
    summary = diversity(config)
    sets = summary["sets"]
    width = max(24, *map(len, sets)) + 2
    say("".ljust(28) + "".join(f"{name:>{width}}" for name in sets))
    for measured, (title, _) in MEANINGS.items():
        say(
            f"{title:28}"
            + "".join(f"{show(measured, m[measured]):>{width}}" for m in sets.values())
        )
    say(f"page: {config.out / 'index.html'}")


if __name__ == "__main__":
    run(main)
