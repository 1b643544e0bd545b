"""The page about a ladder of data sets: what phi-1's Figure 2.1 claims, measured here.

    python -m tools.report --ladder out/ladder --png records/ladder_cpu

Draws what ladder_scores.py reads. What is not there is said to be not run. The figures, as PNG, and
all numbers, as ladder.json, go to the folder --png too.

The paper's numbers (Textbooks Are All You Need, arXiv 2306.11644) stand beside ours, never among
them: other data, other problems, larger models.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from common.files import read_json, read_jsonl
from common.pages import COLORS, bars, escape, figure, page, table
from data.diversity import MEANINGS, draw_growth, show
from eval.scores import percent
from tools import ladder_scores as reading
from tools.ladder_scores import FIGURE_2_1, LADDER, PRUNED, RUNGS, SECTION_5, SETS, Ladder, Rung

MARKERS, DASHES = "osD^vPX", ["-", "--", ":", "-."]
SAMPLES_EACH, SAMPLE_CHARS = 4, 800
SHORT = dict(zip(SETS, ["held-out", "unseen", "HumanEval", "MBPP"]))
MEASURES = [  # file, key, factor, format, title
    ("bits", "bits_per_byte", 1, ".2f", "bits per byte of held-out real code (lower is better)"),
    ("library", "right_frac", 100, ".1f", "attributes of libraries guessed right in such code, %"),
]
NOT_RUN = '<p class="note">Not run: {}.</p>'


def write(folder: Path, out: Path, png: Path | None) -> str:
    """Write the page, the PNGs and ladder.json; the scores as text. Raises UserError."""
    ladder = reading.read_ladder(folder)
    if png:
        png.mkdir(parents=True, exist_ok=True)
    out.write_text(html(ladder, partial(captioned, png)), encoding="utf-8")
    found = reading.rounded(reading.numbers(ladder))
    text = json.dumps(found, separators=(",", ":"), ensure_ascii=False) + "\n"
    for where in {folder, png or folder}:
        (where / "ladder.json").write_text(text, encoding="utf-8")
    return reading.text_table(ladder)


def captioned(png: Path | None, name: str, says: str, draw, *args, **options) -> str:
    """A figure with what it shows and what it does not; the same as NAME.png in the folder."""
    svg = figure(draw, *args, alt=says, png=png and png / f"{name}.png", **options)
    return f"<figure><div class=wide>{svg}</div><figcaption>{escape(says)}</figcaption></figure>"


# ---- Drawing


def draw_loss(axes, ladder: Ladder) -> None:
    """A line for each run; a run that several rungs go on from is drawn once, in black."""
    last = {rung.runs[-1]["name"] for rung in ladder.rungs}
    for ax, (size, title) in zip(np.atleast_1d(axes), ladder.sizes.items()):
        drawn = set()
        for i, rung in enumerate(LADDER):
            start = 0
            for run in (runs := ladder.of(rung, size)) and runs[0].runs:
                points = [(start + r["tokens"], r["loss"]) for r in run["metrics"] if "loss" in r]
                start += run["summary"].get("tokens", 0)
                if points and run["name"] not in drawn:
                    look = {"color": COLORS[i % 6], "linestyle": DASHES[i % 4],
                            "label": RUNGS[rung].replace("\n", " ")}  # fmt: skip
                    if run["name"] not in last:
                        look = {"color": "#1f2328", "label": "base of the finetuned"}
                    ax.plot(*zip(*points), linewidth=1.2, **look)
                    drawn.add(run["name"])
        ax.set_title(title, loc="left", fontsize=11)
        ax.set_ylabel("training loss, nats")
        ax.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1))
        ax.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g}M")
    np.atleast_1d(axes)[-1].set_xlabel("tokens seen, in all runs of the rung")


def draw_compute(axes, ladder: Ladder, sets: list[str]) -> None:
    """pass@1 over FLOPs: a line for each rung, from the smallest size to the largest."""
    for ax, name in zip(np.atleast_1d(axes), sets):
        scores = ladder.scores(name)
        for i, rung in enumerate(LADDER):
            points = [
                (ladder.of(rung, size)[0].about["flops"], scores[rung, size]["value"])
                for size in ladder.sizes
                if (rung, size) in scores
            ]
            if points:
                ax.plot(*zip(*points), marker=MARKERS[i % 7], linestyle=DASHES[i % 4],
                        color=COLORS[i % 6], label=RUNGS[rung].replace("\n", " "))  # fmt: skip
        ax.set_xscale("log")
        ax.set_ylim(0, max(1, 1.1 * max(v["value"] for v in scores.values())))
        ax.set_title(SETS[name], loc="left", fontsize=11)
        ax.set_ylabel("pass@1, %")
    np.atleast_1d(axes)[0].legend(frameon=False, fontsize=9, loc="upper left",
                                  bbox_to_anchor=(1.01, 1))  # fmt: skip
    np.atleast_1d(axes)[-1].set_xlabel("training compute, FLOP")


def draw_robustness(axes, ladder: Ladder, rungs: list[Rung]) -> None:
    told = [item for r in rungs for item in r.more["robustness"]["perturbations"].items()]
    names = list(dict.fromkeys(name for name, row in told if row["problems"]))
    kinds = list(dict.fromkeys(r.key[0] for r in rungs))
    for i, rung in enumerate(rungs):
        j, kind = [*ladder.sizes].index(rung.key[1]), kinds.index(rung.key[0])
        found = rung.more["robustness"]["perturbations"]
        rows = [(y, found[n]) for y, n in enumerate(names) if found.get(n, {}).get("problems")]
        if not rows:
            continue
        y = [y + 0.7 * ((i + 0.5) / len(rungs) - 0.5) for y, _ in rows]
        drop = np.array([100 * r["drop"] for _, r in rows])
        low, high = 100 * np.array([r["ci95"] for _, r in rows]).T
        around = np.maximum(0, [drop - low, high - drop])
        axes.errorbar(drop, y, xerr=around, fmt=MARKERS[kind], color=COLORS[j], markersize=5,
                      linewidth=1, markerfacecolor=COLORS[j] if j else "white",
                      label=f"{rung.key[0]}, {rung.key[1]}")  # fmt: skip
    axes.axvline(0, color="#6e7781", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("points of pass@1 lost (right: worse), with 95% intervals over problems")
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1))


# ---- The page


def html(ladder: Ladder, shown: Callable[..., str]) -> str:
    """The page; `shown(name, caption, draw, *args)` is a figure's HTML."""
    first = ladder.rungs[0].runs[-1]["config"]
    commits = {str(run["config"]["commit"]): 0 for r in ladder.rungs for run in r.runs}
    tokens = sorted(r.about["tokens"] / 1e6 for r in ladder.rungs if r.key[0] != "base")
    tokens = " to ".join(dict.fromkeys(f"{t:.3g}M" for t in (tokens[0], tokens[-1])))
    missing = [r for r in RUNGS if r not in those_run(ladder, list(RUNGS))]
    missing += [SETS[s] for s in SETS if s not in ladder.sets]
    absent = ", ".join([*missing, *(f"{name} (not finished)" for name in ladder.unfinished)])
    body = f"""
<h1>nanophi: the ladder</h1>
<p class="note">{escape("; ".join(ladder.sizes.values()))}; commit {escape(", ".join(commits))},
torch {escape(str(first["torch"]))}, {escape(str(first["device"]))}, {first["cpus"]} CPU cores</p>
<p>phi-1's claim is about data: with the same model and the same number of tokens, filtered code,
textbooks and exercises make a better programmer than code as it comes. Here that claim is put to
small models trained from nothing on {tokens} tokens each. Within a size only the data differ, and
that finetuned models are trained in two runs. Below each figure stands what it does not show.</p>
{NOT_RUN.format(escape(absent)) if absent else ""}"""
    for title, section in SECTIONS.items():
        found = section(ladder, shown) or NOT_RUN.format("nothing of this is there")
        body += f"<h2>{title}</h2>{found}"
    return page("nanophi: the ladder", body)


