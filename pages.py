"""Self-contained HTML: what report.py and curves.py write their pages with."""

import html
import io
from collections.abc import Callable

import matplotlib
from matplotlib.figure import Figure

COLORS = ["#1f6feb", "#d9730d", "#2da44e", "#8250df", "#bf3989", "#6e7781"]
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
.note { color: #59636e; font-size: 14px } .pass { color: #1a7f37 } .fail { color: #cf222e }
details { margin: .5rem 0 } summary { cursor: pointer }
"""


def page(title: str, body: str) -> str:
    """A whole document around `body`, which is HTML."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{body}</body></html>\n"


def figure(draw: Callable, *args, height: float = 3.6, rows: int = 1) -> str:
    """What `draw(axes, *args)` draws, as inline SVG; with several `rows`, axes of a common x."""
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
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def table(head: list[str], rows: list[list[str]], numbers=()) -> str:
    def line(cells, tag):
        return (
            "<tr>"
            + "".join(
                f"<{tag}{' class=n' if i in numbers else ''}>{escape(c)}</{tag}>"
                for i, c in enumerate(cells)
            )
            + "</tr>"
        )

    return f"<table>{line(head, 'th')}{''.join(line(r, 'td') for r in rows)}</table>"


escape = html.escape
