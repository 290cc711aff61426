"""adaLN, m = LN(x)·(1 + scale) + shift: x is read once and m written once, 4 bytes per element in bf16; backward 6.

A program owns consecutive rows of one sample, a row at a time in registers, so the sample's shift and scale are loaded once and
the sums over its tokens stay in registers. With x̂ = (x - mean)·rstd and g = dm·(1 + scale), for each row of D elements

    dx = rstd·(g - mean(g) - x̂·mean(g·x̂))        dshift = Σ_t dm        dscale = Σ_t dm·x̂

Backward stores no x̂: it recomputes it from x and the fp32 statistics, 8 bytes per row. The sums leave as one fp32 partial per
program, which the last program of a sample adds in their order (`partials.py`). Both kernels are bound by memory: the variance
is taken in a second pass over registers (E[x²] - mean² would cancel), and costs no second read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit_kernels.checks import STREAM_DTYPES, require, require_stream
from fastdit_kernels.launch import Launch, block_and_warps, run
from fastdit_kernels.partials import UNROLL, add_rows, by_the_last_program, is_last, split_rows, sum_partials
from fastdit_kernels.reference import EPS

__all__ = ["ln_modulate"]


def forward_split(B: int, T: int, D: int) -> tuple[int, int]:
    """(programs a sample, rows each). 8192 warps fill an A100 or H100; each program reads its modulation again, out of L2."""
    return split_rows(B, T, 8192 // block_and_warps(D)[1], 4)


def backward_split(B: int, T: int, D: int) -> tuple[int, int]:
    """(programs a sample, rows each). 2048 warps, some 16 on each SM: each program writes a partial, and has more to load."""
    return split_rows(B, T, 2048 // block_and_warps(D)[1], 16)


@triton.jit
def ln_modulate_forward_kernel(
    p_x,  # [B, T, D]
    p_shift,  # [B, D], rows stride_shift apart
    p_scale,  # [B, D], rows stride_scale apart
    p_m,  # [B, T, D]
    p_mean,  # [B, T] fp32
    p_rstd,  # [B, T] fp32
    p_counters,  # [B] int32, made 0 for the backward
    T,
    rows,  # of a program
    stride_shift,
    stride_scale,
    D: tl.constexpr,
    BLOCK: tl.constexpr,  # the power of two that covers D
    EPS: tl.constexpr,  # constexpr: a compiler may pass Python floats as fp64
):
    i_b, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tl.store(p_counters + i_b, 0, mask=i_s == 0)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    b_shift = tl.load(p_shift + i_b * stride_shift + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_scale = 1.0 + tl.load(p_scale + i_b * stride_scale + o_d, mask=m_d, other=0.0).to(tl.float32)
    for t in range(i_s * rows, min(i_s * rows + rows, T)):
        row = i_b * T + t
        b_x = tl.load(p_x + row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        mean = tl.sum(b_x, 0) / D
        b_centred = tl.where(m_d, b_x - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(b_centred * b_centred, 0) / D + EPS)
        tl.store(p_mean + row, mean)
        tl.store(p_rstd + row, rstd)
        b_m = b_centred * rstd * b_scale + b_shift
        tl.store(p_m + row * D + o_d, b_m.to(p_m.dtype.element_ty), mask=m_d)


@triton.jit
def ln_modulate_backward_kernel(
    p_dm,  # [B, T, D]
    p_x,  # [B, T, D]
    p_scale,  # [B, D], rows stride_scale apart
    p_mean,  # [B, T] fp32
    p_rstd,  # [B, T] fp32
    p_dx,  # [B, T, D]
    p_partials,  # [B, S, 2, D] fp32: dshift and dscale of each program's rows
    p_counters,  # [B] int32, or None where another kernel adds the partials
    p_dmod,  # [B, 2, D]
    T,
    rows,  # of a program
    stride_scale,
    D: tl.constexpr,
    BLOCK: tl.constexpr,  # the power of two that covers D
    UNROLL: tl.constexpr,
):
    i_b, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    b_scale = 1.0 + tl.load(p_scale + i_b * stride_scale + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_dshift = tl.zeros([BLOCK], tl.float32)
    b_dscale = tl.zeros([BLOCK], tl.float32)
    for t in range(i_s * rows, min(i_s * rows + rows, T)):
        row = i_b * T + t
        b_dm = tl.load(p_dm + row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_x = tl.load(p_x + row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        rstd = tl.load(p_rstd + row)
        # Masked lanes of x̂ are not zero, but those of dm are, and x̂ enters every sum through dm.
        b_xhat = b_x * rstd - tl.load(p_mean + row) * rstd  # one FMA; its rounding is that of the stored mean
        b_g = b_dm * b_scale
        b_dx = rstd * (b_g - tl.sum(b_g, 0) / D - b_xhat * (tl.sum(b_g * b_xhat, 0) / D))
        b_dshift += b_dm
        b_dscale += b_dm * b_xhat
        tl.store(p_dx + row * D + o_d, b_dx.to(p_dx.dtype.element_ty), mask=m_d)
    p_partial = p_partials + (i_b * tl.num_programs(1) + i_s) * (2 * D) + o_d
    tl.store(p_partial, b_dshift, mask=m_d)
    tl.store(p_partial + D, b_dscale, mask=m_d)
    if p_counters is not None:
        S = tl.num_programs(1)
        if is_last(p_counters + i_b, S):
            for k in tl.static_range(2):
                b_sum = add_rows(p_partials + i_b * S * (2 * D) + k * D, S, 2 * D, o_d, m_d, UNROLL)
                tl.store(p_dmod + i_b * (2 * D) + k * D + o_d, b_sum.to(p_dmod.dtype.element_ty), mask=m_d)


def forward_outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(m, mean, rstd, counters), not yet computed: m like x, the statistics of each row [B, T] in fp32; int32 counters [B], for
    the backward.
    """
    B, T, _ = x.shape
    mean, rstd = (x.new_empty(B, T, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), mean, rstd, x.new_empty(B, dtype=torch.int32)


def forward(x: Tensor, shift: Tensor, scale: Tensor, launch: Launch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(m, mean, rstd, counters), as `forward_outputs` has them."""
    B, T, D = x.shape
    m, mean, rstd, counters = forward_outputs(x)
    if x.numel():
        splits, rows = forward_split(B, T, D)
        block, num_warps = block_and_warps(D)
        launch(
            ln_modulate_forward_kernel, (B, splits), num_warps, p_x=x, p_shift=shift, p_scale=scale, p_m=m, p_mean=mean,
            p_rstd=rstd, p_counters=counters, T=T, rows=rows, stride_shift=shift.stride(0), stride_scale=scale.stride(0), D=D,
            BLOCK=block, EPS=EPS,
        )  # fmt: skip
    return m, mean, rstd, counters


def backward_outputs(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, dmod), not yet computed: dx like x; dmod [B, 2, D] in scale's dtype holds dshift and dscale."""
    B, _, D = x.shape
    return torch.empty_like(x), scale.new_empty(B, 2, D)


def backward(
    dm: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, counters: Tensor, launch: Launch
) -> tuple[Tensor, Tensor]:
    """(dx, dmod), as `backward_outputs` has them. counters are 0, and 0 again afterwards."""
    B, T, D = x.shape
    dx, dmod = backward_outputs(x, scale)
    if not x.numel():
        return dx, dmod.zero_()
    splits, rows = backward_split(B, T, D)
    block, num_warps = block_and_warps(D)
    partials = x.new_empty(B, splits, 2 * D, dtype=torch.float32)
    here = by_the_last_program(splits, 2 * D)
    launch(
        ln_modulate_backward_kernel, (B, splits), num_warps, p_dm=dm, p_x=x, p_scale=scale, p_mean=mean, p_rstd=rstd, p_dx=dx,
        p_partials=partials, p_counters=counters if here else None, p_dmod=dmod, T=T, rows=rows, stride_scale=scale.stride(0),
        D=D, BLOCK=block, UNROLL=UNROLL,
    )  # fmt: skip
    if not here:
        sum_partials(partials, dmod, launch)
    return dx, dmod


def traffic(B: int, T: int, D: int, stream: int, modulation: int) -> dict[str, int]:
    """Bytes each direction moves through device memory, every address once; `stream` and `modulation` are bytes per element.

    The floor of 2 and 3 streams; the statistics; the modulation and its gradient; and the fp32 partials, written and read.
    Counters: written forward, and once more backward.
    """
    splits, _ = backward_split(B, T, D)
    statistics = 8 * B * T
    counted = 4 * B * by_the_last_program(splits, 2 * D)
    return {
        "forward": 2 * B * T * D * stream + statistics + 2 * B * D * modulation + 4 * B,
        "backward": 3 * B * T * D * stream + statistics + 3 * B * D * modulation + 2 * B * splits * 2 * D * 4 + counted,
    }


# A custom_op, not a triton_op. A compiler has nothing to fuse with these kernels, whose neighbours are matrix multiplications.
# An opaque op takes strided views as they are, keeps Triton's own launcher and its fp32 scalars, and compiles on a CPU too,
# where its body runs in the interpreter. It costs about 10 µs of dispatch a call in eager mode.
@torch.library.custom_op("fastdit::ln_modulate", mutates_args=())
def _op(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return forward(x, shift, scale, run)


@_op.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return forward_outputs(x)


# The counters are left as they were found, and so are no argument that is changed: nothing has to be copied for them.
@torch.library.custom_op("fastdit::ln_modulate_backward", mutates_args=())
def _backward_op(dm: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, counters: Tensor) -> tuple[Tensor, Tensor]:
    return backward(dm, x, scale, mean, rstd, counters, run)


@_backward_op.register_fake
def _(dm: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, counters: Tensor) -> tuple[Tensor, Tensor]:
    return backward_outputs(x, scale)


def _save(ctx, inputs, output) -> None:
    (x, _, scale), (_, mean, rstd, counters) = inputs, output
    ctx.save_for_backward(x, scale, mean, rstd, counters)
    ctx.mark_non_differentiable(mean, rstd, counters)


def _differentiate(ctx, dm: Tensor, *_: None) -> tuple[Tensor, Tensor, Tensor]:
    dx, dmod = _backward_op(dm.contiguous(), *ctx.saved_tensors)  # autograd may hand over an expanded scalar
    return dx, *dmod.unbind(1)


_op.register_autograd(_differentiate, setup_context=_save)


def ln_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: LN(x)·(1 + scale) + shift, LN without affine parameters, eps 1e-6 (DiT, arXiv 2212.09748, §3.2).

    x [B, T, D], contiguous, bf16, fp16 or fp32, D up to 8192; shift and scale [B, D] of one such dtype, each row contiguous,
    any batch stride. Returns [B, T, D] in x's dtype. Raises ValueError for anything else.
    """
    require_stream("ln_modulate", "x", x, "[B, T, D]")
    B, _, D = x.shape
    require("ln_modulate", "shift", shift, "[B, D]", (B, D), STREAM_DTYPES, x.device, "unit last stride")
    require("ln_modulate", "scale", scale, "[B, D]", (B, D), (shift.dtype,), x.device, "unit last stride")
    return _op(x, shift, scale)[0]
