"""Few evaluations a picture: cats with and without jumps, at equal seconds of training, scored in 1, 2, 4 and 20 steps.

    python bench/few_steps.py --images 60000 --seeds 3

Steps of both kinds are first timed in turns. The run with jumps then sees as many images fewer as equal seconds ask for, so
that what else the machine does changes no figure. Each run is kept in bench/results/few-steps-DEVICE.json when it is done; a
picture of all goes to docs/few-steps.png. Figures are of drawn cats, and not comparable with a published FID or KID.
"""

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import torch
from board import read
from board_rows import Training
from torch import Tensor

from fastdit import command, pictures
from fastdit.config import Config, UserError, replace
from fastdit.data import encoding
from fastdit.quality import references
from fastdit.quality.scores import Judge
from fastdit.recipes import RECIPES
from fastdit.runtime import ranks
from fastdit.runtime.files import write_text
from fastdit.runtime.ranks import World

STEPS = (20, 4, 2, 1)
SHOWN = 8  # pictures of each kind
ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Options:
    images: int = 60_000  # seen by the run without jumps
    share: float = 0.3  # of training in which jumps are taught, --diffusion.consistency
    seeds: int = 3  # runs of each kind
    num: int = 2_000  # pictures scored, and held-out cats they are compared with
    timed: int = 60  # steps of each kind that are timed
    packs: str = "packs"  # where the encoded cats live
    results: str = str(ROOT / "results")  # folder of few-steps-DEVICE.json
    docs: str = str(ROOT.parent / "docs")  # folder of few-steps.png


def recipe(options: Options, share: float, images: int, seed: int) -> Config:
    config = replace(RECIPES["cats"], run={"seed": seed}, data={"packs": options.packs})
    return replace(config, model={"jumps": share > 0}, diffusion={"consistency": share}, train={"images": images})


def seconds_per_step(options: Options, world: World) -> dict[str, float]:
    """Medians of steps without and with jumps, and of their ratio, in turns."""
    configs = [recipe(options, share, options.images, 0) for share in (0.0, 1.0)]
    runs = [Training(config, world, encoding.open_pack(config, world)) for config in configs]
    synchronize = torch.cuda.synchronize if world.device.type == "cuda" else lambda: None
    times: list[list[float]] = [[], []]
    for number in range(options.timed):
        for run, of in zip(runs, times, strict=True):
            began = time.perf_counter()
            run.train(number * run.config.train.batch)
            synchronize()
            of.append(time.perf_counter() - began)
    plain, jumps = (of[len(of) // 5 :] for of in times)  # the first ones warm up
    ratio = statistics.median(b / a for a, b in zip(plain, jumps, strict=True))
    for run in runs:
        run.pack.close()
    return {"plain": statistics.median(plain), "jumps": statistics.median(jumps), "ratio": ratio}


def measure(config: Config, world: World, judge: Judge) -> tuple[dict[str, Any], list[Tensor]]:
    """Train to the last image; the figures by steps, and the first pictures of each."""
    run, began = Training(config, world, encoding.open_pack(config, world)), time.perf_counter()
    with contextlib.closing(run.pack):
        for seen in range(0, config.train.images, config.train.batch):
            run.train(seen)
    found: dict[str, Any] = {"trained_s": time.perf_counter() - began, "images": config.train.images}
    shown = []
    for steps in STEPS:
        made = run.pictures(judge.num, steps=steps)
        found[str(steps)] = judge.score(made)._asdict()
        shown.append(made[:SHOWN])
        print(f"  {steps:2} steps: " + "  ".join(f"{k} {v:.4g}" for k, v in found[str(steps)].items() if v), flush=True)
    return found, shown


def few_steps(options: Options) -> None:
    """Train and score what is not there yet; write the results, the table and the picture. Raises UserError."""
    if options.images <= 0 or options.seeds <= 0 or options.num < 16 or not 0 < options.share <= 1:
        raise UserError("--images and --seeds must be positive, --num at least 16 and --share a share")
    first = recipe(options, 0.0, options.images, 0)
    world = ranks.init(first.parallel)
    path = Path(options.results) / f"few-steps-{machine.slug()}.json"
    asked = {"asked_images": options.images, "share": options.share, "num": options.num}
    kept = [e for e in read(path) if {k: e.get(k) for k in asked} == asked]
    pace = kept[0]["seconds_per_step"] if kept else seconds_per_step(options, world)
    print(f"a step with jumps takes {pace['ratio']:.3f} of one without", flush=True)
    judge = references.open_judge(first, options.num, world.device)
    images = {"plain": options.images, "jumps": round(options.images / (1 + options.share * (pace["ratio"] - 1)))}
    for seed in range(options.seeds):
        rows: list[Tensor] = []
        for name, share in (("plain", 0.0), ("jumps", options.share)):
            if any((e["row"], e["seed"]) == (name, seed) for e in kept):
                continue
            print(f"{name}, seed {seed}: {images[name]:,} images", flush=True)
            found, shown = measure(recipe(options, share, images[name], seed), world, judge)
            rows += shown
            about: dict[str, Any] = {"commit": machine.commit(), "torch": torch.__version__, "device": machine.device()}
            about |= {"floor": judge.floor._asdict(), "seconds_per_step": pace}
            kept.append({"row": name, "seed": seed, **asked, **about, "points": found})
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(kept, indent=1) + "\n")
        if seed == 0 and len(rows) == 2 * len(STEPS):
            captions = [f"{name}, {n}" for name in ("plain", "jumps") for n in STEPS for _ in range(SHOWN)]
            pictures.save_grid(torch.cat(rows), Path(options.docs) / "few-steps.png", captions)
    ranks.shutdown()
    print(table(kept))


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: mean figures over the seeds by steps, and KID in times of that of 20 steps without jumps."""
    lines = ["| run | seeds | steps | KID | of plain's 20 steps | coverage |", "|---|--:|--:|--:|--:|--:|"]

    def mean(row: str, steps: int, figure: str) -> float:
        return statistics.mean(e["points"][str(steps)][figure] for e in entries if e["row"] == row)

    known = [row for row in ("plain", "jumps") if any(e["row"] == row for e in entries)]
    for row in known:
        seeds = sum(e["row"] == row for e in entries)
        for steps in STEPS:
            kid = mean(row, steps, "kid")
            times = f"{kid / mean('plain', 20, 'kid'):.2f} ×" if "plain" in known else ""
            lines.append(f"| {row} | {seeds} | {steps} | {kid:.3f} | {times} | {mean(row, steps, 'coverage'):.3f} |")
    return "\n".join(lines)


def main() -> None:
    """python bench/few_steps.py [--images N] [--seeds N]"""
    command.exit_cleanly(lambda: few_steps(command.parse_args(Options, sys.argv[1:], "bench/few_steps.py", __doc__ or "")))


if __name__ == "__main__":
    main()
