"""A block's gated residual and the next adaLN in one pass: r = x + gate·y, m = LN(r)·(1 + scale) + shift.

Forward reads x and y and writes r and m: 8 bytes per element in bf16. Backward reads dm, dr, r and y and writes dx and dy: 12.
Programs, statistics and partials are those of `ln_modulate.py`, whose gradient of the normalised rows gains what arrives at r
itself: with r̂ = (r - mean)·rstd and g = dm·(1 + scale), for each row of D elements

    dx = rstd·(g - mean(g) - r̂·mean(g·r̂)) + dr        dy = gate·dx        dgate = Σ_t dx·y

r is rounded to its storage type before it is normalised, so forward and backward see the same numbers.
"""

import torch
from torch import Tensor

from fastdit_kernels.checks import STREAM_DTYPES, require, require_stream
from fastdit_kernels.gate_residual_ln_modulate_kernels import (
    gate_residual_ln_modulate_backward_kernel,
    gate_residual_ln_modulate_forward_kernel,
)
from fastdit_kernels.launch import Launch, block_and_warps, run
from fastdit_kernels.ln_modulate import backward_split, forward_split
from fastdit_kernels.partials import UNROLL, by_the_last_program, sum_partials
from fastdit_kernels.reference import EPS

__all__ = ["gate_residual_ln_modulate"]


Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def forward_outputs(x: Tensor) -> Forward:
    """(r, m, mean, rstd, counters), not yet computed: r and m like x, the statistics of each row [B, T] in fp32; counters
    [B + 1] in int32, which the backward needs: of each sample's programs, and of samples.
    """
    B, T, _ = x.shape
    mean, rstd = (x.new_empty(B, T, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), torch.empty_like(x), mean, rstd, x.new_empty(B + 1, dtype=torch.int32)


def forward(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, launch: Launch, bias: Tensor | None = None
) -> Forward:
    """What `forward_outputs` has, computed."""
    B, T, D = x.shape
    r, m, mean, rstd, counters = forward_outputs(x)
    if x.numel():
        splits, rows = forward_split(B, T, D)
        block, num_warps = block_and_warps(D)
        launch(
            gate_residual_ln_modulate_forward_kernel, (B, splits), num_warps, p_x=x, p_y=y, p_gate=gate, p_shift=shift,
            p_scale=scale, p_bias=bias, p_r=r, p_m=m, p_mean=mean, p_rstd=rstd, p_counters=counters, T=T, rows=rows,
            stride_gate=gate.stride(0), stride_shift=shift.stride(0), stride_scale=scale.stride(0), D=D, BLOCK=block, EPS=EPS,
        )  # fmt: skip
    return r, m, mean, rstd, counters


def backward_outputs(r: Tensor, gate: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dy, sums, dbias), not yet computed: dx and dy like r; sums [B, 3, D] in gate's dtype are dgate, dshift and dscale.

    dbias is like bias, and rounded only when it is whole; empty without one.
    """
    B, _, D = r.shape
    dbias = gate.new_empty(0) if bias is None else torch.empty_like(bias)
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
    counters: Tensor,
    launch: Launch,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dy, sums, dbias), as `backward_outputs` has them. A dr of None is zero. counters are 0, and 0 again afterwards."""
    B, T, D = r.shape
    dx, dy, sums, dbias = backward_outputs(r, gate, bias)
    if not r.numel():
        return dx, dy, sums.zero_(), dbias.zero_()
    splits, rows = backward_split(B, T, D)
    block, num_warps = block_and_warps(D)
    num_sums = 3 if bias is None else 4
    partials = r.new_empty(B, splits, num_sums * D, dtype=torch.float32)
    dbiases = None if bias is None else r.new_empty(1, B, D, dtype=torch.float32)
    here = by_the_last_program(splits, num_sums * D)
    bias_here = bias is not None and here and by_the_last_program(B, D)
    # Eighty registers let 24 warps share an SM. ptxas would take a hundred at eight warps; only fp32 streams need them.
    # A fourth sum takes eight more, and leaves room for 20.
    max_registers = (80 if bias is None else 96) if r.itemsize == 2 and block <= 2048 else None
    launch(
        gate_residual_ln_modulate_backward_kernel, (B, splits), num_warps, max_registers, p_dr=dr, p_dm=dm, p_r=r, p_y=y,
        p_gate=gate, p_scale=scale, p_bias=bias, p_mean=mean, p_rstd=rstd, p_dx=dx, p_dy=dy, p_partials=partials,
        p_counters=counters if here else None, p_sums=sums, p_dbiases=dbiases, p_dbias=dbias if bias_here else None, T=T,
        rows=rows, stride_gate=gate.stride(0), stride_scale=scale.stride(0), D=D, BLOCK=block, UNROLL=UNROLL,
    )  # fmt: skip
    if not here:
        sum_partials(partials, sums, launch, None if dbiases is None else dbiases[0])
    if dbiases is not None and not bias_here:
        sum_partials(dbiases, dbias[None], launch)
    return dx, dy, sums, dbias


def traffic(B: int, T: int, D: int, stream: int, modulation: int, bias: bool = False) -> dict[str, int]:
    """Bytes each direction moves through device memory, every address once; `stream` and `modulation` are bytes per element.

    The floor of 4 and 6 streams; the statistics; the modulation and its gradient; and the fp32 partials, written and read.
    A bias, of the modulation's dtype, adds itself to both, and to the backward a fourth partial, its fp32 sum for each sample,
    and their sum. Counters: written forward, and once more backward.
    """
    splits, _ = backward_split(B, T, D)
    statistics = 8 * B * T
    extra = D * modulation if bias else 0
    sums = 4 if bias else 3
    written = B * D * (5 * modulation + (8 if bias else 0))  # and the modulation read
    here = by_the_last_program(splits, sums * D)
    counted = 4 * (B + (bias and by_the_last_program(B, D))) * here
    return {
        "forward": 4 * B * T * D * stream + statistics + 3 * B * D * modulation + extra + 4 * (B + 1),
        "backward": 6 * B * T * D * stream + statistics + written + 2 * extra + 2 * B * splits * sums * D * 4 + counted,
    }


# custom_op: see ln_modulate.py.
@torch.library.custom_op("fastdit::gate_residual_ln_modulate", mutates_args=())
def _op(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None = None) -> Forward:
    return forward(x, y, gate, shift, scale, run, bias)


@_op.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None = None) -> Forward:
    return forward_outputs(x)


