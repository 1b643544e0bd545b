"""Write one self-contained HTML page about training runs, the demo or the ladder.

    python -m tools.report out/a out/b           compare runs: curves, events, settings
    python -m tools.report --demo out/demo       does better data make a better model?
    python -m tools.report --ladder out/ladder --png records/ladder_cpu      the same, rung by rung

--png FOLDER also writes the figures as PNG and all numbers as ladder.json. --best FOLDER adds
pass@k of the model from make best. Figures are inline SVG: the page needs no network.
"""

import html
import io
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from common.config import UserError, run
from common.files import read_json, read_jsonl
from eval.bits import Cell, difference
from eval.scores import parse_folders, predicted

LABELS = {  # row names by training data, in figure order
    "raw": "raw code", "filtered": "filtered by rules", "classified": "classified, best fifth",
    "textbooks": "textbooks and code", "mixture": "mixture of all", "base": "base: not finetuned",
    "exercises": "exercises", "replay": "replay: a fifth is code", "varied": "varied in form",
    "blend": "blend: half varied", "damaged": "damaged: half are wrong",
    "shuffled": "shuffled docstrings", "raw_exercises": "exercises after raw code",
    "pairs": "pairs cut from raw code", "pruned80": "pruned at .80"}
STEPS = ["raw → filtered", "filtered → classified", "classified → textbooks", "textbooks → mixture",
         "raw → mixture", "textbooks → exercises", "textbooks → pairs", "pairs → exercises",
         "exercises → replay", "exercises → varied", "exercises → blend", "exercises → damaged",
         "exercises → pruned80"]
SETS = {"humaneval": "HumanEval", "mbpp": "MBPP", "heldout": "held-out exercises",
        "unseen": "unseen families"}
BITS, RIGHT, PASS = "bits per byte\n← better", "preferred, %\nbetter →", "pass@1, %\nbetter →"
# {measure: (file, key of the score, key of its interval, title, unit)}
MEASURES = {"bits": ("gold/documents.json", "bits_per_byte", "ci95", "other real code", BITS)}
for x, title in (SETS | {"judge": "our 50 problems"}).items():
    MEASURES[f"gold_{x}"] = (f"gold/{x}.json", "bits_per_byte", "ci95", title, BITS)
    MEASURES[f"preferred_{x}"] = (f"gold/{x}.json", "preferred", "preferred_ci95", title, RIGHT)
    MEASURES[x] = (f"{x}/results.json", "pass@1", "ci95", title, PASS)
COMPARED = [f"{x}_{of}" for x in ("gold", "preferred") for of in ("judge", "humaneval", "mbpp")]
COLUMNS = [*COMPARED, *SETS, "bits"]
HEADLINE = ["raw", "filtered", "classified", "textbooks", "mixture"]
FIGURES = {  # measures, x of the dashed line, caption
    "headline": (["gold_humaneval", "gold_mbpp"], None, """The same model trained on better and
        better data: bits per byte of the reference solutions."""),
    "gold": ([*(f"gold_{x}" for x in SETS), "bits"], None, """Bits per byte of the reference
        solution, given the problem. Rightmost: bits per byte of other code. Blank: not run."""),
    "steps": (COMPARED[:3], 0, """Change from one rung to the next, paired by seed and problem. A
        step counts as better or worse only if two 95% intervals exclude 0: over problems (drawn)
        and over seeds (Student's t)."""),
    "mutants": ([f"preferred_{x}" for x in SETS], 50, """How often a model rates the reference
        solution more likely than a copy with one small mistake. Dashed: chance. Knowing which
        tokens are common is enough to beat chance (LOG.md)."""),
    "exercises": (["heldout", "unseen"], None, """Problems solved. The program that made the
        training exercises made these, too. Held-out exercises come from the families in training,
        the others from families that training never shows.""")}
PASS_AT_K = """Problems that the model from make best solves with at least one of k samples. Dots:
    measured. Lines: a fit that assumes beta-distributed solve rates per problem."""
CAVEATS = """<p>What this does <b>not</b> show:</p><ul>
<li>Predicting a solution, or preferring it to a wrong one, is not the same as writing it.</li>
<li>One program made the exercises for training and for scoring: solving them means recombining what
training showed. Others wrote the benchmarks; an LLM wrote the paper's exercises.</li>
<li>Black lines are intervals over problems, dots are the few seeds; no interval covers both.</li>
<li>Pairs share the exercises' format, not their subjects: the two effects are mixed.</li></ul>"""

