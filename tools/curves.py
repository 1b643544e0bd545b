"""Write the page about training runs: how they went, where they stand, how they were set."""

import json
from pathlib import Path

from common.config import UserError
from common.files import read_json
from common.pages import COLORS, escape, figure, page, table

# What is drawn over steps: key of metrics.jsonl, label, factor, whether the axis is logarithmic.
ROWS = [
    ("loss", "loss, nats (dots: validation)", 1, False),
    ("lr", "learning rate", 1, False),
    ("grad_norm", "gradient norm", 1, True),
    ("tokens_per_s", "1000 tokens/s", 1e-3, False),
    ("mfu", "MFU, %", 100, False),
    ("loader_wait_frac", "waiting for data, %", 100, False),
    ("memory_gib", "peak memory, GiB", 1, False),
]
EVENTS = {"spike": "#cf222e", "rewind": "#cf222e", "skipped": "#d9730d", "start": "#6e7781"}


def runs_page(folders: list[Path]) -> str:
    """Return HTML about the runs in `folders`. Raises UserError if one of them holds no run."""
    runs = [read_run(folder) for folder in folders]
    body = f"""
<h1>nanophi: {len(runs)} training run{"s" * (len(runs) > 1)}</h1>
{status_table(runs)}
{figure(draw_curves, runs, height=2 * len(ROWS), rows=len(ROWS))}
<p class="note">Vertical lines: red a loss spike or a rewind, orange skipped steps, grey a start.
</p>
<h2>What happened</h2>
{"".join(event_list(run) for run in runs)}
<h2>Settings that differ</h2>
{settings_table(runs)}
<h2>Every setting</h2>
{"".join(settings(run) for run in runs)}
"""
    return page("nanophi runs", body)


def read_run(folder: Path) -> dict:
    """Read a run's files: {"name", "config", "status", "events", "metrics"}.

    Raises UserError if there is no config.json. A last line that is cut short is left out.
    """
    if (config := read_json(folder / "config.json")) is None:
        raise UserError(f"{folder} is no run: it has no config.json")
    status = read_json(folder / "status.json") or {"status": "unknown"}
    run = {"name": str(folder), "config": config, "status": status}
    for name in ("events", "metrics"):
        path = folder / f"{name}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        run[name] = [json.loads(line) for line in lines if line[-1:] == "}"]
    return run


def draw_curves(axes, runs: list[dict]) -> None:
    for ax, (key, label, factor, logarithmic) in zip(axes, ROWS):
        for i, run in enumerate(runs):
            color = COLORS[i % len(COLORS)]
            points = [(r["step"], factor * r[key]) for r in run["metrics"] if key in r]
            if points:
                ax.plot(*zip(*points), color=color, linewidth=1.1, label=run["name"])
            vals = [(r["step"], r["val_loss"]) for r in run["metrics"] if "val_loss" in r]
            if key == "loss" and vals:
                ax.plot(*zip(*vals), "o", color=color, markersize=3)
            for event in run["events"]:
                if event["event"] in EVENTS:
                    ax.axvline(event["step"], color=EVENTS[event["event"]], linewidth=0.6, zorder=0)
        ax.set_ylabel(label, fontsize=9)
        if logarithmic:
            ax.set_yscale("log")
    axes[0].legend(frameon=False)
    axes[-1].set_xlabel("step")


def status_table(runs: list[dict]) -> str:
    rows = []
    for run in runs:
        status, logged = run["status"], [r for r in run["metrics"] if "lr" in r]
        vals = [r["val_loss"] for r in run["metrics"] if "val_loss" in r]
        last = logged[-1] if logged else {}
        rows.append(
            [
                run["name"],
                f"{status['status']}, step {status.get('step', 0):,}",
                f"{last.get('tokens', 0):,}",
                f"{last['loss']:.4f}" if "loss" in last else "",
                f"{min(vals):.4f}" if vals else "",
                f"{last.get('tokens_per_s', 0):,.0f}",
                f"{last.get('mfu', 0):.1%}",
                f"{last.get('seconds', 0):,.0f} s",
            ]
        )
    head = ["run", "status", "tokens", "loss", "best val loss", "tokens/s", "MFU", "time"]
    return table(head, rows, range(2, 8))


def event_list(run: dict) -> str:
    lines = []
    for event in run["events"]:
        rest = {k: v for k, v in event.items() if k not in ("time", "event", "step", "message")}
        said = event.get("message") or ", ".join(f"{k} {v}" for k, v in rest.items())
        lines.append(f"{event['time']}  step {event['step']:>8,}  {event['event']}: {said}")
    return f"<p>{escape(run['name'])}</p><pre>{escape(chr(10).join(lines))}</pre>"


def settings_table(runs: list[dict]) -> str:
    keys = dict.fromkeys(k for run in runs for k in run["config"])
    rows = []
    for key in keys:
        values = [str(run["config"].get(key)) for run in runs]
        if len(set(values)) > 1:
            rows.append([key, *values])
    return table(["setting", *(run["name"] for run in runs)], rows)


def settings(run: dict) -> str:
    return (
        f"<details><summary>{escape(run['name'])}</summary>"
        f"<pre>{escape(json.dumps(run['config'], indent=2))}</pre></details>"
    )
