"""Read the folder of a ladder (experiments/ladder.py): its rungs, scores, and what differs.

ladder_page.py draws it. What a rung was not asked is absent, never zero.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from common.config import UserError
from common.files import read_json
from data.base.stage import describe, files_in
from eval.robustness import paired
from eval.scores import Result, mean, percent, read_result, wilson
from eval.similarity import read_report, split
from tools.curves import read_run

# The rungs, first to last, as a bar's name.
RUNGS = {
    "raw": "raw code",
    "filtered": "filtered\nby rules",
    "classified": "filtered by\nclassifier",
    "textbooks": "+ textbooks",
    "base": "before\nfinetuning",
    "exercises": "then\nexercises",
    "varied": "in many\nforms",
    "damaged": "half\ndamaged",
    "pairs": "pairs cut\nfrom raw",
    "pruned95": "pruned\nat .95",
    "pruned90": "pruned\nat .90",
    "pruned85": "pruned\nat .85",
    "pruned80": "pruned\nat .80",
}
PRUNED = [rung for rung in RUNGS if rung.startswith("pruned")]
LADDER = [rung for rung in RUNGS if rung not in PRUNED]
SETS = {
    "heldout": "held-out exercises, families seen in training",
    "unseen": "exercises of unseen families",
    "humaneval": "HumanEval",
    "mbpp": "MBPP",
}
STEPS = [("raw", "filtered"), ("raw", "classified"), ("filtered", "classified"),
         ("classified", "textbooks"), ("base", "exercises"), ("textbooks", "exercises"),
         ("pairs", "exercises"), ("exercises", "varied"), ("exercises", "damaged")]  # fmt: skip
PAIRS_EACH = 3  # nearest pairs that are shown of each file of problems
# What the paper prints (Textbooks Are All You Need, arXiv 2306.11644).
FIGURE_2_1 = {  # HumanEval pass@1, %; 76 billion tokens
    ("The Stack", "350M"): 12,
    ("CodeTextbook", "350M"): 20,
    ("CodeTextbook,\nthen CodeExercises", "350M"): 45,
    ("The Stack", "1.3B"): 17,
    ("CodeTextbook", "1.3B"): 29,
    ("CodeTextbook,\nthen CodeExercises", "1.3B"): 51,
}
SECTION_5 = """
0.95  42.5k  71/93   81.7  26.9  50.6  74.6  32.3  50.6
0.90  -      93/71   63.4  33.8  50.6  51.6  36.6  45.1
0.85  -      106/58  62.3  29.3  50.6  52.8  34.5  46.3
0.80  354k   116/48  59.5  29.2  50.6  52.6  27.1  45.1
"""  # tau, exercises removed, problems similar/not, phi-1 and the retrained: similar, not, total


@dataclass(frozen=True)
class Rung:
    """One model that was scored."""

    folder: Path
    about: dict  # rung.json
    runs: list[dict]  # curves.read_run of its runs, first to last, and their summary.json
    results: dict[str, Result]  # of SETS
    more: dict[str, dict]  # robustness, bits, library: what they wrote

    @property
    def key(self) -> tuple[str, str]:
        return self.about["rung"], self.about["size"]


@dataclass(frozen=True, eq=False)
class Ladder:
    folder: Path
    rungs: list[Rung]  # in their order, small before large, and by seed
    sizes: dict[str, str]  # {size: its name}, small to large
    unfinished: list[str]  # folders of rungs without a rung.json

    @property
    def sets(self) -> list[str]:
        """The sets of problems that any rung was scored on."""
        return [s for s in SETS if any(s in r.results for r in self.rungs)]

    def of(self, rung: str, size: str) -> list[Rung]:
        """The seeds of a rung."""
        return [r for r in self.rungs if r.key == (rung, size)]

    @cache  # noqa: B019, a process has one ladder
    def rates(self, rung: str, size: str, name: str) -> dict[str, float]:
        """{task_id: share solved}, over the samples and the seeds; {} if not run."""
        seeds = [r.results[name].rates() for r in self.of(rung, size) if name in r.results]
        common = set.intersection(*map(set, seeds)) if seeds else ()
        return {t: sum(s[t] for s in seeds) / len(seeds) for t in sorted(common)}

    def scores(self, name: str) -> dict[tuple[str, str], dict]:
        """{(rung, size): {"value", "low", "high", "seeds"}} in %: the mean over the seeds, and its
        interval over the problems."""
        found = {}
        for key in dict.fromkeys(r.key for r in self.rungs):
            results = [r.results[name].result for r in self.of(*key) if name in r.results]
            if results:
                seeds = [r["pass@1"] for r in results]
                frac = sum(seeds) / len(seeds)
                low, high = wilson(frac, results[0]["problems"])
                found[key] = {"value": 100 * frac, "low": 100 * low, "high": 100 * high,
                              "seeds": [100 * s for s in seeds]}  # fmt: skip
        return found


def read_ladder(folder: Path) -> Ladder:
    """The finished rungs in their order. Raises UserError if there is none."""
    found, unfinished = [], []
    for path in sorted(p for p in (folder / "rungs").glob("*") if p.is_dir()):
        about = read_json(path / "rung.json")
        if about is None:
            unfinished.append(path.name)
            continue
        asked = [s for s in SETS if s in about["scores"]]  # what else is there may be of before
        results = {s: read_result(path / s) for s in asked}
        more = {"robustness": path / "robustness" / "results.json", "bits": path / "bits.json",
                "library": path / "library.json"}  # fmt: skip
        more = {name: there for name, file in more.items() if (there := read_json(file))}
        runs = [read_run(folder / run) | {"name": run} for run in about["runs"]]
        for run in runs:
            run["summary"] = read_json(folder / run["name"] / "summary.json") or {}
        found.append(Rung(path, about, runs, results, more))
    if not any(r.results for r in found):
        raise UserError(
            f"{folder}: no finished rung with a score in rungs/; "
            "run `python -m experiments.ladder` first"
        )
    parameters = {r.about["size"]: r.about["parameters"] for r in found}
    sizes = {s: f"{s}, {n / 1e6:.3g}M parameters"
             for s, n in sorted(parameters.items(), key=lambda item: item[1])}  # fmt: skip
    order = [*RUNGS, *sorted({r.about["rung"] for r in found} - RUNGS.keys())]
    found.sort(key=lambda r: (order.index(r.key[0]), [*sizes].index(r.key[1]), r.about["seed"]))
    return Ladder(folder, found, sizes, unfinished)


# ---- Comparing


def gain(ladder: Ladder, before: tuple, after: tuple, name: str) -> dict | None:
    """{"gain", "ci95", "problems"} of pass@1 from one (rung, size) to another, by problem."""
    a, b = ladder.rates(*before, name), ladder.rates(*after, name)
    if not (common := [t for t in a if t in b]):
        return None
    found = paired([b[t] for t in common], [a[t] for t in common])  # by how much b is above a
    return {"gain": found["drop"], "ci95": found["ci95"], "problems": found["problems"]}


def comparisons(ladder: Ladder) -> list[tuple[str, tuple, tuple]]:
    """(table, before, after) of everything that is compared problem by problem."""
    sizes = [*ladder.sizes]
    pairs = [("data", (a, size), (b, size)) for size in sizes for a, b in STEPS]
    for small, large in pairwise(sizes):
        pairs += [("size", (rung, small), (rung, large)) for rung in LADDER]
        pairs.append(("size", ("raw", large), ("exercises", small)))
    return [p for p in pairs if ladder.of(*p[1]) and ladder.of(*p[2])]


def pruning(ladder: Ladder) -> list[dict]:
    """A row for each size, set of problems and tau: scores on similar problems and on others."""
    rows = []
    for size in ladder.sizes:
        for name in ("heldout", "humaneval", "mbpp"):  # unseen exercises have no report
            for rung in PRUNED:
                folder = ladder.folder / "data" / f"decontaminate_{rung[-2:]}"
                summary = read_json(folder / "summary.json")
                base = ladder.rates("exercises", size, name)
                if summary is None or not base:
                    continue
                close = read_report(folder / "report" / "problems.jsonl")
                if not base.keys() <= close.keys():
                    continue
                row = {"size": size, "set": name, "tau": int(rung[-2:]) / 100,
                       "removed": summary["removed"], "of": summary["documents_in"]}  # fmt: skip
                for rates, of in ((base, "exercises"), (ladder.rates(rung, size, name), "pruned")):
                    here = split(rates, close, f"{row['tau']:g}") if rates else {}
                    scores = {k: here.get(k) for k in ("similar", "other")}
                    row[of] = scores | {"total": mean([*rates.values()])}
                rows.append(row)
    return rows


# ---- All of it


def decontamination(ladder: Ladder) -> list[tuple[str, dict, int]]:
    """(tau, summary.json, problems similar at it) of each data/decontaminate_TT, large to small."""
    found = []
    for folder in sorted((ladder.folder / "data").glob("decontaminate_*"), reverse=True):
        if summary := read_json(folder / "summary.json"):
            tau = f"{summary['options']['tau']:g}"
            found.append((f"{float(tau):.2f}", summary, summary["tau"][tau]["problems_similar"]))
    return found


def nearest_pairs(path: Path) -> str:
    """The first pairs of each kind of problem in report/pairs.txt, which has the nearest first."""
    by_kind: dict[str, list[str]] = {}
    for pair in re.split(r"\n(?=\S+ \| .+: match rate )", path.read_text(encoding="utf-8"))[1:]:
        by_kind.setdefault(pair.split("/")[0], []).append(pair)
    return "\n".join(pair for pairs in by_kind.values() for pair in pairs[:PAIRS_EACH])


def lineage(ladder: Ladder) -> list[dict]:
    """Of each run the hashes of all that went into it, and of its weights."""
    found = {}
    for run in (run for rung in ladder.rungs for run in rung.runs):
        config = (ladder.folder / run["name"] / "config.json").read_bytes()
        keys = ("data_checksum", "tokenizer", "init_checksum")
        of = {k: str(run["config"].get(k) or "")[:12] for k in keys}
        of |= {"weights": run["summary"].get("weights"), "config": _hash(config)}
        found[run["name"]] = {"run": run["name"], **of, "code": run["config"].get("code"),
                              "commit": run["config"].get("commit")}  # fmt: skip
    return list(found.values())


def data_lineage(folder: Path) -> list[dict]:
    """Of each folder of data: its documents, and hashes of the code that wrote it and of it."""
    found = []
    for path in sorted(folder.rglob("summary.json")):
        here = path.parent
        told = read_json(here / "lineage.json") or {}
        files = told.get("outputs") or [
            describe(f) | {"path": f.relative_to(here).as_posix()}
            for f in files_in(here)
            if f.name != "summary.json"
        ]
        content = "".join(sorted(f"{f['path']} {f['blake2b']}\n" for f in files))
        found.append({"data": here.relative_to(folder).as_posix(),
                      "documents": read_json(path).get("documents", ""),
                      "code": told.get("code", "")[:12],
                      "content": _hash(content.encode())})  # fmt: skip
    return found


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=6).hexdigest()


def numbers(ladder: Ladder) -> dict:
    """All that the figures show, without machine paths."""
    keys = ("pass@1", "ci95", "problems", "protocol", "prompts_too_long")
    kept = {"robustness": (*keys, "perturbations"), "bits": ("bits_per_byte", "ci95", "bytes"),
            "library": ("right_frac", "ci95", "baseline_frac", "places")}  # fmt: skip
    diversity = read_json(ladder.folder / "data" / "diversity" / "summary.json") or {"sets": {}}
    for measured in diversity["sets"].values():
        for key in ("topics", "top_modules", "curves"):
            measured.pop(key, None)
    return {
        "rungs": [
            {
                **r.about,
                "scores": {s: {k: of.result.get(k) for k in keys} for s, of in r.results.items()},
                **{
                    name: {k: told[k] for k in kept[name] if k in told}
                    for name, told in r.more.items()
                },
            }
            for r in ladder.rungs
        ],
        "unfinished": ladder.unfinished,
        "gains": [
            {"from": "-".join(a), "to": "-".join(b), "set": s, **g}
            for _, a, b in comparisons(ladder)
            for s in ladder.sets
            if (g := gain(ladder, a, b, s))
        ],
        "pruning": pruning(ladder),
        "decontamination": {tau: s for tau, s, _ in decontamination(ladder)},
        "diversity": diversity,
        "runs": lineage(ladder),
        "data": data_lineage(ladder.folder / "data"),
    }


def did_not_work(log: str) -> str:
    """What stands in a log of Markdown under headings that have "did not work" in them."""
    kept, level, fence = [], 0, False
    for line in log.splitlines():
        fence ^= line.startswith("```")
        if (found := re.match(r"(#+) +(.*)", line)) and not fence:
            here = len(found[1])
            if level and here <= level:
                level = 0
            if not level and "did not work" in found[2].lower():
                level = here
            line = found[2]
        if level:
            kept.append(line)
    return "\n".join(kept).strip()


def text_table(ladder: Ladder) -> str:
    """The scores of all finished rungs, for a terminal."""
    width = max(len(r.about["name"]) for r in ladder.rungs)
    lines = [f"{'pass@1, %':{width}}" + "".join(f"  {s:>20}" for s in ladder.sets)]
    for r in ladder.rungs:
        cells = [percent(r.results[s].result) if s in r.results else "not run" for s in ladder.sets]
        lines.append(f"{r.about['name']:{width}}" + "".join(f"  {cell:>20}" for cell in cells))
    return "\n".join(lines)


def rounded(value):
    """`value` with its floats to five digits."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
