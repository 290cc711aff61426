"""The kernels of gate_residual_ln_modulate, whose file says what they compute; their tile is that of ln_modulate.py."""

import triton
import triton.language as tl

from fastdit_kernels.partials import add_rows, is_last

__all__ = ["gate_residual_ln_modulate_backward_kernel", "gate_residual_ln_modulate_forward_kernel"]


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
    p_counters,  # [B + 1] int32, made 0 for the backward
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
    tl.store(p_counters + i_b, 0, mask=i_s == 0)
    tl.store(p_counters + tl.num_programs(0), 0, mask=(i_s == 0) & (i_b == 0))
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
    p_counters,  # [B + 1] int32, or None where another kernel adds the partials
    p_sums,  # [B, 3, D]
    p_dbiases,  # [B, D] fp32: Σ_t dy of each sample, or None without a bias
    p_dbias,  # [D], or None without a bias, or where another kernel adds the samples'
    T,
    rows,  # of a program
    stride_gate,
    stride_scale,
    D: tl.constexpr,
    BLOCK: tl.constexpr,  # the power of two that covers D
    UNROLL: tl.constexpr,
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
    if p_counters is not None:
        B, S = tl.num_programs(0), tl.num_programs(1)
        if is_last(p_counters + i_b, S):
            p_sample = p_partials + i_b * S * (SUMS * D)
            for k in tl.static_range(3):
                b_sum = add_rows(p_sample + k * D, S, SUMS * D, o_d, m_d, UNROLL)
                tl.store(p_sums + i_b * (3 * D) + k * D + o_d, b_sum.to(p_sums.dtype.element_ty), mask=m_d)
            if p_bias is not None:
                tl.store(p_dbiases + i_b * D + o_d, add_rows(p_sample + 3 * D, S, SUMS * D, o_d, m_d, UNROLL), mask=m_d)
                if p_dbias is not None:  # noqa: SIM102  None is a constant to the compiler, the other no bool
                    if is_last(p_counters + B, B):
                        b_sum = add_rows(p_dbiases, B, D, o_d, m_d, UNROLL)
                        tl.store(p_dbias + o_d, b_sum.to(p_dbias.dtype.element_ty), mask=m_d)
