"""From a trained network to pictures: sample, decode, lay out in a grid. Picture n of a seed is the same on any rank count."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torchvision.utils import make_grid

from fastdit import config as configs
from fastdit import diffusion, pretrained
from fastdit.config import Config, UserError
from fastdit.gauges import compute_dtype
from fastdit.model import DiT, choose_ops, residual_dtype
from fastdit.parallel import World
from fastdit.vae import VAE
from fastdit.weights import load_weights

MODULATION_BYTES = 256 << 20  # of modulation computed at once


def locate(source: Path) -> tuple[Path, Config]:
    """The weights file that `source` means, and the config of the run that made it. Raises UserError."""
    if not source.exists():
        raise UserError(f"{source} does not exist; name a run folder or a safetensors file")
    weights = source
    if source.is_dir():
        names = (pretrained.WEIGHTS, "ema.safetensors", "checkpoints/[0-9]*[0-9]/ema.safetensors")
        found = sorted(path for name in names for path in source.glob(name))
        if not found:
            raise UserError(f"{source} holds no checkpoint yet")
        weights = found[-1]
    # weights → checkpoint → checkpoints → run folder
    for place in list(weights.resolve().parents)[:3]:
        if (place / "config.json").is_file():
            return weights, configs.load(place / "config.json")
    raise UserError(f"{weights}: there is no config.json beside it that says what model it holds")


def load(weights: Path, config: Config, world: World) -> DiT:
    """The model on its weights, whole, in the precision it computes in."""
    dtype = compute_dtype(config.parallel.precision, world.device)
    with torch.device("meta"):
        model = DiT(config.model, choose_ops(config, world.device), residual=residual_dtype(config))
    model.assign(load_weights(weights)[0], str(weights), dtype, world.device)
    return model.eval().requires_grad_(False)


def compiled(model: DiT, device: torch.device) -> DiT:
    """The model, compiled in place for batches of one size: by a GPU's graphs as a whole, by a CPU block by block.

    A GPU then launches one graph a step, where a small batch would wait for each kernel's launch. The first step takes long.
    """
    if device.type == "cuda":
        model.compile(mode="reduce-overhead", fullgraph=True, dynamic=False)
    else:
        for block in model.blocks:
            block.compile(fullgraph=True, dynamic=False)
    return model


def home(weights: Path) -> Path:
    """Where what is made of weights goes: the run folder of a checkpoint, or the folder of a lone file."""
    parents = weights.parents
    return parents[2] if weights.name == "ema.safetensors" and parents[1].name == "checkpoints" else parents[0]


def chosen(config: Config, options: Any, **groups: dict[str, Any]) -> Config:
    """A run's config with what a verb's options change of its sampling; those left at their defaults change nothing.

    Raises UserError for what does not go together.
    """
    plain = {name: getattr(options, name) for name in ("sampler", "steps", "guidance")}
    interval = {name: getattr(options, name) for name in ("guidance_low", "guidance_high")}
    config = configs.replace(
        config,
        sample={name: value for name, value in plain.items() if value}
        | {name: value for name, value in interval.items() if value != -1},
        data={"vae": options.vae} if options.vae else {},
        parallel={"precision": options.precision},
        **groups,
    )
    configs.validate(config)
    return config


def labels(config: Config, first: int, count: int, label: int = -1) -> Tensor | None:
    """The classes of pictures first … first + count - 1: each in turn, or all `label`; None without classes. int64 [count]"""
    if not config.model.num_classes:
        return None
    numbers = torch.arange(first, first + count)
    return numbers % config.model.num_classes if label < 0 else torch.full_like(numbers, label)


def modulations(model: DiT, times: list[float], y: Tensor | None, count: int, device: torch.device) -> Iterator[Tensor]:
    """The modulation of each sampling time in turn, [count, 6·L + 2, D] for labels y [count] (on the CPU; None: unconditional).

    It depends on the time and the class alone, so many steps and each class that occurs take one product, which reads the
    projection once; in the smallest batches that is a third of the weights every step would read again.
    """
    classes, which = (None, torch.zeros(count, dtype=torch.int64)) if y is None else y.unique(return_inverse=True)
    num_classes = 1 if classes is None else len(classes)
    which = which.to(device)
    step_bytes = num_classes * model.adaLN_modulation.out_features * 4
    together = max(1, MODULATION_BYTES // step_bytes)
    for i in range(0, len(times), together):
        group = torch.tensor(times[i : i + together], device=device)
        labels = None if classes is None else classes.to(device).repeat(len(group))
        modulation = model.condition(group.repeat_interleave(num_classes), labels)
        for of_step in modulation.view(len(group), num_classes, -1, model.config.width):
            yield of_step.index_select(0, which)


def make(
    model: DiT,
    config: Config,
    vae: VAE | None,
    world: World,
    *,
    first: int,
    count: int,
    seed: int,
    label: int = -1,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Pictures first … first + count - 1, uint8 [count, 3, rows, columns] on the CPU, in config.sample.steps forwards."""
    # What FSDP gathers it keeps for training, which cannot use what was made in inference mode.
    with torch.no_grad() if isinstance(model, FSDPModule) else torch.inference_mode():
        m = config.model
        y = labels(config, first, count, label)
        guided = config.sample.guidance != 1 and y is not None
        evaluated = torch.cat([y, torch.full_like(y, m.num_classes)]) if guided and y is not None else y
        times = diffusion.sampling_times(config.diffusion, config.sample.steps)
        vectors = modulations(model, times, evaluated, count * (1 + guided), world.device)

        def network(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
            out: Tensor = model(x, t, y, modulation=next(vectors)[: len(x)])  # the labelled half where a step is not guided
            return out.clone()  # a graph's output lasts until its next run, a solver's history longer

        x0 = diffusion.sample(
            network,
            config.diffusion,
            (count, m.channels, *m.input_size),
            None if y is None else y.to(world.device),
            sampler=config.sample.sampler,
            steps=config.sample.steps,
            guidance=config.sample.guidance,
            guidance_low=config.sample.guidance_low,
            guidance_high=config.sample.guidance_high,
            seed=seed,
            first=first,
            device=world.device,
            null_class=m.num_classes if m.class_dropout else None,
            learn_sigma=m.learn_sigma,
            on_step=None if on_step is None else lambda step, _: on_step(step),
        )
        if vae is not None:
            x0 = vae.decode(x0)
        images = to_uint8(x0)
    return images.clone()  # an ordinary tensor


def to_uint8(images: Tensor) -> Tensor:
    """Images of about [-1, 1], clipped to it, as uint8 on the CPU."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()


def save_grid(images: Tensor, path: Path) -> None:
    """Write uint8 [n, 3, rows, columns] as one PNG, about as wide as high, aside first so that no reader sees half of it."""
    columns = max(1, round(len(images) ** 0.5))
    grid = make_grid(images, nrow=columns, padding=2, pad_value=255)
    save_png(grid, path)


def save_png(image: Tensor, path: Path) -> None:
    """Write one picture, uint8 [3, rows, columns]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(aside, format="PNG")
    aside.replace(path)
