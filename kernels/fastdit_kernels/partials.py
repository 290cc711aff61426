"""Sums over tokens without atomics: each program owns rows of one sample and writes one fp32 partial; a second kernel adds them.

The split is a function of the shape alone, so the order of every addition is too, and two runs give the same bits on any device.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastdit_kernels.launch import Launch

__all__ = ["split_rows", "sum_partials"]

COLUMNS, SPLITS = 128, 8  # tile of one step of the sum: 128-bit loads at 4 warps, eight partials in flight


def split_rows(samples: int, rows: int, programs: int, least: int) -> tuple[int, int]:
    """(S, rows each): S programs for each sample, a power of two, about `programs` in all, none with fewer than `least` rows."""
    splits = triton.next_power_of_2(max(1, triton.cdiv(programs, samples)))
    while splits > 1 and rows < splits * least:
        splits //= 2
    return splits, triton.cdiv(rows, splits)


@triton.jit
def sum_kernel(p_partials, p_sums, N, S: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr):
    i_n, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_n = i_n * COLUMNS + tl.arange(0, COLUMNS)
    o_s = tl.arange(0, SPLITS)
    m_n = o_n < N
    b_sum = tl.zeros([SPLITS, COLUMNS], tl.float32)
    for s in tl.static_range(0, S, SPLITS):  # unrolled: S is a power of two, and its loads are independent
        o_row = (i_b * S + s + o_s) * N
        b_sum += tl.load(p_partials + o_row[:, None] + o_n[None, :], mask=(s + o_s < S)[:, None] & m_n[None, :], other=0.0)
    tl.store(p_sums + i_b * N + o_n, tl.sum(b_sum, 0).to(p_sums.dtype.element_ty), mask=m_n)


def sum_partials(partials: Tensor, sums: Tensor, launch: Launch) -> None:
    """Sum partials [B, S, N], fp32, over S into sums [B, N] (or [B, k, N/k]) of any float dtype; both contiguous."""
    B, S, N = partials.shape
    if partials.numel():
        grid = (triton.cdiv(N, COLUMNS), B)
        launch(sum_kernel, grid, 4, p_partials=partials, p_sums=sums, S=S, N=N, COLUMNS=COLUMNS, SPLITS=SPLITS)
