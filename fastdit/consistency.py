"""Two-interval self-consistency: what teaches a flow to jump, so that pictures take 1, 2 or 4 evaluations instead of 20.

The network also gets the length of a jump and then answers for the whole of it, not for its start alone. For shares of noise
s > m > e let u(x_s, s, e) be the mean velocity of the path from x_s to e, which the jump follows in one step:

    x_e = x_s - (s - e)·u(x_s, s, e)

Two jumps in a row are one. So the mean over the whole is the mean of its two parts, each weighted by its length:

    u(x_s, s, e) = [(s - m)·u(x_s, s, m) + (m - e)·u(x_m, m, e)] / (s - e)        x_m = x_s - (s - m)·u(x_s, s, m)

The right-hand side without its gradient is the target of the left (SplitMeanFlow, arXiv 2507.16884; for halves of equal length
shortcut models, arXiv 2410.12557; for policies arXiv 2603.12480). It takes two forwards and no derivative of the network, so
every kernel and sharding does it. A jump of length 0 is plain flow. Most of the batch stays with it, and all jumps are in the
end made of it: a target that only agrees with itself would be met by any constant.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastdit.config import Config

LEVELS = 3  # lengths taught: the whole process, its half, … down to 2^-LEVELS of it


class Jump(NamedTuple):
    """A jump in two parts, by the share of noise, fp32 [n]: from start, by way of middle, to end."""

    start: Tensor
    middle: Tensor
    end: Tensor


def on(config: Config, images_seen: int) -> bool:
    """Whether the step that follows `images_seen` teaches jumps: a function of images seen, the same on every rank."""
    d = config.diffusion
    return d.consistency > 0 and images_seen >= round((1 - d.consistency) * config.train.images)


def begins(config: Config, images_seen: int, batch: int) -> bool:
    """Whether that step, of `batch` images over all ranks, is the first that does."""
    return on(config, images_seen) and not on(config, images_seen - batch)


def split(x: Tensor, every: int) -> tuple[Tensor, Tensor]:
    """[B, …] → the images that stay with plain flow [B - n, …], and those that learn jumps [n, …]: each `every`-th one."""
    groups = x.unflatten(0, (-1, every))
    return groups[:, :-1].flatten(0, 1), groups[:, -1]


def join(plain: Tensor, jumping: Tensor, every: int) -> Tensor:
    """What `split` took apart."""
    return torch.cat([plain.unflatten(0, (-1, every - 1)), jumping[:, None]], 1).flatten(0, 1)


def jumps(u: Tensor) -> Jump:
    """Jumps from uniform numbers u [n, 2]: each length as likely, anywhere on its own grid, halved in the middle.

    Sampling in 1, 2, 4, … even steps makes just these jumps, so the network learns no other.
    """
    count = 2.0 ** (u[:, 0] * (LEVELS + 1)).floor()  # jumps in the whole process
    place = (u[:, 1] * count).floor()
    return Jump((place + 1) / count, (place + 0.5) / count, place / count)


def mean_velocity(velocity: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, jump: Jump) -> Tensor:
    """The target of a jump from x [n, C, *size]: the mean of its two parts, by their length.

    velocity(x, share of noise [n], length as a share [n]): the network's mean velocity. The shortest parts count as length 0.
    """
    start, middle, end = jump
    first, second = start - middle, middle - end
    shortest = 2.0 ** -(LEVELS + 1)
    u = velocity(x, start, torch.where(first > shortest, first, 0))
    between = x - per_image(first, x) * u
    v = velocity(between, middle, torch.where(second > shortest, second, 0))
    share = per_image(first / (first + second), x)
    return share * u + (1 - share) * v


def per_image(values: Tensor, x: Tensor) -> Tensor:
    """[n] → [n, 1, …], as many axes as x has."""
    return values.view(-1, *[1] * (x.ndim - 1))