def those_run(ladder: Ladder, rungs: list[str]) -> dict[str, str]:
    """Those of the rungs that were run: {rung: its name}."""
    return {rung: RUNGS[rung] for rung in rungs if any(rung == r.key[0] for r in ladder.rungs)}


def scores_section(ladder: Ladder, shown) -> str:
    names, parts = those_run(ladder, LADDER), []
    for file, sets, says in (
        ("exercises", ["heldout", "unseen"], "Problems of our own generator that no rung trained "
         "on. It shows which data are better for such exercises. It does not show that a model can "
         "program: the exercises of training resemble these problems, other code does not."),
        ("benchmarks", ["humaneval", "mbpp"], "The benchmarks that the paper reports, as they are. "
         "Small models solve few of these problems or none, and a prompt that is longer than their "
         "context is a failure: whether two bars differ is said by the table of changes below, not "
         "by their height."),
    ):  # fmt: skip
        if sets := [s for s in sets if s in ladder.sets]:
            says += (" Bars: the mean of the seeds (dots: each seed), greedy. Black: 95% intervals "
                     "over problems, which say nothing of other training runs.")  # fmt: skip
            parts.append(score_bars(ladder, shown, file, says, sets, ladder.sizes, names))
    panels = [("The paper's, not ours: HumanEval pass@1, %, as printed in Figure 2.1", "d",
               {key: {"value": score} for key, score in FIGURE_2_1.items()})]  # fmt: skip
    says = ("Beside it the paper's own figure: 350M and 1.3B parameters, 76 billion tokens. What "
            "can be compared with ours is the order of the bars, not their height.")  # fmt: skip
    names, sizes = ({name: name for name in side} for side in zip(*FIGURE_2_1))
    parts.append(shown("paper", says, bars, panels, sizes, names, height=2.6))
    rows = [
        [r.about["label"], r.key[1], str(r.about["seed"])]
        + [percent(r.results[s].result) if s in r.results else "not run" for s in SETS]
        for r in ladder.rungs
    ]
    head = ["trained on", "size", "seed", *SHORT.values()]
    commands = [r.about["command"] for r in ladder.rungs]
    asked = {f"{SHORT[s]}: {of.result['protocol']}": 0
             for r in ladder.rungs for s, of in r.results.items()}  # fmt: skip
    parts.append("<p>pass@1, % (95% interval over problems), asked as: "
                 f"{escape(', '.join(asked))}. "
                 "Below each row the command that makes it again; on the same machine, with the "
                 "same packages installed, it gives the same number.</p>"
                 + table(head, rows, range(2, 7), commands))  # fmt: skip
    parts.append("<p>What each change of the data changes: points of pass@1, problem by problem "
                 "(paired 95% intervals); an interval that holds 0 shows nothing. Damaged: half of "
                 "the exercises' solutions are wrong.</p>"
                 + gain_table(ladder, "data"))  # fmt: skip
    return "".join(parts)


