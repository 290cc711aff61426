"""How good a run's pictures are: the figures, kept in the run's folder as lines and curves."""

import json
import math
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdit import sampling
from fastdit.config import Config, UserError
from fastdit.data.normaliser import Normaliser
from fastdit.data.vae import VAE
from fastdit.model import DiT
from fastdit.quality import charts
from fastdit.quality.scores import Judge, Scores
from fastdit.runtime.files import json_lines, read_file, write_text
from fastdit.runtime.ranks import World, gather

LINES, CURVE = "evaluations.jsonl", "evaluations.svg"
LIMIT = 1 << 26  # bytes of evaluations.jsonl
LARGEST = 1e100  # of a number in a line; what is larger was not measured


def make_pictures(
    model: DiT, config: Config, decoder: VAE | Normaliser | None, world: World, num: int, batch: int = 64
) -> Tensor:
    """Pictures 0 … num - 1 of the run's seed, made by all ranks together: uint8 [num, 3, H, W], on every rank.

    Every rank runs the network equally often: each forward of a sharded network gathers weights from all ranks.
    """
    parts = []
    for start in range(0, num, batch * world.size):
        count = min(batch, -(-(num - start) // world.size))
        parts.append(
            sampling.make(model, config, decoder, world, first=start + world.rank * count, count=count, seed=config.run.seed)
        )
    shares = gather(world, parts)
    return torch.cat([share[i] for i in range(len(parts)) for share in shares])[:num]


# --- what is kept ---


def line(config: Config, images_seen: int | None, judge: Judge, images: Tensor, seed: int | None = None) -> dict[str, Any]:
    """A line of evaluations.jsonl for pictures: the figures, those of real images, and the settings they were made by."""
    num, figures = min(len(images), judge.num), dict[str, float | None]()
    for name, value, floor in zip(Scores._fields, judge.score(images), judge.floor, strict=True):
        figures |= {name: value, f"{name}_floor": floor}
    settings = how(config, images_seen, "offline", num, config.run.seed if seed is None else seed)
    return {**settings, "against": judge.against, **figures}


def how(config: Config, images_seen: int | None, metric: str, num: int, seed: int) -> dict[str, Any]:
    """What a line's figures follow from; a line that agrees in all of it is replaced."""
    s = config.sample
    guided = {"guidance_low": s.guidance_interval[0], "guidance_high": s.guidance_interval[1]} if s.guidance != 1 else {}
    settings = {"sampler": s.sampler, "steps": s.steps, "guidance": s.guidance, **guided}
    return {"images": images_seen, "metric": metric, "num": num, "seed": seed, **settings}


def record(folder: Path, entry: Mapping[str, Any]) -> None:
    """Keep a line in the folder, in place of the one made the same way; make the curve anew, where matplotlib is installed."""
    same = how_of(entry)
    lines = [old for old in evaluations(folder) if how_of(old) != same]
    lines.append({**entry, "time": datetime.now(UTC).isoformat(timespec="seconds")})
    lines.sort(key=lambda x: (x["metric"], x["images"] or 0))
    write_text(folder / LINES, "".join(json.dumps(x, allow_nan=False) + "\n" for x in lines))
    if charts.installed():
        write_text(folder / CURVE, charts.svg(curves(lines)))


def how_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    names: tuple[str, ...] = (
        "images",
        "metric",
        "num",
        "seed",
        "sampler",
        "steps",
        "guidance",
        "guidance_low",
        "guidance_high",
    )
    names += ("ema", "against")
    return {name: entry.get(name) for name in names}


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """The lines kept in a run's folder; none where there are none. What is no line of ours is skipped."""
    try:
        text = read_file(folder / LINES, LIMIT).decode(errors="replace")
    except (OSError, ValueError, UserError):
        return []
    return [
        value
        for value in json_lines(text)
        if isinstance(value.get("metric"), str) and type(value.get("images")) in (int, type(None))
    ]


TITLES = {
    "kid": "KID, EfficientNet-Lite0 features",
    "swd": "sliced-Wasserstein distance of pixels",
    "coverage": "coverage",
    "nearest": "distance to the nearest training image",
    "fid": "FID",
    "inception_kid": "KID, Inception features",
    "precision": "precision",
    "recall": "recall",
}


def curves(lines: Iterable[Mapping[str, Any]]) -> list[charts.Chart]:
    """A chart of each figure over images seen, with its floor."""
    placed = [x for x in lines if x["images"] is not None and x.get("ema") is None]  # not of another length of average
    shown = []
    for metric in sorted({x["metric"] for x in placed}, reverse=True):
        for name, title in TITLES.items():
            of_metric = [x for x in placed if x["metric"] == metric]
            pairs = [
                charts.Line(label, points(of_metric, key), dashed)
                for label, key, dashed in (("pictures", name, False), ("real images", f"{name}_floor", True))
            ]
            shown.append(charts.Chart(title, [p for p in pairs if p.points]))
    return [chart for chart in shown if chart.lines]


def number(value: object) -> float | None:
    """A finite number of a plausible size, whatever a line holds in its place; None for anything else."""
    if type(value) not in (int, float):
        return None
    assert isinstance(value, int | float)
    return float(value) if abs(value) < LARGEST and math.isfinite(value) else None


def points(lines: Iterable[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(images, value) of the lines that have a number there."""
    pairs = [(number(x.get("images")), number(x.get(key))) for x in lines]
    return [(images, value) for images, value in pairs if images is not None and value is not None]


def table(lines: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """A row of names, then a row for each line, real images' own figures in brackets."""
    lines = list(lines)
    names = [n for n in TITLES if any(number(x.get(n)) is not None for x in lines)]
    rows = [["images seen", *names, "pictures", "against"]]
    for x in lines:
        cells = []
        for value, floor in ((number(x.get(n)), number(x.get(f"{n}_floor"))) for n in names):
            in_brackets = "" if floor is None else f" ({floor:.4g})"
            cells.append("" if value is None else f"{value:.4g}{in_brackets}")
        seen = "" if x["images"] is None else f"{x['images']:,}"
        seen += f" (ema {length:g})" if (length := number(x.get("ema"))) is not None else ""
        rows.append([seen, *cells, str(x.get("num", "")), str(x.get("against", ""))])
    return rows


def scalars(entry: Mapping[str, Any]) -> dict[str, float]:
    """A line's figures under the names that trackers show."""
    return {f"eval/{name}": value for name, value in entry.items() if name in TITLES and isinstance(value, float)}


def say(entry: Mapping[str, Any]) -> str:
    """A line of figures for a person to read, each with its floor in brackets."""
    parts = []
    for name, show in (("kid", "{:.4f}"), ("swd", "{:.4f}"), ("coverage", "{:.3f}"), ("nearest", "{:.1f}")):
        floor = entry.get(f"{name}_floor")
        in_brackets = f" (real images {show.format(floor)})" if floor is not None else ""
        parts.append(f"{name.upper() if len(name) == 3 else name} {show.format(entry[name])}{in_brackets}")
    return f"{'  '.join(parts)}  on {entry['num']:,} pictures against {entry['against']}"
