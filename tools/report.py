"""One self-contained HTML page about a demo: results, curves, data, samples, lineage.

    python -m tools.report --demo out/demo
    python -m tools.report out/a out/b       instead: the curves of training runs, beside each other
    python -m tools.report --ladder out/ladder --png records/ladder_cpu
                                         instead: the ladder's evidence (ladder_page.py)

Reads what the stages left in the folder: eval/ARM/results.json, runs/*/metrics.jsonl and
config.json, and the summaries of the data stages. Needs no network to write or to look at.
"""

import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from common.config import UserError, parse, run
from common.files import read_json, read_jsonl
from common.pages import COLORS, escape, figure, page, table
from tools import curves, ladder_page

# What each arm's last data set is, by its folder's name.
ARMS = {
    "exercises": "filtered code, then exercises",
    "pairs": "filtered code, then docstring/function pairs cut from raw code",
    "shuffled": "filtered code, then exercises with their docstrings exchanged",
    "raw": "raw code only",
    "filtered": "filtered code only",
    "raw_exercises": "raw code, then exercises",
}
CAVEATS = """
<p>What this does <b>not</b> show:</p><ul>
<li>One seed an arm. The interval is over problems, not over training runs.</li>
<li>The held-out problems come from the same generator as the exercises: tasks with parameters that
training never showed, but from families that it did. A high score says that the model learned to
compose what it saw, not that it can program. It is no HumanEval score.</li>
<li>Code alone scores near zero mostly because it never has the <i>format</i> of a problem. The fair
control is the one in the same format: docstring/function pairs, cut from raw code, uncurated. But
those pairs are also about other things than the held-out problems, so a part of the gap is that the
exercises resemble the test, and not that they are better.</li>
<li>The exercises are made by a program and are all correct; the paper's came from an LLM, with
errors, and far more varied.</li></ul>
"""


@dataclass(frozen=True)
class Config:
    """Write the report of a demo and print its table; or of a ladder; or, with RUN..., of runs."""

    run: tuple[Path, ...] = ()  # folders of runs to draw; they may stand without --run, first
    demo: Path = Path("out/demo")  # folder of the demo
    ladder: Path | None = None  # folder of a ladder, instead of a demo
    png: Path | None = None  # of a ladder: folder for its figures as PNG, and for its numbers
    out: Path | None = None  # file to write; DEMO/report.html, LADDER/report.html or, of runs,
    # RUN/curves.html


@dataclass
class Arm:
    """One way of training, and its score."""

    name: str
    result: dict  # of the evaluation
    stages: list[dict]  # the runs' config.json | summary.json, first to last
    records: list[list[dict]]  # the runs' metrics.jsonl

    @property
    def tokens(self) -> int:
        return sum(stage["tokens"] for stage in self.stages)

    @property
    def label(self) -> str:
        return ARMS.get(self.name, self.name)


def main() -> None:
    folders = list(itertools.takewhile(lambda a: not a.startswith("-"), sys.argv[1:]))
    argv = [f"--run={folder}" for folder in folders] + sys.argv[1 + len(folders) :]
    config = parse(Config, argv)
    if config.run:
        out = config.out or config.run[0] / "curves.html"
        out.write_text(curves.runs_page(list(config.run)), encoding="utf-8")
        return print(f"report: {out}")
    if config.ladder:
        out = config.out or config.ladder / "report.html"
        print(ladder_page.write(config.ladder, out, config.png))
        return print(f"\nreport: {out}")
    demo = config.demo
    arms = [read_arm(demo, p.parent.name) for p in sorted(demo.glob("eval/*/results.json"))]
    if not arms:
        raise UserError(f"no eval/*/results.json in {demo}; run `make train` first")
    arms.sort(key=lambda arm: list(ARMS).index(arm.name) if arm.name in ARMS else len(ARMS))
    out = config.out or demo / "report.html"
    out.write_text(demo_page(demo, arms), encoding="utf-8")
    print(text_table(arms))
    print(f"\nreport: {out}")


def read_arm(demo: Path, name: str) -> Arm:
    """The arm whose evaluation is eval/`name`: its run, and the runs that this one started from."""
    result = read(demo / "eval" / name / "results.json")
    stages, records, folder = [], [], Path(result["config"]["checkpoint"])
    while folder:
        stage = {**read(folder / "config.json"), **read(folder / "summary.json")}
        stages.insert(0, stage)
        records.insert(0, list(read_jsonl(folder / "metrics.jsonl")))
        folder = Path(stage["init_from"]) if stage["init_from"] else None
    return Arm(name, result, stages, records)