def score_bars(ladder: Ladder, shown, file: str, says: str, sets, sizes, names) -> str:
    panels = [(f"{SETS[s]}: pass@1, %", ".1f", ladder.scores(s)) for s in sets]
    return shown(file, says, bars, panels, sizes, names, rows=len(sets), height=2.7 * len(sets))


def gain_table(ladder: Ladder, kind: str) -> str:
    rows = []
    for of, a, b in reading.comparisons(ladder):
        if of == kind:
            found = [reading.gain(ladder, a, b, s) for s in ladder.sets]
            rows.append([f"{' '.join(a)} to {' '.join(b)}", *map(points, found)])
    head = ["change", *(SHORT[s] for s in ladder.sets)]
    return table(head, rows, range(1, 5)) if rows else NOT_RUN.format("no two rungs to compare")


def points(gain: dict | None) -> str:
    if gain is None:
        return "not run"
    low, high = (100 * x for x in gain["ci95"])
    return f"{100 * gain['gain']:+.1f} ({low:+.1f} to {high:+.1f})"


def size_section(ladder: Ladder, shown) -> str:
    sets = ladder.sets[:2]
    says = ("pass@1 against the compute of all runs of a rung; each line is one rung, from small "
            "to large. Where the left end of a line is above the right end of another, better data "
            "did more than a larger model. One point a rung: no curve of scaling.")  # fmt: skip
    drawn = shown("compute", says, draw_compute, ladder, sets, rows=len(sets),
                  height=2.7 * len(sets))  # fmt: skip
    return drawn + gain_table(ladder, "size")


def loss_section(ladder: Ladder, shown) -> str:
    says = ("Training loss of the first seed of each rung, pruned ones left out. Each line is of "
            "its own data: exercises are easier to predict than code, so a lower line is not a "
            "better model.")  # fmt: skip
    return shown("loss", says, draw_loss, ladder, rows=(n := len(ladder.sizes)), height=2.8 * n)


def robustness_section(ladder: Ladder, shown) -> str:
    rungs = [r for r in ladder.rungs if "robustness" in r.more and r is ladder.of(*r.key)[0]
             and r.key[0] in LADDER and r.more["robustness"]["pass@1"] > 0]  # fmt: skip
    if not rungs:
        return ""
    said = ", ".join(f"{r.key[0]} {r.key[1]} {percent(r.more['robustness'])}" for r in rungs)
    says = ("What the same problems cost when the prompt is perturbed. A model that solves little "
            f"has little to lose; unperturbed pass@1, %: {said}.")  # fmt: skip
    return shown("robustness", says, draw_robustness, ladder, rungs, height=5)


