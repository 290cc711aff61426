"""The ops for a CPU: what `reference.py` computes, with backward passes written out and temporaries that stay in the cache.

A pass over a temporary that has left the cache costs several times its arithmetic, and autograd keeps each one it might read.
So elementwise work goes chunk by chunk, in fp32, and a backward does it in one go from the few tensors kept for it. The
convolutions run in the stream's own dtype where this machine has instructions for it: 16-bit ones take under half the time.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastdit_kernels import Ops
from fastdit_kernels.attention import attention
from fastdit_kernels.reference import EPS, wide

CHUNK = 2**18  # elements: in fp32 1 MB, of which a few fit a core's second-level cache


def _onednn_has(dtype: str) -> bool:
    probe = getattr(torch.ops.mkldnn, f"_is_mkldnn_{dtype}_supported", None)
    return probe is not None and probe()  # there is none where PyTorch is built without oneDNN


# Where oneDNN lacks them, PyTorch's 16-bit convolution and matrix product are loops over scalars.
FAST = {torch.bfloat16: _onednn_has("bf16"), torch.float16: _onednn_has("fp16")}

# GELU_tanh(u) = u·σ(LINEAR·u + CUBIC·u³): PyTorch's sigmoid takes an eighth of the time of its tanh, and loses nothing where u
# is far below 0.
LINEAR = 2 * math.sqrt(2 / math.pi)
CUBIC = LINEAR * 0.044715


def _chunks(tensor: Tensor, size: int = 1) -> Iterator[slice]:
    """Slices of the tensor's rows, all of one length but the last, of size·CHUNK elements at most, or one row."""
    if torch.compiler.is_compiling():  # it keeps nothing between its operations, and one graph is to serve any batch
        return iter([slice(None)])
    parts = math.ceil(tensor.numel() / (size * CHUNK))
    step = max(1, math.ceil(len(tensor) / max(1, parts)))
    return (slice(first, first + step) for first in range(0, len(tensor), step))


# --- adaLN ---


class _LnModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, scale):
        m, mean, rstd = _norm(x, shift, scale)
        ctx.save_for_backward(x, shift, scale, mean, rstd)
        return m

    @staticmethod
    @once_differentiable
    def backward(ctx, dm):
        x, shift, scale, mean, rstd = ctx.saved_tensors
        dx, dshift, dscale = torch.empty_like(x), torch.empty_like(shift), torch.empty_like(scale)
        for i in _chunks(x, size=2):
            dx[i], dshift[i], dscale[i] = _norm_backward(wide(dm[i]), wide(x[i]), scale[i], mean[i], rstd[i])
        return dx, dshift, dscale


class _GateResidualLnModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, gate, shift, scale, bias):
        if bias is None and gate.dtype == x.dtype:
            r = torch.addcmul(x, y, gate.unsqueeze(1))  # fp32 within, rounded once
        else:
            r, dtype = torch.empty_like(x), torch.promote_types(y.dtype, torch.float32)
            for i in _chunks(x, size=2):
                update = wide(y[i]) if bias is None else y[i].to(dtype, copy=True).add_(bias)
                r[i] = torch.addcmul(wide(x[i]), update, wide(gate[i]).unsqueeze(1))
        m, mean, rstd = _norm(r, shift, scale)
        ctx.save_for_backward(r, y, gate, shift, scale, bias, mean, rstd)
        return r, m

    @staticmethod
    @once_differentiable
    def backward(ctx, dr, dm):
        r, y, gate, shift, scale, bias, mean, rstd = ctx.saved_tensors
        dx, dy, dgate, dshift, dscale = (torch.empty_like(t) for t in (r, y, gate, shift, scale))
        dbias = None if bias is None else torch.zeros_like(bias, dtype=mean.dtype)
        for i in _chunks(r, size=2):
            total, dshift[i], dscale[i] = _norm_backward(wide(dm[i]), wide(r[i]), scale[i], mean[i], rstd[i])
            dx[i] = total.add_(dr[i])
            of_gate = (total * y[i]).sum(1)
            if dbias is not None:  # of y + bias, whose second term is the same for every row
                rows = total.sum(1)
                of_gate.addcmul_(rows, wide(bias))
                dbias += (rows * gate[i]).sum(0)
            dgate[i] = of_gate
            dy[i] = total.mul_(gate[i].unsqueeze(1))
        return dx, dy, dgate, dshift, dscale, None if dbias is None else dbias.to(bias.dtype)


