"""What the two depthwise convolutions share: the weight as their kernels read it, and how outputs and gradients lie."""

import torch
from torch import Tensor

__all__ = ["BLOCK", "MAX_PROGRAMS", "backward_outputs", "forward_outputs", "gradients", "repack"]

BLOCK = 64  # channels of a program: a 128-byte line of bf16
MAX_PROGRAMS = 256  # for each block of channels: as many partial sums are added at the end


def repack(weight: Tensor) -> Tensor:
    """A weight [F, 1, K, K] or [F, 1, K] as fp32 [taps, F], by one kernel. Without `copy`, fp32 would stay where it is."""
    return weight.flatten(1).t().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def forward_outputs(h: Tensor) -> tuple[Tensor, Tensor]:
    """(z, counters), not yet computed: z like h; int32 counters for the backward, one for each block of channels."""
    return torch.empty_like(h), h.new_empty(-(-h.shape[-1] // BLOCK), dtype=torch.int32)


def backward_outputs(h: Tensor, bias: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """(dh, sums), not yet computed: dh like h; sums [(taps + 2)·F], of bias's dtype, as `gradients` divides them."""
    return torch.empty_like(h), bias.new_empty((taps.shape[0] + 2) * taps.shape[1])


def gradients(sums: Tensor, F: int) -> tuple[Tensor, Tensor, Tensor]:
    """dweight [F, taps], dbias and dconv_bias [F]: views of `sums`."""
    dweight, biases = sums.split([len(sums) - 2 * F, 2 * F])
    return dweight.view(F, -1), *biases.view(2, F).unbind()