def library_section(ladder: Ladder, shown) -> str:
    panels = []
    for name, key, factor, form, title in MEASURES:
        values = {}
        for of in dict.fromkeys(r.key for r in ladder.rungs):
            found = [r.more[name] for r in ladder.of(*of) if name in r.more]
            if found:
                low, high = np.mean([f["ci95"] for f in found], 0) * factor
                seeds = [f[key] * factor for f in found]
                values[of] = {"value": np.mean(seeds), "low": low, "high": high, "seeds": seeds}
        if values:
            panels.append((title, form, values))
    if not panels:
        return ""
    says = ("The paper's section 3 finds that finetuning on exercises also brings out what these "
            "do not contain, as the use of libraries. Compare then exercises with before "
            "finetuning, which it was made of; + textbooks went on with its data as long. "
            "Black: 95% intervals over documents.")  # fmt: skip
    usual = [told["baseline_frac"] for r in ladder.rungs if (told := r.more.get("library"))]
    if usual:  # of the same code, so for all rungs the same
        says += f" Naming always the usual attribute of a library is right in {usual[0]:.1%}."
    return shown("library", says, bars, panels, ladder.sizes, those_run(ladder, LADDER),
                 rows=len(panels), height=2.7 * len(panels))  # fmt: skip


def pruning_section(ladder: Ladder, shown) -> str:
    head = ["tau", "removed", "similar/not", "unpruned: similar", "not", "total",
            "retrained: similar", "not", "total"]  # fmt: skip
    rows = []
    for row in reading.pruning(ladder):
        scores = [row[of][k] for of in ("exercises", "pruned") for k in row[of]]
        n = "{}/{}".format(*(s["problems"] if s else 0 for s in scores[:2]))
        removed = f"{row['removed']:,} of {row['of']:,}"
        rows.append([row["size"], SHORT[row["set"]], f"{row['tau']:.2f}", removed, n,
                     *map(percent, scores)])  # fmt: skip
    parts = ["<p>Had the model only memorised, it would solve what resembles its exercises and "
             "nothing else, and would lose its score with them. A problem is similar at tau if an "
             "exercise has that match rate of syntax trees and is near it as text. Removed: of the "
             "exercises; similar/not: problems; then pass@1, %, with 95% intervals, - where there "
             "is no such problem or the rung was not run. A pruned rung sees its fewer exercises "
             "more often, which may cost something too.</p><p><b>Ours</b></p>"]  # fmt: skip
    parts.append(table(["size", "problems", *head], rows, range(2, 11)) if rows else
                 NOT_RUN.format("no pruning with both a report and a score"))  # fmt: skip
    paper = [line.split() for line in SECTION_5.strip().splitlines()]
    parts.append("<p><b>The paper's</b> (its section 5: phi-1 on HumanEval, 1.3B parameters; - is "
                 f"not printed there)</p>{table(head, paper, range(9))}")  # fmt: skip
    if names := those_run(ladder, PRUNED):
        names = {"exercises": "unpruned", **names}
        sizes = {s: n for s, n in ladder.sizes.items() if any(ladder.of(r, s) for r in PRUNED)}
        says = "The total scores. Black: 95% intervals over problems."
        parts.append(score_bars(ladder, shown, "pruning", says, ladder.sets, sizes, names))
    rows = [
        [tau, *(f"{s[k]:,}" for k in ("documents_in", "removed", "by_ngram")), f"{similar:,}",
         f"{s['problems']:,}", s["distance"]]
        for tau, s, similar in reading.decontamination(ladder)
    ]  # fmt: skip
    if rows:
        head = ["tau", "exercises", "removed", "by 13-grams", "problems similar", "problems",
                "nearness by"]  # fmt: skip
        pairs = ladder.folder / "data" / f"decontaminate_{rows[-1][0][2:]}" / "report" / "pairs.txt"
        parts.append("<p>What data.decontaminate found in the exercises, all files of problems "
                     f"together:</p>{table(head, rows, range(6))}<details><summary>The nearest "
                     "pairs of each file, to judge by eye (problem | exercise)</summary>"
                     f"<pre>{escape(reading.nearest_pairs(pairs))}</pre></details>")  # fmt: skip
    return "".join(parts)


