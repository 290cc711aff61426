"""Make pictures with a trained model, from a run folder or a safetensors file.

Picture n of a seed is the same whatever the batch and the number of processes: torchrun --nproc-per-node N shares the work.
"""

import fastdit  # noqa: F401  # isort: skip  before torch

import functools
import statistics
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fastdit import command, pictures, sampling
from fastdit.config import Config, UserError, plain
from fastdit.data import classes, encoding, vae
from fastdit.model import DiT
from fastdit.planning import memory as footprint
from fastdit.runtime import ranks
from fastdit.runtime.hardware import memory_bytes
from fastdit.runtime.ranks import World
from fastdit.weights.averages import at_length
from fastdit.weights.folder import Located, load_model, locate

LATENCY_CALLS = 200
CLASSES_KEPT = 16  # whose modulation a Sampler holds: for DiT-XL/2 in 20 steps 16 MB each


@dataclass(frozen=True)
class Options:
    source: Annotated[str, tyro.conf.Positional]  # run folder, checkpoint, exported folder, safetensors file or hub id
    num_images: int = 64  # pictures to make (torchrun takes a plain --num for its own)
    first: int = 0  # number of the first; pictures are numbered per seed
    seed: int = 0  # picture n of a seed is always the same
    ema: float | None = None  # length of the averaged weights, a share of the run, after --train.ema posthoc; e.g. 0.07
    label: str | None = None  # class of all pictures, by name or number; without it each class in turn
    sampler: Literal["auto", "ddpm", "ddim", "dpm++", "euler"] | None = None  # instead of the run's own
    steps: int | None = None  # network evaluations per picture, instead of the run's own
    guidance: float | None = None  # classifier-free guidance scale, instead of the run's own; 1 is off
    guidance_interval: tuple[float, float] | None = None  # guide only in this part of the process, 0 … 1
    batch: int = 64  # pictures made at once, per process
    compile: bool = False  # compile the network first, which takes a while: for many pictures, or many calls of one
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of the network; auto: bf16 where the device has it
    vae: str | None = None  # folder or hub id of the autoencoder, instead of the run's own
    out: str | None = None  # folder to write to, instead of pictures/ in the run folder or beside the file
    singles: bool = False  # write each picture as a PNG of its own, besides the grid
    latency: bool = False  # make no files: time 200 calls at batch 1 and print the figures


def main() -> None:
    """torchrun fastdit/sample.py RUN [--field VALUE …]"""
    command.run(sample, lambda argv: command.parse_args(Options, argv, "fastdit/sample.py", __doc__ or ""))


def sample(options: Options) -> None:
    """Load, make this process's share, gather, write."""
    source = open_source(options)
    if options.ema is not None and options.latency:
        raise UserError("--ema changes no latency; leave it out")
    config = source.config
    names = source.class_names or class_names(config)
    label = None if options.label is None else classes.number(str(options.label), names, config.model.num_classes)
    if options.latency:
        print(latency(Sampler(source, options.compile), label))
        return

    world = ranks.init(config.parallel)
    source = ranks.once(world, lambda: source)  # a run that goes on may have a newer checkpoint by now
    if (length := options.ema) is not None:
        source = ranks.once(world, lambda: at_length(source, length))
    weights = source.weights
    model = ranks.every(world, lambda: load_model(weights, config, world))
    if options.compile:
        sampling.compiled(model, world.device)
    autoencoder = ranks.every(world, lambda: vae.of(config, world.device, source.latents_by))
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
            label=label,
        )
        for start in track(starts, "sampling", console=console, disable=not console.is_terminal)
    ]
    images = torch.cat([part for parts in ranks.gather(world, parts) for part in parts])
    out = Path(options.out) if options.out else source.home / "pictures"
    grid = ranks.once(world, lambda: write(images, out, config, options, label, names))
    ranks.shutdown()
    console.print(plain(f"{len(images)} pictures of {weights}: {grid}", 4000), markup=False, highlight=False, soft_wrap=True)


def open_source(options: Options) -> Located:
    """The weights, and the run's config with what the options change. Raises UserError before anything is built."""
    for name in ("num_images", "batch"):
        if getattr(options, name) <= 0:
            raise UserError(f"--{name} is {getattr(options, name)}; it must be positive")
    if options.first < 0:
        raise UserError(f"--first is {options.first}; it must not be negative")
    found = locate(options.source)
    config = command.chosen(found.config, options)
    footprint.check_sampling(config, memory_bytes())
    return found._replace(config=config, latents_by="" if options.vae else found.latents_by)


def class_names(config: Config) -> list[str]:
    """The names of the run's classes as its pack has them; empty where it has none."""
    return encoding.class_names(config.data) if config.model.num_classes else []


def write(images: Tensor, out: Path, config: Config, options: Options, label: int | None, names: Sequence[str]) -> Path:
    """The grid, and each picture where asked for, under names that say how they were made. Returns the grid's path."""
    s = config.sample
    how = f"seed{options.seed}-{s.sampler}-{s.steps}steps"
    if s.guidance != 1:
        how += f"-guidance{s.guidance:g}"
        how += "-{:g}to{:g}".format(*s.guidance_interval) if s.guidance_interval != (0, 1) else ""
    how += f"-ema{options.ema:g}" if options.ema is not None else ""
    how += f"-class{label}" if label is not None else ""
    last = options.first + len(images) - 1
    grid = out / f"{how}-{options.first}to{last}.png"
    y = sampling.labels(config, options.first, len(images), label)
    pictures.save_grid(images, grid, classes.captions(names, None if y is None else y.tolist()))
    if options.singles:
        for number, image in enumerate(images, options.first):
            pictures.save_png(image, out / how / f"{number:06d}.png")
    return grid


