"""The kernels of gelu_dwconv1d, whose file says what they compute and why the tile is what it is.

A segment at K = 3 and TOKENS = 4 at a time. The program walks along the tokens of its segment; at token t, forward

           t-1   t  t+1 t+2 t+3 t+4
            g    g                         carried: the activations of the last K - 1 tokens
                     g   g   g   g         read now, and GELU evaluated: TOKENS of them, AFTER ahead of what is stored
            └────┼────┘
                 z   z   z   z             K activations make one output, TOKENS outputs are stored

and backward walks with dz in the place of the activations, and meets h at the tokens in the middle:

            d    d
                     d   d   d   d         dz[t + BEFORE - k] is multiplied by weight[k] into du[t],
            └────┼────┘                    and by GELU(h + bias)[t] into dweight[k]
                 h   h   h   h             read here; dh is stored

The tokens of a segment are a tuple of tensors, of which Triton gives each thread the same lanes: [SEGMENTS, BLOCK] everywhere.
"""

# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"
# Triton's tuples grow by +, they have no star and no declared type.

import triton
import triton.language as tl

from fastdit_kernels.gelu_dwconv_kernels import add_partials, gelu, gelu_and_slope, load_taps, locate_channels

__all__ = ["gelu_dwconv1d_backward_kernel", "gelu_dwconv1d_forward_kernel"]