def filter_section(ladder: Ladder, shown) -> str:
    parts, forest = [], read_json(ladder.folder / "data" / "forest" / "summary.json")
    if forest:
        parts.append(f"<p>The classifier on labels that it has not seen: AUC {forest['auc']} "
                     f"({forest['auc_ci95'][0]} to {forest['auc_ci95'][1]}), labelled by "
                     f"{' and '.join(forest['labellers'])}. Where the rules made the labels, this "
                     "shows that it learns the rules, and nothing about quality.</p>")  # fmt: skip
    for name, title in (("filtered", "the rules"), ("scored", "the classifier"),
                        ("classified", "the classifier's cut")):  # fmt: skip
        folder = ladder.folder / "data" / name
        summary = read_json(folder / "summary.json") or {}
        if "documents_in" in summary:
            parts.append(f"<p>By {title}: {summary['documents']:,} of {summary['documents_in']:,} "
                         f"documents kept, {summary['bytes'] / 1e6:.1f} of "
                         f"{summary['bytes_in'] / 1e6:.1f} MB.</p>")  # fmt: skip
        for path in sorted((folder / "samples").glob("*.jsonl") if name != "classified" else ()):
            rows = list(read_jsonl(path))
            parts.append(f"<details><summary>{path.stem.capitalize()} by {title}</summary>")
            for s in rows[:: max(1, len(rows) // SAMPLES_EACH)][:SAMPLES_EACH]:
                why = escape(str(s.get("quality", s.get("reason", ""))))
                parts.append(f"<p><b>{why}</b> {escape(s['origin'])}</p>"
                             f"<pre>{escape(s['text'][:SAMPLE_CHARS])}</pre>")  # fmt: skip
            parts.append("</details>")
    return "".join(parts)


def diversity_section(ladder: Ladder, shown) -> str:
    found = read_json(ladder.folder / "data" / "diversity" / "summary.json")
    if not found:
        return ""
    sets = list(found["sets"].items())
    rows = [[title, *(show(k, m[k]) for _, m in sets)] for k, (title, _) in MEANINGS.items()]
    meanings = [[title, meaning] for title, meaning in MEANINGS.values() if meaning]
    says = "Different names over names read: a set that repeats itself bends. More is not better."
    return (
        "<p>No number here is diversity; together they say what a set lacks. All are measured on "
        "the same amount of text of each set.</p>"
        + table(["", *(name for name, _ in sets)], rows, range(1, len(sets) + 1))
        + f"<details><summary>How to read it</summary>{table(['', ''], meanings)}</details>"
        + shown("diversity", says, draw_growth, sets, COLORS)
    )


def lineage_section(ladder: Ladder, shown) -> str:
    head = ["run", "data", "tokenizer", "from weights", "weights", "config", "code", "commit"]
    runs = [[str(v or "random") for v in run.values()] for run in reading.lineage(ladder)]
    data = [[str(v) for v in row.values()] for row in reading.data_lineage(ladder.folder / "data")]
    return (
        "<p>Each run: checksums of its data, its tokenizer, the weights it started from and ended "
        "with, of config.json and of the code. Each folder of data: hashes of the code that wrote "
        "it and of all that is in it.</p>"
        + table(head, runs)
        + table(["data", "documents", "code", "content"], data, [1])
    )


def cost_section(ladder: Ladder, shown) -> str:
    rows = [
        [r.about["name"], f"{r.about['parameters']:,}", f"{r.about['tokens']:,}",
         f"{r.about['epochs']:g}", f"{r.about['flops']:.3g}", f"{r.about['train_s']:,.0f}",
         f"{r.about['score_s']:,.0f}"]
        for r in ladder.rungs
    ]  # fmt: skip
    head = ["rung", "parameters", "tokens", "passes over its last data", "FLOP of training",
            "training, s", "scoring, s"]  # fmt: skip
    return ("<p>Wall-clock seconds of one rung, runs that it starts from included; rungs that ran "
            "side by side slow each other down.</p>" + table(head, rows, range(1, 7)))  # fmt: skip


def log_section(ladder: Ladder, shown) -> str:
    text = reading.did_not_work((Path(__file__).parents[1] / "LOG.md").read_text(encoding="utf-8"))
    return text and f"<p>From LOG.md, as it stands there.</p><pre>{escape(text)}</pre>"


SECTIONS = {
    "Does better data make a better model?": scores_section,
    "Small against large": size_section,
    "Loss against tokens": loss_section,
    "Prompts written in another way": robustness_section,
    "What finetuning does to other abilities": library_section,
    "Exercises pruned of what resembles the test": pruning_section,
    "What the filters keep and reject": filter_section,
    "How varied the data are": diversity_section,
    "Lineage": lineage_section,
    "Cost": cost_section,
    "What did not work": log_section,
}
