"""Sums over tokens without atomics: each program owns rows of one sample and writes an fp32 partial; a second kernel adds them.

The split is a function of the shape alone, so the order of every addition is too, and two runs give the same bits.
"""

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from fastdit_kernels.launch import Launch

__all__ = ["split_rows", "sum_partials"]

# Of a program, which is one warp: a thread sums its own columns and has eight 128-bit loads in flight.
COLUMNS, UNROLL = 128, 8


@lru_cache(maxsize=64)  # each of Triton's functions on integers costs a host some microseconds
def split_rows(samples: int, rows: int, programs: int, least: int) -> tuple[int, int]:
    """(S, rows each): S programs a sample, a power of two, about `programs` in all, of `least` rows or more on average."""
    splits = triton.next_power_of_2(max(1, triton.cdiv(programs, samples)))
    while splits > 1 and rows < splits * least:
        splits //= 2
    return splits, triton.cdiv(rows, splits)


@triton.jit
def sum_partials_kernel(
    p_partials,  # [B, S, N] fp32
    p_sums,  # [B, FIRST], of any float type
    p_rest,  # [B, N - FIRST] fp32, or None where FIRST is N
    S,
    N: tl.constexpr,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    i_b, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_n = i_n * COLUMNS + tl.arange(0, COLUMNS)
    m_n = o_n < N
    b_sum = tl.zeros([COLUMNS], tl.float32)
    p_partial = p_partials + i_b * S * N + o_n
    for s in range(0, S, UNROLL):
        for k in tl.static_range(UNROLL):
            b_sum += tl.load(p_partial + k * N, mask=m_n & (s + k < S), other=0.0)
        p_partial += UNROLL * N
    tl.store(p_sums + i_b * FIRST + o_n, b_sum.to(p_sums.dtype.element_ty), mask=o_n < FIRST)
    if p_rest is not None:
        tl.store(p_rest + i_b * (N - FIRST) + (o_n - FIRST), b_sum, mask=m_n & (o_n >= FIRST))


def sum_partials(partials: Tensor, sums: Tensor, launch: Launch, rest: Tensor | None = None) -> None:
    """Sum partials [B, S, N], fp32, over S in order, into sums [B, N] (or [B, k, N/k]) of any float dtype; all contiguous.

    rest: fp32 [B, n], for the last n columns; sums then has the others.
    """
    B, S, N = partials.shape
    if partials.numel():
        first = N if rest is None else N - rest.shape[1]
        grid = (B, -(-N // COLUMNS))
        launch(
            sum_partials_kernel, grid, 1, p_partials=partials, p_sums=sums, p_rest=rest, S=S, N=N, FIRST=first, COLUMNS=COLUMNS,
            UNROLL=UNROLL,
        )  # fmt: skip
