"""Line charts as SVG text: for a run's folder and its report, without a plotting library."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 28, 34  # margins: numbers, edge, title, numbers and the axis' name
COLOURS = ("#1f6fb4", "#d9661f", "#2e8b57", "#8a56ac")
POINTS = 600  # of a line; a longer one is averaged


class Line(NamedTuple):
    """Points from left to right, and how they are drawn."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


class Chart(NamedTuple):
    """Lines over one axis, images seen."""

    title: str
    lines: Sequence[Line]
    logarithmic: bool = False  # the vertical axis, where all values are positive
    x_name: str = "images seen"


def svg(charts: Sequence[Chart], columns: int = 2) -> str:
    """The charts that have points, side by side, as one SVG document."""
    thinned = [c._replace(lines=[line._replace(points=thin(line.points)) for line in c.lines]) for c in charts]
    shown = [c for c in thinned if any(line.points for line in c.lines)]
    columns = max(1, min(columns, len(shown)))
    rows = -(-len(shown) // columns)
    parts = [_chart(c, i % columns * WIDTH, i // columns * HEIGHT) for i, c in enumerate(shown)]
    width, height = columns * WIDTH, max(rows, 1) * HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="11" fill="#333">'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>'
    )


def _chart(chart: Chart, left: float, top: float) -> str:
    lines = [line for line in chart.lines if line.points]
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    logarithmic = chart.logarithmic and min(ys) > 0
    x_low, x_high = min(0.0, *xs), max(xs)
    x_high = x_high if x_high > x_low else x_low + 1
    x_ticks = [x for x in ticks(x_low, x_high) if x_low <= x <= x_high]
    y_ticks = decades(min(ys), max(ys)) if logarithmic else ticks(min(ys), max(ys))
    y_low, y_high = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)

    def scale(y: float) -> float:
        return math.log(y) if logarithmic else y

    def at_x(x: float) -> float:
        return left + LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def at_y(y: float) -> float:
        share = (scale(y) - scale(y_low)) / ((scale(y_high) - scale(y_low)) or 1)
        return top + HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    out = [f'<text x="{left + LEFT}" y="{top + 16}" font-weight="bold">{escape(chart.title)}</text>']
    right, bottom = left + WIDTH - RIGHT, top + HEIGHT - BOTTOM
    for y in y_ticks:
        out.append(f'<path d="M{left + LEFT} {at_y(y):.1f}H{right}" stroke="#e4e4e4"/>')
        out.append(f'<text x="{left + LEFT - 6}" y="{at_y(y) + 4:.1f}" text-anchor="end">{number(y)}</text>')
    for x in x_ticks:
        out.append(f'<text x="{at_x(x):.1f}" y="{bottom + 15}" text-anchor="middle">{number(x)}</text>')
    out.append(f'<text x="{right}" y="{bottom + 29}" text-anchor="end" fill="#777">{escape(chart.x_name)}</text>')
    for i, line in enumerate(lines):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in line.points)
        dash = ' stroke-dasharray="5 4"' if line.dashed else ""
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>')
        if len(line.points) <= 30:
            out += [f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="2.2" fill="{colour}"/>' for x, y in line.points]
        if len(lines) > 1:
            out.append(
                f'<text x="{right}" y="{top + 16 + 13 * i}" text-anchor="end" fill="{colour}">{escape(line.name)}</text>'
            )
    return "".join(out)


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS finite points, each the mean of its neighbours'."""
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    size = max(1, -(-len(points) // POINTS))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, around low … high."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    power = 10 ** math.floor(math.log10((high - low) / most))
    step = next(s * power for s in (1, 2, 5, 10, 20) if (high - low) / (s * power) <= most)
    return [i * step for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, around low … high, both positive."""
    steps = [m * 10.0**e for e in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2) for m in (1, 2, 5)]
    first = max(i for i, s in enumerate(steps) if s <= low * (1 + 1e-9))
    last = min(i for i, s in enumerate(steps) if s >= high * (1 - 1e-9))
    return steps[first : last + 1]


def number(x: float) -> str:
    """As short as it can be said: 250k, 1.5M, 0.02."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:.4g}{letter}"
    return f"{x:.3g}" if x else "0"