def read(path: Path) -> dict:
    """Return the JSON in `path`. Raises UserError if the file is missing."""
    if (value := read_json(path)) is None:
        raise UserError(f"{path} is missing: that stage has not finished; run `make train`")
    return value


def text_table(arms: list[Arm]) -> str:
    width = max(len(arm.label) for arm in arms)
    lines = [
        f"{'trained on':{width}}  {'tokens':>9}  {'pass@1':>7}  {'95% interval':>12}  problems"
    ]
    for arm in arms:
        low, high = (100 * x for x in arm.result["ci95"])
        lines.append(
            f"{arm.label:{width}}  {arm.tokens / 1e6:8.2f}M  {100 * arm.result['pass@1']:6.1f}%"
            f"  {low:4.1f} - {high:4.1f}%  {arm.result['problems']:8}"
        )
    return "\n".join(lines)


def demo_page(demo: Path, arms: list[Arm]) -> str:
    run = arms[0].stages[-1]
    body = f"""
<h1>nanophi: phi-1 in miniature</h1>
<p class="note">{run["parameters"]:,} parameters, vocabulary {run["vocab_size"]:,}, context
{run["seq_len"]}; trained from nothing on this machine; commit {escape(run["commit"])}, torch
{escape(run["torch"])}, {escape(run["device"])}</p>
<h2>Does better data make a better model?</h2>
<p>The same model, trained on different data for nearly the same number of tokens, then asked to
write {arms[0].result["problems"]} functions that it has never seen, greedily, once each. A problem
counts as solved if its {tests_each(demo)} tests pass.</p>
{figure(score_bars, arms, height=0.8 + 0.6 * len(arms))}
{score_table(arms)}
{CAVEATS}
<h2>Training</h2>
{figure(loss_curves, arms)}
{run_table(arms)}
<h2>What the model writes</h2>
{completions(demo, arms[0])}
<h2>Data</h2>
{data_section(demo)}
<h2>Lineage</h2>
<p class="note">Each run: the data's checksum, the tokenizer's fingerprint, the weights it started
from and ended with.</p>
{lineage_table(arms)}
<details><summary>Every setting of the last run of the first arm</summary>
<pre>{escape(json.dumps(arms[0].stages[-1], indent=2))}</pre></details>
"""
    return page("nanophi demo report", body)


def score_bars(axes, arms: list[Arm]) -> None:
    for i, arm in enumerate(arms):
        score, (low, high) = 100 * arm.result["pass@1"], (100 * x for x in arm.result["ci95"])
        axes.barh(
            i,
            score,
            color=COLORS[i % len(COLORS)],
            height=0.6,
            xerr=[[max(0, score - low)], [max(0, high - score)]],
            capsize=3,
            ecolor="#59636e",
        )
        axes.text(max(score, high) + 1.5, i, f"{score:.1f}%", va="center")
    axes.set_yticks(range(len(arms)), [wrap(arm.label) for arm in arms])
    axes.invert_yaxis()
    axes.set_xlim(0, 109)
    axes.set_xlabel("pass@1 on held-out exercises, %, with a 95% interval over problems")


def wrap(label: str, width: int = 34) -> str:
    if len(label) <= width:
        return label
    cut = label.rindex(" ", 0, width)
    return label[:cut] + "\n" + label[cut + 1 :]


def loss_curves(axes, arms: list[Arm]) -> None:
    drawn = set()
    for i, arm in enumerate(arms):
        start = 0
        for stage, records in zip(arm.stages, arm.records):
            points = [(start + r["tokens"], r["loss"]) for r in records if "loss" in r]
            shared = stage["out"] in drawn  # the arms may start from the same run
            if points and not shared:
                first = stage is arm.stages[0] and len(arm.stages) > 1
                axes.plot(
                    *zip(*points),
                    color="#6e7781" if first else COLORS[i % len(COLORS)],
                    label=f"on {Path(stage['data']).name}",
                    linewidth=1.2,
                )
                drawn.add(stage["out"])
            start += stage["tokens"]
    axes.set_xlabel("tokens seen")
    axes.set_ylabel("training loss")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g}M")
    axes.legend(frameon=False)


def tests_each(demo: Path) -> int:
    """The test inputs of a held-out problem."""
    return next(read_jsonl(demo / "exercises" / "heldout.jsonl"))["test"].count("assert ")


