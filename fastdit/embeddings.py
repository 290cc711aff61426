"""What the network makes of an image's places and of the time: patches as tokens, and sinusoids of t and of each place.

B batch, T tokens, D width, C channels.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdit.config import ModelConfig

FREQUENCIES = 256  # sinusoids that embed the timestep


def patchify(x: Tensor, patch: int) -> Tensor:
    """[B, C, rows, columns] → [B, T, C·patch²], in the order a convolution's weight flattens to."""
    return F.pixel_unshuffle(x, patch).flatten(2).transpose(1, 2)


def unpatchify(tokens: Tensor, config: ModelConfig) -> Tensor:
    """[B, T, patch²·C] → [B, C, rows, columns]; within a token the order is (row, column, channel), as in the DiT paper."""
    B, p = len(tokens), config.patch
    rows, columns = (side // p for side in config.input_size)
    x = tokens.view(B, rows, columns, p, p, -1).permute(0, 5, 1, 3, 2, 4)  # [B, C, rows, p, columns, p]
    return x.reshape(B, -1, rows * p, columns * p)


def num_frequencies(config: ModelConfig) -> int:
    """Sinusoids that embed the timestep: 256, but as many as the width in the seed repository's models."""
    return config.width if config.time_embedding == "seed" else FREQUENCIES


def timestep_embedding(t: Tensor, size: int, endpoint: bool = False) -> Tensor:
    """cos and sin of t [B] at `size`/2 frequencies from 1 to 1/10,000, in fp32: [B, size] (GLIDE; DiT, §3.2).

    endpoint: whether 1/10,000 is the last frequency, as in diffusers' DiT, or would be the next, as in the paper's code.
    """
    t = t if t.dtype == torch.float64 else t.float()
    angles = t[:, None] * frequencies(size // 2, endpoint, t.dtype, t.device)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # whoever asks first
def frequencies(count: int, endpoint: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The frequencies of `timestep_embedding`, [count]: a table made once, which no step computes again."""
    return torch.exp(-math.log(10_000) * torch.arange(count, dtype=dtype, device=device) / (count - endpoint))


def position_embedding(rows: int, columns: int, width: int) -> Tensor:
    """2-D sinusoids, fp32 [rows·columns, width]: the first half of the width encodes the column, the second the row (MAE)."""

    def encode(position: Tensor) -> Tensor:
        quarter = width // 4
        angles = position[:, None] / 10_000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    row, column = torch.meshgrid(torch.arange(rows).double(), torch.arange(columns).double(), indexing="ij")
    return torch.cat([encode(column.flatten()), encode(row.flatten())], dim=1).float()
