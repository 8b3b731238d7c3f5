"""How every figure of a report looks: sizes, colours, grid, legend, and SVG that is the same bytes whenever it is made."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

# Okabe and Ito's palette, told apart by colour-blind readers too; line styles repeat it in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C6D31")
STYLES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*"
WIDTH, HEIGHT = 5.2, 3.4  # inches: a phone shows this at nearly its own size
LEGEND_ROW = 0.17  # inches


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One figure.

    Attributes:
      name: of its file, without suffix.
      alt: what it shows, for those who do not see it.
    """

    name: str
    title: str
    alt: str
    svg: str


def new_figure(title: str, rows: int = 1, columns: int = 1, height: float = HEIGHT) -> tuple[Any, Any]:
    """A figure and its axes [row, column]."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "strata", "font.family": "sans-serif", "font.size": 9})
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.suptitle(title, fontsize=10)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def finish(figure: Any, name: str, title: str, alt: str) -> Drawing:
    """The same bytes for the same figure: no date, and ids from a fixed salt."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return Drawing(name, title, alt, svg[svg.index("<svg") :])


def look(index: int) -> dict[str, Any]:
    """Colour and line style of the line of this number."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": STYLES[index // len(COLOURS) % len(STYLES)]}


def add_legend(figure: Any, axis: Any) -> None:
    """Below the axes, which keep their size."""
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        columns = 1 if max(map(len, labels)) > 24 else 2
        rows = -(-len(labels) // columns)
        figure.set_figheight(figure.get_figheight() + LEGEND_ROW * max(0, rows - 4))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def family_of(arm: str) -> str:
    """What the name of an arm has before a colon, as "text" of "text: a"; empty without one."""
    head, colon, _ = arm.partition(": ")
    return head if colon else ""


def titled(title: str, family: str) -> str:
    """The title of a family's figure."""
    return f"{family}: {title}" if family else title


def called(name: str, family: str) -> str:
    """The name of a family's drawing, which is a file's too."""
    return "-".join(f"{name} {family}".replace("/", "-").split())
