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

The backward is one pass. Its sums leave as one fp32 partial per program, which `partials.py` adds without atomics. The weight
is repacked from nn.Conv1d's [F, 1, K] to fp32 [K, F] outside the op, for gelu_dwconv's reasons.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastdit_kernels.gelu_dwconv1d_kernels import gelu_dwconv1d_backward_kernel, gelu_dwconv1d_forward_kernel
from fastdit_kernels.launch import Launch, run
from fastdit_kernels.partials import sum_partials

__all__ = ["gelu_dwconv1d"]

BLOCK = 64  # channels of a program: a 128-byte line of bf16
MAX_PROGRAMS = 256  # for each block of channels: as many partial sums are added at the end
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


def forward(h: Tensor, bias: Tensor, taps: Tensor, conv_bias: Tensor, exact: bool, launch: Launch) -> Tensor:
    """z like h; taps [K, F] in fp32."""
    (B, L, F), K = h.shape, taps.shape[0]
    z = torch.empty_like(h)
    if z.numel():
        tile = FORWARD_TILES[K]
        segment, segments, programs, steps = forward_split(B, L, K)
        launch(
            gelu_dwconv1d_forward_kernel, (triton.cdiv(F, BLOCK), programs), tile.num_warps, p_h=h, p_bias=bias, p_taps=taps,
            p_conv_bias=conv_bias, p_z=z, num_segments=segments, steps=steps, L=L, F=F, K=K, SEGMENTS=tile.segments,
            SEGMENT=segment, TOKENS=tile.tokens, BLOCK=BLOCK,
            EXACT=exact or h.dtype != torch.bfloat16 or triton.knobs.runtime.interpret,
        )  # fmt: skip
    return z


def backward_outputs(h: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """(dh, sums), not yet computed: dh like h; sums [K + 2, F] in fp32 are dtaps, dbias and dconv_bias."""
    return torch.empty_like(h), taps.new_empty(taps.shape[0] + 2, taps.shape[1])


def backward(dz: Tensor, h: Tensor, bias: Tensor, taps: Tensor, launch: Launch) -> tuple[Tensor, Tensor]:
    """(dh, sums), as `backward_outputs` has them."""
    (B, L, F), K = h.shape, taps.shape[0]
    dh, sums = backward_outputs(h, taps)
    if not h.numel():
        return dh, sums.zero_()
    tile = BACKWARD_TILES[K]
    segment, segments, programs, steps = backward_split(B, L, K)
    partials = taps.new_empty(1, programs, (K + 2) * F)
    launch(
        gelu_dwconv1d_backward_kernel, (triton.cdiv(F, BLOCK), programs), tile.num_warps, p_dz=dz, p_h=h, p_bias=bias,
        p_taps=taps, p_dh=dh, p_partials=partials, num_segments=segments, steps=steps, L=L, F=F, K=K, SEGMENTS=tile.segments,
        SEGMENT=segment, TOKENS=tile.tokens, BLOCK=BLOCK,
    )  # fmt: skip
    sum_partials(partials, sums[None], launch)
    return dh, sums


def traffic(B: int, L: int, F: int, K: int, stream: int, parameter: int) -> dict[str, int]:
    """Bytes each direction touches: each program's distinct addresses, summed. `stream` and `parameter` are bytes per element.

    The floor of 2 and 3 streams; tokens that neighbouring programs both read; taps and biases, once a program; the fp32
    partials, written and read, and their sum.
    """
    token = F * stream
    before, after = (K - 1) // 2, K // 2
    ahead, back = forward_split(B, L, K), backward_split(B, L, K)
    h_read = tokens_read(ahead, L, FORWARD_TILES[K], before, after)
    dz_read = tokens_read(back, L, BACKWARD_TILES[K], after, before)
    sums = (K + 2) * F * 4
    return {
        "forward": (B * L + h_read) * token + ahead.programs * F * (4 * K + 2 * parameter),
        "backward": (2 * B * L + dz_read) * token + back.programs * (F * (4 * K + parameter) + 2 * sums) + sums,
    }


# custom_op for ln_modulate's reasons.
@torch.library.custom_op("fastdit::gelu_dwconv1d", mutates_args=())
def gelu_dwconv1d(h: Tensor, bias: Tensor, taps: Tensor, conv_bias: Tensor, exact: bool) -> Tensor:
    """As `gelu_dwconv` on a grid of one length, which checks its arguments and repacks the weight: taps [K, F] in fp32."""
    return forward(h, bias, taps, conv_bias, exact, run)


@gelu_dwconv1d.register_fake
def _(h: Tensor, bias: Tensor, taps: Tensor, conv_bias: Tensor, exact: bool) -> Tensor:
    return torch.empty_like(h)


@torch.library.custom_op("fastdit::gelu_dwconv1d_backward", mutates_args=())
def _backward_op(dz: Tensor, h: Tensor, bias: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    return backward(dz, h, bias, taps, run)


@_backward_op.register_fake
def _(dz: Tensor, h: Tensor, bias: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    return backward_outputs(h, taps)


def _save(ctx, inputs, output) -> None:
    h, bias, taps, _, _ = inputs
    ctx.save_for_backward(h, bias, taps)


def _differentiate(ctx, dz: Tensor) -> tuple[Tensor | None, ...]:
    h, bias, taps = ctx.saved_tensors
    dh, sums = _backward_op(dz.contiguous(), h, bias, taps)
    dtaps, (dbias, dconv_bias) = sums[:-2], sums[-2:].to(bias.dtype)
    return dh, dbias, dtaps, dconv_bias, None


gelu_dwconv1d.register_autograd(_differentiate, setup_context=_save)
