"""What pictures are compared with: held-out images, a folder that the user names, or the training images."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastdit import config as configs
from fastdit.config import Config, DataConfig, UserError
from fastdit.data.images import open_images, origin
from fastdit.data.source import ImageSource
from fastdit.quality import features, scores
from fastdit.quality.scores import Judge
from fastdit.runtime import rng

TRAINING = 20_000  # training images looked through for the nearest


def real_images(config: Config, num: int, reference: str | None = None) -> tuple[ImageSource, bool]:
    """About `num` images to compare with: a folder's that the user names, held-out cats, or else the training images.

    And whether they are held out: whether the training set has none of them. Raises UserError.
    """
    d, threads = config.data, torch.get_num_threads()
    if reference:
        return open_images(DataConfig(path=reference, image_size=d.image_size, crop=d.crop), threads=threads), True
    if origin(d).kind == "cats":
        return open_images(configs.replace(config, data={"num_images": num}).data, held_out=True, threads=threads), True
    return open_images(d, threads=threads), False


def references(config: Config, num: int, reference: str | None = None) -> tuple[ImageSource, Sequence[int]]:
    """What FID compares with, by custom: the folder that the user names, or else `num` of the training images, or all for 0."""
    source = real_images(config, 0, reference)[0] if reference else open_images(config.data)
    return source, subset(source, num or source.length)


def subset(source: ImageSource, count: int) -> Sequence[int]:
    """The numbers, ascending, of `count` images of a source, or of all: chosen at random, and the same each time."""
    if count >= source.length:
        return range(source.length)
    return sorted(rng.order(0, 2, source.length)[:count].tolist())


def read(source: ImageSource, numbers: Sequence[int]) -> Iterator[Tensor]:
    """Those images, uint8 [3, H, W]; those that cannot be decoded are left out."""
    runs = [numbers] if isinstance(numbers, range) else [range(n, n + 1) for n in numbers]
    for run in runs:
        for example in source.read(run[0], run[-1] + 1):
            if example.image is not None:
                yield torch.from_numpy(example.image).permute(2, 0, 1)


def of(config: Config, device: torch.device) -> Judge:
    """What scores a run's pictures while it trains."""
    return open_judge(config, config.eval.num, device, config.eval.reference)


def open_judge(config: Config, num: int, device: torch.device, reference: str | None = None) -> Judge:
    """What scores pictures against `num` real images, or half of those there are. Raises UserError."""
    features.require()
    source, held_out = real_images(config, 2 * num, reference)
    real = list(read(source, subset(source, 2 * num)))
    if len(real) <= 2 * scores.NEIGHBOURS + 1:
        raise UserError(f"{source.name}: {len(real)} images; a comparison needs at least {2 * scores.NEIGHBOURS + 2}")
    # A folder's come by class: shuffled, so that both halves have all of them.
    order = rng.order(0, 3, len(real)).tolist()
    half = len(real) // 2
    ours, others = (torch.stack([real[i] for i in part]) for part in (order[:half], order[half : 2 * half]))
    trained_on = open_images(config.data, threads=torch.get_num_threads())
    training = torch.stack([features.shrink(image[None])[0] for image in read(trained_on, subset(trained_on, TRAINING))])
    if config.data.hflip:
        training = torch.cat([training, training.flip(-1)])
    against = f"{half:,} {'' if held_out else 'training '}images of {source.name}"
    return Judge(ours, others, training, held_out=held_out, against=against, device=device)
