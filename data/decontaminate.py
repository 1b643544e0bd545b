"""Remove what is too close to a benchmark's problems, and show how much that is.

    python -m data.decontaminate --source out/exercises/train --out out/clean \\
        --benchmarks HumanEval.jsonl.gz --benchmarks mbpp.jsonl

After section 5 of the phi-1 paper (arXiv 2306.11644), a document is removed if one of its functions
has a match rate of at least `--tau` with the solution of a problem (data/base/ast_match.py) *and*
is near it, in one of three ways:
    as a text     nearer, by the words they share, than all but 1% of the benchmarks' own problems
                  are to each other
    as a copy     under any names: COPY_FRAC of names from outside, attributes and constants, and
                  COPY_WORDS at least, are the same
    for certain   SURE_NODES nodes or more match at a rate of SURE_RATE
PAPER: nearness is by embeddings; neither the threshold nor how the two combine is given. Of
HumanEval's 164 solutions under other names and docstrings 10 are near as a text, 153 as a text or
copy, 158 in one of the three; of MBPP's 974 it is 65, 702 and 794. In 3,267 files of other people's
code the three remove 13 at tau 0.8; the first alone 11, and with no SURE_RATE it would be 118.

A document that shares NGRAM words in a row with a docstring is counted and reported; the paper's
four such were false alarms. `--ngrams` removes it, too.

The output has the documents that stay (shard i is input shard i less what was removed), and
    summary.json            the paper's table: documents removed, problems similar at each tau
    report/problems.jsonl   how many documents are close to each problem at each tau
                            (eval/similarity.py splits scores by it)
    report/overlaps/        each document that shares words with a docstring: read it
    removed/                each removed document with the problem it is close to: read it
"""

import ast
import gc
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.config import UserError, parse, run
from common.files import write_jsonl
from data.base.ast_match import Function, Matcher, functions_anywhere
from data.base.benchmarks import Reference, read_references
from data.base.documents import DocumentFile, batched, chars, source_shards
from data.base.features import Lexical
from data.base.ranks import say
from data.base.stage import Part, Stage, total
from data.base.syntax import FUNCTIONS, docstring, parse_python

TAUS = (0.95, 0.9, 0.85, 0.8)  # the rows of the paper's table
NGRAM = 13  # words; as GPT-3 (arXiv 2005.14165, appendix C)
NEAR_FRAC = 0.01  # share of the pairs of different problems that are this near
FAR = 1.2  # never near from here on, a cosine of 0.28; 1% of HumanEval's pairs are within 1.1955 of
# each other and of MBPP's within 1.1401, but a few unrelated problems are all at 1.41
COPY_FRAC = 0.8  # of what stays under other names, the share that a copy has in common
COPY_WORDS = 3  # of that, at least: with fewer, functions are alike by chance
SURE_NODES, SURE_RATE = 20, 0.95  # of a problem's tree: what matches so much is no chance
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
    ngrams: bool = False  # true: remove what shares words with a docstring, too


@dataclass
class Hit:
    """How close a document is to one problem."""

    problem: Reference
    rate: float = 0.0  # match rate of the syntax trees
    distance: float = 2.0
    close: bool = False  # near enough for the rate to count
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
        self.lasting = [lasting(text) for text in texts]
        self.near = min(FAR, float(np.quantile(between, NEAR_FRAC))) if len(between) else FAR
        self.grams: dict[tuple[str, ...], int] = {}
        for i, problem in enumerate(problems):
            for gram in ngrams(problem.docstring):
                self.grams.setdefault(gram, i)

    def find(self, texts: list[str], functions: list[list[Function]]) -> list[list[Hit]]:
        """Return the hits of each document, at most one a problem: the closest."""
        hits: list[dict[int, Hit]] = [{} for _ in texts]
        flat = [(i, function) for i, found in enumerate(functions) for function in found]
        pairs = list(self.matcher.match([f.nodes for _, f in flat]))
        row = {at: n for n, at in enumerate(dict.fromkeys(at for _, at, _ in pairs))}
        matched = [flat[at][1].text for at in row]
        distances, kept = self.lexical.distances(matched), [lasting(text) for text in matched]
        for number, at, rate in pairs:
            (document, function), problem = flat[at], self.problems[number]
            distance = float(distances[row[at], number])
            close = (
                distance <= self.near
                or same(kept[row[at]], self.lasting[number])
                or (rate >= SURE_RATE and len(problem.function.nodes) >= SURE_NODES)
            )
            hit = Hit(problem, rate, distance, close, text=function.text)
            old = hits[document].get(number)
            if not old or (old.close, old.rate, -old.distance) < (close, rate, -distance):
                hits[document][number] = hit
        for text, of_text in zip(texts, hits):
            for gram in filter(self.grams.__contains__, ngrams(text)):
                number = self.grams[gram]
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
        found = stage.map("screen", stage.shards, lambda part: screen(part, finder, config, taus))
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