# --- from Python ---


class _Callable(types.ModuleType):
    """`fastdit.sample` is this module, as Python binds every submodule to its package; so the module itself can be called."""

    def __call__(self, model: DiT, num: int = 4, **options: Any) -> Tensor:
        return make_pictures(model, num, **options)


sys.modules[__name__].__class__ = _Callable


def make_pictures(
    model: DiT,
    num: int = 4,
    *,
    label: int | str | None = None,
    steps: int | None = None,
    seed: int = 0,
    first: int = 0,
    guidance: float | None = None,
    sampler: Literal["auto", "ddpm", "ddim", "dpm++", "euler"] | None = None,
    batch: int = 64,
) -> Tensor:
    """Pictures first … first + num - 1 of a seed, uint8 [num, 3, rows, columns] (1 channel if all are grey), on the CPU.

    The same pictures as sample.py makes. model: of `fastdit.load`. label: a class by number or name; None: each in turn. None
    elsewhere: as the run's config says. Raises UserError, a ValueError, for what the model cannot do.
    """
    if model.run is None:
        raise UserError("the model does not say how it was trained: sample one that fastdit.load(source) returns")
    config = command.chosen(model.run, Options("", steps=steps, guidance=guidance, sampler=sampler))
    if num < 1 or batch < 1 or first < 0:
        raise UserError(f"num is {num}, batch {batch} and first {first}; there must be a picture to make")
    number = None if label is None else classes.number(str(label), model.class_names, config.model.num_classes)
    device = model.x_embedder.weight.device
    decoder = _decoder(model.run, device)
    world = World(0, 1, 0, 1, device)
    parts = [
        sampling.make(model, config, decoder, world, first=n, count=min(batch, first + num - n), seed=seed, label=number)
        for n in range(first, first + num, batch)
    ]
    return torch.cat(parts)


@functools.lru_cache(maxsize=1)
def _decoder(config: Config, device: torch.device) -> vae.VAE | None:
    return vae.of(config, device)  # kept from call to call


# --- one picture at a time ---


class Sampler:
    """A trained model for a control loop: `policy = Sampler.load(folder, steps=1)`, then `policy(label)` for each sample.

    It is warm once it is made. No state is global, and one object serves one thread: a second thread takes its own.
    """

    def __init__(self, source: Located, compile: bool = False, device: torch.device | None = None):
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.config, self.world = source.config, World(0, 1, 0, 1, device)
        self.model = load_model(source.weights, source.config, self.world)
        if compile:
            sampling.compiled(self.model, device)
        self.vae = vae.of(source.config, device, source.latents_by)
        self.modulations: dict[int | None, sampling.Modulations] = {}  # of each class asked for
        self(0 if source.config.model.num_classes else None)

    @classmethod
    def load(cls, source: str | Path, steps: int | None = None, **options: bool | str) -> "Sampler":
        """From whatever sample.py takes. options: sampler, precision, vae and compile of sample.py. Raises UserError."""
        given = Options(str(source), steps=steps, **options)  # type: ignore[arg-type]
        return cls(open_source(given), given.compile)

    @torch.inference_mode()
    def __call__(self, label: int | None = None, seed: int = 0, number: int = 0) -> Tensor:
        """Picture `number` of a seed, fp32 [C, rows, columns] of about [-1, 1] on the device; by default always the same noise.

        label: the class, for a model that has classes.
        """
        y = sampling.labels(self.config, number, 1, label)
        key = None if y is None else int(y)
        if key not in self.modulations:
            if len(self.modulations) >= CLASSES_KEPT:
                del self.modulations[next(iter(self.modulations))]
            self.modulations[key] = sampling.ahead(self.model, self.config, y, 1, self.world.device)
        x0 = sampling.x0_of(self.model, self.config, y, self.modulations[key], number, 1, seed)
        return (x0 if self.vae is None else self.vae.decode(x0))[0]


def latency(sampler: Sampler, label: int | None, calls: int = LATENCY_CALLS) -> str:
    """Time calls of a warm sampler, each with noise of its own: one line of figures."""
    seconds = []
    for number in range(calls):
        start = perf_counter()
        sampler(label, number=number)
        if sampler.world.device.type == "cuda":
            torch.cuda.synchronize(sampler.world.device)
        seconds.append(perf_counter() - start)
    steps = sampler.config.sample.steps
    last = statistics.quantiles(seconds, n=100)[98]
    return (
        f"{calls} calls at batch 1, {steps} step{'s'[: steps - 1]} each: median {1000 * statistics.median(seconds):.2f} ms, "
        f"99th percentile {1000 * last:.2f} ms, {calls * steps / sum(seconds):,.1f} evaluations per second"
    )


if __name__ == "__main__":
    main()
