"""Self-contained HTML: what tools/report.py and tools/curves.py write their pages with."""

import html
import io
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

COLORS = ["#1f6feb", "#d9730d", "#2da44e", "#8250df", "#bf3989", "#6e7781"]
HATCHES = ["////", "", "xx"]  # of bars beside each other, for who sees no colours
PNG_DPI, PNG_COLORS = 130, 48
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #1f2328; background: #fff; }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #d1d9e0 }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { text-align: left; padding: .3rem .8rem; border-bottom: 1px solid #d1d9e0;
  vertical-align: top }
td.n, th.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
pre { background: #f6f8fa; padding: .7rem 1rem; overflow-x: auto; border-radius: 6px;
  font-size: 13px; line-height: 1.4 }
pre b { color: #1f6feb; font-weight: normal } svg { max-width: 100%; height: auto }
figure { margin: 1.5rem 0 } figcaption { color: #59636e; font-size: 14px }
.wide { overflow-x: auto } .wide table { font-size: 14px }
.wide svg { width: 100%; min-width: 40rem }
td code { color: #59636e; font-size: 12px; white-space: nowrap }
tr.has-under td { border-bottom: 0; padding-bottom: 0 } tr.under td { padding-top: 0 }
.note { color: #59636e; font-size: 14px } .pass { color: #1a7f37 } .fail { color: #cf222e }
details { margin: .5rem 0 } summary { cursor: pointer }
"""


def page(title: str, body: str) -> str:
    """A whole document around `body`, which is HTML."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{body}</body></html>\n"


def figure(
    draw: Callable,
    *args,
    height: float = 3.6,
    rows: int = 1,
    alt: str = "",
    png: Path | None = None,
) -> str:
    """What `draw(axes, *args)` draws, as inline SVG; with several `rows`, axes of a common x.

    `alt` says it in words to who cannot see it; the file `png` gets the same drawing.
    """
    style = {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "nanophi",
    }
    with matplotlib.rc_context(style):
        fig = Figure(figsize=(9, height))
        draw(fig.subplots(rows, sharex=True), *args)
        buffer = io.StringIO()
        fig.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
        if png:  # a palette: a third of the bytes, and no colour is missed
            fig.savefig(raw := io.BytesIO(), dpi=PNG_DPI, bbox_inches="tight")
            Image.open(raw).convert("RGB").quantize(PNG_COLORS).save(png, optimize=True)
    text = buffer.getvalue()
    label = f' role="img" aria-label="{escape(alt)}"' if alt else ""
    return f"<svg{label}{text[text.index('<svg') + 4 :]}"


def bars(axes, panels: list[tuple], sizes: dict[str, str], names: dict[str, str]) -> None:
    """In each panel (title, format, {(group, size): {"value", "low", "high", "seeds"}}) a bar of
    each size for each of the groups `names`; intervals are black lines, seeds are white dots."""
    width = 0.8 / len(sizes)
    for ax, (title, form, values) in zip(np.atleast_1d(axes), panels):
        values = {key: v for key, v in values.items() if key[0] in names}
        tops = [max(v.get("high", v["value"]), *v.get("seeds", [0])) for v in values.values()]
        top = max([*tops, 0]) or 1
        if not any(v["value"] for v in values.values()):
            top *= 4  # an interval around nothing is not to fill the panel
        for j, (size, label) in enumerate(sizes.items()):
            look = {"color": COLORS[j % 6], "hatch": HATCHES[j % 3], "edgecolor": "white"}
            ax.bar(0, 0, label=label, **look)  # for the legend, whatever was run
            for i, group in enumerate(names):
                x = i + (j - (len(sizes) - 1) / 2) * width
                if (group, size) not in values:
                    ax.text(x, 0.02 * top, "not run", rotation=90, ha="center", va="bottom",
                            fontsize=8, color="#59636e")  # fmt: skip
                    continue
                v = values[group, size]
                ax.bar(x, v["value"], 0.92 * width, **look)
                if "low" in v:
                    around = [[max(0, v["value"] - v["low"])], [max(0, v["high"] - v["value"])]]
                    ax.errorbar(x, v["value"], around, color="#1f2328", capsize=3, linewidth=1)
                if len(seeds := v.get("seeds", [])) > 1:
                    at = x + np.linspace(-0.25, 0.25, len(seeds)) * width
                    ax.plot(at, seeds, "o", color="white", markeredgecolor="#1f2328", markersize=4)
                above = max(v.get("high", v["value"]), *seeds, 0)
                ax.text(x, above + 0.02 * top, f"{v['value']:{form}}", ha="center", fontsize=9)
        ax.set_ylim(0, 1.18 * top)
        ax.set_xlim(-0.6, len(names) - 0.4)
        ax.set_title(title, loc="left", fontsize=11)
        ax.set_xticks(range(len(names)), names.values(), fontsize=9)
    if len(sizes) > 1:
        np.atleast_1d(axes)[0].legend(frameon=False, fontsize=9, ncols=len(sizes), loc="lower left",
                                      bbox_to_anchor=(0, 1), borderaxespad=2)  # fmt: skip


def table(head: list[str], rows: list[list[str]], numbers=(), under: list[str] = ()) -> str:
    """A table that scrolls by itself where it is wider than the page. `numbers` are the columns set
    to the right; `under` has a line of code below each row, as the command that makes it again."""

    def line(cells, tag):
        return (
            ("<tr class=has-under>" if under and tag == "td" else "<tr>")
            + "".join(
                f"<{tag}{' class=n' if i in numbers else ''}>{escape(c)}</{tag}>"
                for i, c in enumerate(cells)
            )
            + "</tr>"
        )

    lines = [line(row, "td") for row in rows]
    if under:
        below = [
            f"<tr class=under><td colspan={len(head)}><code>{escape(code)}</code></td></tr>"
            for code in under
        ]
        lines = [part for both in zip(lines, below, strict=True) for part in both]
    return f"<div class=wide><table>{line(head, 'th')}{''.join(lines)}</table></div>"


escape = html.escape