def score_table(arms: list[Arm]) -> str:
    rows = []
    for arm in arms:
        low, high = (100 * x for x in arm.result["ci95"])
        seen = " + ".join(f"{s['tokens'] / 1e6:.2f}M {Path(s['data']).name}" for s in arm.stages)
        rows.append(
            [
                arm.label,
                seen,
                f"{arm.tokens / 1e6:.2f}M",
                f"{100 * arm.result['pass@1']:.1f}%",
                f"{low:.1f} - {high:.1f}%",
                f"{arm.result['problems']}",
                f"{sum(s['trained_s'] for s in arm.stages):,.0f} s",
            ]
        )
    return table(
        ["trained on", "tokens", "in all", "pass@1", "95% interval", "problems", "time"],
        rows,
        numbers=range(2, 7),
    )


def runs(arms: list[Arm]) -> list[dict]:
    """The runs of all arms, once each: arms may start from the same one."""
    return list({stage["out"]: stage for arm in arms for stage in arm.stages}.values())


def run_table(arms: list[Arm]) -> str:
    rows = [
        [
            r["out"],
            f"{r['steps']:,}",
            f"{r['tokens']:,}",
            f"{r['best_val_loss']:.3f}",
            f"{r['tokens_per_s']:,.0f}",
            f"{r['trained_s']:,.0f} s",
        ]
        for r in runs(arms)
    ]
    return table(["run", "steps", "tokens", "best val loss", "tokens/s", "time"], rows, range(1, 6))


def lineage_table(arms: list[Arm]) -> str:
    keys = ["out", "data_checksum", "tokenizer", "init_checksum", "weights"]
    rows = [[str(r[k] or "random") for k in keys] for r in runs(arms)]
    return table(["run", "data", "tokenizer", "from weights", "weights"], rows)


def completions(demo: Path, arm: Arm, each: int = 3) -> str:
    """Some solved and some unsolved problems of an arm, as the model answered them."""
    problems = {p["task_id"]: p for p in read_jsonl(demo / "exercises" / "heldout.jsonl")}
    samples = list(read_jsonl(demo / "eval" / arm.name / "samples.jsonl"))
    parts = [f"<p>Arm: {escape(arm.label)}. The prompt in black, the completion in blue.</p>"]
    for passed, word in ((True, "solved"), (False, "not solved")):
        some = [s for s in samples if s["passed"] == passed]
        for s in some[:: max(1, len(some) // each)][:each]:
            prompt = problems[s["task_id"]]["prompt"]
            mark = "pass" if passed else "fail"
            detail = "" if passed else f": {escape(s['detail'][:200])}"
            parts.append(
                f'<p class="{mark}">{word}{detail}</p><pre>{escape(prompt)}'
                f"<b>{escape(s['completion'])}</b></pre>"
            )
    return "\n".join(parts)


def data_section(demo: Path) -> str:
    raw, kept = read(demo / "raw" / "summary.json"), read(demo / "filtered" / "summary.json")
    exercises = read(demo / "exercises" / "summary.json")
    rows = [
        ["raw code", f"{raw['documents']:,}", f"{raw['bytes'] / 1e6:.1f} MB"],
        ["kept by the filter", f"{kept['documents']:,}", f"{kept['bytes'] / 1e6:.1f} MB"],
    ]
    for name in ("pairs", "exercises"):
        if (demo / name / "summary.json").exists():
            summary = read(demo / name / "summary.json")
            rows.append([name, f"{summary['documents']:,}", f"{summary['bytes'] / 1e6:.1f} MB"])
    parts = [table(["set", "documents", "text"], rows, range(1, 3))]
    parts.append(
        f"<p>Exercises: {len(exercises['train_by_family'])} families, {exercises['tasks']:,} tasks "
        f"in training; {exercises['heldout']:,} other tasks of the same families held out.</p>"
    )
    parts.append("<p>Why the filter rejected what it rejected, first reason only:</p>")
    rejected = [[reason, f"{n:,}"] for reason, n in kept["rejected"].items()]
    parts.append(table(["rule", "documents"], rejected, [1]))
    for name in ("rejected", "kept"):
        parts.append(f"<details><summary>A sample of what was {name}</summary>")
        for s in read_jsonl(demo / "filtered" / "samples" / f"{name}.jsonl"):
            parts.append(
                f"<p><b>{escape(s['reason'])}</b> {escape(s['origin'])}</p>"
                f"<pre>{escape(s['text'][:800])}</pre>"
            )
        parts.append("</details>")
    return "\n".join(parts)


if __name__ == "__main__":
    run(main)
