"""What the network makes of places and of the time: patches as tokens, and sinusoids of t and of each place.

B batch, T tokens, D width, C channels. A grid has one axis (a sequence), two (an image) or three (frames of a video).
"""

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

from fastdit.config import ModelConfig, UserError, times

FREQUENCIES = 256  # sinusoids that embed the timestep


def patchify(x: Tensor, config: ModelConfig) -> Tensor:
    """[B, C, *input_size] → [B, T, C·patch_size], in the order a convolution's weight flattens to."""
    grid, patches = config.grid, config.patches
    n = len(grid)
    x = x.reshape(*x.shape[:2], *(side for pair in zip(grid, patches, strict=True) for side in pair))
    # [B, C, grid, patch] with one axis or more of each; tokens last, so that what a product reads is laid out as it was.
    x = x.permute(0, 1, *range(3, 3 + 2 * n, 2), *range(2, 2 + 2 * n, 2))
    return x.reshape(len(x), -1, config.num_tokens).transpose(1, 2)


def unpatchify(tokens: Tensor, config: ModelConfig) -> Tensor:
    """[B, T, patch_size·C] → [B, C, *input_size]; within a token the channel is last, as in the DiT paper."""
    grid, patches = config.grid, config.patches
    n = len(grid)
    x = tokens.view(len(tokens), *grid, *patches, -1)
    x = x.permute(0, 2 * n + 1, *(axis for i in range(1, n + 1) for axis in (i, i + n)))  # [B, C, rows, p, columns, p]
    return x.reshape(*x.shape[:2], *config.input_size)


def within(x: Tensor, length: Tensor) -> Tensor:
    """Which positions of x [B, C, *size] are no padding: bool [B, 1, size[0], 1, …]. length [B] counts along the first axis."""
    places = torch.arange(x.shape[2], device=x.device)
    return (places < length[:, None]).view(len(x), 1, -1, *[1] * (x.ndim - 3))


def valid_tokens(length: Tensor, config: ModelConfig) -> Tensor:
    """Which tokens hold a position that is no padding, bool [B, T]."""
    row = torch.arange(config.num_tokens, device=length.device) // (config.num_tokens // config.grid[0])
    return row * config.patches[0] < length[:, None]


class ConditionEmbedder(nn.Linear):
    """Vectors [B, K] → [B, D]. With `null`, a row of NaN is the null condition, whose embedding is learned."""

    def __init__(self, K: int, D: int, null: bool):
        super().__init__(K, D)
        self.null = nn.Parameter(torch.empty(D)) if null else None

    def forward(self, condition: Tensor | None) -> Tensor:
        if condition is None or condition.ndim != 2 or condition.shape[1] != self.in_features:
            given = "no condition" if condition is None else f"a condition of {times(tuple(condition.shape))}"
            raise UserError(f"{given}; this model takes {self.in_features} numbers a sample, [B, {self.in_features}]")
        if self.null is None:
            return super().forward(condition.to(self.weight.dtype))
        null = condition.isnan().any(1, keepdim=True)
        return torch.where(null, self.null, super().forward(condition.masked_fill(null, 0).to(self.weight.dtype)))


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


def position_embedding(grid: tuple[int, ...], width: int) -> Tensor:
    """Sinusoids of each token's place on the grid, fp32 [T, width]: every axis has a share of the width, the last axis first.

    Of an image, the first half encodes the column and the second the row (MAE). Of a video's three shares, the frame's is the
    largest where the width is not divisible by 6.
    """
    share = width // len(grid) // 2 * 2
    shares = [share] * (len(grid) - 1) + [width - share * (len(grid) - 1)]

    def encode(position: Tensor, share: int) -> Tensor:
        half = share // 2
        angles = position[:, None] / 10_000 ** (torch.arange(half, dtype=torch.float64) / half)
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    axes = torch.meshgrid(*(torch.arange(side).double() for side in grid), indexing="ij")
    return torch.cat([encode(a.flatten(), s) for a, s in zip(reversed(axes), shares, strict=True)], dim=1).float()


def out_channels(config: ModelConfig) -> int:
    return 2 * config.channels if config.learn_sigma else config.channels


def mean_square(error: Tensor, length: Tensor | None = None) -> Tensor:
    """[B, C, *size] → [B]: over the positions that are no padding."""
    if length is None:
        return error.square().flatten(1).mean(1)
    return mean_within(torch.where(within(error, length), error, 0).square(), length)


def mean_within(values: Tensor, length: Tensor | None) -> Tensor:
    """The mean over each sample's positions that are no padding: [B, C, *size] → [B]."""
    if length is None:
        return values.flatten(1).mean(1)
    inside = within(values, length)
    return torch.where(inside, values, 0).flatten(1).sum(1) * (values.shape[2] / length) / values[0].numel()
