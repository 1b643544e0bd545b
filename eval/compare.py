"""Our models beside the paper's Table 1, printed and drawn.

    python -m eval.compare out/eval/humaneval out/eval/mbpp --out out/compare.html

Each folder is the --out of an evaluation, or holds such folders. Scores of one checkpoint, or one
file of samples, share a row. Ours have an interval and name their protocol. The paper's are as it
prints them: other harnesses, other prompts, in part other people's numbers; it does not say how it
prompts MBPP. What is no score on HumanEval or MBPP is listed apart, and compares with nothing here.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from common.config import UserError, run
from common.pages import COLORS, escape, figure, page, table
from eval.scores import Result, parse_folders, percent, read_result

# Textbooks Are All You Need, arXiv 2306.11644, Table 1: pass@1 % on HumanEval and on MBPP.
TABLE_1 = {
    "Codex-300M": (13.2, None),
    "Codex-12B": (28.8, None),
    "CodeGen-Mono-350M": (12.8, None),
    "CodeGen-Mono-16.1B": (29.3, 35.3),
    "PaLM-Coder": (35.9, 47.0),
    "CodeGeeX": (22.9, 24.4),
    "GPT-3.5": (47, None),
    "SantaCoder": (14.0, 35.0),
    "GPT-4": (67, None),
    "PaLM 2-S": (37.6, 50.0),
    "CodeGen2-1B": (10.3, None),
    "CodeGen2-7B": (19.1, None),
    "StarCoder": (33.6, 52.7),
    "StarCoder-Prompted": (40.8, 49.5),
    "Replit": (21.9, None),
    "Replit-Finetuned": (30.5, None),
    "CodeT5+ 2B": (24.2, None),
    "CodeT5+ 16B": (30.9, None),
    "InstructCodeT5+": (35.0, None),
    "WizardCoder": (57.3, 51.8),
    "phi-1-base": (29, None),
    "phi-1-small": (45, None),
    "phi-1": (50.6, 55.5),
}
BENCHMARKS = ("HumanEval", "MBPP")
PAPER, OURS = COLORS[5], COLORS[0]


@dataclass(frozen=True)
class Config:
    """Print and draw scores of ours beside the paper's Table 1."""

    result: tuple[Path, ...] = ()  # folders of evaluations, or of such folders; they may stand
    # without --result, first
    out: Path | None = None  # HTML file to write
    json: bool = False  # print all rows as JSON


@dataclass(frozen=True)
class Score:
    percent: float
    low: float  # of the 95 % interval; equal to `percent` where none is known
    high: float
    how: str  # benchmark, protocol and problems; "" of the paper's


def find(folders: tuple[Path, ...]) -> list[Result]:
    """Return the evaluations in these folders. Raises UserError where there is none."""
    found = []
    for folder in folders:
        if (folder / "results.json").exists():
            found.append(read_result(folder))
            continue
        inside = sorted(p.parent for p in folder.glob("**/results.json"))
        if not inside:
            raise UserError(f"{folder}: no results.json there; name the --out of an evaluation")
        found += [read_result(path) for path in inside]
    if not found:
        raise UserError("name at least one folder that an evaluation wrote")
    return found


def column(result: Result) -> str | None:
    """Return the column of Table 1 that a score belongs to, None for other problems."""
    name = result.result["benchmark"].removesuffix(" sanitized")
    return name if name in BENCHMARKS else None


def score(result: Result) -> Score:
    r = result.result
    low, high = (100 * x for x in r["ci95"])
    k = r.get("samples_per_problem", 1)
    how = f"{r['benchmark']}, {r['protocol']}, {r['problems']} problems" + f" x {k}" * (k > 1)
    return Score(100 * r["pass@1"], low, high, how)


def our_rows(results: list[Result]) -> list[tuple[str, dict[str, Score]]]:
    """Return rows (model, {benchmark: score}); a second score in a column starts another row,
    as MBPP has several protocols."""
    rows: list[tuple[str, dict[str, Score]]] = []
    for result in results:
        if not (name := column(result)):
            continue
        for model, scores in rows:
            if model == result.model and name not in scores:
                scores[name] = score(result)
                break
        else:
            rows.append((result.model, {name: score(result)}))
    return rows


def paper_rows() -> list[tuple[str, dict[str, Score]]]:
    return [
        (name, {b: Score(x, x, x, "") for b, x in zip(BENCHMARKS, both) if x is not None})
        for name, both in TABLE_1.items()
    ]


