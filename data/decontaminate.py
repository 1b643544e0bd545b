"""Remove what is too close to a benchmark's problems, and show how much that is.

    python -m data.decontaminate --source out/exercises/train --out out/clean \\
        --benchmarks HumanEval.jsonl.gz --benchmarks mbpp.jsonl

After section 5 of the phi-1 paper (arXiv 2306.11644), a document is removed for either of
    n-grams   it shares 13 words in a row with the docstring of a problem
    syntax    one of its functions has a match rate of at least `--tau` with the solution of a
              problem (data/base/ast_match.py), and is near it as a text: nearer, by the words they
              share, than all but 1% of the benchmarks' own problems are to each other
PAPER: it has both measures, the second on embeddings, and gives neither the threshold of distance
nor how they combine. Short functions are alike by chance, so they must be near, too; from
SURE_NODES nodes on they need not: a copy under other names with another docstring is a copy.

The output has the documents that stay (shard i is input shard i less what was removed), and
    summary.json            the paper's table: documents removed, problems similar at each tau
    report/pairs.txt        each problem beside its nearest document: read it
    report/problems.jsonl   for each problem its nearest document and, at each tau, how many are
                            close (eval/similarity.py splits scores by it)
    removed/                each removed document with the problem it is close to
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.config import UserError, parse, run
from common.files import write_json, write_jsonl
from data.base.ast_match import Matcher, functions_anywhere
from data.base.benchmarks import Reference, read_references
from data.base.documents import DocumentFile, batched, chars, side_by_side, source_shards
from data.base.features import Lexical
from data.base.ranks import say
from data.base.stage import Part, Stage, total

TAUS = (0.95, 0.9, 0.85, 0.8)  # the rows of the paper's table
NGRAM = 13  # words; as GPT-3 (arXiv 2005.14165, appendix C)
NEAR_FRAC = 0.01  # share of the pairs of different problems that are this near
FAR = 1.2  # never near from here on, a cosine of 0.28; 1% of HumanEval's pairs are within 1.1955 of
# each other and of MBPP's within 1.1401, but a few unrelated problems are all at 1.41
SURE_NODES = 20  # of a problem's tree: of 31,000 functions of raw code none reached a rate of 0.95
# with a larger HumanEval solution, and one 0.9
BATCH_CHARS = 1 << 20  # of documents screened at once
PAIR_CHARS = 1500  # of a function in pairs.txt
WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class Config:
    """Remove documents that are close to a benchmark's problems; print the paper's table."""

    source: tuple[Path, ...]  # document shards, files or folders; may be given several times
    out: Path  # folder to write
    benchmarks: tuple[Path, ...]  # problem files: HumanEval's format, mbpp.jsonl or
    # sanitized-mbpp.json; may be given several times
    tau: float = 0.95  # match rate of syntax trees from which a near function is too close


@dataclass
class Hit:
    """How close a document is to one problem."""

    problem: Reference
    rate: float = 0.0  # match rate of the syntax trees
    distance: float = 2.0
    close: bool = False  # near enough, or long enough, for the rate to count
    words: str = ""  # shared with the docstring
    text: str = ""  # the document's function, or the lines around the words

    def reaches(self, tau: float) -> bool:
        return self.close and self.rate >= tau - 1e-9

    def record(self, document: dict) -> dict:
        """Return a line of the output about this document and problem."""
        return {
            "task_id": self.problem.task_id,
            "id": document["id"],
            "origin": document["origin"],
            "match_rate": round(self.rate, 4),
            "distance": round(self.distance, 4),
            "close": self.close,
            "words": self.words,
        }


class Finder:
    """Find documents that are close to problems."""

    def __init__(self, problems: list[Reference], min_rate: float):
        self.problems = problems
        self.matcher = Matcher([p.function.nodes for p in problems], min_rate)
        texts = [p.function.text for p in problems]
        self.lexical = Lexical(texts)
        between = self.lexical.distances(texts)[np.triu_indices(len(texts), 1)]
        self.near = min(FAR, float(np.quantile(between, NEAR_FRAC))) if len(between) else FAR
        self.grams: dict[tuple[str, ...], int] = {}
        for i, problem in enumerate(problems):
            for gram in ngrams(problem.docstring):
                self.grams.setdefault(gram, i)

    def find(self, texts: list[str]) -> list[list[Hit]]:
        """Return the hits of each document, at most one a problem: the closest."""
        hits: list[dict[int, Hit]] = [{} for _ in texts]
        flat = [(i, f) for i, text in enumerate(texts) for f in functions_anywhere(text) or ()]
        pairs = list(self.matcher.match([f.nodes for _, f in flat]))
        row = {at: n for n, at in enumerate(dict.fromkeys(at for _, at, _ in pairs))}
        distances = self.lexical.distances([flat[at][1].text for at in row])
        for number, at, rate in pairs:
            (document, function), problem = flat[at], self.problems[number]
            distance = float(distances[row[at], number])
            close = distance <= self.near or len(problem.function.nodes) >= SURE_NODES
            hit = Hit(problem, rate, distance, close, text=function.text)
            old = hits[document].get(number)
            if not old or (old.close, old.rate, -old.distance) < (close, rate, -distance):
                hits[document][number] = hit
        for text, of_text in zip(texts, hits):
            for gram in ngrams(text):
                if (number := self.grams.get(gram)) is not None:
                    hit = of_text.setdefault(number, Hit(self.problems[number]))
                    hit.words = hit.words or " ".join(gram)
                    hit.text = hit.text or around(text, hit.words)
        return [list(of_text.values()) for of_text in hits]


def decontaminate(config: Config) -> dict:
    """Write `config.out` and return its summary. Raises UserError for a file without problems."""
    if not 0.5 <= config.tau <= 1:
        raise UserError(f"--tau {config.tau:g}: want 0.5 to 1; at less, everything is alike")
    problems = [problem for path in config.benchmarks for problem in read_references(path)]
    taus = sorted({*TAUS, config.tau}, reverse=True)
    finder = Finder(problems, min(taus))
    with Stage(config, source_shards(*config.source), config.benchmarks) as stage:
        results = stage.map(
            "screen", stage.shards, lambda part: screen(part, finder, config.tau, taus)
        )
        count = total(results)
        if not count["documents_in"]:
            raise UserError(f"--source {config.source[0]}: no document there")
        by_problem, removed = count.pop("by_problem"), count.pop("removed_at")
        if stage.ranks.rank == 0:
            write_report(stage, finder, by_problem, taus)
        similar = Counter(tau for of_problem in by_problem.values() for tau in of_problem)
        count |= {
            "tau": {t: {"removed": removed[t], "problems_similar": similar[t]} for t in removed},
            "problems": len({p.task_id for p in problems}),  # MBPP may be there in both files
            "distance": "words in common",
            "near": round(finder.near, 4),
            "options": {"tau": config.tau},
        }
        return stage.finish(count)


def screen(part: Part, finder: Finder, tau: float, taus: list[float]) -> dict:
    """Write the shard's documents that stay; count those close at each tau."""
    count = Counter(documents_in=0, bytes_in=0, removed=0, by_ngram=0)
    removed_at = {f"{t:g}": 0 for t in taus}
    by_problem: dict[str, Counter] = defaultdict(Counter)
    best: dict[str, dict] = {}
    (part.result / "removed").mkdir()
    removed = part.result / "removed" / f"{part.name}.jsonl.zst"
    with part.writer() as kept, DocumentFile(removed) as lines:
        for batch in batched(part.documents(), BATCH_CHARS, chars):
            for document, hits in zip(batch, finder.find([d["text"] for d in batch])):
                for t in taus:
                    close = [hit.problem.task_id for hit in hits if hit.reaches(t)]
                    removed_at[f"{t:g}"] += bool(close)
                    for task_id in close:
                        by_problem[task_id][f"{t:g}"] += 1
                for hit in hits:
                    keep_best(best, hit.record(document) | {"function": hit.text[:PAIR_CHARS]})
                too_close = [hit for hit in hits if hit.words or hit.reaches(tau)]
                count["documents_in"] += 1
                count["bytes_in"] += len(document["text"].encode())
                count["removed"] += bool(too_close)
                count["by_ngram"] += any(hit.words for hit in hits)
                for hit in too_close:
                    lines.write(hit.record(document))
                if not too_close:
                    kept.write(document)
    write_json(part.scratch / f"{part.name}.best.json", best)
    written = {"documents": kept.documents, "bytes": kept.bytes}
    return {**count, **written, "removed_at": removed_at, "by_problem": by_problem}


