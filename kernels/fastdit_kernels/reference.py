"""Every op in plain PyTorch: the specification the kernels are tested against, and what a machine without a GPU trains on.

Arithmetic is fp32 (fp64 for fp64 inputs) and each result is cast once, at the end, to the dtype of the stream it belongs to.
B samples, T tokens, D width, F hidden width of the MLP.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdit_kernels import Ops
from fastdit_kernels.attention import attention

EPS = 1e-6  # of every LayerNorm in a DiT


def wide(x: Tensor) -> Tensor:
    """x in the dtype of arithmetic: fp32, or fp64 for fp64."""
    return x if x.dtype == torch.float64 else x.float()


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(x)·(1 + scale) + shift, with x already wide."""
    normed = F.layer_norm(x, x.shape[-1:], eps=EPS)
    return torch.addcmul(wide(shift).unsqueeze(1), normed, wide(scale).unsqueeze(1) + 1)


def ln_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: LN(x)·(1 + scale) + shift, LN without affine parameters, eps 1e-6 (DiT, arXiv 2212.09748, §3.2).

    x [B, T, D]; shift and scale [B, D], any strides. Returns [B, T, D] in x's dtype.
    """
    return _modulate(wide(x), shift, scale).to(x.dtype)


def gate_residual_ln_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Finish a block's gated residual and open the next one: r = x + gate·(y + bias), m = LN(r)·(1 + scale) + shift.

    x and y [B, T, D] of one dtype; gate, shift and scale [B, D], any strides; bias [D], where the Linear that made y left it
    to this op. Returns (r, m), both [B, T, D] in x's dtype. r is rounded to x's dtype before it is normalised, so that forward
    and backward see the residual that was stored.
    """
    update = wide(y) if bias is None else wide(y) + wide(bias)
    r = torch.addcmul(wide(x), update, wide(gate).unsqueeze(1)).to(x.dtype)
    return r, _modulate(wide(r), shift, scale).to(x.dtype)


def gelu_dwconv(h: Tensor, bias: Tensor, weight: Tensor, conv_bias: Tensor, *grid: int) -> Tensor:
    """Depthwise convolution of GELU_tanh(h + bias) on the token grid (LocalViT, arXiv 2104.05707, is its case of images).

    h [B, T, F]; bias and conv_bias [F]; weight as torch.nn keeps it. The grid, whose product is T, says what is convolved:

        (length)                 a sequence, by weight [F, 1, K], K in {3, 4, 5, 7}
        (height, width)          an image, by weight [F, 1, K, K], K in {3, 4, 5}
        (frames, height, width)  a video frame by frame, as an image: to mix over time is attention's part

    Zero padding of the activation keeps the grid: (K-1)//2 before and K//2 after, so K = 4 pads 1 and 2, as PyTorch's
    padding="same" does. Returns [B, T, F] in h's dtype. Tokens are channels-last already, so the convolution sees a view.
    """
    F_, K = h.shape[-1], weight.shape[-1]
    rows, columns = (1, *grid)[-2:]  # a sequence is an image of one row, and a frame an image
    a = F.gelu(wide(h) + wide(bias), approximate="tanh")
    a = a.view(-1, rows, columns, F_).permute(0, 3, 1, 2)  # [B, F, H, W], channels_last strides: a view
    w = wide(weight).view(F_, 1, -1, K)
    if K % 2 == 0:
        # A zero row and column before the kernel make its padding symmetric, at no copy of the activation.
        w = F.pad(w, (1, 0) if len(grid) == 1 else (1, 0, 1, 0))
    z = F.conv2d(a, w, wide(conv_bias), padding=(w.shape[2] // 2, w.shape[3] // 2), groups=F_)
    return z.permute(0, 2, 3, 1).reshape(h.shape).to(h.dtype)


def log(beta: float) -> float:
    """ln β of a decay, whose powers are 0 where it is."""
    return math.log(max(beta, 1e-30))


def adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor],
    decays: Tensor,
    steps: Tensor,
    grad_scale: Tensor,
    found_inf: Tensor,
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight: float | Tensor,
    table: Tensor | None = None,
    copies: Sequence[Tensor] = (),
) -> None:
    """One step of AdamW (arXiv 1711.05101, algorithm 2), and of an exponential average of what it makes, on N tensors in place.

    params, grads, exp_avgs, exp_avg_sqs and averages: N tensors each, of one shape down the lists; copies: as many, which
    become the new parameters, rounded, or none. decays [N]: each one's weight decay; steps [N]: its steps, this one counted.
    grad_scale []: gradients are divided by it, and stay as they are. found_inf []: where it is not 0, nothing changes. weight:
    how far the averages move towards the new parameters. table: the kernel's, not read here.
    """
    if found_inf:  # waits for the device; the kernel does not
        return
    tensors = zip(params, grads, exp_avgs, exp_avg_sqs, averages, decays, steps, strict=True)
    for p, grad, exp_avg, exp_avg_sq, average, decay, step in tensors:
        g = grad.to(p.dtype) / grad_scale
        exp_avg.lerp_(g, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        correction1, correction2 = (-torch.expm1(step * log(beta)) for beta in (beta1, beta2))  # 1 - βᵏ
        p.sub_(lr * (decay * p + exp_avg / correction1 / ((exp_avg_sq / correction2).sqrt() + eps)))
        average.lerp_(p, weight)
    if copies:
        torch._foreach_copy_(list(copies), list(params))


REFERENCE = Ops(ln_modulate, gate_residual_ln_modulate, gelu_dwconv, attention)
