"""Structured token drop (SPRINT, arXiv 2510.21986): in training, the blocks in the middle see one token of each 2×2 cell.

The first and last blocks see all tokens. Which token of a cell is kept changes from image to image and cell to cell; those kept
are a grid of half the rows and columns, so that the depthwise convolution runs on it. What comes out of the middle goes back
to its places, zeros to the others, and is fused with what went in. Sampling, and the last part of training, is on all tokens.

The paper puts a learnt token where we put zeros: a projection of it is a constant, which the kept tokens' own biases can make.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdit.config import Config


def ends(depth: int) -> int:
    """Blocks before, and after, those that see one token in four: 2 as in the paper, 1 of a network of few."""
    return min(2, max(1, depth // 6))


def drops(config: Config, images_seen: int) -> bool:
    """Whether the step on the batch that follows so many images drops tokens: all but those of the run's last part."""
    t = config.train
    return config.model.token_drop and images_seen < (1 - t.whole_share) * t.images


def picked(corners: Tensor, dtype: torch.dtype) -> Tensor:
    """corners [B, R, C], 0 … 3 of each cell → 1 where a cell's token is kept: [B, R·C, 4, 1]."""
    return F.one_hot(corners.flatten(1), 4).to(dtype)[..., None]


def thin(x: Tensor, corners: Tensor) -> Tensor:
    """The tokens kept of x [B, T, D]: [B, T/4, D]. A product with ones and zeros: its backward is deterministic."""
    B, R, C = corners.shape
    cells = x.view(B, R, 2, C, 2, -1).transpose(2, 3).reshape(B, R * C, 4, -1)
    return (cells * picked(corners, x.dtype)).sum(2)


def spread(kept: Tensor, corners: Tensor) -> Tensor:
    """The tokens back in their places, zeros in the others: [B, T/4, D] → [B, T, D]."""
    B, R, C = corners.shape
    cells = kept[:, :, None] * picked(corners, kept.dtype)  # [B, T/4, 4, D]
    return cells.view(B, R, C, 2, 2, -1).transpose(2, 3).reshape(B, 4 * R * C, -1)


class Fusion(nn.Module):
    """What the last blocks get: a projection of what went into the middle blocks, and of what came out of them."""

    def __init__(self, width: int):
        super().__init__()
        self.before, self.after = nn.Linear(width, width), nn.Linear(width, width, bias=False)

    def forward(self, before: Tensor, after: Tensor, corners: Tensor | None) -> Tensor:
        """before [B, T, D]; after [B, T/4, D] at these corners, or [B, T, D] without any. Returns [B, T, D], as `before` is."""
        dtype = self.after.weight.dtype
        after = self.after(after.to(dtype))
        return (self.before(before.to(dtype)) + (after if corners is None else spread(after, corners))).to(before.dtype)
