"""The page of data/diversity.py: tables and pictures of one or more sets."""

import numpy as np

from common.config import UserError
from data.base import minhash
from data.base.syntax import TOPICS

# The table: a measure, its name, and how to read it.
MEANINGS = {
    "documents": ("documents", ""),
    "mb": ("text, MB", ""),
    "topics_covered": ("topics covered", f"of {len(TOPICS)}, those that 1% of the documents have; "
                       "long documents have more of them"),
    "topic_balance": ("balance of topics", "1 where all are as frequent: the entropy of topics "
                      "over its largest value, a document's weight shared among its topics"),
    "near_duplicate_frac": ("near-duplicates", "documents that are like an earlier one, by "
                            f"MinHash over shingles of {minhash.SHINGLE} tokens"),
    "distinct_1": ("distinct tokens", "different ones over all, in the same amount of text"),
    "distinct_2": ("distinct pairs of tokens", "the same; high: varied"),
    "distinct_4": ("distinct 4-grams of tokens", "the same; low: the same phrases again and again"),
    "compression": ("compression ratio", "of zstd at level 19, of the same amount of text; high: "
                    "redundant"),
    "vendi": ("Vendi score", "so many documents with no likeness at all would be as diverse"),
    "names": ("different names", "in the same amount of text, keywords left out"),
    "imports_frac": ("documents that import", ""),
    "modules": ("different modules", "that the sample imports"),
    "parses_frac": ("Python", "documents that are, or that hold fenced blocks that are"),
    "chars": ("characters", "of a document: 10th, 50th and 90th percentile"),
    "functions": ("functions", "of a document: the same percentiles"),
    "complexity": ("cyclomatic complexity", "of a function: the same percentiles"),
    "depth": ("depth of the syntax tree", "of a document: the same percentiles"),
    "runs_frac": ("solutions that run", "of problem records alone: those that pass their tests"),
}  # fmt: skip


def html_page(names: list[str], measured: list[dict]) -> str:
    """Tables and pictures of all sets."""
    try:
        from common import pages
    except ImportError:
        raise UserError("the page needs matplotlib: pip install matplotlib") from None
    sets = list(zip(names, measured))
    rows = [[title, *(show(k, m[k]) for m in measured)] for k, (title, _) in MEANINGS.items()]
    meanings = [[title, meaning] for title, meaning in MEANINGS.values() if meaning]
    modules = [[name, ", ".join(f"{m} {n}" for m, n in s["top_modules"].items())]
               for name, s in sets]  # fmt: skip
    number = range(1, len(sets) + 1)
    body = f"""<h1>Diversity</h1>
<p class="note">{pages.escape(", ".join(names))}. Sets are compared on the same amount of text of
each; see data/diversity.py.</p>
{pages.table(["", *names], rows, number)}
<details><summary>How to read it</summary>{pages.table(["", ""], meanings)}</details>
<h2>Topics</h2><p>Share of the documents that have something of each topic.</p>
{pages.figure(draw_topics, sets, pages.COLORS, height=9)}
<h2>Length</h2>
{pages.figure(draw_quantiles, sets, pages.COLORS, "chars", "characters of a document")}
<h2>Difficulty</h2>
{pages.figure(draw_quantiles, sets, pages.COLORS, "complexity", "complexity of a function")}
<h2>Vocabulary</h2><p>A set that runs out of new names bends; one that goes on inventing does
not.</p>{pages.figure(draw_growth, sets, pages.COLORS)}
<h2>Modules</h2><p>How many documents of the sample import them.</p>
{pages.table(["set", "most imported"], modules)}
"""
    return pages.page("Diversity", body)


def show(measured: str, value) -> str:
    if measured.endswith("_frac") and value is not None:
        return f"{100 * value:.3g}%"
    match value:
        case None:
            return "-"
        case list():
            return " / ".join(f"{v:,}" for v in value)
        case int():
            return f"{value:,}"
        case _:
            return f"{value:g}"


def draw_topics(axes, sets: list[tuple[str, dict]], colors: list[str]) -> None:
    height, order = 0.8 / len(sets), list(TOPICS)
    for i, (name, found) in enumerate(sets):
        y = np.arange(len(order)) + (i - (len(sets) - 1) / 2) * height
        shares = [100 * found["topics"][topic] for topic in order]
        axes.barh(y, shares, height, color=colors[i % len(colors)], label=name)
    axes.set_yticks(range(len(order)), order)
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.set_xlabel("% of documents")
    axes.legend(frameon=False, loc="lower right")


def draw_quantiles(axes, sets, colors: list[str], measure: str, label: str) -> None:
    for i, (name, found) in enumerate(sets):
        values = found["curves"][measure]
        shares = np.linspace(0, 100, len(values))
        axes.plot(values, shares, color=colors[i % len(colors)], label=name)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.set_xlabel(label)
    axes.set_ylabel("% that have at most")
    axes.legend(frameon=False)


def draw_growth(axes, sets, colors: list[str]) -> None:
    for i, (name, found) in enumerate(sets):
        axes.plot(*zip(*found["curves"]["names"]), color=colors[i % len(colors)], label=name)
    axes.set_xlabel("names seen")
    axes.set_ylabel("different ones")
    axes.legend(frameon=False)
