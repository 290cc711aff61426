"""Every random number of a run is a function of (seed, what it is for, which image): never of rank, time or history.

Images are numbered 0, 1, 2, ... in the order the run sees them, across epochs. Image n's noise, timestep and flip are the same
whether one process or sixty-four train it, and whether or not the run was killed in between.
"""

import hashlib

import torch
from torch import Tensor

CHUNK = 32  # images drawn that share a generator; a batch that starts anywhere takes at most ceil(count / CHUNK) + 1 generators


def generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A generator seeded by the key alone, e.g. generator("cpu", seed, "order", epoch)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def normal(shape: tuple[int, ...], seed: int, purpose: str, first: int, count: int, device: torch.device) -> Tensor:
    """Standard normal fp32 [count, *shape] for images first … first + count - 1."""
    return _in_chunks(torch.randn, shape, seed, purpose, first, count, device)


def uniform(shape: tuple[int, ...], seed: int, purpose: str, first: int, count: int, device: torch.device) -> Tensor:
    """Uniform fp32 in [0, 1), [count, *shape], for images first … first + count - 1."""
    return _in_chunks(torch.rand, shape, seed, purpose, first, count, device)


def _in_chunks(kind, shape, seed, purpose, first, count, device) -> Tensor:
    chunks = range(first // CHUNK, -(-(first + count) // CHUNK))
    parts = [kind(CHUNK, *shape, generator=generator(device, seed, purpose, c), device=device) for c in chunks]
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    return whole[first - chunks.start * CHUNK :][:count]


def order(seed: int, epoch: int, num_images: int) -> Tensor:
    """The permutation of the dataset in which this epoch sees it: int64 [num_images], on the CPU."""
    return torch.randperm(num_images, generator=generator("cpu", seed, "order", epoch))