@torch.library.custom_op("fastdit::gate_residual_ln_modulate_backward", mutates_args=())
def _backward_op(
    dr: Tensor | None, dm: Tensor, r: Tensor, y: Tensor, gate: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor,
    counters: Tensor, bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return backward(dr, dm, r, y, gate, scale, mean, rstd, counters, run, bias)


@_backward_op.register_fake
def _(
    dr: Tensor | None, dm: Tensor, r: Tensor, y: Tensor, gate: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor,
    counters: Tensor, bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return backward_outputs(r, gate, bias)


def _save(ctx, inputs, output) -> None:
    (_, y, gate, _, scale, bias), (r, _, mean, rstd, counters) = inputs, output
    ctx.save_for_backward(r, y, gate, scale, bias, mean, rstd, counters)
    ctx.mark_non_differentiable(mean, rstd, counters)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dr: Tensor | None, dm: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    r, y, gate, scale, bias, *rest = ctx.saved_tensors  # read once: recomputed activations are handed out a single time
    dm = torch.zeros_like(r) if dm is None else dm.contiguous()  # autograd may hand over an expanded scalar
    dr = None if dr is None else dr.contiguous()
    dx, dy, sums, dbias = _backward_op(dr, dm, r, y, gate, scale, *rest, bias)
    return dx, dy, *sums.unbind(1), None if bias is None else dbias


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
    r, m, *_ = _op(x, y, gate, shift, scale, bias)
    return r, m
