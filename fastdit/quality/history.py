"""What a run's metrics.jsonl holds: its lines (damaged ones are skipped), its curves, and the facts of the run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdit.config import Config, UserError, times
from fastdit.quality.charts import Chart, Line
from fastdit.quality.evaluation import number, points
from fastdit.runtime.files import json_lines, read_file

LIMIT = 1 << 28  # bytes of metrics.jsonl

# What the meter writes: key, title of its chart, factor, whether the axis is logarithmic, and whether the first line counts:
# its throughput has compilation in it.
CURVES = (
    ("loss", "loss", 1, True, True),
    ("grad_norm", "gradient norm", 1, True, True),
    ("img_per_s", "images per second", 1, False, False),
    ("lr", "learning rate", 1, False, True),
    ("mfu", "MFU, %", 100, False, False),
    ("watts", "power of one node's GPUs, W", 1, False, False),
    ("j_per_img", "energy per image, J", 1, False, False),
    ("memory_gib", "memory, GiB", 1, False, True),
)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; what is no line of ours is skipped. Raises UserError where there is none."""
    try:
        text = read_file(path, LIMIT).decode(errors="replace")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    lines = [line for line in json_lines(text) if type(line.get("images")) is int and number(line["images"])]
    if not lines:
        raise UserError(f"{path.parent} has no line of metrics yet")
    return lines


def curves(lines: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """A chart of each of CURVES over images seen."""
    paced = lines[1:] or lines
    return [
        Chart(title, [Line(key, [(x, factor * y) for x, y in points(lines if first else paced, key)])], logarithmic)
        for key, title, factor, logarithmic, first in CURVES
    ]


def facts(config: Config, lines: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The facts of a run, such as its model, data and duration: names and values."""
    m, d, t, last = config.model, config.data, config.train, lines[-1]
    space = f"latents of {d.vae}" if d.vae else "pixels"
    if d.kind == "arrays":
        space = f"arrays of {m.channels} channels"
    size = m.input_size if d.kind == "arrays" else d.image_size
    seconds, done, skipped = number(last.get("seconds")), last["images"], number(last.get("skipped"))
    loss, energy = [y for _, y in points(lines, "loss")], points(lines, "j_per_img")
    rows = [
        ["images seen", f"{done:,} of {t.images:,}"],
        ["data", f"{d.path or 'drawn cats'}, {times(size)}, {space}"],
        ["model", f"{m.depth} blocks of width {m.width}, {m.num_heads} heads, patch {m.patch}, {m.num_classes} classes"],
        ["objective", f"{config.diffusion.kind}, the network predicts {config.diffusion.prediction}"],
        ["learning rate", f"{t.lr:g} {t.lr_decay}"],
    ]
    if seconds and seconds > 0:
        rows.append(["training time", f"{seconds / 60:,.1f} min, {done / seconds:,.1f} images per second over all"])
    if tail := loss[-max(1, len(loss) // 20) :]:
        rows.append(["loss at the end", f"{sum(tail) / len(tail):.4f}"])
    if energy:
        joules = sum((x - before) * j for (x, j), before in zip(energy, [0.0, *(x for x, _ in energy)], strict=False))
        rows.append(["energy of the GPUs", f"{joules / 3.6e6:,.3f} kWh, {joules / energy[-1][0]:,.3g} J per image"])
    if skipped:
        rows.append(["steps skipped", f"{skipped:,.0f}"])
    return rows
