"""Remove what is too close to a benchmark's problems, and show how much that is.

    python -m data.decontaminate --source out/exercises/train --out out/clean \\
        --benchmarks HumanEval.jsonl.gz --benchmarks mbpp.jsonl

After section 5 of the phi-1 paper (arXiv 2306.11644), a document is removed for either of
    n-grams   it has 13 words in a row in common with the docstring of a problem
    syntax    one of its functions has a match rate of at least `--tau` with the solution of a
              problem (data/base/ast_match.py), and is near it as a text: nearer than all but 1% of
              the benchmarks' own problems are to each other. Without `--checkpoint` it is the
              words in common that count, with it the hidden states (data/base/features.py)
The paper has both measures and gives neither the threshold of distance nor how they combine; both
choices are ours. Short functions are alike by chance, so nearness is asked of them. From
`--sure_nodes` nodes on it is not: a copy under other names with another docstring is a copy.

The output has the documents that stay (shard i is input shard i less what was removed), and
    summary.json            the paper's table: documents removed, problems similar at each tau
    report/pairs.txt        each problem beside its nearest document: read it
    report/problems.jsonl   for each problem its nearest document and, at each tau, how many are
                            close: splits a score into similar and other problems, as in the paper
    removed/                id, origin, problem, rate, distance and shared words of each removed one

A document that is no Python is searched for fenced code blocks; n-grams are sought everywhere.
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
from data.base.features import Hidden, Lexical
from data.base.minhash import shingles
from data.base.ranks import say
from data.base.stage import Part, Stage, total

TAUS = (0.95, 0.9, 0.85, 0.8)  # the rows of the paper's table
FAR = 1.2  # never near from here on, a cosine of 0.28; 1% of HumanEval's pairs are within 1.1955 of
# each other and of MBPP's within 1.1401, but a few unrelated problems are all at 1.41
BATCH_CHARS = 1 << 20  # of documents screened at once
PAIR_CHARS = 1500  # of a function in pairs.txt
FOLD = bytes(b if chr(b).isalnum() and b < 128 else 32 for b in range(256))


@dataclass(frozen=True)
class Config:
    """Remove documents that are close to a benchmark's problems; print the paper's table."""

    source: tuple[Path, ...]  # document shards, files or folders; may be given several times
    out: Path  # folder to write
    benchmarks: tuple[Path, ...]  # problem files: HumanEval's format, mbpp.jsonl or
    # sanitized-mbpp.json; may be given several times
    tau: float = 0.95  # match rate of syntax trees from which a near function is too close
    ngram: int = 13  # words in a row in common with a docstring, 0 = do not look
    checkpoint: str = ""  # run or checkpoint folder whose hidden states give the distance
    near_frac: float = 0.01  # share of the pairs of different problems that are this near
    sure_nodes: int = 20  # from so many nodes of a problem's tree on, the match rate is enough: of
    # 31,000 functions of raw code none reached 0.95 of a larger HumanEval solution, one 0.9
    device: str = "auto"  # of the checkpoint: auto, cpu or cuda


@dataclass
class Hit:
    """A document's closeness to one problem."""

    problem: int
    rate: float = 0.0  # of the syntax trees
    distance: float = 2.0
    close: bool = False  # near enough, or long enough, for the rate to count
    words: str = ""  # in common with the docstring
    text: str = ""  # the document's function, or what stands around the words

    def key(self) -> tuple:
        return (self.close, self.rate, -self.distance)