COLORS = ["#1f6feb", "#d9730d", "#2da44e", "#8250df", "#bf3989", "#6e7781"]
DASHES = ["-", "--", ":", "-."]
GREY, MARKERS = "#6e7781", "oD^v"
BLACK = {"color": "#1f2328", "lw": 1.2, "zorder": 3}
WHITE = {"marker": "o", "ls": "", "ms": 3.2, "mfc": "white", "mec": "#1f2328", "mew": 0.8}
VERDICTS = {"better": "#1a7f37", "worse": "#cf222e", "not resolved": "#8c959f"}
CURVES = {"loss": "loss, nats (dots: validation)", "lr": "learning rate",
          "grad_norm": "gradient norm", "tokens_per_s": "tokens/s", "mfu": "MFU",
          "loader_wait_frac": "fraction of time waiting for data", "memory_gib": "peak memory, GiB"}
MARKS = {"skipped": "#d9730d", "start": GREY}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #d1d9e0 }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px }
th, td { text-align: left; padding: .2rem .6rem; border-bottom: 1px solid #d1d9e0 }
td:first-child { white-space: nowrap }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
pre { background: #f6f8fa; padding: .7rem 1rem; overflow-x: auto; font-size: 13px }
pre b { color: #1f6feb; font-weight: normal } .wide { overflow-x: auto } .pass { color: #1a7f37 }
svg { max-width: 100%; height: auto } figure { margin: 1.5rem 0 } .fail { color: #cf222e }
figcaption, .note { color: #59636e; font-size: 14px }
"""
escape = html.escape


@dataclass(frozen=True)
class Config:
    """Write the report on a demo or a ladder and print its scores; given RUN..., compare runs."""

    run: tuple[Path, ...] = ()  # run folders to compare; can come first, without --run
    demo: Path = Path("out/demo")  # demo folder
    ladder: Path | None = None  # ladder folder, instead of a demo
    best: Path | None = None  # folder of make best: add a figure of its pass@k
    png: Path | None = None  # folder for the figures as PNG and the numbers as ladder.json
    out: Path | None = None  # HTML file; default: report.html in DEMO or LADDER, RUN/curves.html


def main() -> None:
    c = parse_folders(Config, "run")
    if c.run:
        out, text, said = c.out or c.run[0] / "curves.html", runs_page(c.run), ""
    else:
        found = Scores(c.ladder or c.demo, c.png, c.best)
        if c.png:
            c.png.mkdir(parents=True, exist_ok=True)
            (c.png / "ladder.json").write_text(json.dumps(found.numbers()) + "\n")
        out, text, said = c.out or found.folder / "report.html", found.page(), found.text()
    out.write_text(text, encoding="utf-8", errors="backslashreplace")
    print(f"{said}report: {out}")


# ---- HTML and figures


def page(title: str, body: str) -> str:
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    body = f"<h1>{title}</h1>{body}"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{body}</body></html>\n"


def table(lines: list[list], words: int = 1) -> str:
    """Return an HTML table. Row 0 is the header; columns from `words` on hold numbers."""
    text = ""
    for i, cells in enumerate(lines):
        tag = "td" if i else "th"
        kinds = [f"{tag} class=n" if j >= words else tag for j in range(len(cells))]
        cells = [f"<{kind}>{escape(str(x))}</{tag}>" for kind, x in zip(kinds, cells)]
        text += f"<tr>{''.join(cells)}</tr>"
    return f"<div class=wide><table>{text}</table></div>"


def figure(draw: Callable, panels: list, *args, says: str, size, png=None, beside=False) -> str:
    """Return inline SVG with a caption, drawn by draw(axes, panels, *args); also write `png`."""
    style = {"svg.fonttype": "none", "font.size": 11, "svg.hashsalt": "nanophi",
             "axes.spines.top": False, "axes.spines.right": False}
    if not panels:
        return ""
    with matplotlib.rc_context(style):
        fig, shape = Figure(figsize=size), (1, len(panels)) if beside else (len(panels), 1)
        axes = fig.subplots(*shape, sharex="col", sharey="row", squeeze=False,
                            gridspec_kw={"hspace": 0.35, "wspace": 0.15})
        draw(axes.ravel(), panels, *args)
        svg, raw = io.StringIO(), io.BytesIO()
        fig.savefig(svg, format="svg", bbox_inches="tight", metadata={"Date": None})
        if png:  # a palette takes a third of the bytes
            fig.savefig(raw, dpi=130, bbox_inches="tight")
            Image.open(raw).convert("RGB").quantize(48).save(png, optimize=True)
    text = svg.getvalue()
    return f"<figure>{text[text.index('<svg'):]}<figcaption>{escape(says)}</figcaption></figure>"


def draw_rows(axes, panels: list, rows: list[str], sizes: dict, line: float | None) -> None:
    """Mark each row and size in each panel (title, unit, {(row, size): Cell}): mean, interval in
    black, seeds in white. Draw pass@1 as bars."""
    for ax, (title, unit, cells) in zip(axes, panels):
        for (i, row), (j, size) in itertools.product(enumerate(rows), enumerate(sizes)):
            if j == 0 and i % 2:
                ax.axhspan(i - 0.5, i + 0.5, color="#f3f5f7", zorder=0)
            if (cell := cells.get((row, size))) is None:
                continue
            y, end = i + 0.8 * ((j + 0.5) / len(sizes) - 0.5), max(cell.high, *cell.seeds)
            color = VERDICTS.get(cell.verdict, COLORS[j])
            if unit.startswith("pass"):
                ax.barh(y, cell.value, 0.7 / len(sizes), color=color)
                ax.annotate(short(cell.value), (end, y), (5, 0), va="center", fontsize=9,
                            textcoords="offset points")
                ax.set_xlim(0, max(10, 1.15 * end, ax.get_xlim()[1]))
            else:
                ax.plot(cell.value, y, MARKERS[j], color=color, ms=8, zorder=4)
            ax.plot(cell[1:3], [y, y], **BLACK)
            ax.plot(cell.seeds, [y + 0.27 / len(sizes)] * len(cell.seeds), **WHITE, zorder=5)
        if line is not None:
            ax.axvline(line, color=GREY, lw=1.2, ls="--", zorder=1)
        ax.set_title(title, loc="left", fontsize=11)
        ax.set_xlabel(unit, fontsize=10)
        ax.locator_params(axis="x", nbins=4, prune="both")
        ax.tick_params(axis="y", length=0)
        ax.tick_params(axis="x", labelsize=9)
    first, judged = axes[0], rows[0] in STEPS
    first.set_yticks(range(len(rows)), [LABELS.get(row, row) for row in rows])
    first.set_ylim(len(rows) - 0.5, -0.5)
    looks = [(MARKERS[j], GREY if judged else COLORS[j], x) for j, x in enumerate(sizes.values())]
    for marker, color, label in looks + [("s", c, x) for x, c in VERDICTS.items()] * judged:
        first.plot([], [], marker, color=color, ms=8, label=label)
    first.plot([], [], **WHITE, label="a seed")
    first.plot([], [], **BLACK, label="95% interval over problems")
    first.legend(frameon=False, fontsize=10, ncols=4, loc="lower left", bbox_to_anchor=(0, 1),
                 borderaxespad=1.8, columnspacing=1, handletextpad=0.3)


def draw_passk(axes, panels: list) -> None:
    """Draw one line per result {name: {"pass_at", "fit"}} in the only panel."""
    for color, (name, told) in zip(COLORS, panels[0].items()):
        ks = [int(k) for k in told["pass_at"]]
        axes[0].plot(ks, [100 * x for x in told["pass_at"].values()], "o", color=color, label=name)
        if fit := told.get("fit"):
            k = np.geomspace(1, max(ks))
            axes[0].plot(k, 100 * predicted(fit["a"], fit["b"], k), color=color)
    axes[0].set(xscale="log", xlabel="k, samples per problem", ylabel="solved by any, %", ylim=0)
    axes[0].xaxis.set_major_formatter("{x:,.0f}")
    axes[0].legend(frameon=False)


# ---- Runs


def read_run(folder: Path) -> dict:
    """Read a run's files. Raises UserError if `folder` is not a run folder."""
    if (config := read_json(folder / "config.json")) is None:
        raise UserError(f"{folder} is not a run folder: it has no config.json")
    data = ", ".join(Path(d).name for d in config.get("data", "").split(", "))
    found = {"name": str(folder), "data": data, "config": config}
    for name in ("summary", "status"):
        found[name] = read_json(folder / f"{name}.json") or {}
    for name in ("events", "metrics"):  # a kill can cut the last line short
        path = folder / f"{name}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found[name] = [json.loads(line) for line in lines if line.endswith("}")]
    return found


def runs_page(folders: tuple[Path, ...]) -> str:
    runs, said = [read_run(folder) for folder in folders], []
    rows = [["run", "status", "tokens", "loss", "best val loss", "tokens/s", "MFU", "seconds"]]
    for r in runs:
        last = ([x for x in r["metrics"] if "loss" in x] or [{}])[-1]
        vals = [x["val_loss"] for x in r["metrics"] if "val_loss" in x]
        rows.append([r["name"], f"{r['status'].get('status')}, step {r['status'].get('step', 0):,}",
                     f"{last.get('tokens', 0):,}", f"{last.get('loss', np.nan):.4f}",
                     f"{min(vals, default=np.nan):.4f}", f"{last.get('tokens_per_s', 0):,.0f}",
                     f"{last.get('mfu', 0):.1%}", f"{last.get('seconds', 0):,.0f}"])
        for e in r["events"]:
            known = ("time", "step", "event", "message")
            more = [e.get("message", ""), *(f"{k} {v}" for k, v in e.items() if k not in known)]
            more = ", ".join(filter(None, more))
            said.append(f"{e['time']} {r['name']} step {e['step']:,} {e['event']} {more}".rstrip())
    keys = dict.fromkeys(key for r in runs for key in r["config"])
    settings = [[key, *(str(r["config"].get(key)) for r in runs)] for key in keys]
    differ = [row for row in settings if len(set(row[1:])) > 1]
    panels = [(title, {r["name"]: [(x["step"], x[key]) for x in r["metrics"] if key in x]
                      for r in runs}) for key, title in CURVES.items()]
    says = "Vertical lines: skipped steps in orange, starts in grey."
    drawn = figure(draw_curves, panels, runs, says=says, size=(9, 2 * len(panels)))
    return page("nanophi: training runs", f"""{table(rows, 2)}{drawn}
<h2>Events</h2><pre>{escape(chr(10).join(said))}</pre>
<h2>Settings that differ</h2>
{table([["setting", *(r["name"] for r in runs)], *differ], 1 + len(runs))}""")


def draw_curves(axes, panels: list, runs: list[dict]) -> None:
    """Draw one line per label in each panel (title, {label: [(x, y), ...]})."""
    for ax, (title, lines) in zip(axes, panels):
        for i, (name, points) in enumerate(lines.items()):
            ax.plot(*zip(*points), color=COLORS[i % 6], ls=DASHES[i % 4], lw=1.2, label=name)
        ax.set_title(title, loc="left", fontsize=11)
    axes[0].legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1))
    axes[-1].set_xlabel("step")
    for i, r in enumerate(runs):
        vals = [(x["step"], x["val_loss"]) for x in r["metrics"] if "val_loss" in x]
        if vals:
            axes[0].plot(*zip(*vals), "o", color=COLORS[i % 6], markersize=3)
        for e in r["events"]:
            for ax in axes if e["event"] in MARKS else []:
                ax.axvline(e["step"], color=MARKS[e["event"]], linewidth=0.6, zorder=0)
    if any(panels[2][1].values()):  # the gradient norm
        axes[2].set_yscale("log")


# ---- Models: demo arms, ladder bars

def said(cell: Cell | None) -> str:
    """Format value and range: the interval for a step or a single seed, else over seeds."""
    if cell and cell.verdict:
        digits = 1 if cell.high - cell.low > 0.5 else 3
        return "{:+.{n}f} ({:+.{n}f} to {:+.{n}f}) {}".format(*cell[:3], cell.verdict, n=digits)
    ends = cell and ((min(cell.seeds), max(cell.seeds)) if len(cell.seeds) > 1 else cell[1:3])
    return "{} ({} - {})".format(*map(short, (cell.value, *ends))) if cell else "-"


class Model:
    """A trained and scored model: an arm of a demo or a bar of a ladder."""

    def __init__(self, folder: Path):
        top, self.name = folder.parent.parent, folder.name
        self.rung, self.size, seed = (*self.name.split("-"), "", "s0")[:3]
        self.seed, self.runs = int(seed[1:]), [read_run(top / "runs" / self.name)]
        while (init := self.runs[0]["config"]["init_from"]) and (
                before := top / "runs" / Path(init).name).exists():  # else it is not of this folder
            self.runs.insert(0, read_run(before))
        self.config = self.runs[-1]["config"]
        self.heldout = folder / "heldout" if self.size else folder  # a demo has only these
        self.tokens = [(r["data"], r["summary"]["tokens"]) for r in self.runs]
        data, n = self.tokens[-1]
        packed = read_json(top / f"data/tokens/{data}/summary.json") or {}
        parts = packed.get("mixture") or [{"share": 1, "tokens": packed.get("train_tokens", 0)}]
        self.epochs = [round(x["share"] * n / x["tokens"], 2) for x in parts if x["tokens"]]
        self.scores, self.tasks = {}, {}  # {measure: (value, low, high)}; inputs of difference
        for name, (file, key, ci95, _, unit) in MEASURES.items():
            path = self.heldout / "results.json" if name == "heldout" else folder / file
            if (told := read_json(path) or {}).get(key) is not None:
                values = np.array([told[key], *told[ci95]]) * (1 if unit == BITS else 100)
                self.scores[name] = [float(f"{x:.5g}") for x in values]
                self.tasks[name] = told.get("tasks")

    def numbers(self) -> dict:
        """Return one row of ladder.json."""
        keys = ("name", "rung", "size", "seed", "tokens", "epochs", "scores")
        return {key: getattr(self, key) for key in keys} | {
            "train_s": sum(r["summary"]["trained_s"] for r in self.runs),
            "weights": self.runs[-1]["summary"]["weights"],
            "parameters": self.config["parameters"], "commit": self.config["commit"]}


def short(x: float) -> str:
    return f"{x:.{1 if abs(x) >= 10 else 2}f}"


class Scores:
    """The report on a demo or a ladder, without what was not run."""

    def __init__(self, folder: Path, png: Path | None, best: Path | None = None):
        self.folder, self.png, self.best = folder, png, best
        paths = [*folder.glob("eval/*"), *folder.glob("rungs/*-*-s*")]
        found = [Model(x) for x in paths if (folder / "runs" / x.name / "summary.json").exists()]
        if not any(m.scores for m in found):
            raise UserError(f"{folder}: no finished run with a score; run make train or ladder")
        rungs, small = [*LABELS, *(m.rung for m in found)], lambda m: m.config["parameters"]
        self.models = sorted(found, key=lambda m: (rungs.index(m.rung), small(m), m.seed))
        self.sizes = {m.size: f"{m.size} {small(m) / 1e6:.2g}M parameters".strip()
                      for m in sorted(found, key=small)}
        bars = itertools.groupby(self.models, lambda m: (m.rung, m.size))
        self.bars = {bar: list(models) for bar, models in bars}
        self.cells = {name: {} for name in MEASURES}  # {measure: {(rung or step, size): Cell}}
        for name, (bar, models) in itertools.product(MEASURES, self.bars.items()):
            if found := [m.scores[name] for m in models if name in m.scores]:
                self.cells[name][bar] = Cell(*np.mean(found, 0).tolist(), [x[0] for x in found])
        for name, size, step in itertools.product(COMPARED, self.sizes, STEPS):
            told = [{m.seed: m.tasks[name] for m in self.bars.get((rung, size), ())
                     if m.tasks.get(name)} for rung in step.split(" → ")]
            if seeds := sorted(told[0].keys() & told[1].keys()):
                sides = ([x[seed] for seed in seeds] for x in told)
                self.cells[name][step, size] = difference(*sides, MEASURES[name][-1] == BITS)

    def numbers(self) -> dict:
        """Return the contents of ladder.json."""
        steps = [{"step": step, "size": size, "measure": name, **cell._asdict()}
                 for name in COMPARED for (step, size), cell in self.cells[name].items()
                 if step in STEPS]
        return {"rungs": [m.numbers() for m in self.models], "steps": steps}

    def figure(self, name: str) -> str:
        measures, line, says = FIGURES[name]
        steps, sizes = name == "steps", self.sizes
        panels = [(MEASURES[x][3], "change in " * steps + MEASURES[x][4], self.cells[x])
                  for x in measures if self.cells[x]]
        rows = [row for row in (STEPS if steps else dict.fromkeys(m.rung for m in self.models))
                if any((row, size) in cells for size in sizes for *_, cells in panels)
                and (name != "headline" or row in HEADLINE)]
        size = min(11, 5 + 3 * len(panels)), 0.4 + 0.16 * (1 + len(sizes)) * len(rows)
        return figure(draw_rows, rows and panels, rows, sizes, line, says=says, size=size,
                      beside=True, png=self.png and self.png / f"{name}.png")

    def passk(self) -> str:
        paths = sorted(self.best.glob("*/results.json")) if self.best else []
        told = {SETS[path.parent.name]: x for path in paths
                if path.parent.name in SETS and "pass_at" in (x := read_json(path))}
        if self.best and not told:
            raise UserError(f"--best {self.best}: no humaneval/results.json with several samples")
        return figure(draw_passk, [told] if told else [], says=PASS_AT_K, size=(7, 4),
                      png=self.png and self.png / "passk.png")

    def tables(self) -> list[list[list[str]]]:
        """Return one table per model size and one of steps, each with its header first."""
        found = {}  # {header's first cells: {(rung or step, size): row's first cells}}
        for bar, (m, *_) in self.bars.items():
            trained = " + ".join(f"{n / 1e6:.2f}M {data}" for data, n in m.tokens)
            epochs = " + ".join(map(short, m.epochs))
            row = LABELS.get(m.rung, m.rung), f"{trained} ({epochs} epochs)" if epochs else trained
            found.setdefault((self.sizes[m.size], "trained on"), {})[bar] = row
        found["step", "model"] = {key: key for x in COMPARED for key in self.cells[x]
                                  if key[0] in STEPS}
        for head, rows in found.items():
            names = [x for x in COLUMNS if self.cells[x].keys() & rows.keys()]
            heads = (", ".join(MEASURES[x][3:]).split("\n")[0] for x in names)
            found[head] = [[*head, *heads], *([*row, *(said(self.cells[x].get(key)) for x in names)]
                                              for key, row in rows.items())]
        return [rows for rows in found.values() if len(rows) > 1]

    def samples(self, each: int = 3) -> str:
        """Return some held-out problems with the best model's answers, solved and not."""
        best = max(self.models, key=lambda m: m.scores.get("heldout", [-1]))
        exercises = self.folder / ("data/exercises" if best.size else "exercises")
        if not (exercises / "heldout.jsonl").exists() or "heldout" not in best.scores:
            return ""
        prompts = {p["task_id"]: p["prompt"] for p in read_jsonl(exercises / "heldout.jsonl")}
        text = f"<h2>What the best model writes</h2>{escape(best.name)}; completions in blue."
        answers = list(read_jsonl(best.heldout / "samples.jsonl"))
        for passed, kind in ((True, "pass"), (False, "fail")):
            some = [s for s in answers if s["passed"] == passed]
            for s in some[:: max(1, len(some) // each)][:each]:
                said = "solved" if passed else f"not solved: {escape(s['detail'][:200])}"
                text += (f"<p class={kind}>{said}</p><pre>{escape(prompts[s['task_id']])}"
                         f"<b>{escape(s['completion'])}</b></pre>")
        return text

    def page(self) -> str:
        c, sizes = self.models[0].config, "; ".join(self.sizes.values())
        tables = "".join(table(rows, 2) for rows in self.tables())
        predicts = """We measure how well it predicts the reference solutions of problems it never
saw (bits per byte), and how often it rates them more likely than copies with one small mistake
(preferred).""" * any(self.cells[x] for x in COMPARED)
        writes = """It writes each function of each set once, greedily; a function is solved if it
passes all its tests.""" * any(self.cells[x] for x in SETS)
        return page("nanophi: phi-1 in miniature", f"""<p class=note>{sizes}; vocabulary
{c["vocab_size"]:,}, context {c["seq_len"]}; commit {escape(c["commit"])}, torch
{escape(c["torch"])}, {escape(c["device"])}</p>
<h2>Does better data make a better model?</h2>
<p>We train the same model from scratch on different data, for nearly the same number of tokens.
{predicts} {writes}</p>
{"".join(map(self.figure, FIGURES))}{self.passk()}<h2>The numbers</h2>
<p>Mean over seeds, with the lowest and highest seed in parentheses; for a single seed or a step,
the 95% interval over problems. Rerun one bar of a ladder: <code>make ladder BAR=RUNG-SIZE-sSEED
LADDER=out/again</code>.</p>{tables}{CAVEATS}{self.samples()}""")

    def text(self) -> str:
        said = ""
        for rows in self.tables():
            widths = [max(map(len, column)) for column in zip(*rows)]
            said += "".join("  ".join(map(str.ljust, x, widths)).rstrip() + "\n" for x in rows)
        return said


if __name__ == "__main__":
    run(main)
