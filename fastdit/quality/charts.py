"""Line charts by matplotlib: SVG for a run's folder and its report, PNG for the pages."""

import importlib.util
import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from fastdit.config import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 600  # of a line; a longer one is averaged
INSTALL = "charts are made by matplotlib: pip install 'fastdit[eval]'"


class Line(NamedTuple):
    """Points from left to right, and how they are shown."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False
    band: Sequence[tuple[float, float]] = ()  # least and greatest value at each point


class Chart(NamedTuple):
    """Lines over one axis, images seen."""

    title: str
    lines: Sequence[Line]
    logarithmic: bool = False  # the vertical axis, where all values are positive
    x_name: str = "images seen"
    x_logarithmic: bool = False


def installed() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def require() -> None:
    """Raise UserError, one line, where matplotlib is not installed."""
    if not installed():
        raise UserError(INSTALL)


def svg(charts: Sequence[Chart], columns: int = 2) -> str:
    """The charts that have points, side by side, as one <svg> element: the same charts give the same text. Raises UserError."""
    require()
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastdit", "font.size": 9}):
        out = io.StringIO()
        figure(charts, columns).savefig(
            out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    return re.sub(r"^.*?(?=<svg)", "", out.getvalue(), flags=re.DOTALL)


def png(charts: Sequence[Chart], columns: int = 2) -> bytes:
    """The charts that have points, side by side, as one PNG. Raises UserError."""
    require()
    out = io.BytesIO()
    figure(charts, columns).savefig(out, format="png", dpi=110)
    return out.getvalue()


def figure(charts: Sequence[Chart], columns: int = 2) -> "Figure":
    from matplotlib.figure import Figure

    shown = [c for c in charts if any(thin(line.points) for line in c.lines)]
    columns = max(1, min(columns, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    whole = Figure(figsize=(4.8 * columns, 2.7 * rows), layout="constrained")
    for i, chart in enumerate(shown):
        axes = whole.add_subplot(rows, columns, i + 1)
        axes.set_title(chart.title, loc="left", fontweight="bold", parse_math=False)
        axes.set_xlabel(chart.x_name, loc="right", color="#777", parse_math=False)
        axes.grid(color="#e4e4e4")
        axes.spines[["top", "right"]].set_visible(False)
        for line in chart.lines:
            points = thin(line.points)
            if not points:
                continue
            xs, ys = zip(*points, strict=True)
            style = "--" if line.dashed else "-"
            [drawn] = axes.plot(xs, ys, style, marker="o" if len(points) <= 30 else None, markersize=3, linewidth=1.3)
            drawn.set_label(line.name.replace("\n", " "))
            if line.band:
                low, high = zip(*line.band, strict=True)
                axes.fill_between(xs, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)
        if chart.logarithmic and all(y > 0 for line in chart.lines for _, y in thin(line.points)):
            axes.set_yscale("log")
        if chart.x_logarithmic and all(x > 0 for line in chart.lines for x, _ in thin(line.points)):
            axes.set_xscale("log")
        if len(chart.lines) > 1:
            for text in axes.legend(frameon=False, fontsize=8).get_texts():
                text.set_parse_math(False)
    return whole


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS finite points, each the mean of its neighbours'."""
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    size = max(1, -(-len(points) // POINTS))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
