"""A finished run as one page: loss, throughput, power, quality, samples over time. One HTML file that needs nothing else."""

import base64
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastdit import command
from fastdit import config as configs
from fastdit.config import Config, UserError
from fastdit.quality import charts, evaluation
from fastdit.quality.charts import Chart, Line

LIMIT = 1 << 28  # bytes of metrics.jsonl
LIMIT_GRID = 1 << 25  # bytes of one grid

STYLE = (
    "body{font-family:sans-serif;color:#333;max-width:960px;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;font-size:14px}td,th{padding:3px 14px 3px 0;text-align:left;vertical-align:top}"
    "svg,img{max-width:100%;height:auto}.grids{display:flex;flex-wrap:wrap;gap:14px}"
    "figure{margin:0}figcaption{font-size:12px;color:#777}img{image-rendering:pixelated}"
    "pre{font-size:12px;background:#f6f6f6;padding:1em;overflow:auto}"
)


@dataclass(frozen=True)
class Options:
    run: Annotated[str, tyro.conf.Positional]  # run folder
    out: str = ""  # file to write; empty: report.html in the run folder
    grids: int = 12  # sample grids shown at most, evenly spread over the run, the last one always


def main() -> None:
    """python fastdit/report.py RUN [--out FILE]"""

    def run() -> None:
        options = command.parse_args(Options, sys.argv[1:], "fastdit/report.py", __doc__ or "")
        print(report(options))

    command.exit_cleanly(run)


def report(options: Options) -> Path:
    """Write the page of a run folder. Returns its path. Raises UserError."""
    folder = Path(options.run)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no run folder: it holds no config.json")
    if options.grids < 1:
        raise UserError(f"--grids is {options.grids}; it must be positive")
    config = configs.load(folder / "config.json")
    lines = read_lines(folder / "metrics.jsonl")
    if not lines:
        raise UserError(f"{folder} has no line of metrics yet")
    page = html(folder.resolve().name, config, lines, evaluation.evaluations(folder), grids(folder / "samples", options.grids))
    out = Path(options.out) if options.out else folder / "report.html"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        evaluation.write(out, page)
    except OSError as error:
        raise UserError(f"{out} was not written: {error.strerror or error}") from None
    return out


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a torn one is skipped. Raises UserError."""
    try:
        if path.stat().st_size > LIMIT:
            raise UserError(f"{path} has more than {LIMIT:,} bytes")
        text = path.read_text(errors="replace")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    return [value for value in evaluation.json_lines(text) if isinstance(value.get("images"), int)]


def grids(folder: Path, most: int) -> list[tuple[int, bytes]]:
    """(images seen, PNG) of at most so many sample grids, evenly spread, the last one among them."""
    paths = sorted((p for p in folder.glob("*.png") if p.stem.isdecimal() and p.is_file()), key=lambda p: int(p.stem))
    count = min(most, len(paths))
    chosen = [paths[len(paths) - 1 - i * len(paths) // count] for i in range(count)][::-1]
    return [(int(p.stem), p.read_bytes()) for p in chosen if p.stat().st_size <= LIMIT_GRID]


def html(
    name: str,
    config: Config,
    lines: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    grids: Sequence[tuple[int, bytes]],
) -> str:
    parts = [f"<h1>{escape(name)}</h1>", table(facts(config, lines)), "<h2>Training</h2>", charts.svg(training(lines))]
    if evaluations:
        parts += ["<h2>Quality</h2>", charts.svg(evaluation.curves(evaluations)), table(scores(evaluations))]
        parts.append("<p>Figures of the offline metric are not comparable with published FID or KID.</p>")
    if grids:
        parts.append("<h2>Samples over time</h2><p>EMA weights, the same noise each time.</p><div class=grids>")
        for images, png in grids:
            data = base64.b64encode(png).decode()
            parts.append(
                f'<figure><img alt="" src="data:image/png;base64,{data}"><figcaption>{images:,} images</figcaption></figure>'
            )
        parts.append("</div>")
    settings = json.dumps(dataclasses.asdict(config), indent=2)
    parts.append(f"<h2>Config</h2><details><summary>all settings</summary><pre>{escape(settings)}</pre></details>")
    title = f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(name)}</title><style>{STYLE}</style>"
    return f"{title}<body>{''.join(parts)}</body></html>\n"


def training(lines: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """What the meter wrote, over images seen. The first line's throughput has compilation in it and is left out."""

    def chart(title: str, key: str, factor: float = 1.0, logarithmic: bool = False, skip: int = 0) -> Chart:
        points = [(x, factor * y) for x, y in evaluation.points(lines[skip:], key)]
        return Chart(title, [Line(key, points)], logarithmic)

    paced = 1 if len(lines) > 1 else 0
    return [
        chart("loss", "loss", logarithmic=True),
        chart("gradient norm", "grad_norm", logarithmic=True),
        chart("images per second", "img_per_s", skip=paced),
        chart("learning rate", "lr"),
        chart("MFU, %", "mfu", 100, skip=paced),
        chart("power of one node's GPUs, W", "watts", skip=paced),
        chart("energy per image, J", "j_per_img", skip=paced),
        chart("memory, GiB", "memory_gib"),
    ]