class Finder:
    """Find documents that are close to problems."""

    def __init__(self, config: Config, problems: list[Reference]):
        self.problems, self.ngram = problems, config.ngram
        self.min_rate = min(TAUS[-1], config.tau)
        self.matcher = Matcher([p.function.nodes for p in problems], self.min_rate)
        texts = [p.function.text for p in problems]
        if config.checkpoint:
            self.measure = Hidden(Path(config.checkpoint), texts, config.device)
        else:
            self.measure = Lexical(texts)
        between = self.measure.distances(texts)[np.triu_indices(len(texts), 1)]
        near = float(np.quantile(between, config.near_frac)) if len(between) else FAR
        self.near = min(near, FAR)
        sizes = np.array([len(p.function.nodes) for p in problems])
        self.sure = sizes >= config.sure_nodes
        self.grams: dict[tuple[str, ...], int] = {}
        for i, problem in enumerate(problems):
            for gram in ngrams(problem.docstring, config.ngram) if config.ngram else ():
                self.grams.setdefault(gram, i)
        hashes, _ = shingles([" ".join(gram).encode() for gram in self.grams], max(config.ngram, 1))
        self.gram_hashes = np.unique(hashes)

    def find(self, texts: list[str]) -> tuple[list[dict[int, Hit]], list[bool]]:
        """Return each document's hits by problem, and whether any Python was found in it."""
        hits: list[dict[int, Hit]] = [{} for _ in texts]
        found = [functions_anywhere(text) for text in texts]
        flat = [(i, f) for i, of_text in enumerate(found) for f in of_text or ()]
        pairs = [
            (at, problem, rate)
            for problem, near, rates in self.matcher.match([f.nodes for _, f in flat])
            for at, rate in zip(near.tolist(), rates.tolist())
        ]
        rows = {at: row for row, at in enumerate(sorted({at for at, _, _ in pairs}))}
        distances = self.measure.distances([flat[at][1].text for at in rows])
        for at, problem, rate in pairs:
            document, function = flat[at]
            distance = float(distances[rows[at], problem])
            close = bool(self.sure[problem] or distance <= self.near)
            hit = Hit(problem, rate, distance, close, "", function.text)
            if problem not in hits[document] or hits[document][problem].key() < hit.key():
                hits[document][problem] = hit
        for document, problem, words in self.shared_words(texts):
            hit = hits[document].setdefault(problem, Hit(problem))
            hit.words, hit.text = words, hit.text or around(texts[document], words)
        return hits, [of_text is not None for of_text in found]

    def shared_words(self, texts: list[str]) -> Iterator[tuple[int, int, str]]:
        """Yield (document, problem, n-gram) for the first n-gram that they share, hashes first."""
        if not self.grams:
            return
        hashes, starts = shingles([fold(text) for text in texts], self.ngram)
        places = np.flatnonzero(np.isin(hashes, self.gram_hashes))
        for document in np.unique(np.searchsorted(starts, places, side="right") - 1).tolist():
            seen = set()
            for gram in ngrams(texts[document], self.ngram):
                problem = self.grams.get(gram)
                if problem is not None and problem not in seen:
                    seen.add(problem)
                    yield document, problem, " ".join(gram)


def decontaminate(config: Config) -> dict:
    """Write `config.out` and return its summary. Raises UserError for a file of no problems."""
    if not 0.5 <= config.tau <= 1:
        raise UserError(f"--tau {config.tau:g}: want 0.5 to 1; at less, everything is alike")
    if config.ngram < 0 or not 0 <= config.near_frac <= 1 or config.sure_nodes < 0:
        raise UserError("want --ngram and --sure_nodes of at least 0, --near_frac from 0 to 1")
    problems = [problem for path in config.benchmarks for problem in read_references(path)]
    taus = sorted({*TAUS, config.tau}, reverse=True)
    shards, finder = source_shards(*config.source), Finder(config, problems)
    reads = [*config.benchmarks, *([finder.measure.folder] if config.checkpoint else [])]
    with Stage(config, shards, reads) as stage:
        results = stage.map(
            "screen", stage.shards, lambda part: screen(part, finder, config.tau, taus)
        )
        count = total(results)
        if not count["documents_in"]:
            raise UserError(f"--source {config.source[0]}: no document there")
        by_problem = count.pop("by_problem")
        if stage.ranks.rank == 0:
            write_report(stage, finder, by_problem, taus)
        for row in count["tau"].values():
            row["problems_similar"] = 0
        for of_tau in by_problem.values():
            for tau in of_tau:
                count["tau"][tau]["problems_similar"] += 1
        count |= {
            "problems": len({p.task_id for p in problems}),  # MBPP may be there in both files
            "problems_without_ngram": len(problems) - len(set(finder.grams.values())),
            "distance": "hidden states" if config.checkpoint else "words in common",
            "near": round(finder.near, 4),
            "options": {k: getattr(config, k) for k in ("tau", "ngram", "near_frac", "sure_nodes")},
        }
        return stage.finish(count)


