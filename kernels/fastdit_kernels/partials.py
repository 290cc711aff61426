"""Sums over tokens in a fixed order: each program owns rows of one sample and writes an fp32 partial; the last one adds them.

The split is a function of the shape alone, and partials are added in their order whichever program ends last, so two runs give
the same bits. Which one is last, an atomic counter says: what a program wrote before it counted itself (release) is there for
the one that finds all others counted (acquire), and that one puts the counter back to 0. An op's forward makes the counters 0
and hands them to its backward, which so may run any number of times, and in a CUDA graph, with no launch that clears them. No
two calls share one, on whatever streams they run.

The last program is alone on its SM. L2 hands an SM some 64 bytes a clock, so the 147 KB of B/2's sixteen partials of a sample
take it 2 µs, as long as a launch of its own; 1 MB would take 12. Where it is more than `MOST` a second kernel adds instead, on
many SMs, in the same order: to the bit the same sums.
"""

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from fastdit_kernels.launch import Launch

__all__ = ["add_rows", "by_the_last_program", "is_last", "split_rows", "sum_partials"]

# Of a program, which is one warp: a thread sums its own columns and has eight 128-bit loads in flight.
COLUMNS, UNROLL = 128, 8
MOST = 256 * 1024  # bytes of partials that a last program adds


@lru_cache(maxsize=64)  # each of Triton's functions on integers costs a host some microseconds
def split_rows(samples: int, rows: int, programs: int, least: int) -> tuple[int, int]:
    """(S, rows each): S programs a sample, a power of two, about `programs` in all, of `least` rows or more on average."""
    splits = triton.next_power_of_2(max(1, triton.cdiv(programs, samples)))
    while splits > 1 and rows < splits * least:
        splits //= 2
    return splits, triton.cdiv(rows, splits)


def by_the_last_program(rows: int, columns: int) -> bool:
    """Whether the last program adds so many fp32 partials of so many columns, or a kernel of its own."""
    return 4 * rows * columns <= MOST


@triton.jit
def is_last(p_counter, programs):
    """Whether `programs` programs, this one too, have been here. The last one sees whatever the others wrote before."""
    tl.debug_barrier()  # one thread counts for all: their stores come first
    last = tl.atomic_add(p_counter, 1, sem="acq_rel", scope="gpu") == programs - 1
    tl.debug_barrier()  # and all see what that thread does
    if last:
        tl.store(p_counter, 0)
    return last


@triton.jit
def add_rows(p_row, rows, stride, o, m, UNROLL: tl.constexpr):
    """The sum over `rows` rows of fp32, `stride` apart, at offsets o where m holds, one after the other."""
    b_sum = tl.zeros(o.shape, tl.float32)
    for s in range(0, rows, UNROLL):
        for k in tl.static_range(UNROLL):
            b_sum += tl.load(p_row + k * stride + o, mask=m & (s + k < rows), other=0.0)
        p_row += UNROLL * stride
    return b_sum


@triton.jit
def sum_partials_kernel(
    p_partials,  # [B, S, N] fp32
    p_sums,  # [B, FIRST], of any float type
    p_rest,  # [B, N - FIRST] fp32, or None where FIRST is N
    S,
    N: tl.constexpr,
    FIRST: tl.constexpr,
    TAPS: tl.constexpr,  # the first TAPS·F of FIRST = (TAPS + 2)·F columns, [TAPS, F], are written as [F, TAPS]
    COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    i_b, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_n = i_n * COLUMNS + tl.arange(0, COLUMNS)
    m_n = o_n < N
    b_sum = add_rows(p_partials + i_b * S * N, S, N, o_n, m_n, UNROLL)
    o_sum = o_n
    if TAPS > 0:
        F: tl.constexpr = FIRST // (TAPS + 2)
        o_sum = tl.where(o_n < TAPS * F, o_n % F * TAPS + o_n // F, o_n)
    tl.store(p_sums + i_b * FIRST + o_sum, b_sum.to(p_sums.dtype.element_ty), mask=o_n < FIRST)
    if p_rest is not None:
        tl.store(p_rest + i_b * (N - FIRST) + (o_n - FIRST), b_sum, mask=m_n & (o_n >= FIRST))


def sum_partials(partials: Tensor, sums: Tensor, launch: Launch, rest: Tensor | None = None, taps: int = 0) -> None:
    """Sum partials [B, S, N], fp32, over S in order, into sums [B, N] (or [B, k, N/k]) of any float dtype; all contiguous.

    rest: fp32 [B, n], for the last n columns; sums then has the others. taps: of (taps + 2)·F columns the first taps·F, which
    are [taps, F], go to sums as [F, taps].
    """
    B, S, N = partials.shape
    if partials.numel():
        first = N if rest is None else N - rest.shape[1]
        grid = (B, -(-N // COLUMNS))
        launch(
            sum_partials_kernel, grid, 1, p_partials=partials, p_sums=sums, p_rest=rest, S=S, N=N, FIRST=first, TAPS=taps,
            COLUMNS=COLUMNS, UNROLL=UNROLL,
        )  # fmt: skip