def parameters(model: str) -> str:
    """Return how many parameters the run in that folder has, "" if it does not say."""
    try:
        return f"{json.loads((Path(model) / 'summary.json').read_text())['parameters']:,}"
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def cell(found: Score | None, interval: bool) -> str:
    if found is None:
        return "-"
    if not interval:
        return f"{found.percent:g}"
    return f"{found.percent:.1f} ({found.low:.1f} to {found.high:.1f})"


def bars(axes, ours: list, benchmark: str) -> None:
    """Draw the models with a score on `benchmark`, the best on top."""
    rows = [(n, s[benchmark], True) for n, s in ours if benchmark in s]
    rows += [(n, s[benchmark], False) for n, s in paper_rows() if benchmark in s]
    rows.sort(key=lambda row: (row[1].percent, row[2]))
    for y, (_, s, is_ours) in enumerate(rows):
        axes.barh(y, s.percent, color=OURS if is_ours else PAPER, height=0.7)
        if is_ours:
            around = [[max(0, s.percent - s.low)], [max(0, s.high - s.percent)]]
            axes.errorbar(s.percent, y, xerr=around, color="#1f2328", capsize=3, linewidth=1)
        axes.text(max(s.percent, s.high) + 1, y, f"{s.percent:.1f}", va="center", fontsize=9)
    names = [f"{short(n)} (ours)" if is_ours else n for n, _, is_ours in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=9)
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"pass@1 on {benchmark}, %. Blue: ours, 95 % interval. Grey: the paper's")


def short(name: str, most: int = 40) -> str:
    return name if len(name) <= most else "..." + name[3 - most :]


def html(ours: list, others: list[Result]) -> str:
    """Draw the page."""
    rows = [
        [short(name), parameters(name), *(cell(scores.get(b), True) for b in BENCHMARKS),
         "; ".join(s.how for s in scores.values())]
        for name, scores in ours
    ]  # fmt: skip
    rows += [
        [name, "", *(cell(scores.get(b), False) for b in BENCHMARKS), "the paper's"]
        for name, scores in paper_rows()
    ]
    drawn = "".join(
        f"<h2>{b}</h2>" + figure(bars, ours, b, height=1.2 + 0.26 * _count(ours, b))
        for b in BENCHMARKS
    )
    listed = [
        [short(r.model), r.result["benchmark"], percent(r.result), str(r.result["problems"])]
        for r in others
    ]
    apart = (
        "<h2>Other problems</h2><p>These compare with nothing above.</p>"
        + table(["model", "problems", "pass@1 %", "how many"], listed, [2, 3])
        if listed
        else ""
    )
    head = ["model", "parameters", *(f"{b} pass@1 %" for b in BENCHMARKS), "source"]
    return page(
        "nanophi beside Table 1",
        f"<h1>Beside Table 1</h1><p class='note'>{escape(note())}</p>{drawn}"
        f"<h2>Table</h2>{table(head, rows, [1, 2, 3])}{apart}",
    )


def _count(ours: list, benchmark: str) -> int:
    return sum(benchmark in scores for _, scores in [*ours, *paper_rows()])


def note() -> str:
    return (
        "Grey, and below the line: as printed in Table 1 of arXiv 2306.11644, from other harnesses "
        "and prompts. Ours: 95 % intervals over the problems, not over training runs."
    )


def main() -> None:
    config = parse_folders(Config, "result")
    results = find(config.result)
    ours, others = our_rows(results), [r for r in results if not column(r)]
    if config.out:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(html(ours, others), encoding="utf-8")
    if config.json:
        rows = [("ours", *row) for row in ours] + [("paper", *row) for row in paper_rows()]
        return print(
            json.dumps(
                [
                    {"source": where, "model": name, **{b: asdict(s) for b, s in scores.items()}}
                    for where, name, scores in rows
                ]
            )
        )
    width = max(len(short(name)) for name, _ in [*ours, *paper_rows()])
    print(f"{'pass@1, %':{width}}  {'HumanEval':22}  MBPP")
    for name, scores in ours:
        cells = [cell(scores.get(b), True) for b in BENCHMARKS]
        print(f"{short(name):{width}}  {cells[0]:22}  {cells[1]}")
        for s in scores.values():
            print(f"{'':{width}}    {s.how}")
    print(f"{'the paper, Table 1':-<{width + 30}}")
    for name, scores in paper_rows():
        cells = [cell(scores.get(b), False) for b in BENCHMARKS]
        print(f"{name:{width}}  {cells[0]:22}  {cells[1]}")
    if others:
        print("other problems, which compare with nothing above")
        for r in others:
            print(f"{short(r.model):{width}}  {percent(r.result):22}  {r.result['benchmark']}")
    print(note())
    if config.out:
        print(f"page: {config.out}")


if __name__ == "__main__":
    run(main)
