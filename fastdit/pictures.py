"""From a trained network to pictures: sample, decode, lay out in a grid. Picture n of a seed is the same on any rank count."""

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from fastdit import diffusion
from fastdit.config import Config
from fastdit.parallel import World
from fastdit.vae import VAE


def labels(config: Config, first: int, count: int, label: int = -1) -> Tensor | None:
    """The classes of pictures first … first + count - 1: each in turn, or all `label`; None without classes. int64 [count]"""
    if not config.model.num_classes:
        return None
    numbers = torch.arange(first, first + count)
    return numbers % config.model.num_classes if label < 0 else torch.full_like(numbers, label)


def make(
    network: diffusion.Network,
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
    y = labels(config, first, count, label)
    model = config.model
    x0 = diffusion.sample(
        network,
        config.diffusion,
        (count, model.channels, *model.input_size),
        None if y is None else y.to(world.device),
        sampler=config.sample.sampler,
        steps=config.sample.steps,
        guidance=config.sample.guidance,
        seed=seed,
        first=first,
        device=world.device,
        null_class=model.num_classes if model.class_dropout else None,
        learn_sigma=model.learn_sigma,
        on_step=None if on_step is None else lambda step, _: on_step(step),
    )
    if vae is not None:
        x0 = vae.decode(x0)
    return ((x0.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()


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
