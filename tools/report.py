"""Write one self-contained HTML page about training runs, the demo or the ladder.

    python -m tools.report out/a out/b           runs beside each other: how they went and differ
    python -m tools.report --demo out/demo       does better data make a better model?
    python -m tools.report --ladder out/ladder --png records/ladder_cpu      the same, rung by rung

--png FOLDER also writes the figures as PNG there, and all numbers as ladder.json. Figures are
inline SVG: the page needs no network.
"""

import html
import io
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from textwrap import fill

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from common.config import UserError, run
from common.files import read_json, read_jsonl, write_json
from eval.scores import parse_folders

LABELS = {  # of what a model is trained on, in the order of the figures
    "raw": "raw code", "filtered": "filtered by rules", "classified": "filtered by classifier",
    "textbooks": "+ textbooks", "base": "before finetuning", "exercises": "then exercises",
    "varied": "in many forms", "damaged": "half damaged", "shuffled": "docstrings exchanged",
    "raw_exercises": "raw, then exercises", "pairs": "pairs cut from raw",
    "pruned95": "pruned at .95", "pruned90": "pruned at .90", "pruned85": "pruned at .85",
    "pruned80": "pruned at .80",
}  # fmt: skip
PRUNED = [rung for rung in LABELS if rung.startswith("pruned")]
# A model's scores: file, key in it, factor and title.
MEASURES = {
    "heldout": ("results.json", "pass@1", 100, "held-out exercises: pass@1, %"),
    "unseen": ("unseen/results.json", "pass@1", 100, "exercises of unseen families: pass@1, %"),
    "humaneval": ("humaneval/results.json", "pass@1", 100, "HumanEval: pass@1, %"),
    "mbpp": ("mbpp/results.json", "pass@1", 100, "MBPP: pass@1, %"),
    "bits": ("bits.json", "bits_per_byte", 1, "bits per byte of real code, lower is better"),
}
SETS = ["heldout", "unseen", "humaneval", "mbpp"]
# Textbooks Are All You Need, arXiv 2306.11644, Figure 2.1 and Table 1: pass@1, %.
PAPER = [("The Stack, 350M", "12", "-"), ("CodeTextbook, 350M", "20", "-"),
         ("then CodeExercises (phi-1-small), 350M", "45", "-"), ("The Stack, 1.3B", "17", "-"),
         ("CodeTextbook (phi-1-base), 1.3B", "29", "-"),
         ("then CodeExercises (phi-1), 1.3B", "50.6", "55.5"), ("StarCoder", "33.6", "52.7"),
         ("GPT-3.5", "47", "-"), ("WizardCoder", "57.3", "51.8")]  # fmt: skip
TAUS = ["unpruned", "0.95", "0.90", "0.85", "0.80"]
PAPER_PRUNED = [50.6, 50.6, 45.1, 46.3, 45.1]  # section 5
CAVEATS = """<p>What this does <b>not</b> show:</p><ul>
<li>Intervals are over problems, not over training runs; most rows are of one seed.</li>
<li>The held-out problems come from the generator that made the exercises: tasks with parameters
that training never showed, but from families that it did. A high score says that the model learned
to compose what it saw, not that it can program. It is no HumanEval score.</li>
<li>Code alone scores near zero mostly because it never has the <i>format</i> of a problem. The fair
control has it: docstring/function pairs, cut from raw code, uncurated. But those pairs are also
about other things than the problems: part of the gap is that the exercises resemble the test.</li>
<li>A program makes the exercises, all correct; the paper's came from an LLM, with errors, and far
more varied. Small models solve few of HumanEval and MBPP or none.</li></ul>"""

COLORS = ["#1f6feb", "#d9730d", "#2da44e", "#8250df", "#bf3989", "#6e7781"]
HATCHES, DASHES, MARKERS = ["////", "", "xx"], ["-", "--", ":", "-."], "osD^vPX"
INK, GREY = "#1f2328", "#6e7781"
CURVES = {"loss": "loss, nats (dots: validation)", "lr": "learning rate",
          "grad_norm": "gradient norm", "tokens_per_s": "tokens/s", "mfu": "MFU",
          "loader_wait_frac": "waiting for data, share", "memory_gib": "peak memory, GiB"}
