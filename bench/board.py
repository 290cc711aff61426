"""Quality per second: train each row for the same seconds on this machine, score it at fixed times, and write the board.

    python bench/board.py [ROW …] --seconds 240 --seeds 3
    python bench/board.py ours seed --seconds 60 --seeds 1 --num 500 --points 1     within minutes
    python bench/board.py --data fashion.parquet --reference fashion-test.parquet   other pictures, which nobody tuned on

A row is a recipe, trained as its users train it. The clock runs while it trains, not while it is scored. What is done is kept
in bench/results/board-DEVICE.json row by row, so a board that was stopped goes on where it was. The table and docs/board.png
are made anew from all rows there are. Figures are not comparable with a published FID or KID.
"""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import machine
import torch
import tyro
from board_page import FIGURES, curves, table
from board_rows import ROWS, Ours, Plain, Row

from fastdit import command
from fastdit import config as configs
from fastdit.config import UserError
from fastdit.data import encoding
from fastdit.quality import charts, references
from fastdit.quality.scores import Judge
from fastdit.recipes import run_name
from fastdit.runtime import ranks
from fastdit.runtime.files import write_text
from fastdit.runtime.hardware import Energy
from fastdit.runtime.ranks import World
from fastdit.runtime.validation import fit

TIMES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # shares of the seconds at which a row is scored
ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Options:
    rows: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # rows to train; without any, all
    seconds: float = 240.0  # of training for each row and seed
    seeds: int = 3  # runs of each row
    num: int = 2_000  # pictures scored, and held-out cats they are compared with
    points: int = 5  # times at which a row is scored: the last of a sixteenth, an eighth … of the seconds
    data: str | None = None  # pictures to train on instead of the drawn cats: a folder or a parquet file
    reference: str | None = None  # folder or parquet file of pictures held out of --data; without it, the training images
    packs: str = "packs"  # where the encoded cats live
    results: str = str(ROOT / "results")  # folder of board-DEVICE.json
    docs: str = str(ROOT.parent / "docs")  # folder of board.png


def measure(row: Row, options: Options, world: World, pack: encoding.Pack, judge: Judge) -> list[dict[str, Any]]:
    """Train a row for its seconds; a point for each of TIMES: seconds, images, joules where they are known, and the figures."""
    run = (Plain if row.plain else Ours)(row, world, pack, options.seconds)
    synchronize = torch.cuda.synchronize if world.device.type == "cuda" else lambda: None
    meter = Joules(world)
    seen, trained_s, points = 0, 0.0, []
    joules: float | None = 0.0
    for share in TIMES[-options.points :]:
        before = meter.read()
        while trained_s < share * options.seconds:
            start = time.perf_counter()
            run.step(seen, trained_s)
            synchronize()
            trained_s += time.perf_counter() - start
            seen += row.config.train.batch
        after = meter.read()
        joules = joules + after - before if None not in (joules, before, after) else None
        scores = judge.score(run.pictures(judge.num))
        points.append({"seconds": trained_s, "images": seen, "joules": joules, **scores._asdict()})
        print(f"  {trained_s:7.1f} s  {seen:9,} images  " + "  ".join(f"{k} {points[-1][k]:.4g}" for k in FIGURES), flush=True)
    return points


class Joules:
    """Energy used so far: of the GPUs by NVML, of a CPU by RAPL where the system lets it be read; else None."""

    def __init__(self, world: World):
        self.gpus = Energy(1 if world.device.type == "cuda" else 0)
        self.on_gpu = world.device.type == "cuda"
        self.total, self.last = 0.0, self._counters()

    def read(self) -> float | None:
        if self.on_gpu:
            return self.gpus.joules()
        now = self._counters()
        if not now:
            return None
        for path, (value, wraps_at) in now.items():
            self.total += (value - self.last.get(path, (value, 0))[0]) % wraps_at / 1e6
        self.last = now
        return self.total

    @staticmethod
    def _counters() -> dict[Path, tuple[int, int]]:
        """Microjoules of each processor, and where its counter starts anew."""
        counters = {}
        for path in sorted(Path("/sys/class/powercap").glob("intel-rapl:[0-9]*")):
            if path.name.count(":") == 1:
                with contextlib.suppress(OSError, ValueError):
                    wraps_at = int((path / "max_energy_range_uj").read_text()) + 1
                    counters[path] = int((path / "energy_uj").read_text()), wraps_at
        return counters


