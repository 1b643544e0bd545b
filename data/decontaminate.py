"""Remove documents too close to benchmark problems, and report how many there are.

    python -m data.decontaminate --source out/exercises/train --out out/clean \\
        --benchmarks HumanEval.jsonl.gz --benchmarks mbpp.jsonl

Following section 5 of the phi-1 paper (arXiv 2306.11644), a document is removed if the AST of one
of its functions matches a problem's solution at a rate of at least `--tau` (data/base/ast_match.py)
*and* passes one of three nearness tests:
    text      word distance below the 1% quantile of distances between the benchmark's problems
    copy      survives renaming: shares COPY_FRAC of external names, attributes and constants, if
              there are at least COPY_WORDS
    certain   a solution of at least SURE_NODES nodes matches at a rate of at least SURE_RATE
PAPER: nearness uses embeddings; neither its threshold nor how it combines with tau is given. Given
solutions with new names and docstrings, `text` catches 10 of HumanEval's 164, `text` or `copy` 153,
all three 158; of MBPP's 974, they catch 65, 702 and 794. At tau 0.8, all three remove 13 of 3,267
third-party files, `text` alone 11; without SURE_RATE they would remove 118.

Documents that share NGRAM consecutive words with a docstring are only counted and reported (the
paper's four were false alarms); `--ngrams` removes them too.

The output holds the remaining documents (shard i is input shard i minus the removed), and
    summary.json            the paper's table: documents removed and similar problems per tau
    report/problems.jsonl   number of close documents per problem and tau (eval/similarity.py
                            splits scores by it)
    report/overlaps/        documents that share words with a docstring: read them
    removed/                removed documents, each with the problem it is close to: read them
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

TAUS = (0.95, 0.9, 0.85, 0.8)  # rows of the paper's table
NGRAM = 13  # words, as in GPT-3 (arXiv 2005.14165, appendix C)
NEAR_FRAC = 0.01  # quantile of distances between different problems that counts as near
FAR = 1.2  # upper bound on near, a cosine of 0.28: the 1% quantile is 1.1955 for HumanEval and
# 1.1401 for MBPP, but a few unrelated problems would give 1.41
COPY_FRAC = 0.8  # share of the rename-invariant words that a copy has in common
COPY_WORDS = 3  # minimum of these words: with fewer, functions match by chance
SURE_NODES, SURE_RATE = 20, 0.95  # solution size and match rate that rule out chance
BATCH_CHARS = 1 << 20  # per screening batch
FUNCTION_CHARS = 1500  # per function shown in removed/
WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class Config:
    """Remove documents too close to benchmark problems; print the paper's table."""

    source: tuple[Path, ...]  # files or folders of documents; repeatable
    out: Path  # folder to write
    benchmarks: tuple[Path, ...]  # problem files: HumanEval's format, mbpp.jsonl or
    # sanitized-mbpp.json; repeatable
    tau: float = 0.95  # minimum AST match rate for a near function to count as too close
    ngrams: bool = False  # true: also remove documents that share a run of words with a docstring


@dataclass
class Hit:
    """Closeness of a document to one problem."""

    problem: Reference
    rate: float = 0.0  # AST match rate
    distance: float = 2.0
    close: bool = False  # near enough for the rate to count
    words: str = ""  # shared with the docstring
    text: str = ""  # the document's function

    def reaches(self, tau: float) -> bool:
        return self.close and self.rate >= tau - 1e-9

    def record(self, document: dict) -> dict:
        """Return the output line for this document and problem."""
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
        """Return the hits of each document: at most one per problem, the closest."""
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
        raise UserError(f"--tau {config.tau:g}: want 0.5 to 1; below it, everything matches")
    problems = [problem for path in config.benchmarks for problem in read_references(path)]
    taus = sorted({*TAUS, config.tau}, reverse=True)
    finder = Finder(problems, min(taus))
    with Stage(config, source_shards(*config.source), config.benchmarks) as stage:
        found = stage.map("screen", stage.shards, lambda part: screen(part, finder, config, taus))
        count = total(found)
        if not count["documents_in"]:
            raise UserError(f"--source {config.source[0]}: no documents found")
        by_problem, removed = count.pop("by_problem"), count.pop("removed_at")
        lines = {}  # keyed by task_id: MBPP may be given as both files
        for task_id in (p.task_id for p in problems):
            close = {t: by_problem.get(task_id, {}).get(t, 0) for t in removed}
            lines[task_id] = {"task_id": task_id, "close": close}
        if stage.ranks.rank == 0:  # a subfolder, so the next stage does not read it
            (stage.result / "report").mkdir(exist_ok=True)
            write_jsonl(stage.result / "report" / "problems.jsonl", lines.values())
        similar = Counter(tau for of_problem in by_problem.values() for tau in of_problem)
        table = {t: {"removed": removed[t], "problems_similar": similar[t]} for t in removed}
        told = {"problems": len(lines), "near": round(finder.near, 4)}
        return stage.finish({**count, "tau": table, **told})


def screen(part: Part, finder: Finder, config: Config, taus: list[float]) -> dict:
    """Write the shard's remaining documents; count close ones per tau."""
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
            gc.disable()  # trees have no cycles, and collection costs a third of parse time
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
    """Count what survives renaming: external names, attributes and constants."""
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
    """Return whether two functions share most of what `lasting` counts."""
    most = max(a.total(), b.total())
    return most >= COPY_WORDS and (a & b).total() >= COPY_FRAC * most


def ngrams(text: str) -> Iterator[tuple[str, ...]]:
    """Yield each run of NGRAM words (ASCII letters and digits), in lower case."""
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
    say(f"{config.out}: kept {s['documents']:,} of {s['documents_in']:,} documents at tau "
        f"{config.tau:g}; near means a distance of at most {s['near']:.4f}")  # fmt: skip


if __name__ == "__main__":
    run(main)
