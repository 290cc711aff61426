"""Make pictures with a trained model, from a run folder or a safetensors file.

Picture n of a seed is the same whatever the batch and the number of processes: torchrun --nproc-per-node N shares the work.
"""

import fastdit  # noqa: F401  # isort: skip  before torch
from fastdit import command  # isort: skip
from fastdit.options import Sample as Options  # isort: skip

if command.is_program("sample", __name__):
    command.at_once(lambda argv: command.parse_args(Options, argv, "fastdit/sample.py", __doc__ or ""))  # before torch

import functools
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fastdit import pictures, sampling
from fastdit.config import Config, UserError, plain
from fastdit.data import classes, encoding, vae
from fastdit.data.arrays import read_conditions
from fastdit.data.normaliser import Normaliser
from fastdit.given import Given, asked
from fastdit.model import DiT
from fastdit.modulations import Modulations
from fastdit.planning import memory as footprint
from fastdit.runtime import ranks, rng
from fastdit.runtime.hardware import memory_bytes
from fastdit.runtime.latency import measure
from fastdit.runtime.ranks import World
from fastdit.steps import EulerSteps
from fastdit.weights.averages import at_length
from fastdit.weights.folder import Located, load_model, locate

LATENCY_CALLS = 200
CLASSES_KEPT = 16  # whose modulation a Sampler holds: for DiT-XL/2 in 20 steps 16 MB each


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
    y = sampling.labels(config, options.first, options.num_images, label)
    conditions = None if options.condition is None else read_conditions(Path(options.condition))
    given = asked(config.model, options.num_images, y, conditions, options.length)
    if options.latency:
        print(latency(Sampler(source, options.compile), label, given=given))
        return

    world = ranks.init(config.parallel)
    source = ranks.once(world, lambda: source)  # a run that goes on may have a newer checkpoint by now
    if (length := options.ema) is not None:
        source = ranks.once(world, lambda: at_length(source, length))
    weights = source.weights
    model = ranks.every(world, lambda: load_model(weights, config, world))
    if options.compile:
        sampling.compiled(model, world.device)
    decoder = ranks.every(world, lambda: vae.decoder(config, world.device, source.latents_by, source.normaliser))
    share = -(-options.num_images // world.size)
    mine = range(options.first + world.rank * share, options.first + min((world.rank + 1) * share, options.num_images))
    starts = range(mine.start, mine.stop, options.batch)
    console = Console(quiet=world.rank > 0)
    parts = [
        sampling.make(
            model,
            config,
            decoder,
            world,
            first=start,
            count=min(options.batch, mine.stop - start),
            seed=options.seed,
            given=given.some(start - options.first, min(options.batch, mine.stop - start)),
        )
        for start in track(starts, "sampling", console=console, disable=not console.is_terminal)
    ]
    made = torch.cat([part for parts in ranks.gather(world, parts) for part in parts])
    out = Path(options.out) if options.out else source.home / "pictures"
    file = ranks.once(world, lambda: write(made, out, config, options, label, names, given))
    ranks.shutdown()
    what = "samples" if config.data.kind == "arrays" else "pictures"
    console.print(plain(f"{len(made)} {what} of {weights}: {file}", 4000), markup=False, highlight=False, soft_wrap=True)


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


def write(
    images: Tensor, out: Path, config: Config, options: Options, label: int | None, names: Sequence[str], given: Given
) -> Path:
    """The grid, and each picture where asked for, or the arrays, under names that say how they were made. Returns the file."""
    s = config.sample
    how = f"seed{options.seed}-{s.sampler}-{s.steps}steps"
    if s.guidance != 1:
        how += f"-guidance{s.guidance:g}"
        how += "-{:g}to{:g}".format(*s.guidance_interval) if s.guidance_interval != (0, 1) else ""
    how += f"-ema{options.ema:g}" if options.ema is not None else ""
    how += f"-class{label}" if label is not None else ""
    last = options.first + len(images) - 1
    grid = out / f"{how}-{options.first}to{last}.png"
    captions = classes.captions(names, None if given.y is None else given.y.tolist())
    beside = given.beside | ({} if given.y is None else {"label": given.y})
    file = pictures.save(images, grid, captions, beside)
    if options.singles and images.dtype == torch.uint8:
        for number, image in enumerate(images, options.first):
            pictures.save_png(image, out / how / f"{number:06d}.png")
    return file


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
    condition: Any = None,
    length: Any = None,
    steps: int | None = None,
    seed: int = 0,
    first: int = 0,
    guidance: float | None = None,
    sampler: Literal["auto", "ddpm", "ddim", "dpm++", "euler"] | None = None,
    batch: int = 64,
) -> Tensor:
    """Pictures first … first + num - 1 of a seed, uint8 [num, 3, rows, columns] (1 channel if all are grey), on the CPU.

    The same pictures as sample.py makes. model: of `fastdit.load`. label: a class by number or name; None: each in turn. None
    elsewhere: as the run's config says. Of a model of arrays: fp32 [num, C, *size] in physical units; condition [num, K] or
    [K] in physical units too; length [num] or one number, beyond which samples are 0. Raises UserError, a ValueError, for what
    the model cannot do.
    """
    if model.run is None:
        raise UserError("the model does not say how it was trained: sample one that fastdit.load(source) returns")
    config = command.chosen(model.run, Options("", steps=steps, guidance=guidance, sampler=sampler))
    if num < 1 or batch < 1 or first < 0:
        raise UserError(f"num is {num}, batch {batch} and first {first}; there must be a picture to make")
    number = None if label is None else classes.number(str(label), model.class_names, config.model.num_classes)
    device = model.x_embedder.weight.device
    decoder = _decoder(model.run, device, model.latents_by, model.normaliser)
    given = asked(config.model, num, sampling.labels(config, first, num, number), condition, length)
    world = World(0, 1, 0, 1, device)
    parts = []
    for n in range(0, num, batch):
        part, count = given.some(n, batch), min(batch, num - n)
        parts.append(sampling.make(model, config, decoder, world, first=first + n, count=count, seed=seed, given=part))
    return torch.cat(parts)


