"""Sums over tokens without atomics: each program owns rows of one sample and writes one fp32 partial; a second kernel adds them.

The split is a function of the shape alone, so the order of every addition is too, and two runs give the same bits on any device.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastdit_kernels.launch import Launch

__all__ = ["split_rows", "sum_partials"]

COLUMNS = 128  # of one program, a single warp: a 128-bit load a thread for each partial, and no sum crosses threads


def split_rows(samples: int, rows: int, programs: int, least: int) -> tuple[int, int]:
    """(S, rows each): S programs for each sample, a power of two, about `programs` in all, none with fewer than `least` rows."""
    splits = triton.next_power_of_2(max(1, triton.cdiv(programs, samples)))
    while splits > 1 and rows < splits * least:
        splits //= 2
    return splits, triton.cdiv(rows, splits)


@triton.jit
def sum_kernel(p_partials, p_sums, N, S: tl.constexpr, COLUMNS: tl.constexpr):
    i_n, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_n = i_n * COLUMNS + tl.arange(0, COLUMNS)
    m_n = o_n < N
    b_sum = tl.zeros([COLUMNS], tl.float32)
    for s in tl.static_range(S):  # unrolled: its loads do not depend on each other
        b_sum += tl.load(p_partials + (i_b * S + s) * N + o_n, mask=m_n, other=0.0)
    tl.store(p_sums + i_b * N + o_n, b_sum.to(p_sums.dtype.element_ty), mask=m_n)


def sum_partials(partials: Tensor, sums: Tensor, launch: Launch) -> None:
    """Sum partials [B, S, N], fp32, over S into sums [B, N] (or [B, k, N/k]) of any float dtype; both contiguous."""
    B, S, N = partials.shape
    if partials.numel():
        grid = (triton.cdiv(N, COLUMNS), B)
        launch(sum_kernel, grid, 1, p_partials=partials, p_sums=sums, N=N, S=S, COLUMNS=COLUMNS)