def facts(config: Config, lines: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """What was trained on what for how long: names and values."""
    m, d, t, last = config.model, config.data, config.train, lines[-1]
    seconds, done = last.get("seconds"), last["images"]
    found = [
        ["images seen", f"{done:,} of {t.images:,}"],
        ["data", f"{d.source} {d.path}, {d.image_size[0]}×{d.image_size[1]}{', latents of ' + d.vae if d.vae else ', pixels'}"],
        ["model", f"{m.depth} blocks of width {m.width}, {m.num_heads} heads, patch {m.patch}, {m.num_classes} classes"],
        ["objective", f"{config.diffusion.kind}, the network predicts {config.diffusion.prediction}"],
        ["learning rate", f"{t.lr:g} {t.lr_decay}"],
    ]
    if isinstance(seconds, int | float) and seconds > 0:
        found.append(["training time", f"{seconds / 60:,.1f} min, {done / seconds:,.1f} images per second over all"])
    loss = evaluation.points(lines, "loss")
    if loss:
        tail = loss[-max(1, len(loss) // 20) :]
        found.append(["loss at the end", f"{sum(y for _, y in tail) / len(tail):.4f}"])
    energy = [(x["images"], x["j_per_img"]) for x in lines if isinstance(x.get("j_per_img"), int | float)]
    if energy:
        before = [0, *(images for images, _ in energy[:-1])]
        joules = sum((now - then) * j for (now, j), then in zip(energy, before, strict=True))
        found.append(["energy of the GPUs", f"{joules / 3.6e6:,.3f} kWh, {joules / energy[-1][0]:,.3g} J per image"])
    if last.get("skipped"):
        found.append(["steps skipped", f"{last['skipped']:,}"])
    return found


def scores(evaluations: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row for each evaluation, real images' own figures in brackets."""
    names = [n for n in evaluation.TITLES if any(isinstance(e.get(n), int | float) for e in evaluations)]
    rows = [["images seen", *names, "pictures", "against"]]
    for e in evaluations:
        cells = []
        for n in names:
            value, floor = e.get(n), e.get(f"{n}_floor")
            beside = f" ({floor:.4g})" if isinstance(floor, int | float) else ""
            cells.append(f"{value:.4g}{beside}" if isinstance(value, int | float) else "")
        seen = f"{e['images']:,}" if e["images"] is not None else ""
        rows.append([seen, *cells, str(e.get("num", "")), str(e.get("against", ""))])
    return rows


def table(rows: Sequence[Sequence[str]]) -> str:
    return "<table>" + "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows) + "</table>"


if __name__ == "__main__":
    main()