def screen(part: Part, finder: Finder, tau: float, taus: list[float]) -> dict:
    """Write the shard's documents that stay; count what is close at each tau."""
    count = Counter(documents_in=0, bytes_in=0, removed=0, by_ngram=0, no_python=0)
    table = {f"{t:g}": Counter(removed=0, syntax_alone=0) for t in taus}
    by_problem: dict[str, Counter] = defaultdict(Counter)
    best: dict[str, dict] = {}
    (part.result / "removed").mkdir()
    removed = part.result / "removed" / f"{part.name}.jsonl.zst"
    with part.writer() as kept, DocumentFile(removed) as lines:
        for batch in batched(part.documents(), BATCH_CHARS, chars):
            all_hits, python = finder.find([record["text"] for record in batch])
            count["no_python"] += python.count(False)
            for record, hits in zip(batch, all_hits):
                count["documents_in"] += 1
                count["bytes_in"] += len(record["text"].encode())
                for t in taus:
                    alike = [h for h in hits.values() if h.rate >= t - 1e-9]
                    close = [h for h in alike if h.close]
                    table[f"{t:g}"]["syntax_alone"] += bool(alike)
                    table[f"{t:g}"]["removed"] += bool(close)
                    for h in close:
                        by_problem[finder.problems[h.problem].task_id][f"{t:g}"] += 1
                too_close = [
                    h for h in hits.values() if h.words or (h.close and h.rate >= tau - 1e-9)
                ]
                count["by_ngram"] += any(h.words for h in too_close)
                for hit in hits.values():
                    _keep_best(best, as_record(finder, record, hit, PAIR_CHARS))
                if not too_close:
                    kept.write(record)
                    continue
                count["removed"] += 1
                for hit in too_close:
                    lines.write(as_record(finder, record, hit, 0))
    write_json(part.scratch / f"{part.name}.best.json", best)
    return count | {
        "documents": kept.documents,
        "bytes": kept.bytes,
        "tau": table,
        "by_problem": by_problem,
    }


def as_record(finder: Finder, record: dict, hit: Hit, chars: int) -> dict:
    """Return a document's hit, for a person and for files."""
    return {
        "task_id": finder.problems[hit.problem].task_id,
        "id": record["id"],
        "origin": record["origin"],
        "match_rate": round(hit.rate, 4),
        "distance": round(hit.distance, 4),
        "close": hit.close,
        "words": hit.words,
        **({"function": hit.text[:chars]} if chars else {}),
    }


def write_report(stage: Stage, finder: Finder, by_problem: dict, taus: list[float]) -> None:
    """Write report/problems.jsonl and report/pairs.txt from the nearest documents of all shards."""
    folder = stage.result / "report"  # a folder of its own: the next stage reads *.jsonl beside
    folder.mkdir(exist_ok=True)
    best: dict[str, dict] = {}
    for path in sorted(stage.scratch.glob("*.best.json")):
        for record in json.loads(path.read_text()).values():
            _keep_best(best, record)
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
        for r in sorted(best.values(), key=_rank, reverse=True):
            f.write(
                f"{r['task_id']} | {r['origin']} {r['id']}: match rate {r['match_rate']:.3f}, "
                f"distance {r['distance']:.3f}{', close' if r['close'] else ''}\n"
            )
            f.write(f"words in common: {r['words']}\n" if r["words"] else "")
            f.write(side_by_side(texts[r["task_id"]][:PAIR_CHARS], r["function"]) + "\n")


def _keep_best(best: dict[str, dict], record: dict) -> None:
    """Keep the record if it is the closest of its problem; of equals the smallest id, so that the
    order of documents does not matter."""
    old = best.get(record["task_id"])
    if old is None or _rank(old) < _rank(record):
        best[record["task_id"]] = record


def _rank(record: dict) -> tuple:
    return (
        bool(record["words"]),
        record["close"],
        record["match_rate"],
        -record["distance"],
        -int(record["id"], 16),
    )


def fold(text: str) -> bytes:
    """Return the text's words in lower case: what is no ASCII letter or digit only separates."""
    return text.lower().encode().translate(FOLD)


def ngrams(text: str, width: int) -> Iterator[tuple[str, ...]]:
    words = fold(text).decode().split()
    return (tuple(words[i : i + width]) for i in range(len(words) - width + 1))


def around(text: str, words: str) -> str:
    """Return the lines of a text from shortly before these words, which `ngrams` found in it."""
    found = re.search(r"[\W_]+".join(words.split()), text, re.IGNORECASE)
    return text[text.rfind("\n", 0, max(0, found.start() - 200)) + 1 :] if found else text


def main() -> None:
    config = parse(Config)
    s = decontaminate(config)
    say("  tau   removed   share   by syntax alone   problems similar / not")
    for tau, row in s["tau"].items():
        similar = row["problems_similar"]
        say(
            f"{float(tau):5.2f} {row['removed']:9,} {row['removed'] / s['documents_in']:7.2%} "
            f"{row['syntax_alone']:17,}   {similar:6,} / {s['problems'] - similar:,}"
        )
    if config.ngram:
        say(
            f"{config.ngram}-grams: {s['by_ngram']:,} documents share one with a docstring "
            f"({s['problems_without_ngram']:,} problems are shorter)"
        )
    say(
        f"{config.out}: {s['documents']:,} of {s['documents_in']:,} documents; removed "
        f"{s['removed']:,} at tau {config.tau:g} or by n-grams; near: {s['distance']}, at most "
        f"{s['near']:.4f}"
    )


if __name__ == "__main__":
    run(main)