def screen(part: Part, finder: Finder, config: Config, taus: list[float]) -> dict:
    """Write the shard's documents that stay; count those close at each tau."""
    count = Counter(documents_in=0, no_python=0, removed=0, by_ngram=0)
    removed_at = {f"{t:g}": 0 for t in taus}
    by_problem: dict[str, Counter] = defaultdict(Counter)
    folders = [part.result / name for name in ("removed", "report/overlaps")]
    for folder in folders:
        folder.mkdir(parents=True)
    removed, overlaps = (DocumentFile(folder / f"{part.name}.jsonl.zst") for folder in folders)
    with part.writer() as kept, removed, overlaps:
        for batch in batched(part.documents(), BATCH_CHARS, chars):
            texts = [document["text"] for document in batch]
            gc.disable()  # trees are large, and free of cycles: a third of the time to parse
            functions = [functions_anywhere(text) for text in texts]
            gc.enable()
            count["no_python"] += functions.count(None)
            found = finder.find(texts, [of_text or [] for of_text in functions])
            for document, hits in zip(batch, found):
                for t in taus:
                    close = [hit.problem.task_id for hit in hits if hit.reaches(t)]
                    removed_at[f"{t:g}"] += bool(close)
                    for task_id in close:
                        by_problem[task_id][f"{t:g}"] += 1
                words = [hit for hit in hits if hit.words]
                too_close = [hit for hit in hits if hit.reaches(config.tau)]
                too_close += words if config.ngrams and not too_close else []
                for file, told in ((removed, too_close), (overlaps, words)):
                    for hit in told:
                        file.write(hit.record(document))
                if not too_close:
                    kept.write(document)
                count["documents_in"] += 1
                count["removed"] += bool(too_close)
                count["by_ngram"] += bool(words)
    written = {"documents": kept.documents, "bytes": kept.bytes}
    return {**count, **written, "removed_at": removed_at, "by_problem": by_problem}


def lasting(text: str) -> Counter:
    """Count what a copy has under any names: names from outside, attributes, constants."""
    try:
        nodes = list(ast.walk(parse_python(text)))
    except SyntaxError:
        return Counter()
    own = {getattr(n, "arg", getattr(n, "name", None)) for n in nodes}
    own |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    texts = [id(docstring(n)) for n in nodes if isinstance(n, (*FUNCTIONS, ast.Module))]
    found = Counter(n.id for n in nodes if isinstance(n, ast.Name) and n.id not in own)
    found.update("." + n.attr for n in nodes if isinstance(n, ast.Attribute))
    constants = (n for n in nodes if isinstance(n, ast.Constant) and id(n) not in texts)
    found.update(repr(n.value) for n in constants)
    return found


def same(a: Counter, b: Counter) -> bool:
    """Return whether two functions have in common what `lasting` counts."""
    most = max(a.total(), b.total())
    return most >= COPY_WORDS and (a & b).total() >= COPY_FRAC * most


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
    say(f"{NGRAM}-grams: {s['by_ngram']:,} documents share one with a docstring: "
        f"{'removed' if config.ngrams else 'see report/overlaps'}")  # fmt: skip
    say(f"{s['no_python']:,} documents have no Python to compare")
    say(f"{config.out}: {s['documents']:,} of {s['documents_in']:,} documents stay, at tau "
        f"{config.tau:g}; near: at most {s['near']:.4f}")  # fmt: skip


if __name__ == "__main__":
    run(main)