def _norm(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """m = LN(x)·(1 + scale) + shift in x's dtype, and the mean and 1/deviation [B, T, 1] of each row, wide."""
    m, dtype = torch.empty_like(x), torch.promote_types(x.dtype, torch.float32)
    mean, rstd = (x.new_empty(*x.shape[:2], 1, dtype=dtype) for _ in range(2))
    for i in _chunks(x, size=2):
        normed, mean[i], rstd[i] = torch.native_layer_norm(wide(x[i]), x.shape[-1:], None, None, EPS)
        m[i] = torch.addcmul(wide(shift[i]).unsqueeze(1), normed, wide(scale[i]).unsqueeze(1) + 1)
    return m, mean, rstd


def _norm_backward(dm: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dshift and dscale of m = LN(x)·(1 + scale) + shift, wide."""
    dscale = (x - mean).mul_(rstd).mul_(dm).sum(1)
    dnormed = dm * (wide(scale).unsqueeze(1) + 1)
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(
        dnormed, x, x.shape[-1:], mean, rstd, None, None, [True, False, False]
    )  # fmt: skip
    return dx, dm.sum(1), dscale


def ln_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """As `reference.ln_modulate`."""
    return _LnModulate.apply(x, shift, scale)


def gate_residual_ln_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.gate_residual_ln_modulate`."""
    return _GateResidualLnModulate.apply(x, y, gate, shift, scale, bias)


# --- GELU and depthwise convolution ---


class _GeluDwconv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, bias, weight, conv_bias, grid):
        a, slope = _gelu(h, bias, slope=any(ctx.needs_input_grad[:2]))
        ctx.save_for_backward(a, slope, bias, weight, conv_bias)
        ctx.grid = grid
        return _convolve(_images(a, grid), _plane(weight), conv_bias, h.dtype).reshape(h.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dz):
        a, slope, bias, weight, conv_bias = ctx.saved_tensors
        dz_images, plane = _images(dz.to(a.dtype), ctx.grid), _plane(weight)
        dweight = _weight_gradient(_images(a, ctx.grid), dz_images, *plane.shape[2:]).view(weight.shape).to(weight.dtype)
        dconv_bias = dz.sum((0, 1)).to(conv_bias.dtype)
        if slope is None:
            return None, None, dweight, dconv_bias, None
        # The convolution by the flipped weight, whose zero padding lies on the other side where K is even.
        dh = _convolve(dz_images, plane.flip(2, 3), None, dz.dtype, flipped=True).reshape(dz.shape)
        dbias = torch.zeros_like(bias, dtype=slope.dtype)
        flat = dh.flatten(0, 1)
        for i in _chunks(flat):
            du = slope[i] * flat[i]
            dbias += du.sum(0)
            flat[i] = du
        return dh, dbias.to(bias.dtype), dweight, dconv_bias, None


def _gelu(h: Tensor, bias: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
    """GELU_tanh(h + bias), of h's shape, in the dtype to convolve in; on request its derivative, wide, [B·T, F]."""
    tokens, dtype = h.flatten(0, 1), torch.promote_types(h.dtype, torch.float32)
    a = torch.empty_like(tokens, dtype=h.dtype if FAST.get(h.dtype, True) else torch.float32)
    slopes = torch.empty_like(tokens, dtype=dtype) if slope else None
    for i in _chunks(tokens):
        u = tokens[i].to(dtype, copy=True).add_(bias)
        square = u * u
        sigmoid = (square * CUBIC).add_(LINEAR).mul_(u).sigmoid_()
        value = u * sigmoid
        a[i] = value
        if slopes is not None:
            # d(u·σ(z))/du = σ + u·σ·(1 - σ)·dz/du, where z is what σ is of.
            value.addcmul_(value, sigmoid, value=-1)
            torch.addcmul(sigmoid, value, square.mul_(3 * CUBIC).add_(LINEAR), out=slopes[i])
    return a.view(h.shape), slopes


def _images(tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
    """[B, T, F] as [B, F, H, W] with channels_last strides, a sequence as an image of one row, each frame as one: a view."""
    return tokens.reshape(-1, *(1, *grid)[-2:], tokens.shape[-1]).permute(0, 3, 1, 2)


def _plane(weight: Tensor) -> Tensor:
    """[F, 1, K, K] as it is, [F, 1, K] as [F, 1, 1, K]."""
    return weight.unsqueeze(2) if weight.ndim == 3 else weight


def _convolve(images: Tensor, plane: Tensor, bias: Tensor | None, dtype: torch.dtype, flipped: bool = False) -> Tensor:
    """The depthwise convolution that keeps the grid: [B, F, H, W] → [B, H, W, F] of dtype."""
    if plane.shape[3] % 2 == 0:
        # A zero row and column on its shorter side make the kernel's padding symmetric, at no copy of the activation.
        shorter = (0, 1) if flipped else (1, 0)
        plane = F.pad(plane, shorter if plane.shape[2] == 1 else shorter * 2)
    bias = None if bias is None else bias.to(images.dtype)
    padding = [side // 2 for side in plane.shape[2:]]
    return F.conv2d(images, plane.to(images.dtype), bias, padding=padding, groups=len(plane)).permute(0, 2, 3, 1).to(dtype)


def _weight_gradient(a: Tensor, dz: Tensor, rows: int, columns: int) -> Tensor:
    """Of the convolution of a by dz, both [B, F, H, W], by a kernel [F, 1, rows, columns] of their dtype.

    oneDNN has this gradient vectorised for three columns, and one or three rows, alone. Wider kernels take it for their 3×3
    corners, or threes of one row, which overlap: in bf16 an eighth of the time, a thirtieth for one row.
    """
    F_, (H, W) = a.shape[1], a.shape[2:]

    def part(a: Tensor, padding: list[int]) -> Tensor:
        shape = a.new_empty(F_, 1, min(rows, 3), 3)
        return torch.ops.aten.convolution_backward(
            dz, a, shape, None, [1, 1], padding, [1, 1], False, [0, 0], F_, [False, True, False]
        )[1]  # fmt: skip

    if columns == 3:
        return part(a, padding=[rows // 2, 1])
    padded = F.pad(a, [side for K in (columns, rows) for side in ((K - 1) // 2, K // 2)])
    dweight = a.new_empty(F_, 1, rows, columns)
    for i in _threes(rows):
        for j in _threes(columns):
            within = padded[:, :, i : i + H + min(rows, 3) - 1, j : j + W + 2].contiguous(memory_format=torch.channels_last)
            dweight[:, :, i : i + 3, j : j + 3] = part(within, padding=[0, 0])
    return dweight


def _threes(K: int) -> list[int]:
    """Where threes begin that cover K taps, or one."""
    return [0] if K == 1 else [*range(0, K - 3, 3), K - 3]


def gelu_dwconv(h: Tensor, bias: Tensor, weight: Tensor, conv_bias: Tensor, *grid: int) -> Tensor:
    """As `reference.gelu_dwconv`; in 16 bits the activation and its gradient are rounded to them on their way."""
    return _GeluDwconv.apply(h, bias, weight, conv_bias, grid)


CPU = Ops(ln_modulate, gate_residual_ln_modulate, gelu_dwconv, attention)
