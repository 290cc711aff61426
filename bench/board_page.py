"""The board as a table and as charts."""

from collections.abc import Mapping, Sequence
from typing import Any

from board_rows import Row

from fastdit.quality.charts import Chart, Line

FIGURES = ("kid", "swd", "coverage", "nearest")
LEAST = 1e-4  # what stands in a logarithmic chart for a figure of 0 or below


def table(entries: Sequence[Mapping[str, Any]], rows: Mapping[str, Row]) -> str:
    """Markdown: each row's figures at its last time, mean over the seeds with the least and the greatest."""
    lines = [
        "| row | seeds | seconds | images | KID | SWD | coverage | nearest | s to `before`'s last KID | kJ |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    goal = mean([e["points"][-1]["kid"] for e in entries if e["row"] == "before"])
    for name, row in rows.items():
        runs = [e for e in entries if e["row"] == name]
        if not runs:
            continue
        last = [e["points"][-1] for e in runs]
        cells = [spread([p[figure] for p in last]) for figure in FIGURES]
        reached = [next((p["seconds"] for p in e["points"] if goal is not None and p["kid"] <= goal), None) for e in runs]
        seconds = "not reached" if None in reached else spread(reached)
        joules = [p["joules"] for p in last]
        energy = "" if None in joules else spread([j / 1000 for j in joules])
        images = f"{mean([p['images'] for p in last]):,.0f}"
        lines.append(
            f"| {row.about} | {len(runs)} | {mean([p['seconds'] for p in last]):.0f} | {images} | {' | '.join(cells)} | "
            f"{'' if goal is None else seconds} | {energy} |"
        )
    floors = [e["floor"] for e in entries]
    cells = ["" if any(f[k] is None for f in floors) or not floors else spread([f[k] for f in floors]) for k in FIGURES]
    return "\n".join([*lines, f"| real images, held out | | | | {' | '.join(cells)} | | |"])


def curves(entries: Sequence[Mapping[str, Any]], rows: Mapping[str, Row]) -> list[Chart]:
    """KID and coverage over seconds of training, bands from the least to the greatest seed."""
    shown = []
    for figure, title in (("kid", "KID"), ("coverage", "coverage of held-out cats")):
        lines = []
        for name in rows:
            runs = [e["points"] for e in entries if e["row"] == name]
            if not runs:
                continue
            together = list(zip(*runs, strict=False))  # the seeds' points at each time
            values = [[max(p[figure], LEAST) for p in at] for at in together]
            seconds = [mean([p["seconds"] for p in at]) for at in together]
            line = [(s, mean(v)) for s, v in zip(seconds, values, strict=True)]
            lines.append(Line(name, line, band=[(min(v), max(v)) for v in values] if len(runs) > 1 else ()))
        shown.append(Chart(title, lines, logarithmic=True, x_name="seconds of training", x_logarithmic=True))
    return shown


def mean(values: Sequence[float]) -> Any:
    return sum(values) / len(values) if values else None


def spread(values: Sequence[float]) -> str:
    middle = f"{mean(values):.3g}"
    return middle if len(values) < 2 else f"{middle} ({min(values):.3g} … {max(values):.3g})"
