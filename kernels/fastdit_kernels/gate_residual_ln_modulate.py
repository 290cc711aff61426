"""A block's gated residual and the next adaLN in one pass: r = x + gate·y, m = LN(r)·(1 + scale) + shift.

Forward reads x and y and writes r and m: 8 bytes per element in bf16. Backward reads dm, dr, r and y and writes dx and dy: 12.
Programs, statistics and partials are those of `ln_modulate.py`, whose gradient of the normalised rows gains what arrives at r
itself: with r̂ = (r - mean)·rstd and g = dm·(1 + scale), for each row of D elements

    dx = rstd·(g - mean(g) - r̂·mean(g·r̂)) + dr        dy = gate·dx        dgate = Σ_t dx·y

r is rounded to its storage type before it is normalised, so forward and backward see the same numbers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit_kernels.checks import STREAM_DTYPES, require, require_stream
from fastdit_kernels.launch import Launch, block_and_warps, run
from fastdit_kernels.ln_modulate import backward_split, forward_split
from fastdit_kernels.partials import sum_partials
from fastdit_kernels.reference import EPS

__all__ = ["gate_residual_ln_modulate"]


@triton.jit
def gate_residual_ln_modulate_forward_kernel(
    p_x,  # [B, T, D]
    p_y,  # [B, T, D]
    p_gate,  # [B, D], rows stride_gate apart
    p_shift,  # [B, D], rows stride_shift apart
    p_scale,  # [B, D], rows stride_scale apart
    p_bias,  # [D], or None
    p_r,  # [B, T, D]
    p_m,  # [B, T, D]
    p_mean,  # [B, T] fp32
    p_rstd,  # [B, T] fp32
    T,
    rows,  # of a program
    stride_gate,
    stride_shift,
    stride_scale,
    D: tl.constexpr,
    BLOCK: tl.constexpr,  # the power of two that covers D
    EPS: tl.constexpr,  # constexpr: a compiler may pass Python floats as fp64
):
    i_b, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    b_gate = tl.load(p_gate + i_b * stride_gate + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_shift = tl.load(p_shift + i_b * stride_shift + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_scale = 1.0 + tl.load(p_scale + i_b * stride_scale + o_d, mask=m_d, other=0.0).to(tl.float32)
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    for t in range(i_s * rows, min(i_s * rows + rows, T)):
        row = i_b * T + t
        b_x = tl.load(p_x + row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_y = tl.load(p_y + row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        if p_bias is not None:
            b_y += b_bias
        b_stored = (b_x + b_gate * b_y).to(p_r.dtype.element_ty)
        tl.store(p_r + row * D + o_d, b_stored, mask=m_d)
        b_r = b_stored.to(tl.float32)
        mean = tl.sum(b_r, 0) / D
        b_centred = tl.where(m_d, b_r - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(b_centred * b_centred, 0) / D + EPS)
        tl.store(p_mean + row, mean)
        tl.store(p_rstd + row, rstd)
        b_m = b_centred * rstd * b_scale + b_shift
        tl.store(p_m + row * D + o_d, b_m.to(p_m.dtype.element_ty), mask=m_d)


@triton.jit
def gate_residual_ln_modulate_backward_kernel(
    p_dr,  # [B, T, D], or None where nothing after this op reads r: the last one of a model
    p_dm,  # [B, T, D]
    p_r,  # [B, T, D]
    p_y,  # [B, T, D]
    p_gate,  # [B, D], rows stride_gate apart
    p_scale,  # [B, D], rows stride_scale apart
    p_bias,  # [D], or None
    p_mean,  # [B, T] fp32
    p_rstd,  # [B, T] fp32
    p_dx,  # [B, T, D]
    p_dy,  # [B, T, D]
    p_partials,  # [B, S, 3, D] fp32, or 4 with a bias: dgate, dshift, dscale and Σ_t dy of each program's rows
    T,
    rows,  # of a program
    stride_gate,
    stride_scale,
    D: tl.constexpr,
    BLOCK: tl.constexpr,  # the power of two that covers D
):
    i_b, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    b_gate = tl.load(p_gate + i_b * stride_gate + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_scale = 1.0 + tl.load(p_scale + i_b * stride_scale + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_dgate = tl.zeros([BLOCK], tl.float32)
    b_dshift = tl.zeros([BLOCK], tl.float32)
    b_dscale = tl.zeros([BLOCK], tl.float32)
    if p_bias is not None:
        b_dx_sum = tl.zeros([BLOCK], tl.float32)
    for t in range(i_s * rows, min(i_s * rows + rows, T)):
        row = i_b * T + t
        # Every load is issued before the first sum waits for one.
        b_dm = tl.load(p_dm + row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_r = tl.load(p_r + row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_y = tl.load(p_y + row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        rstd = tl.load(p_rstd + row)
        # Masked lanes of r̂ are not zero, but those of dm and y are, and r̂ enters every sum through them.
        b_rhat = b_r * rstd - tl.load(p_mean + row) * rstd  # one FMA; its rounding is that of the stored mean
        b_g = b_dm * b_scale
        if p_dr is None:
            b_dr = tl.zeros([BLOCK], tl.float32)
        else:
            b_dr = tl.load(p_dr + row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_dx = rstd * (b_g - tl.sum(b_g, 0) / D - b_rhat * (tl.sum(b_g * b_rhat, 0) / D)) + b_dr
        b_dgate += b_dx * b_y
        b_dshift += b_dm
        b_dscale += b_dm * b_rhat
        if p_bias is not None:
            b_dx_sum += b_dx
        tl.store(p_dx + row * D + o_d, b_dx.to(p_dx.dtype.element_ty), mask=m_d)
        tl.store(p_dy + row * D + o_d, (b_gate * b_dx).to(p_dy.dtype.element_ty), mask=m_d)
    SUMS: tl.constexpr = 3 if p_bias is None else 4
    p_partial = p_partials + (i_b * tl.num_programs(1) + i_s) * (SUMS * D) + o_d
    if p_bias is not None:  # the bias of y and the gate are the same for every row: both wait for the end
        b_dgate += b_dx_sum * tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
        tl.store(p_partial + 3 * D, b_gate * b_dx_sum, mask=m_d)
    tl.store(p_partial, b_dgate, mask=m_d)
    tl.store(p_partial + D, b_dshift, mask=m_d)
    tl.store(p_partial + 2 * D, b_dscale, mask=m_d)


def forward_outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(r, m, mean, rstd), not yet computed: r and m like x, the statistics of each row [B, T] in fp32."""
    B, T, _ = x.shape
    mean, rstd = (x.new_empty(B, T, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), torch.empty_like(x), mean, rstd


def forward(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, launch: Launch, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(r, m, mean, rstd), as `forward_outputs` has them."""
    B, T, D = x.shape
    r, m, mean, rstd = forward_outputs(x)
    if x.numel():
        splits, rows = forward_split(B, T, D)
        block, num_warps = block_and_warps(D)
        launch(
            gate_residual_ln_modulate_forward_kernel, (B, splits), num_warps, p_x=x, p_y=y, p_gate=gate, p_shift=shift,
            p_scale=scale, p_bias=bias, p_r=r, p_m=m, p_mean=mean, p_rstd=rstd, T=T, rows=rows, stride_gate=gate.stride(0),
            stride_shift=shift.stride(0), stride_scale=scale.stride(0), D=D, BLOCK=block, EPS=EPS,
        )  # fmt: skip
    return r, m, mean, rstd


def backward_outputs(r: Tensor, gate: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dy, sums, dbias), not yet computed: dx and dy like r; sums [B, 3, D] in gate's dtype are dgate, dshift and dscale.

    dbias [B, D] in fp32 is each sample's part of the bias's gradient, rounded only when it is whole; empty without a bias.
    """
    B, _, D = r.shape
    dbias = gate.new_empty(0 if bias is None else B, D, dtype=torch.float32)
    return torch.empty_like(r), torch.empty_like(r), gate.new_empty(B, 3, D), dbias


def backward(
    dr: Tensor | None,
    dm: Tensor,
    r: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    launch: Launch,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dy, sums, dbias), as `backward_outputs` has them. A dr of None is zero."""
    B, T, D = r.shape
    dx, dy, sums, dbias = backward_outputs(r, gate, bias)
    if not r.numel():
        return dx, dy, sums.zero_(), dbias.zero_()
    splits, rows = backward_split(B, T, D)
    block, num_warps = block_and_warps(D)
    partials = r.new_empty(B, splits, (3 if bias is None else 4) * D, dtype=torch.float32)
    # Eighty registers let 24 warps share an SM. ptxas would take a hundred at eight warps; only fp32 streams need them.
    # A fourth sum takes eight more, and leaves room for 20.
    max_registers = (80 if bias is None else 96) if r.itemsize == 2 and block <= 2048 else None
    launch(
        gate_residual_ln_modulate_backward_kernel, (B, splits), num_warps, max_registers, p_dr=dr, p_dm=dm, p_r=r, p_y=y,
        p_gate=gate, p_scale=scale, p_bias=bias, p_mean=mean, p_rstd=rstd, p_dx=dx, p_dy=dy, p_partials=partials, T=T,
        rows=rows, stride_gate=gate.stride(0), stride_scale=scale.stride(0), D=D, BLOCK=block,
    )  # fmt: skip
    sum_partials(partials, sums, launch, None if bias is None else dbias)
    return dx, dy, sums, dbias


def traffic(B: int, T: int, D: int, stream: int, modulation: int, bias: bool = False) -> dict[str, int]:
    """Bytes each direction moves through device memory, every address once; `stream` and `modulation` are bytes per element.

    The floor of 4 and 6 streams; the statistics; the modulation and its gradient; and the fp32 partials, written and read.
    A bias, of the modulation's dtype, adds itself to both, and to the backward a fourth partial and its fp32 sum.
    """
    splits, _ = backward_split(B, T, D)
    statistics = 8 * B * T
    extra = D * modulation if bias else 0
    sums = 4 if bias else 3
    written = B * D * (5 * modulation + (4 if bias else 0))  # and the modulation read
    return {
        "forward": 4 * B * T * D * stream + statistics + 3 * B * D * modulation + extra,
        "backward": 6 * B * T * D * stream + statistics + written + extra + 2 * B * splits * sums * D * 4,
    }


# custom_op: see ln_modulate.py.
@torch.library.custom_op("fastdit::gate_residual_ln_modulate", mutates_args=())
def _op(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return forward(x, y, gate, shift, scale, run, bias)


@_op.register_fake
def _(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return forward_outputs(x)


@torch.library.custom_op("fastdit::gate_residual_ln_modulate_backward", mutates_args=())
def _backward_op(
    dr: Tensor | None, dm: Tensor, r: Tensor, y: Tensor, gate: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return backward(dr, dm, r, y, gate, scale, mean, rstd, run, bias)


@_backward_op.register_fake
def _(
    dr: Tensor | None, dm: Tensor, r: Tensor, y: Tensor, gate: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return backward_outputs(r, gate, bias)


def _save(ctx, inputs, output) -> None:
    (_, y, gate, _, scale, bias), (r, _, mean, rstd) = inputs, output
    ctx.save_for_backward(r, y, gate, scale, bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dr: Tensor | None, dm: Tensor | None, _mean: None, _rstd: None) -> tuple[Tensor | None, ...]:
    r, y, gate, scale, bias, mean, rstd = ctx.saved_tensors  # read once: recomputed activations are handed out a single time
    dm = torch.zeros_like(r) if dm is None else dm.contiguous()  # autograd may hand over an expanded scalar
    dr = None if dr is None else dr.contiguous()
    dx, dy, sums, dbias = _backward_op(dr, dm, r, y, gate, scale, mean, rstd, bias)
    return dx, dy, *sums.unbind(1), None if bias is None else dbias.sum(0).to(bias.dtype)


_op.register_autograd(_differentiate, setup_context=_save)


def gate_residual_ln_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Finish a block's gated residual and open the next one: r = x + gate·(y + bias), m = LN(r)·(1 + scale) + shift, eps 1e-6.

    x and y [B, T, D], contiguous, of one dtype: bf16, fp16 or fp32, D up to 8192; gate, shift and scale [B, D] of one such
    dtype, each row contiguous, any batch stride; bias [D], contiguous, of any of these dtypes. It is that of the Linear which
    made y without it, and its gradient then needs no pass over dy. Returns (r, m), both [B, T, D] in x's dtype. Raises
    ValueError for anything else. Above D = 4096 the backward spills registers; it stays exact.
    """
    op = "gate_residual_ln_modulate"
    require_stream(op, "x", x, "[B, T, D]")
    B, _, D = x.shape
    require(op, "y", y, "[B, T, D]", x.shape, (x.dtype,), x.device)
    require(op, "gate", gate, "[B, D]", (B, D), STREAM_DTYPES, x.device, "unit last stride")
    for name, vector in (("shift", shift), ("scale", scale)):
        require(op, name, vector, "[B, D]", (B, D), (gate.dtype,), x.device, "unit last stride")
    if bias is not None:
        require(op, "bias", bias, "[D]", (D,), STREAM_DTYPES, x.device)
    r, m, _, _ = _op(x, y, gate, shift, scale, bias)
    return r, m