@functools.lru_cache(maxsize=1)
def _decoder(config: Config, device: torch.device, made_by: str, normaliser: Normaliser | None) -> vae.VAE | Normaliser | None:
    return vae.decoder(config, device, made_by, normaliser)  # kept from call to call


# --- one picture at a time ---


Ahead = tuple[Modulations, list[Tensor]]  # and each step's, where a flow's steps are one function


class Sampler:
    """A trained model for a control loop: `policy = Sampler.load(folder, steps=1)`, then `policy(label)` for each sample.

    It is warm once it is made: a flow's steps are then one CUDA graph, where there is a GPU. No state is global, and one object
    serves one thread: a second thread takes its own.
    """

    def __init__(self, source: Located, compile: bool = False, device: torch.device | None = None):
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.config, self.world = source.config, World(0, 1, 0, 1, device)
        self.model = load_model(source.weights, source.config, self.world)
        if compile:
            sampling.compiled(self.model, device)
        self.decoder = vae.decoder(source.config, device, source.latents_by, source.normaliser)
        self.modulations: dict[int | None, Ahead] = {}  # of each class asked for
        m, s, flow = source.config.model, source.config.sample, source.config.diffusion
        self.euler: EulerSteps | None = None
        if flow.kind == "flow" and s.guidance == 1:
            times = sampling.sampling_times(flow, s.steps)
            self.euler = EulerSteps(self.model, flow, times, 1, device, graph=device.type == "cuda" and not compile)
        for _ in range(self.euler.warm_ups if self.euler else 1):
            self(0 if m.num_classes else None, condition=torch.zeros(m.condition) if m.condition else None)

    @classmethod
    def load(cls, source: str | Path, steps: int | None = None, **options: bool | str) -> "Sampler":
        """From whatever sample.py takes. options: sampler, precision, vae and compile of sample.py. Raises UserError."""
        given = Options(str(source), steps=steps, **options)  # type: ignore[arg-type]
        return cls(open_source(given), given.compile)

    @torch.inference_mode()
    def __call__(
        self,
        label: int | None = None,
        seed: int = 0,
        number: int = 0,
        *,
        condition: Any = None,
        length: int | None = None,
    ) -> Tensor:
        """Picture `number` of a seed, fp32 [C, rows, columns] of about [-1, 1] on the device; by default always the same noise.

        label: the class, for a model that has classes. condition: K numbers, for one that has a condition. Of a model of arrays
        both that and the sample [C, *size] are in physical units. Raises UserError for a condition of another width.
        """
        m, device = self.config.model, self.world.device
        given = asked(m, 1, sampling.labels(self.config, number, 1, label), condition, length)
        given = sampling.prepared(given, self.config, self.decoder, 1)
        modulations, each = self._ahead(given)
        if self.euler is None or given.length is not None:
            x0 = sampling.x0_of(self.model, self.config, given, modulations, number, 1, seed)
        else:
            x0 = self.euler(rng.normal((m.channels, *m.input_size), seed, "sample noise", number, 1, device), each).clone()
        return sampling.decoded(x0, given, self.decoder)[0]

    def _ahead(self, given: Given) -> Ahead:
        """The modulation of all steps: kept by class, computed anew for a condition."""
        key = None if given.y is None else int(given.y)
        if key in self.modulations and not self.config.model.condition:
            return self.modulations[key]
        if len(self.modulations) >= CLASSES_KEPT:
            del self.modulations[next(iter(self.modulations))]
        found = sampling.ahead(self.model, self.config, given, 1, self.world.device)
        self.modulations[key] = found, [found.at(time) for time in found.times] if self.euler else []
        return self.modulations[key]


def latency(sampler: Sampler, label: int | None, calls: int = LATENCY_CALLS, given: Given | None = None) -> str:
    """Time calls of a warm sampler, each with noise of its own: one line of figures. given: a condition for all calls."""
    condition = None if given is None or given.condition is None else given.condition[0]
    found = measure(lambda number: sampler(label, number=number, condition=condition), calls, sampler.world.device)
    steps = sampler.config.sample.steps
    return (
        f"{calls} calls at batch 1, {steps} step{'s'[: steps - 1]} each: median {1000 * found.median:.2f} ms, "
        f"99th percentile {1000 * found.p99:.2f} ms, {steps / found.mean:,.1f} evaluations per second"
    )


if __name__ == "__main__":
    main()