MARKS = {"skipped": "#d9730d", "start": GREY}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #d1d9e0 }
table { border-collapse: collapse; margin: 1rem 0; font-size: 14px }
th, td { text-align: left; padding: .3rem .8rem; border-bottom: 1px solid #d1d9e0 }
td:first-child { white-space: nowrap }
td.n, th.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
pre { background: #f6f8fa; padding: .7rem 1rem; overflow-x: auto; font-size: 13px }
pre b { color: #1f6feb; font-weight: normal } .wide { overflow-x: auto } .pass { color: #1a7f37 }
svg { max-width: 100%; height: auto } figure { margin: 1.5rem 0 } .fail { color: #cf222e }
figcaption, .note { color: #59636e; font-size: 14px }
"""
escape = html.escape


@dataclass(frozen=True)
class Config:
    """Write the page about a demo or a ladder and print its scores; or, with RUN..., about runs."""

    run: tuple[Path, ...] = ()  # folders of runs to draw; they may stand without --run, first
    demo: Path = Path("out/demo")  # folder of the demo
    ladder: Path | None = None  # folder of a ladder, instead of a demo
    png: Path | None = None  # folder for the figures as PNG, and for the numbers
    out: Path | None = None  # file to write, default DEMO or LADDER/report.html, RUN/curves.html


def main() -> None:
    c = parse_folders(Config, "run")
    if c.run:
        out, text, said = c.out or c.run[0] / "curves.html", runs_page(c.run), ""
    else:
        found = Scores(c.ladder or c.demo, c.png)
        out, text, said = c.out or found.folder / "report.html", found.page(), found.text()
        if c.png:
            write_json(c.png / "ladder.json", [m.numbers() for m in found.models])
    out.write_text(text, encoding="utf-8", errors="backslashreplace")
    print(f"{said}report: {out}")


# ---- HTML and figures


def page(title: str, body: str) -> str:
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    body = f"<h1>{title}</h1>{body}"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{body}</body></html>\n"


def table(head: list[str], rows: list[list], words: int = 1) -> str:
    """Return an HTML table; the columns after the first `words` are set to the right."""

    def line(cells: list, tag: str) -> str:
        kinds = [f"{tag} class=n" if i >= words else tag for i in range(len(cells))]
        cells = [f"<{kind}>{escape(str(c))}</{tag}>" for kind, c in zip(kinds, cells)]
        return f"<tr>{''.join(cells)}</tr>"

    lines = [line(head, "th"), *(line(row, "td") for row in rows)]
    return f"<div class=wide><table>{''.join(lines)}</table></div>"


def figure(draw: Callable, panels, *args, says: str, height=2.8, png: Path | None = None) -> str:
    """Return what draw(axes, panels, *args) draws as inline SVG with a caption; write `png` too."""
    style = {"svg.fonttype": "none", "font.size": 11, "svg.hashsalt": "nanophi",
             "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip
    with matplotlib.rc_context(style):
        fig = Figure(figsize=(9, height * len(panels)))
        axes = fig.subplots(len(panels), sharex=True, squeeze=False, gridspec_kw={"hspace": 0.35})
        draw(axes[:, 0], panels, *args)
        svg, raw = io.StringIO(), io.BytesIO()
        fig.savefig(svg, format="svg", bbox_inches="tight", metadata={"Date": None})
        if png:  # with a palette, a third of the bytes
            png.parent.mkdir(parents=True, exist_ok=True)
            fig.savefig(raw, dpi=130, bbox_inches="tight")
            Image.open(raw).convert("RGB").quantize(48).save(png, optimize=True)
    text = svg.getvalue()
    return f"<figure>{text[text.index('<svg'):]}<figcaption>{escape(says)}</figcaption></figure>"


def draw_lines(axes, panels: dict[str, dict[str, list]], x_label: str, markers="") -> None:
    """Draw in each panel {title: {label: [(x, y), ...]}} a line for each label."""
    for ax, (title, lines) in zip(axes, panels.items()):
        for i, (name, points) in enumerate(lines.items()):
            ax.plot(*zip(*points), color=COLORS[i % 6], ls=DASHES[i % 4], lw=1.2, label=name,
                    marker=markers[i % 7 : i % 7 + 1])  # fmt: skip
        ax.set_title(title, loc="left", fontsize=11)
        if ax is axes[0] or lines.keys() != next(iter(panels.values())).keys():
            ax.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1))
    axes[-1].set_xlabel(x_label)


def draw_bars(axes, panels: dict[str, dict], labels: dict[str, str], sizes: dict[str, str]) -> None:
    """Draw in each panel {title: {(rung, size): [(value, low, high) of each seed]}} a group of bars
    for each rung, a bar for each size: the mean, its interval in black, the seeds as white dots."""
    width = 0.8 / len(sizes)
    for ax, (title, values) in zip(axes, panels.items()):
        top = max(np.max(seeds) for seeds in values.values()) or 1
        if not any(np.mean(seeds, 0)[0] for seeds in values.values()):
            top *= 4  # an interval around nothing shall not fill the panel
        for j, (size, size_label) in enumerate(sizes.items()):
            look = {"color": COLORS[j % 6], "hatch": HATCHES[j % 3] if len(sizes) > 1 else "",
                    "edgecolor": "white"}  # fmt: skip
            ax.bar(0, 0, label=size_label, **look)  # for the legend
            for i, rung in enumerate(labels):
                x = i + (j - (len(sizes) - 1) / 2) * width
                if (rung, size) not in values:
                    ax.text(x, 0.02 * top, "not run", rotation=90, ha="center", fontsize=8,
                            color=GREY)  # fmt: skip
                    continue
                value, low, high = np.mean(values[rung, size], 0)
                spread = np.maximum(0, [[value - low], [high - value]])
                ax.bar(x, value, 0.92 * width, **look)
                ax.errorbar(x, value, spread, color=INK, capsize=3, linewidth=1)
                if len(seeds := [seed[0] for seed in values[rung, size]]) > 1:
                    at = x + np.linspace(-0.25, 0.25, len(seeds)) * width
                    ax.plot(at, seeds, "o", color="white", markeredgecolor=INK, markersize=4)
                ax.text(x, max(high, *seeds) + 0.02 * top, short(value), ha="center", fontsize=9)
        ax.set_ylim(0, min(1.18 * top, 110) if "%" in title else 1.18 * top)
        ax.set_xlim(-0.6, len(labels) - 0.4)
        ax.set_title(title, loc="left", fontsize=11)
        ax.set_xticks(range(len(labels)), [fill(x, 12) for x in labels.values()], fontsize=9)
    if len(sizes) > 1:
        axes[0].legend(frameon=False, fontsize=9, ncols=len(sizes), loc="lower left",
                       bbox_to_anchor=(0, 1), borderaxespad=2)  # fmt: skip


# ---- Runs


def read_run(folder: Path) -> dict:
    """Read a run's files. Raises UserError if `folder` holds no run."""
    if (config := read_json(folder / "config.json")) is None:
        raise UserError(f"{folder} is no run: it has no config.json")
    found = {"name": str(folder), "data": Path(config.get("data", "")).name, "config": config}
    for name in ("summary", "status"):
        found[name] = read_json(folder / f"{name}.json") or {}
    for name in ("events", "metrics"):  # their last line may be cut short
        path = folder / f"{name}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found[name] = [json.loads(line) for line in lines if line.endswith("}")]
    return found


def runs_page(folders: tuple[Path, ...]) -> str:
    runs, rows, said = [read_run(folder) for folder in folders], [], []
    for r in runs:
        last = ([x for x in r["metrics"] if "loss" in x] or [{}])[-1]
        vals = [x["val_loss"] for x in r["metrics"] if "val_loss" in x]
        rows.append([r["name"], f"{r['status'].get('status')}, step {r['status'].get('step', 0):,}",
                     f"{last.get('tokens', 0):,}", f"{last.get('loss', np.nan):.4f}",
                     f"{min(vals, default=np.nan):.4f}", f"{last.get('tokens_per_s', 0):,.0f}",
                     f"{last.get('mfu', 0):.1%}", f"{last.get('seconds', 0):,.0f}"])  # fmt: skip
        for e in r["events"]:
            known = ("time", "step", "event", "message")
            more = [e.get("message", ""), *(f"{k} {v}" for k, v in e.items() if k not in known)]
            more = ", ".join(filter(None, more))
            said.append(f"{e['time']} {r['name']} step {e['step']:,} {e['event']} {more}".rstrip())
    head = ["run", "status", "tokens", "loss", "best val loss", "tokens/s", "MFU", "seconds"]
    keys = dict.fromkeys(key for r in runs for key in r["config"])
    settings = [[key, *(str(r["config"].get(key)) for r in runs)] for key in keys]
    differ = [row for row in settings if len(set(row[1:])) > 1]
    panels = {title: {r["name"]: [(x["step"], x[key]) for x in r["metrics"] if key in x]
                      for r in runs} for key, title in CURVES.items()}  # fmt: skip
    says = "Vertical lines: orange skipped steps, grey a start."
    drawn = figure(draw_curves, panels, runs, says=says, height=2)
    return page("nanophi: training runs", f"""{table(head, rows, 2)}{drawn}
<h2>What happened</h2><pre>{escape(chr(10).join(said))}</pre>
<h2>Settings that differ</h2>
{table(["setting", *(r["name"] for r in runs)], differ, 1 + len(runs))}""")


def draw_curves(axes, panels: dict, runs: list[dict]) -> None:
    draw_lines(axes, panels, "step")
    for i, r in enumerate(runs):
        vals = [(x["step"], x["val_loss"]) for x in r["metrics"] if "val_loss" in x]
        if vals:
            axes[0].plot(*zip(*vals), "o", color=COLORS[i % 6], markersize=3)
        for e in r["events"]:
            for ax in axes if e["event"] in MARKS else []:
                ax.axvline(e["step"], color=MARKS[e["event"]], linewidth=0.6, zorder=0)
    if any(lines for lines in panels["gradient norm"].values()):
        axes[2].set_yscale("log")


# ---- Models: the arms of the demo, the bars of the ladder


class Model:
    """A trained and scored model: its runs, first to last, and its scores."""

    def __init__(self, name: str, rung: str, size: str, seed: int, folder: Path, runs: list[dict]):
        from model import ModelConfig, flops_per_token

        self.name, self.rung, self.size, self.seed, self.runs = name, rung, size, seed, runs
        self.config, self.folder, self.label = runs[-1]["config"], folder, LABELS.get(rung, rung)
        self.heldout = folder / "heldout" if size else folder  # the demo has no other problems
        self.tokens = [(r["data"], r["summary"]["tokens"]) for r in runs]
        self.train_s = sum(r["summary"]["trained_s"] for r in runs)
        shape = ModelConfig(**{f.name: self.config[f.name] for f in fields(ModelConfig)})
        self.flops = flops_per_token(shape) * sum(n for _, n in self.tokens)
        self.scores, self.problems = {}, {}  # {name: (value, low, high)} of MEASURES; how many
        for name, (file, key, factor, _) in MEASURES.items():
            if told := read_json(self.heldout / file if name == "heldout" else folder / file):
                self.scores[name] = tuple(factor * x for x in (told[key], *told["ci95"]))
                self.problems[name] = told.get("problems")

    def numbers(self) -> dict:
        """Return a row of ladder.json."""
        keys = ("name", "rung", "size", "seed", "tokens", "flops", "train_s")
        return {key: getattr(self, key) for key in keys} | {
            "parameters": self.config["parameters"],
            "weights": self.runs[-1]["summary"]["weights"],
            "commit": self.config["commit"],
            "scores": {k: [float(f"{x:.5g}") for x in v] for k, v in self.scores.items()},
        }


def read_models(folder: Path) -> list[Model]:
    """Read the models of a demo or a ladder, in the order of figures. Raises UserError if none."""
    found = []
    for path in [*folder.glob("eval/*"), *folder.glob("rungs/*-*-s*")]:
        if not (folder / "runs" / path.name / "summary.json").exists():
            continue
        runs = [read_run(folder / "runs" / path.name)]
        while init := runs[0]["config"]["init_from"]:
            before = folder / "runs" / Path(init).name
            if not before.exists():  # it started from weights that came from elsewhere
                break
            runs.insert(0, read_run(before))
        demo = path.parent.name == "eval"
        rung, size, seed = (path.name, "", "s0") if demo else path.name.split("-")
        found.append(Model(path.name, rung, size, int(seed[1:]), path, runs))
    if not any(m.scores for m in found):
        raise UserError(f"{folder}: no finished run with a score; see make train, make ladder")
    order = [*LABELS, *sorted(m.rung for m in found)]
    return sorted(found, key=lambda m: (order.index(m.rung), m.config["parameters"], m.seed))


def percent(score: tuple | None) -> str:
    return "{} ({} - {})".format(*map(short, score)) if score else "-"


def short(x: float) -> str:
    return f"{x:.{1 if abs(x) >= 10 else 2}f}"


class Scores:
    """The page about a demo or a ladder; what was not run is left out."""

    def __init__(self, folder: Path, png: Path | None):
        self.folder, self.png, self.models = folder, png, read_models(folder)
        self.unpruned = [m for m in self.models if m.rung not in PRUNED]
        self.sizes = {m.size: f"{m.size} {m.config['parameters'] / 1e6:.3g}M parameters".strip()
                      for m in sorted(self.models, key=lambda m: m.config["parameters"])}
        self.seeds = {}  # {measure: {(rung, size): [(value, low, high), ...]}}
        for name, m in itertools.product(MEASURES, self.models):
            if name in m.scores:
                groups = self.seeds.setdefault(name, {})
                groups.setdefault((m.rung, m.size), []).append(m.scores[name])

    def mean(self, name: str, rung: str, size: str) -> float:
        return np.mean(self.seeds[name][rung, size], 0)[0]

    def figure(self, name: str, says: str, *args) -> str:
        return figure(*args, says=says, png=self.png and self.png / f"{name}.png")

    def bars(self, name: str, measures: list[str], says: str) -> str:
        panels = {MEASURES[n][-1]: self.seeds[n] for n in measures if n in self.seeds}
        labels = {m.rung: m.label for m in self.unpruned}
        return self.figure(name, says, draw_bars, panels, labels, self.sizes) if panels else ""

    def rows(self) -> list[list[str]]:
        """Return the table of scores, its head first."""
        scores = [f"{name}, %" if name in SETS else name for name in self.seeds]
        found = [["model", "trained on", *scores, "FLOP", "seconds"]]
        for m in self.models:
            tokens = " + ".join(f"{n / 1e6:.2f}M {data}" for data, n in m.tokens)
            cells = [percent(m.scores.get(name)) for name in self.seeds]
            name = m.name if m.size else m.label
            found.append([name, tokens, *cells, f"{m.flops:.2g}", f"{m.train_s:,.0f}"])
        return found

    def loss(self) -> str:
        panels = {}
        for size, title in self.sizes.items():
            models = [m for m in self.unpruned if m.size == size and not m.seed]
            last = {m.runs[-1]["name"]: m.label for m in models}
            lines = panels[title] = {}
            for m in models:
                start = 0
                for r in m.runs:  # draw a run that several start from once
                    points = [(start + x["tokens"] / 1e6, x["loss"])
                              for x in r["metrics"] if "loss" in x]  # fmt: skip
                    lines[last.get(r["name"], f"first, on {r['data']}")] = points
                    start += r["summary"]["tokens"] / 1e6
        says = ("Training loss, nats, each line on its own data: exercises are easier to predict "
                "than code, so a lower line is not a better model.")  # fmt: skip
        return self.figure("loss", says, draw_lines, panels, "million tokens seen, in all runs")

    def compute(self) -> str:
        if len(self.sizes) == 1 or "heldout" not in self.seeds:
            return ""
        lines = {}
        for m in self.unpruned:
            if "heldout" in m.scores and not m.seed:
                point = (m.flops, self.mean("heldout", m.rung, m.size))
                lines.setdefault(m.label, []).append(point)
        says = ("Where the left end of a line is above the right end of another, better data did "
                "more than a larger model.")  # fmt: skip
        return self.figure("compute", says, draw_lines, {MEASURES["heldout"][-1]: lines},
                           "training FLOP", MARKERS)  # fmt: skip

    def pruning(self) -> str:
        if len(self.models) == len(self.unpruned):
            return ""
        lines = {"the paper's phi-1 on HumanEval": list(zip(TAUS, PAPER_PRUNED))}
        for name, size in itertools.product(SETS, self.sizes):
            found = [(x, self.mean(name, rung, size))
                     for rung, x in zip(["exercises", *PRUNED], TAUS)
                     if (rung, size) in self.seeds.get(name, {})]  # fmt: skip
            lines |= {f"ours on {name}, {size}": found} if len(found) > 1 else {}
        says = ("A model that had only memorised would lose its whole score. A pruned rung sees "
                "its fewer exercises more often, which may cost something too. eval.similarity "
                "splits a score into problems like the exercises and others.")  # fmt: skip
        return "<h2>Exercises pruned of what resembles the test</h2>" + self.figure(
            "pruning", says, draw_lines, {"pass@1, %": lines}, "exercises pruned at tau", MARKERS)

    def perturbed(self) -> str:
        told = {m.name: read_json(m.folder / "robustness" / "results.json") for m in self.models}
        drops = {name: t["perturbations"] for name, t in told.items() if t}
        kinds = dict.fromkeys(kind for d in drops.values() for kind in d)
        points = [{k: f"{100 * x['drop']:.0f}" for k, x in d.items() if "drop" in x}
                  for d in drops.values()]  # fmt: skip
        rows = [[kind, *(d.get(kind, "-") for d in points)] for kind in kinds]
        title = "<h2>Prompts written in another way: points of pass@1 lost</h2>"
        return title + table(["", *drops], rows) if rows else ""

    def paper(self) -> str:
        if self.seeds.keys().isdisjoint(SETS[2:]):
            return ""
        rows = [[f"ours: {m.name}", *(percent(m.scores.get(name)) for name in SETS[2:])]
                for m in self.models if m.rung == "exercises"]  # fmt: skip
        title = "<h2>Beside the paper</h2>pass@1, %, of other data, prompts and harnesses"
        return title + table(["model", "HumanEval", "MBPP"], [*rows, *PAPER])

    def samples(self, each: int = 3) -> str:
        """Return some held-out problems, solved and not, as the best model answered them."""
        best = max(self.models, key=lambda m: m.scores.get("heldout", (-1,)))
        exercises = self.folder / ("data/exercises" if best.size else "exercises")
        if not (exercises / "heldout.jsonl").exists() or "heldout" not in best.scores:
            return ""
        prompts = {p["task_id"]: p["prompt"] for p in read_jsonl(exercises / "heldout.jsonl")}
        text = f"<h2>What the best model writes</h2>{escape(best.name)}; completions in blue."
        for passed, kind in ((True, "pass"), (False, "fail")):
            some = list(read_jsonl(best.heldout / "samples.jsonl"))
            some = [s for s in some if s["passed"] == passed]
            for s in some[:: max(1, len(some) // each)][:each]:
                said = "solved" if passed else f"not solved: {escape(s['detail'][:200])}"
                text += (f"<p class={kind}>{said}</p><pre>{escape(prompts[s['task_id']])}"
                         f"<b>{escape(s['completion'])}</b></pre>")  # fmt: skip
        return text

    def page(self) -> str:
        c, (head, *rows) = self.models[0].config, self.rows()
        problems = {k: n for m in self.models for k, n in m.problems.items() if k in SETS}
        asked = ", ".join(f"{n} {name}" for name, n in problems.items())
        black = (f"Problems: {asked}. Black: 95% intervals over problems. White dots: the seeds, "
                 "where there are several.")  # fmt: skip
        sizes = "; ".join(self.sizes.values())
        again = "" if "" in self.sizes else " One again: make ladder BAR=MODEL LADDER=out/again"
        return page("nanophi: phi-1 in miniature", f"""<p class=note>{sizes}; vocabulary
{c["vocab_size"]:,}, context {c["seq_len"]}; trained from nothing; commit {escape(c["commit"])},
torch {escape(c["torch"])}, {escape(c["device"])}</p>
<h2>Does better data make a better model?</h2>
<p>The same model, trained on different data for nearly the same number of tokens, then asked to
write functions that it has never seen, greedily, once each. A problem counts as solved if all its
tests pass.</p>{self.bars("exercises", SETS[:2], black)}{self.bars("benchmarks", SETS[2:], black)}
<p>Scores with 95% intervals.{again}</p>
{table(head, rows, 2)}{CAVEATS}
{self.bars("code", ["bits"], "What exercises cost. Black: intervals over documents.")}
<h2>Training</h2>{self.loss()}{self.compute()}{self.pruning()}{self.perturbed()}{self.paper()}
{self.samples()}""")

    def text(self) -> str:
        rows = self.rows()
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows) + "\n"


if __name__ == "__main__":
    run(main)