def write_report(stage: Stage, finder: Finder, by_problem: dict, taus: list[float]) -> None:
    """Write report/problems.jsonl and report/pairs.txt from the nearest documents of all shards."""
    folder = stage.result / "report"  # a folder of its own: the next stage reads *.jsonl beside
    folder.mkdir(exist_ok=True)
    best: dict[str, dict] = {}
    for path in sorted(stage.scratch.glob("*.best.json")):
        for record in json.loads(path.read_text()).values():
            keep_best(best, record)
    lines = []
    for p in finder.problems:
        close = {f"{t:g}": by_problem.get(p.task_id, {}).get(f"{t:g}", 0) for t in taus}
        nearest = {k: v for k, v in best.get(p.task_id, {}).items() if k != "function"} or None
        nodes = len(p.function.nodes)
        lines.append({"task_id": p.task_id, "nodes": nodes, "close": close, "nearest": nearest})
    write_jsonl(folder / "problems.jsonl", lines)
    texts = {p.task_id: p.function.text for p in finder.problems}
    with open(folder / "pairs.txt", "w", encoding="utf-8") as f:
        f.write(f"Near is a distance of at most {finder.near:.4f}.\n\n")
        for r in sorted(best.values(), key=closeness, reverse=True):
            f.write(
                f"{r['task_id']} | {r['origin']} {r['id']}: match rate {r['match_rate']:.3f}, "
                f"distance {r['distance']:.3f}{', close' if r['close'] else ''}\n"
            )
            f.write(f"words in common: {r['words']}\n" if r["words"] else "")
            f.write(side_by_side(texts[r["task_id"]][:PAIR_CHARS], r["function"]) + "\n")


