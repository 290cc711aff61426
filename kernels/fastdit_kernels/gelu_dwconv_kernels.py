"""The kernels of gelu_dwconv, whose file says what they compute and why the tile is what it is.

A strip of COLS = 4 columns at K = 3. The program walks down the rows; at row y, forward

       b  0  1  2  3  a       reads h at b, 0 … 3 and a: its own columns, BEFORE columns left of them and AFTER right of them
     ┌────────────────┐
 y-1 │    z  z  z  z  │       carried row 0 (unfinished[0:4]): row y is the last it lacks, so it is stored
 y   │ g  g  g  g  g  g       GELU once for each column read; these activations enter K rows of z
 y+1 │    .  .  .  .  │       begun at this row, and carried on with row y of z: the new `unfinished`
     └────────────────┘

and backward reads h and writes dh at row y alone, and meets each dz of the K rows and COLS + K - 1 columns about it:

                 y-1   d  d  d  d  d  d       dz[y + BEFORE - i, x + BEFORE - j] is multiplied
                 y     d  d  d  d  d  d       by weight[i, j] into du[y, x],
                 y+1   d  d  d  d  d  d       and by GELU(h + bias)[y, x] into dweight[i, j]

One thread's columns are a tuple of tensors, of which Triton gives each thread the same lanes: [STRIPS, BLOCK] everywhere.
"""

# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"
# Triton's tuples grow by +, they have no star and no declared type.

import triton
import triton.language as tl

from fastdit_kernels.partials import add_rows, is_last

__all__ = ["gelu_dwconv_backward_kernel", "gelu_dwconv_forward_kernel"]

C = tl.constexpr(0.7978845608028654)  # √(2/π), of the tanh form of GELU
A = tl.constexpr(0.044715)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _exponential(x):
    """exp(-2C·(x + A·x³)), and no more than 1 + it can hold."""
    return tl.exp2(tl.minimum(x * (x * x * (-2.0 * C * A * LOG2E) - 2.0 * C * LOG2E), 126.0))


@triton.jit
def _sigmoid(e):
    """1/(1 + e), of which GELU_tanh(x) = x·σ is made, as exactly as fp32 has it."""
    root = tl.rsqrt(1.0 + e)  # a root and a product: a division takes three instructions more
    return root * root


