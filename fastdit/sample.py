"""Make pictures with a trained model, from a run folder or a safetensors file.

Picture n of a seed is the same whatever the batch and the number of processes: torchrun --nproc-per-node N shares the work.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import track

from fastdit import command, sampling
from fastdit.config import Config, UserError
from fastdit.data import vae
from fastdit.runtime import ranks
from fastdit.weights.folder import find_weights, home_of, load_model


@dataclass(frozen=True)
class Options:
    source: Annotated[str, tyro.conf.Positional]  # run folder, checkpoint, exported folder or safetensors file
    num_images: int = 64  # pictures to make (torchrun takes a plain --num for its own)
    first: int = 0  # number of the first; pictures are numbered per seed
    seed: int = 0  # picture n of a seed is always the same
    label: int = -1  # class of all pictures; -1: each class in turn
    sampler: Literal["", "auto", "ddpm", "ddim", "dpm++", "euler"] = ""  # empty: as the run's config says
    steps: int = 0  # network evaluations per picture; 0: as the run's config says
    guidance: float = 0.0  # classifier-free guidance scale, 1 is off; 0: as the run's config says
    guidance_low: float = -1.0  # guide only from this share of the process's timesteps; -1: as the run's config says
    guidance_high: float = -1.0  # … to this one; -1: as the run's config says
    batch: int = 64  # pictures made at once, per process
    compile: bool = False  # compile the network first, which takes a while: for many pictures, or many calls of one
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of the network; auto: bf16 where the device has it
    vae: str = ""  # folder or hub id of the autoencoder; empty: as the run's config says
    out: str = ""  # folder to write to; empty: pictures/ in the run folder, or beside the file
    singles: bool = False  # write each picture as a PNG of its own, besides the grid


def main() -> None:
    """torchrun fastdit/sample.py RUN [--field VALUE …]"""
    rank = int(os.environ.get("RANK", 0))

    def run() -> None:
        sample(command.parse_args(Options, sys.argv[1:], "fastdit/sample.py", __doc__ or ""))

    command.exit_cleanly(lambda: ranks.as_one(run), rank)


def sample(options: Options) -> None:
    """Load, make this process's share, gather, write."""
    for name in ("num_images", "batch"):
        if getattr(options, name) <= 0:
            raise UserError(f"--{name} is {getattr(options, name)}; it must be positive")
    for name in ("first", "steps", "guidance"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name} is {getattr(options, name)}; it must not be negative")
    weights, config = find_weights(Path(options.source))
    config = command.chosen(config, options)
    if options.label >= max(config.model.num_classes, 1):
        raise UserError(f"--label is {options.label}; the model has classes 0 … {config.model.num_classes - 1}")

    world = ranks.init(config.parallel)
    model = ranks.every(world, lambda: load_model(weights, config, world))
    if options.compile:
        sampling.compiled(model, world.device)
    autoencoder = ranks.every(world, lambda: vae.load(config.data, world.device)) if config.data.vae else None
    share = -(-options.num_images // world.size)
    mine = range(options.first + world.rank * share, options.first + min((world.rank + 1) * share, options.num_images))
    starts = range(mine.start, mine.stop, options.batch)
    console = Console(quiet=world.rank > 0)
    parts = [
        sampling.make(
            model,
            config,
            autoencoder,
            world,
            first=start,
            count=min(options.batch, mine.stop - start),
            seed=options.seed,
            label=options.label,
        )
        for start in track(starts, "sampling", console=console, disable=not console.is_terminal)
    ]
    images = torch.cat([part for parts in ranks.gather(world, parts) for part in parts])
    out = ranks.once(
        world, lambda: write(images, Path(options.out) if options.out else home_of(weights) / "pictures", config, options)
    )
    ranks.shutdown()
    console.print(f"{len(images)} pictures of {weights}: {out}", highlight=False, soft_wrap=True)


def write(images: torch.Tensor, out: Path, config: Config, options: Options) -> Path:
    """The grid, and each picture where asked for, under names that say how they were made. Returns the grid's path."""
    how = f"seed{options.seed}-{config.sample.sampler}-{config.sample.steps}steps"
    s = config.sample
    if s.guidance != 1:
        how += f"-guidance{s.guidance:g}"
        how += f"-{s.guidance_low:g}to{s.guidance_high:g}" if (s.guidance_low, s.guidance_high) != (0, 1) else ""
    how += f"-class{options.label}" if options.label >= 0 else ""
    last = options.first + len(images) - 1
    grid = out / f"{how}-{options.first}to{last}.png"
    sampling.save_grid(images, grid)
    if options.singles:
        for number, image in enumerate(images, options.first):
            sampling.save_png(image, out / how / f"{number:06d}.png")
    return grid


if __name__ == "__main__":
    main()