def main() -> None:
    """python bench/board.py [ROW …] [--seconds S] [--seeds N]"""
    command.exit_cleanly(lambda: board(command.parse_args(Options, sys.argv[1:], "bench/board.py", __doc__ or "")))


def board(options: Options, rows: Mapping[str, Row] = ROWS) -> None:
    """Train and score what is not there yet, and write the results, the table and the picture. Raises UserError."""
    charts.require()
    for name in options.rows:
        if name not in rows:
            raise UserError(f"unknown row {name!r}{configs.nearest(name, rows)}; rows are {', '.join(rows)}")
    if options.seconds <= 0 or options.seeds <= 0 or options.num < 16 or not 0 < options.points <= len(TIMES):
        raise UserError(f"--seconds and --seeds must be positive, --num at least 16, --points 1 to {len(TIMES)}")
    if options.reference and not options.data:
        raise UserError("--reference goes with --data; cats have their own")
    world = ranks.init(next(iter(rows.values())).config.parallel)
    rows = on_data(rows, options, world)
    first = next(iter(rows.values())).config
    stem = f"board-{run_name(options.data)}" if options.data else "board"
    path = Path(options.results) / f"{stem}-{machine.slug()}.json"
    kept = read(path)
    missing = [
        (name, seed, row._replace(config=configs.replace(row.config, run={"seed": seed})))
        for name, row in rows.items()
        if name in (options.rows or rows)
        for seed in range(options.seeds)
    ]
    missing = [(name, seed, row) for name, seed, row in missing if not any(same(old, name, seed, row, options) for old in kept)]
    if missing:
        judge = references.open_judge(first, options.num, world.device, options.reference)
        for number, (name, seed, row) in enumerate(missing, 1):
            print(f"{number} of {len(missing)}: {name}, seed {seed}: {row.about}", flush=True)
            with contextlib.closing(encoding.open_pack(row.config, world)) as pack:
                points = measure(row, options, world, pack, judge)
            floor = {k: getattr(judge.floor, k) for k in FIGURES}
            about = {"commit": machine.commit(), "torch": torch.__version__, "device": machine.device()}
            entry = {**key(name, seed, row, options), "about": row.about, **about, "floor": floor, "points": points}
            kept = [old for old in kept if (old["row"], old["seed"]) != (name, seed)] + [entry]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(kept, indent=1) + "\n")
    ranks.shutdown()
    shown = [entry for entry in kept if entry["row"] in rows]
    print(table(shown, rows))
    Path(options.docs).mkdir(parents=True, exist_ok=True)
    (Path(options.docs) / f"{stem}.png").write_bytes(charts.png(curves(shown, rows)))


def on_data(rows: Mapping[str, Row], options: Options, world: World) -> dict[str, Row]:
    """The rows on the pictures that the options name: as many channels and classes as those have. Raises UserError."""
    placed = {n: row._replace(config=configs.replace(row.config, data={"packs": options.packs})) for n, row in rows.items()}
    if options.data is None:
        return placed
    on_theirs = configs.replace(next(iter(placed.values())).config, data={"path": options.data})
    with contextlib.closing(encoding.open_pack(on_theirs, world)) as pack:
        fits = pack.manifest.fits
    data = {"path": options.data}
    return {n: row._replace(config=fit(configs.replace(row.config, data=data), *fits)) for n, row in placed.items()}


def key(name: str, seed: int, row: Row, options: Options) -> dict[str, Any]:
    """What an entry follows from. The settings that say where files lie are not in it."""
    settings = json.loads(json.dumps({g: dataclasses.asdict(getattr(row.config, g)) for g in ("model", "diffusion", "train")}))
    how = {"plain": row.plain, "averaged": row.averaged, "settings": settings}
    told = {"seconds": options.seconds, "num": options.num, "times": options.points, "reference": options.reference}
    return {"row": name, "seed": seed, "data": row.config.data.path, **told, **how}


def same(old: Mapping[str, Any], name: str, seed: int, row: Row, options: Options) -> bool:
    wanted = key(name, seed, row, options)
    return {k: old.get(k) for k in wanted} == wanted


def read(path: Path) -> list[dict[str, Any]]:
    """The entries kept on this kind of device. Raises UserError for a file that holds something else."""
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text())
        needed = {"row", "seed", "points"}
        if not isinstance(entries, list) or not all(isinstance(e, dict) and needed <= e.keys() for e in entries):
            raise ValueError("no list of rows")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a board ({configs.plain(error, 100)}); move it away to start anew") from None
    return entries


if __name__ == "__main__":
    main()
