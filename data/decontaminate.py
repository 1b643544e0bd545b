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
    report/problems.jsonl   how many documents are close to each problem at each tau
                            (eval/similarity.py splits scores by it)
    removed/                each removed document with the problem it is close to: read it
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.config import UserError, parse, run
from common.files import write_jsonl
from data.base.ast_match import Matcher, functions_anywhere
from data.base.benchmarks import Reference, read_references
from data.base.documents import DocumentFile, batched, chars, source_shards
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
FUNCTION_CHARS = 1500  # of a function in removed/
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
    text: str = ""  # the document's function

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
            "function": self.text[:FUNCTION_CHARS],
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
        flat = [(i, f) for i, text in enumerate(texts) for f in functions_anywhere(text)]
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
        return [list(of_text.values()) for of_text in hits]


def decontaminate(config: Config) -> dict:
    """Write `config.out` and return its summary. Raises UserError for a file without problems."""
    if not 0.5 <= config.tau <= 1:
        raise UserError(f"--tau {config.tau:g}: want 0.5 to 1; at less, everything is alike")
    problems = [problem for path in config.benchmarks for problem in read_references(path)]
    taus = sorted({*TAUS, config.tau}, reverse=True)
    finder = Finder(problems, min(taus))
    with Stage(config, source_shards(*config.source), config.benchmarks) as stage:
        found = stage.map("screen", stage.shards, lambda p: screen(p, finder, config.tau, taus))
        count = total(found)
        if not count["documents_in"]:
            raise UserError(f"--source {config.source[0]}: no document there")
        by_problem, removed = count.pop("by_problem"), count.pop("removed_at")
        lines = {}  # by task_id: MBPP may be there in both files
        for task_id in (p.task_id for p in problems):
            close = {t: by_problem.get(task_id, {}).get(t, 0) for t in removed}
            lines[task_id] = {"task_id": task_id, "close": close}
        if stage.ranks.rank == 0:  # a folder of its own: the next stage reads *.jsonl beside
            (stage.result / "report").mkdir(exist_ok=True)
            write_jsonl(stage.result / "report" / "problems.jsonl", lines.values())
        similar = Counter(tau for of_problem in by_problem.values() for tau in of_problem)
        table = {t: {"removed": removed[t], "problems_similar": similar[t]} for t in removed}
        told = {"problems": len(lines), "near": round(finder.near, 4)}
        return stage.finish({**count, "tau": table, **told})


def screen(part: Part, finder: Finder, tau: float, taus: list[float]) -> dict:
    """Write the shard's documents that stay; count those close at each tau."""
    count = Counter(documents_in=0, removed=0, by_ngram=0)
    removed_at = {f"{t:g}": 0 for t in taus}
    by_problem: dict[str, Counter] = defaultdict(Counter)
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
                too_close = [hit for hit in hits if hit.words or hit.reaches(tau)]
                for hit in too_close:
                    lines.write(hit.record(document))
                if not too_close:
                    kept.write(document)
                count["documents_in"] += 1
                count["removed"] += bool(too_close)
                count["by_ngram"] += any(hit.words for hit in hits)
    written = {"documents": kept.documents, "bytes": kept.bytes}
    return {**count, **written, "removed_at": removed_at, "by_problem": by_problem}


def ngrams(text: str) -> Iterator[tuple[str, ...]]:
    """Yield every NGRAM words in a row, in lower case; only ASCII letters and digits are words."""
    words = WORD.findall(text.lower())
    return zip(*(words[i:] for i in range(NGRAM)))


def main() -> None:
    config = parse(Config)
    s = decontaminate(config)
    say("  tau   removed   share   problems similar / not")
    for tau, row in s["tau"].items():
        n, similar = row["removed"], row["problems_similar"]
        share, other = n / s["documents_in"], s["problems"] - similar
        say(f"{float(tau):5.2f} {n:9,} {share:7.2%}   {similar:6,} / {other:,}")
    say(f"{NGRAM}-grams: {s['by_ngram']:,} documents share one with a docstring")
    say(f"{config.out}: {s['documents']:,} of {s['documents_in']:,} documents stay, at tau "
        f"{config.tau:g} and by n-grams; near: at most {s['near']:.4f}")  # fmt: skip


if __name__ == "__main__":
    run(main)