def keep_best(best: dict[str, dict], record: dict) -> None:
    """Keep the record if it is the closest of its problem."""
    old = best.get(record["task_id"])
    if old is None or closeness(old) < closeness(record):
        best[record["task_id"]] = record


def closeness(record: dict) -> tuple:
    """Return what orders records; the id last, so that the order of documents does not matter."""
    rate, distance = record["match_rate"], record["distance"]
    return bool(record["words"]), record["close"], rate, -distance, -int(record["id"], 16)


def ngrams(text: str) -> Iterator[tuple[str, ...]]:
    """Yield every NGRAM words in a row, in lower case; only ASCII letters and digits are words."""
    words = WORD.findall(text.lower())
    return zip(*(words[i:] for i in range(NGRAM)))


def around(text: str, words: str) -> str:
    """Return the lines of a text from shortly before these words, which `ngrams` found in it."""
    found = re.search(r"[\W_]+".join(words.split()), text, re.IGNORECASE)
    return text[text.rfind("\n", 0, max(0, found.start() - 200)) + 1 :] if found else text


def main() -> None:
    config = parse(Config)
    s = decontaminate(config)
    say("  tau   removed   share   problems similar / not")
    for tau, row in s["tau"].items():
        n, similar = row["removed"], row["problems_similar"]
        share, other = n / s["documents_in"], s["problems"] - similar
        say(f"{float(tau):5.2f} {n:9,} {share:7.2%}   {similar:6,} / {other:,}")
    say(f"{NGRAM}-grams: {s['by_ngram']:,} documents share one with a docstring")
    say(
        f"{config.out}: {s['documents']:,} of {s['documents_in']:,} documents; removed "
        f"{s['removed']:,} at tau {config.tau:g} or by n-grams; near: at most {s['near']:.4f}"
    )


if __name__ == "__main__":
    run(main)