@triton.jit
def gelu(y, EXACT: tl.constexpr):
    """GELU_tanh(2y). Half of x comes free where x = h + bias is formed, and leaves four instructions and the tanh."""
    if EXACT:
        return 2.0 * y * _sigmoid(_exponential(2.0 * y))
    else:
        u = y * (y * y * (8.0 * C * A) + 2.0 * C)
        tanh: tl.constexpr = "tanh.approx.f32 $0, $1;"
        return y + y * tl.inline_asm_elementwise(tanh, "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def gelu_and_slope(x):
    """GELU_tanh(x) and its derivative, σ + x·σ·(2C + 6C·A·x²)·(1 - σ).

    Always exact: of tanh.approx the slope would take (1 - t²)·x³, all cancellation. So is 1 - σ where σ is near 1: e·σ is not.
    """
    e = _exponential(x)
    s = _sigmoid(e)
    value = x * s
    return value, s + value * (x * x * (6.0 * C * A) + 2.0 * C) * (e * s)


@triton.jit
def locate_channels(F: tl.constexpr, STRIPS: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets and mask of the program's channels, [STRIPS, BLOCK]; a row vector would change layout in shared memory."""
    o_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :] + tl.zeros([STRIPS, BLOCK], tl.int32)
    m_c = tl.full([STRIPS, BLOCK], True, tl.int1) if F % BLOCK == 0 else o_c < F
    return o_c, m_c


@triton.jit
def locate_strips(
    step, num_strips, H: tl.constexpr, W: tl.constexpr, F: tl.constexpr, STRIPS: tl.constexpr, COLS: tl.constexpr
):
    """Of the program's strips at this step: offset of their first token's first channel, first column, and which exist."""
    PER_IMAGE: tl.constexpr = (W + COLS - 1) // COLS
    o_s = step * STRIPS + tl.arange(0, STRIPS)[:, None]
    o_x = o_s % PER_IMAGE * COLS
    return (o_s // PER_IMAGE).to(tl.int64) * (H * W * F) + o_x * F, o_x, o_s < num_strips


@triton.jit
def inside(m_s, o_x, x: tl.constexpr, W: tl.constexpr, COLS: tl.constexpr):
    """Strips whose column x, counted from their first, lies in the grid; where all do, nothing is compared."""
    if x < 0:
        return m_s & (o_x >= -x)
    elif x >= COLS or W % COLS != 0:
        return m_s & (o_x < W - x)
    else:
        return m_s


@triton.jit
def load_taps(p_row, m_c, F: tl.constexpr, K: tl.constexpr):
    """One row of the weight, loaded again for every row of the grid, out of L1: K² taps would fill the registers."""
    b_taps = ()
    for i in tl.static_range(K):
        b_taps = b_taps + (tl.load(p_row + i * F, mask=m_c, other=0.0),)
    return b_taps


@triton.jit
def add_partials(p_partials, p_counters, p_sums, TAPS: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr):
    """The last program of a block of channels adds all their partials, and writes dtaps [TAPS, F] as the weight's [F, TAPS]."""
    S = tl.num_programs(1)
    if is_last(p_counters + tl.program_id(0), S):
        ROWS: tl.constexpr = 8 if TAPS + 2 <= 8 else (16 if TAPS + 2 <= 16 else 32)
        o_k = tl.arange(0, ROWS)[:, None]
        o_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
        m = (o_k < TAPS + 2) & (o_c < F)
        b_sum = add_rows(p_partials, S, (TAPS + 2) * F, o_k * F + o_c, m, 4)
        tl.store(p_sums + tl.where(o_k < TAPS, o_c * TAPS + o_k, o_k * F + o_c), b_sum.to(p_sums.dtype.element_ty), mask=m)


@triton.jit
def gelu_dwconv_forward_kernel(
    p_h,  # [B, H·W, F]
    p_bias,  # [F]
    p_taps,  # [K·K, F] fp32
    p_conv_bias,  # [F]
    p_z,  # [B, H·W, F]
    p_counters,  # int32, one for each block of channels, made 0 for the backward
    num_strips,  # in the whole batch
    steps,  # tiles of a program
    H: tl.constexpr,
    W: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    STRIPS: tl.constexpr,  # of a tile
    COLS: tl.constexpr,  # of a strip
    BLOCK: tl.constexpr,  # channels of a program
    EXACT: tl.constexpr,  # or tanh.approx
):
    BEFORE: tl.constexpr = (K - 1) // 2
    AFTER: tl.constexpr = K // 2
    o_c, m_c = locate_channels(F, STRIPS, BLOCK)
    tl.store(p_counters + tl.program_id(0), 0, mask=tl.program_id(1) == 0)
    b_half_bias = 0.5 * tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_conv_bias = tl.load(p_conv_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    first = tl.program_id(1) * steps
    for step in range(first, min(first + steps, tl.cdiv(num_strips, STRIPS))):
        o_first, o_x, m_s = locate_strips(step, num_strips, H, W, F, STRIPS, COLS)
        p_in = p_h + o_first + o_c
        p_out = p_z + o_first + o_c
        unfinished = ()  # rows y - AFTER … y + BEFORE - 1 of the output, COLS columns each
        for _ in tl.static_range((K - 1) * COLS):
            unfinished = unfinished + (b_conv_bias,)
        for y in range(H):
            b_g = ()
            for i in tl.static_range(COLS + K - 1):
                m_x = inside(m_s, o_x, i - BEFORE, W, COLS)
                b_h = tl.load(p_in + (i - BEFORE) * F, mask=m_x & m_c, other=0.0).to(tl.float32)
                b_g = b_g + (tl.where(m_x, gelu(0.5 * b_h + b_half_bias, EXACT), 0.0),)
            rows = ()
            for j in tl.static_range(K):
                b_taps = load_taps(p_taps + (K - 1 - j) * K * F + o_c, m_c, F, K)
                for c in tl.static_range(COLS):
                    b_z = unfinished[j * COLS + c] if j < K - 1 else b_conv_bias
                    for i in tl.static_range(K):
                        b_z += b_g[c + i] * b_taps[i]
                    rows = rows + (b_z,)
            for c in tl.static_range(COLS):
                m_z = inside(m_s, o_x, c, W, COLS) & m_c & (y >= AFTER)
                tl.store(p_out + (c - AFTER * W) * F, rows[c].to(p_z.dtype.element_ty), mask=m_z)
            unfinished = rows[COLS:]
            p_in += W * F
            p_out += W * F
        for j in tl.static_range(AFTER):  # the last rows lack only what lies below the grid
            for c in tl.static_range(COLS):
                m_z = inside(m_s, o_x, c, W, COLS) & m_c & (H + j >= AFTER)
                tl.store(p_out + (c + (j - AFTER) * W) * F, unfinished[j * COLS + c].to(p_z.dtype.element_ty), mask=m_z)


@triton.jit
def gelu_dwconv_backward_kernel(
    p_dz,  # [B, H·W, F]
    p_h,  # [B, H·W, F]
    p_bias,  # [F]
    p_taps,  # [K·K, F] fp32
    p_dh,  # [B, H·W, F]
    p_partials,  # [programs, K·K + 2, F] fp32: dtaps, dbias and dconv_bias of each program's strips
    p_counters,  # int32, one for each block of channels, or None where another kernel adds the partials
    p_sums,  # [K·K + 2, F]: their sums, but that those of dtaps are [F, K·K]
    num_strips,  # in the whole batch
    steps,  # tiles of a program
    H: tl.constexpr,
    W: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    STRIPS: tl.constexpr,  # of a tile
    COLS: tl.constexpr,  # of a strip
    BLOCK: tl.constexpr,  # channels of a program
):
    BEFORE: tl.constexpr = (K - 1) // 2
    AFTER: tl.constexpr = K // 2
    o_c, m_c = locate_channels(F, STRIPS, BLOCK)
    b_held = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_zero = tl.zeros([STRIPS, BLOCK], tl.float32)
    b_dbias = b_zero
    b_dconv_bias = b_zero
    b_dweight = ()
    for _ in tl.static_range(K * K):
        b_dweight = b_dweight + (b_zero,)
    first = tl.program_id(1) * steps
    for step in range(first, min(first + steps, tl.cdiv(num_strips, STRIPS))):
        o_first, o_x, m_s = locate_strips(step, num_strips, H, W, F, STRIPS, COLS)
        p_centre = p_h + o_first + o_c
        p_reach = p_dz + o_first + o_c
        p_out = p_dh + o_first + o_c
        for y in range(H):
            # At K = 3 loaded again for every row, out of L1: held, its eight registers are those that spill.
            b_bias = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32) if K == 3 else b_held
            b_g = ()
            b_slope = ()
            b_du = ()
            for c in tl.static_range(COLS):
                m_x = inside(m_s, o_x, c, W, COLS)
                b_h = tl.load(p_centre + c * F, mask=m_x & m_c, other=0.0).to(tl.float32)
                b_value, b_derivative = gelu_and_slope(b_h + b_bias)
                if W % COLS != 0:  # a column past the grid meets dz of the last one inside it
                    b_value = tl.where(m_x, b_value, 0.0)
                    b_derivative = tl.where(m_x, b_derivative, 0.0)
                b_g = b_g + (b_value,)
                b_slope = b_slope + (b_derivative,)
                b_du = b_du + (b_zero,)
            b_sums = ()
            for i in tl.static_range(K):
                m_y = m_s & (y + (BEFORE - i) >= 0) & (y + (BEFORE - i) < H)
                b_dz = ()
                for x in tl.static_range(-AFTER, COLS + BEFORE):
                    m_dz = inside(m_y, o_x, x, W, COLS) & m_c
                    b_dz = b_dz + (tl.load(p_reach + ((BEFORE - i) * W + x) * F, mask=m_dz, other=0.0).to(tl.float32),)
                b_taps = load_taps(p_taps + i * K * F + o_c, m_c, F, K)
                for j in tl.static_range(K):
                    b_sum = b_dweight[i * K + j]
                    for c in tl.static_range(COLS):
                        b_sum += b_g[c] * b_dz[c + K - 1 - j]
                    b_sums = b_sums + (b_sum,)
                b_partial = ()
                for c in tl.static_range(COLS):
                    b_sum = b_du[c]
                    for j in tl.static_range(K):
                        b_sum += b_taps[j] * b_dz[c + K - 1 - j]
                    b_partial = b_partial + (b_sum,)
                    if i == BEFORE:
                        b_dconv_bias += b_dz[c + AFTER]
                b_du = b_partial
            b_dweight = b_sums
            for c in tl.static_range(COLS):
                b_dh = b_du[c] * b_slope[c]
                b_dbias += b_dh
                tl.store(p_out + c * F, b_dh.to(p_dh.dtype.element_ty), mask=inside(m_s, o_x, c, W, COLS) & m_c)
            p_centre += W * F
            p_reach += W * F
            p_out += W * F
    o_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p_partial = p_partials + tl.program_id(1).to(tl.int64) * ((K * K + 2) * F) + o_c
    for k in tl.static_range(K * K):
        tl.store(p_partial + k * F, tl.sum(b_dweight[k], 0), mask=o_c < F)
    tl.store(p_partial + K * K * F, tl.sum(b_dbias, 0), mask=o_c < F)
    tl.store(p_partial + (K * K + 1) * F, tl.sum(b_dconv_bias, 0), mask=o_c < F)
    if p_counters is not None:
        add_partials(p_partials, p_counters, p_sums, K * K, F, BLOCK)
