"""A finished run as one page: samples over time, loss, throughput, power, quality. One HTML file that needs nothing else."""

import fastdit  # noqa: F401  # isort: skip  before torch
from fastdit import command  # isort: skip
from fastdit.options import Report as Options  # isort: skip

if command.is_program("report", __name__):
    command.at_once(lambda argv: command.parse_args(Options, argv, "fastdit/report.py", __doc__ or ""))  # before torch

import base64
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fastdit.config import Config, UserError, plain
from fastdit.data import classes
from fastdit.quality import charts, evaluation, history
from fastdit.runtime.files import read_file, write_text
from fastdit.runtime.run import load_config

LIMIT_GRID = 1 << 25  # bytes of one grid

STYLE = (
    "body{font-family:sans-serif;color:#333;max-width:960px;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;font-size:14px}td{padding:3px 14px 3px 0;text-align:left;vertical-align:top}"
    "svg,img{max-width:100%;height:auto}.grids{display:flex;flex-wrap:wrap;gap:14px}"
    "figure{margin:0}figcaption{font-size:12px;color:#777}img{image-rendering:pixelated}"
    "pre{font-size:12px;background:#f6f6f6;padding:1em;overflow:auto}"
)


def main() -> None:
    """python fastdit/report.py RUN [--out FILE]"""

    def parse(argv: Sequence[str]) -> Options:
        return command.parse_args(Options, argv, "fastdit/report.py", __doc__ or "")

    command.run(lambda options: print(plain(report(options), 4000)), parse)


def report(options: Options) -> Path:
    """Write the page of a run folder. Returns its path. Raises UserError. No link in the folder is followed."""
    charts.require()
    folder = Path(options.run)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no run folder: it holds no config.json")
    if options.grids < 1:
        raise UserError(f"--grids is {options.grids}; it must be positive")
    config, out = load_config(folder / "config.json"), Path(options.out or folder / "report.html")
    lines = history.read(folder / "metrics.jsonl")
    shown, names = grids(folder / "samples", options.grids), classes.read(folder)
    page = html(folder.resolve().name, config, lines, evaluation.evaluations(folder), shown, names)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, page)
    except OSError as error:
        raise UserError(f"{out} was not written: {error.strerror or error}") from None
    return out


def grids(folder: Path, most: int) -> list[tuple[int, bytes]]:
    """(images seen, PNG) of at most so many sample grids, evenly spread, the last one among them."""
    plain = [] if folder.is_symlink() else [p for p in folder.glob("*.png") if p.stem.isdecimal() and not p.is_symlink()]
    paths = sorted((p for p in plain if p.is_file() and p.stat().st_size <= LIMIT_GRID), key=lambda p: int(p.stem))
    count = min(most, len(paths))
    chosen = [paths[len(paths) - 1 - i * len(paths) // count] for i in range(count)][::-1]
    return [(int(p.stem), read_file(p, LIMIT_GRID)) for p in chosen]


def html(
    name: str,
    config: Config,
    lines: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    grids: Iterable[tuple[int, bytes]],
    names: Sequence[str],
) -> str:
    """The page. names: of the classes."""
    figures = "".join(
        f'<figure><img alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f"<figcaption>{seen:,} images</figcaption></figure>"
        for seen, png in grids
    )
    facts = [*history.facts(config, lines), *([["classes", ", ".join(map(plain, names))]] if names else [])]
    parts = [f"<h1>{escape(name)}</h1>", table(facts)]
    if figures:
        parts.append(f"<h2>Samples over time</h2><p>EMA weights, the same noise each time.</p><div class=grids>{figures}</div>")
    parts += ["<h2>Training</h2>", charts.svg(history.curves(lines))]
    if evaluations:
        parts += ["<h2>Quality</h2>", charts.svg(evaluation.curves(evaluations)), table(evaluation.table(evaluations))]
        parts.append("<p>Figures of the offline metric are not comparable with published FID or KID.</p>")
    settings = escape(json.dumps(dataclasses.asdict(config), indent=2))
    parts.append(f"<h2>Config</h2><details><summary>all settings</summary><pre>{settings}</pre></details>")
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(name)}</title><style>{STYLE}</style>"
    return f"{head}<body>{''.join(parts)}</body></html>\n"


def table(rows: Iterable[Iterable[str]]) -> str:
    return "<table>" + "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows) + "</table>"


if __name__ == "__main__":
    main()