@triton.jit
def locate_segments(step, num_segments, L: tl.constexpr, F: tl.constexpr, SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr):
    """Of the program's segments at this step: offset of their first token's first channel, first token, and which exist."""
    PER_SEQUENCE: tl.constexpr = (L + SEGMENT - 1) // SEGMENT
    o_s = step * SEGMENTS + tl.arange(0, SEGMENTS)[:, None]
    o_t = o_s % PER_SEQUENCE * SEGMENT
    return (o_s // PER_SEQUENCE).to(tl.int64) * (L * F) + o_t * F, o_t, o_s < num_segments


@triton.jit
def inside(m_s, o_t, L: tl.constexpr):
    """Segments whose token o_t lies in the sequence."""
    return m_s & (o_t >= 0) & (o_t < L)


@triton.jit
def gelu_dwconv1d_forward_kernel(
    p_h,  # [B, L, F]
    p_bias,  # [F]
    p_taps,  # [K, F] fp32
    p_conv_bias,  # [F]
    p_z,  # [B, L, F]
    p_counters,  # int32, one for each block of channels, made 0 for the backward
    num_segments,  # in the whole batch
    steps,  # tiles of a program
    L: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    SEGMENTS: tl.constexpr,  # of a tile
    SEGMENT: tl.constexpr,  # tokens of a segment, a multiple of TOKENS
    TOKENS: tl.constexpr,  # at a time
    BLOCK: tl.constexpr,  # channels of a program
    EXACT: tl.constexpr,  # or tanh.approx
):
    BEFORE: tl.constexpr = (K - 1) // 2
    AFTER: tl.constexpr = K // 2
    o_c, m_c = locate_channels(F, SEGMENTS, BLOCK)
    tl.store(p_counters + tl.program_id(0), 0, mask=tl.program_id(1) == 0)
    b_half_bias = 0.5 * tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_conv_bias = tl.load(p_conv_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_taps = load_taps(p_taps + o_c, m_c, F, K)
    first = tl.program_id(1) * steps
    for step in range(first, min(first + steps, tl.cdiv(num_segments, SEGMENTS))):
        o_first, o_t, m_s = locate_segments(step, num_segments, L, F, SEGMENTS, SEGMENT)
        p_in = p_h + o_first + o_c
        p_out = p_z + o_first + o_c
        carried = ()  # activations of tokens t - BEFORE … t + AFTER - 1
        for i in tl.static_range(-BEFORE, AFTER):
            m_h = inside(m_s, o_t + i, L)
            b_h = tl.load(p_in + i * F, mask=m_h & m_c, other=0.0).to(tl.float32)
            carried = carried + (tl.where(m_h, gelu(0.5 * b_h + b_half_bias, EXACT), 0.0),)
        for t in range(0, SEGMENT, TOKENS):
            b_g = carried
            for i in tl.static_range(AFTER, AFTER + TOKENS):
                m_h = inside(m_s, o_t + (t + i), L)
                b_h = tl.load(p_in + i * F, mask=m_h & m_c, other=0.0).to(tl.float32)
                b_g = b_g + (tl.where(m_h, gelu(0.5 * b_h + b_half_bias, EXACT), 0.0),)
            for i in tl.static_range(TOKENS):
                b_z = b_conv_bias
                for k in tl.static_range(K):
                    b_z += b_g[i + k] * b_taps[k]
                m_z = inside(m_s, o_t + (t + i), L) & m_c
                tl.store(p_out + i * F, b_z.to(p_z.dtype.element_ty), mask=m_z)
            carried = b_g[TOKENS:]
            p_in += TOKENS * F
            p_out += TOKENS * F


@triton.jit
def gelu_dwconv1d_backward_kernel(
    p_dz,  # [B, L, F]
    p_h,  # [B, L, F]
    p_bias,  # [F]
    p_taps,  # [K, F] fp32
    p_dh,  # [B, L, F]
    p_partials,  # [programs, K + 2, F] fp32: dtaps, dbias and dconv_bias of each program's segments
    p_counters,  # int32, one for each block of channels, or None where another kernel adds the partials
    p_sums,  # [K + 2, F]: their sums, but that those of dtaps are [F, K]
    num_segments,  # in the whole batch
    steps,  # tiles of a program
    L: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    SEGMENTS: tl.constexpr,  # of a tile
    SEGMENT: tl.constexpr,  # tokens of a segment, a multiple of TOKENS
    TOKENS: tl.constexpr,  # at a time
    BLOCK: tl.constexpr,  # channels of a program
):
    BEFORE: tl.constexpr = (K - 1) // 2
    AFTER: tl.constexpr = K // 2
    o_c, m_c = locate_channels(F, SEGMENTS, BLOCK)
    b_bias = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_taps = load_taps(p_taps + o_c, m_c, F, K)
    b_zero = tl.zeros([SEGMENTS, BLOCK], tl.float32)
    b_dbias = b_zero
    b_dconv_bias = b_zero
    b_dweight = ()
    for _ in tl.static_range(K):
        b_dweight = b_dweight + (b_zero,)
    first = tl.program_id(1) * steps
    for step in range(first, min(first + steps, tl.cdiv(num_segments, SEGMENTS))):
        o_first, o_t, m_s = locate_segments(step, num_segments, L, F, SEGMENTS, SEGMENT)
        p_centre = p_h + o_first + o_c
        p_reach = p_dz + o_first + o_c
        p_out = p_dh + o_first + o_c
        carried = ()  # dz of tokens t - AFTER … t + BEFORE - 1
        for i in tl.static_range(-AFTER, BEFORE):
            m_dz = inside(m_s, o_t + i, L) & m_c
            carried = carried + (tl.load(p_reach + i * F, mask=m_dz, other=0.0).to(tl.float32),)
        for t in range(0, SEGMENT, TOKENS):
            b_dz = carried
            for i in tl.static_range(BEFORE, BEFORE + TOKENS):
                m_dz = inside(m_s, o_t + (t + i), L) & m_c
                b_dz = b_dz + (tl.load(p_reach + i * F, mask=m_dz, other=0.0).to(tl.float32),)
            for i in tl.static_range(TOKENS):
                m_t = inside(m_s, o_t + (t + i), L)
                b_h = tl.load(p_centre + i * F, mask=m_t & m_c, other=0.0).to(tl.float32)
                b_value, b_slope = gelu_and_slope(b_h + b_bias)
                if L % SEGMENT != 0:  # a token past the end meets dz of the last ones inside
                    b_value = tl.where(m_t, b_value, 0.0)
                    b_slope = tl.where(m_t, b_slope, 0.0)
                b_du = b_zero
                b_sums = ()
                for k in tl.static_range(K):
                    b_du += b_taps[k] * b_dz[i + K - 1 - k]
                    b_sums = b_sums + (b_dweight[k] + b_value * b_dz[i + K - 1 - k],)
                b_dweight = b_sums
                b_dh = b_du * b_slope
                b_dbias += b_dh
                b_dconv_bias += b_dz[i + AFTER]
                tl.store(p_out + i * F, b_dh.to(p_dh.dtype.element_ty), mask=m_t & m_c)
            carried = b_dz[TOKENS:]
            p_centre += TOKENS * F
            p_reach += TOKENS * F
            p_out += TOKENS * F
    o_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p_partial = p_partials + tl.program_id(1).to(tl.int64) * ((K + 2) * F) + o_c
    for k in tl.static_range(K):
        tl.store(p_partial + k * F, tl.sum(b_dweight[k], 0), mask=o_c < F)
    tl.store(p_partial + K * F, tl.sum(b_dbias, 0), mask=o_c < F)
    tl.store(p_partial + (K + 1) * F, tl.sum(b_dconv_bias, 0), mask=o_c < F)
    if p_counters is not None:
        add_partials(p_partials, p_counters, p_sums, K, F, BLOCK)
