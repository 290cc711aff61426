"""Averaged weights whose length is chosen after the run (post-hoc EMA, arXiv 2312.02696, section 3).

A power-function average of exponent γ at time t weighs the weights of time τ by τ^γ, so its length is a share of the run and
not a number of steps: σ_rel, the deviation of those weights over t. A run keeps two such averages, and snapshots of both. The
average of another length is a weighted sum of the snapshots, with the weights that come nearest to it by least squares.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

LENGTHS = {"ema": 0.10, "narrow": 0.05}  # σ_rel of the averages kept, by what checkpoints and snapshots call them
EVERY = 8  # steps between two updates, of 24 bytes a parameter each: 3 a step
FINE = 128  # but at most this part of the steps so far, so that a short run is averaged as finely as a long one
WORST = 0.1  # error of a profile, relative, above which a length cannot be had


@lru_cache  # asked for at each move of the averages
def exponent(length: float) -> float:
    """γ of an average of this σ_rel, which is at most 0.28: the positive root of (γ + 2)²·(γ + 3)·σ_rel² = γ + 1."""
    low, high = 0.0, length**-1  # from the left side, which grows faster, below the right one to above it
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (middle + 2) ** 2 * (middle + 3) * length**2 < middle + 1 else (low, middle)
    return (low + high) / 2


def averaged_images(images_seen: int, global_batch: int) -> int:
    """Images seen at the last update of the averages: at each of the first steps, then at one in 2, in 4, and in EVERY."""
    steps, stride = images_seen // global_batch, 1
    while stride < EVERY and 2 * stride * FINE <= steps:
        stride *= 2
    return steps // stride * stride * global_batch


# --- another length, afterwards ---


class Profile(NamedTuple):
    """How an average weighs the weights of the past: τ^γ from time 0 to `end`, with sum 1."""

    end: float
    exponent: float


def inner(a: Profile, b: Profile) -> float:
    """The integral of the product of two profiles over time."""
    first = min(a.end, b.end)
    scale = (a.exponent + 1) * (b.exponent + 1) / (a.exponent + b.exponent + 1)
    return scale * first / (a.end * b.end) * (first / a.end) ** a.exponent * (first / b.end) ** b.exponent


def mix(kept: Sequence[Profile], wanted: Profile) -> tuple[Tensor, float]:
    """The weights of the kept averages, fp64, whose sum comes nearest to the wanted one; and its error, relative, in L2."""
    products = torch.tensor([[inner(a, b) for b in kept] for a in kept], dtype=torch.float64)
    with_wanted = torch.tensor([inner(a, wanted) for a in kept], dtype=torch.float64)
    weights = torch.linalg.lstsq(products, with_wanted[:, None], driver="gelsd").solution[:, 0]
    square = inner(wanted, wanted)
    rest = square - 2 * float(weights @ with_wanted) + float(weights @ products @ weights)
    return weights, (max(0.0, rest) / square) ** 0.5
