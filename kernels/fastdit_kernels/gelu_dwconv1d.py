"""GELU, then a depthwise convolution along sequences: what gelu_dwconv does on a grid of one length. Backward of K taps sums
K + 2 numbers a channel, not K² + 2. As there, 4 bytes per element in bf16 and backward 6, and only h is saved.

The tile. A sequence is cut into segments of at most 64 tokens, numbered through the whole batch, so that 256 sequences of 16
tokens fill a program as well as one of 4096. A thread owns one segment and 8 channels, and walks along its tokens, a few at a
time, so that their loads are in flight together. It carries the last K - 1 activations, in the backward the last K - 1 of dz:
each token is read once and its GELU evaluated once, but for the K - 1 tokens where one segment meets the next.

Outside the sequence the activation is zero, not its input (GELU(0 + bias) ≠ 0). With `before` = (K-1)//2,

    z[t] = conv_bias + Σ_k weight[k]·GELU(h + bias)[t + k - before]
    du[t] = Σ_k weight[k]·dz[t + before - k]                       dh = du·GELU'(h + bias)
    dweight[k] = Σ_t GELU(h + bias)[t]·dz[t + before - k]          dbias = Σ dh, dconv_bias = Σ dz

The backward is one pass. Its sums leave as one fp32 partial per program, which the last program of a block of channels adds in
their order (`partials.py`). The weight is repacked from nn.Conv1d's [F, 1, K] to fp32 [K, F], for gelu_dwconv's reasons.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastdit_kernels.depthwise import BLOCK, MAX_PROGRAMS, backward_outputs, forward_outputs, gradients, repack
from fastdit_kernels.gelu_dwconv1d_kernels import gelu_dwconv1d_backward_kernel, gelu_dwconv1d_forward_kernel
from fastdit_kernels.launch import Launch, run
from fastdit_kernels.partials import by_the_last_program, sum_partials

__all__ = ["gelu_dwconv1d"]

LONGEST = 64  # tokens of a segment


class Tile(NamedTuple):
    tokens: int  # of a segment, at a time
    segments: int  # of a program, at a time
    num_warps: int


class Split(NamedTuple):
    segment: int  # tokens of each
    segments: int  # in all
    programs: int
    steps: int  # tiles of each program, one after the other


def split(B: int, L: int, tile: Tile, tokens: int) -> Split:
    """Share the segments of a batch among programs of about `tokens` tokens or, if these would be too many, more."""
    each = triton.cdiv(L, triton.cdiv(L, LONGEST))
    segment = triton.cdiv(each, tile.tokens) * tile.tokens
    segments = B * triton.cdiv(L, segment)
    tiles = triton.cdiv(segments, tile.segments)
    wanted = max(tokens // (tile.segments * segment), triton.cdiv(tiles, MAX_PROGRAMS))
    steps = max(1, min(wanted, tiles))
    return Split(segment, segments, triton.cdiv(tiles, steps), steps)


def tokens_read(split: Split, L: int, tile: Tile, before: int, after: int) -> int:
    """Tokens that programs read with `before` and `after` neighbours of each of their own, summed over programs."""
    per_sequence, share = triton.cdiv(L, split.segment), split.steps * tile.segments
    total = 0
    for program in range(split.programs):
        begin, end = program * share, min((program + 1) * share, split.segments)
        while begin < end:  # the segments of one sequence follow each other
            start = begin // per_sequence * per_sequence
            first, begin = (begin - start) * split.segment, min(end, start + per_sequence)
            total += min((begin - start) * split.segment + after, L) - max(0, first - before)
    return total


# Chosen from the code that Triton 3.6, 3.8 and 3.9 compile for sm_80, 86, 89, 90, 100 and 120: none spills. A thread has 8
# channels, one 128-bit access to the streams, and 4 where the sums of the backward would leave room for few warps.
FORWARD_TILES = {K: Tile(4, 4, 1) for K in (3, 4, 5, 7)}
BACKWARD_TILES = {3: Tile(4, 8, 2), 4: Tile(4, 8, 4), 5: Tile(4, 8, 4), 7: Tile(4, 8, 4)}

FORWARD_TOKENS, BACKWARD_TOKENS = 64, 128  # of a program for each tap: what it reads and writes besides grows with K


def forward_split(B: int, L: int, K: int) -> Split:
    return split(B, L, FORWARD_TILES[K], FORWARD_TOKENS * K)


def backward_split(B: int, L: int, K: int) -> Split:
    return split(B, L, BACKWARD_TILES[K], BACKWARD_TOKENS * K)


def forward(h: Tensor, bias: Tensor, taps: Tensor, conv_bias: Tensor, exact: bool, launch: Launch) -> tuple[Tensor, Tensor]:
    """(z, counters), as `forward_outputs` has them; taps as `repack` makes them."""
    (B, L, F), K = h.shape, taps.shape[0]
    z, counters = forward_outputs(h)
    if z.numel():
        tile = FORWARD_TILES[K]
        segment, segments, programs, steps = forward_split(B, L, K)
        launch(
            gelu_dwconv1d_forward_kernel, (triton.cdiv(F, BLOCK), programs), tile.num_warps, p_h=h, p_bias=bias, p_taps=taps,
            p_conv_bias=conv_bias, p_z=z, p_counters=counters, num_segments=segments, steps=steps, L=L, F=F, K=K,
            SEGMENTS=tile.segments, SEGMENT=segment, TOKENS=tile.tokens, BLOCK=BLOCK,
            EXACT=exact or h.dtype != torch.bfloat16 or triton.knobs.runtime.interpret,
        )  # fmt: skip
    return z, counters


def backward(dz: Tensor, h: Tensor, bias: Tensor, taps: Tensor, counters: Tensor, launch: Launch) -> tuple[Tensor, Tensor]:
    """(dh, sums), as `backward_outputs` has them. counters are 0, and 0 again afterwards."""
    (B, L, F), K = h.shape, taps.shape[0]
    dh, sums = backward_outputs(h, bias, taps)
    if not h.numel():
        return dh, sums.zero_()
    tile = BACKWARD_TILES[K]
    segment, segments, programs, steps = backward_split(B, L, K)
    partials = taps.new_empty(1, programs, (K + 2) * F)
    here = by_the_last_program(programs, (K + 2) * BLOCK)
    launch(
        gelu_dwconv1d_backward_kernel, (triton.cdiv(F, BLOCK), programs), tile.num_warps, p_dz=dz, p_h=h, p_bias=bias,
        p_taps=taps, p_dh=dh, p_partials=partials, p_counters=counters if here else None, p_sums=sums, num_segments=segments,
        steps=steps, L=L, F=F, K=K, SEGMENTS=tile.segments, SEGMENT=segment, TOKENS=tile.tokens, BLOCK=BLOCK,
    )  # fmt: skip
    if not here:
        sum_partials(partials, sums[None], launch, taps=K)
    return dh, sums


def traffic(B: int, L: int, F: int, K: int, stream: int, parameter: int) -> dict[str, int]:
    """Bytes each direction touches: each program's distinct addresses, summed. `stream` and `parameter` are bytes per element.

    The floor of 2 and 3 streams; tokens that neighbouring programs both read; taps and biases, once a program; the fp32
    partials, written and read, and their sum, as the parameters are; counters, written forward and once more backward.
    """
    token = F * stream
    before, after = (K - 1) // 2, K // 2
    ahead, back = forward_split(B, L, K), backward_split(B, L, K)
    h_read = tokens_read(ahead, L, FORWARD_TILES[K], before, after)
    dz_read = tokens_read(back, L, BACKWARD_TILES[K], after, before)
    sums, counters = (K + 2) * F, 4 * triton.cdiv(F, BLOCK)
    each = F * (4 * K + parameter) + 8 * sums
    counted = counters * by_the_last_program(back.programs, (K + 2) * BLOCK)
    return {
        "forward": (B * L + h_read) * token + ahead.programs * F * (4 * K + 2 * parameter) + counters,
        "backward": (2 * B * L + dz_read) * token + back.programs * each + parameter * sums + counted,
    }


Forward = tuple[Tensor, Tensor, Tensor]


# custom_op for ln_modulate's reasons.
@torch.library.custom_op("fastdit::gelu_dwconv1d", mutates_args=())
def gelu_dwconv1d(h: Tensor, bias: Tensor, weight: Tensor, conv_bias: Tensor, exact: bool) -> Forward:
    """(z, counters, taps): `gelu_dwconv` on a grid of one length, which checks its arguments, and what its backward needs."""
    taps = repack(weight)
    return *forward(h, bias, taps, conv_bias, exact, run), taps


@gelu_dwconv1d.register_fake
def _(h: Tensor, bias: Tensor, weight: Tensor, conv_bias: Tensor, exact: bool) -> Forward:
    return *forward_outputs(h), repack(weight)


@torch.library.custom_op("fastdit::gelu_dwconv1d_backward", mutates_args=())
def _backward_op(dz: Tensor, h: Tensor, bias: Tensor, taps: Tensor, counters: Tensor) -> tuple[Tensor, Tensor]:
    return backward(dz, h, bias, taps, counters, run)


@_backward_op.register_fake
def _(dz: Tensor, h: Tensor, bias: Tensor, taps: Tensor, counters: Tensor) -> tuple[Tensor, Tensor]:
    return backward_outputs(h, bias, taps)


def _save(ctx, inputs, output) -> None:
    (h, bias, weight, _, _), (_, counters, taps) = inputs, output
    ctx.shape = weight.shape
    ctx.save_for_backward(h, bias, taps, counters)
    ctx.mark_non_differentiable(counters, taps)


def _differentiate(ctx, dz: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    h, bias, taps, counters = ctx.saved_tensors
    dh, sums = _backward_op(dz.contiguous(), h, bias, taps, counters)
    dweight, dbias, dconv_bias = gradients(sums, len(bias))
    return dh, dbias, dweight.view(ctx.shape), dconv_bias, None


gelu_dwconv1d.register_autograd(_differentiate, setup_context=_save)
