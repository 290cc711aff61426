"""GELU, then a depthwise convolution: z = dwconv(GELU_tanh(h + bias)) + conv_bias. h is read once and z written once, 4 bytes
per element in bf16; backward 6. Only h is saved: the activation and its slope are computed again.

The tile. The grid is cut into vertical strips a few columns wide, numbered through the whole batch, so that 4×4 tokens fill a
program as well as 128×128. A program owns 16 columns of 64 channels, one image at 16×16, and walks down the rows. A thread owns
one strip and 8 channels, or fewer in the backward of K > 3, whose K² sums for each channel would not fit in registers. A
neighbouring row or column is thus another of the thread's own registers: GELU is evaluated once for each column a strip reads,
(COLS + K - 1)/COLS times per element instead of K, and nothing passes through shared memory.

Forward. A row's activations enter K rows of output; K - 1 unfinished ones are carried to the next row. Outside the grid the
activation is zero, not its input (GELU(0 + bias) ≠ 0).

Backward mirrors it about the centre token: each dz within its reach serves twice. With `before` = (K-1)//2,

    du[y, x] = Σ_ij weight[i, j]·dz[y + before - i, x + before - j]                       dh = du·GELU'(h + bias)
    dweight[i, j] = Σ_yx GELU(h + bias)[y, x]·dz[y + before - i, x + before - j]          dbias = Σ dh, dconv_bias = Σ dz

all in one pass. The rows of dz come K times, out of L1 but for the first. The sums leave as one fp32 partial per program, which
the last program of a block of channels adds in their order (`partials.py`), and writes as the parameters have them.

The weight is repacked from nn.Conv2d's [F, 1, K, K] to fp32 [K², F]: one kernel and 0.2 MB a call for F = 3072. A tap of 8
channels is then two 128-bit loads; in place it would be 8 scalar ones.
"""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastdit_kernels import gelu_dwconv1d
from fastdit_kernels.checks import STREAM_DTYPES, require, require_stream
from fastdit_kernels.depthwise import BLOCK, MAX_PROGRAMS, backward_outputs, forward_outputs, gradients, repack
from fastdit_kernels.gelu_dwconv_kernels import gelu_dwconv_backward_kernel, gelu_dwconv_forward_kernel
from fastdit_kernels.launch import Launch, architecture, run
from fastdit_kernels.partials import by_the_last_program, sum_partials

__all__ = ["gelu_dwconv"]

OP = "gelu_dwconv"


class Tile(NamedTuple):
    columns: int  # of a strip
    strips: int  # of a program, at a time
    num_warps: int


class Split(NamedTuple):
    strips: int  # in all
    programs: int
    steps: int  # tiles of each program, one after the other


def split(samples: int, height: int, width: int, tile: Tile, tokens: int) -> Split:
    """Share the strips of a batch among programs of about `tokens` tokens or, if these would be too many, more."""
    strips = samples * triton.cdiv(width, tile.columns)
    tiles = triton.cdiv(strips, tile.strips)
    wanted = max(tokens // (tile.strips * tile.columns * height), triton.cdiv(tiles, MAX_PROGRAMS))
    steps = max(1, min(wanted, tiles))
    return Split(strips, triton.cdiv(tiles, steps), steps)


def columns_read(split: Split, width: int, tile: Tile, before: int, after: int) -> int:
    """Grid columns that programs read with `before` and `after` neighbours of each of their own, summed over programs."""
    per_image = triton.cdiv(width, tile.columns)
    total = 0
    for program in range(split.programs):
        columns = set()
        for strip in range(program * split.steps * tile.strips, min((program + 1) * split.steps * tile.strips, split.strips)):
            image, first = strip // per_image, strip % per_image * tile.columns
            last = min(first + tile.columns, width) + after
            columns |= {(image, x) for x in range(max(0, first - before), min(last, width))}
        total += len(columns)
    return total


# Chosen from the code that Triton 3.6, 3.8 and 3.9 compile for sm_80, 86, 89, 90, 100 and 120: the fewest instructions per
# element that spill in none of them. A thread has 8 channels of K = 3, one 128-bit access to the streams, and 4 or 2 where the
# sums of the backward leave no room for more. A warp then still takes whole 128-byte lines: 64 channels of each token.
FORWARD_TILES = {3: Tile(4, 4, 1), 4: Tile(2, 8, 2), 5: Tile(2, 8, 2)}
BACKWARD_TILES = {3: Tile(2, 8, 2), 4: Tile(4, 4, 2), 5: Tile(4, 4, 4)}
# By (K, architecture): these need more registers.
BACKWARD_TILES_OF = {(3, 120): Tile(4, 4, 2), (4, 100): Tile(4, 4, 4), (4, 120): Tile(4, 4, 4)}
# These have no register left for adding the partials at the end, and would spill: a kernel of its own does it there.
ADDED_APART = {(3, 86), (3, 89)}

# Tokens of a program for each tap: what every program reads and writes besides, taps and sums, grows with K².
FORWARD_TOKENS, BACKWARD_TOKENS = 32, 64


def backward_tile(K: int, arch: int) -> Tile:
    return BACKWARD_TILES_OF.get((K, arch), BACKWARD_TILES[K])


def forward_split(B: int, height: int, width: int, K: int) -> Split:
    return split(B, height, width, FORWARD_TILES[K], FORWARD_TOKENS * K * K)


def backward_split(B: int, height: int, width: int, K: int, arch: int) -> Split:
    return split(B, height, width, backward_tile(K, arch), BACKWARD_TOKENS * K * K)


def adds_partials(programs: int, K: int, arch: int) -> bool:
    """Whether the backward's last program adds what so many programs of each block of channels leave."""
    return (K, arch) not in ADDED_APART and by_the_last_program(programs, (K * K + 2) * BLOCK)


def forward(
    h: Tensor, bias: Tensor, taps: Tensor, conv_bias: Tensor, height: int, width: int, exact: bool, launch: Launch
) -> tuple[Tensor, Tensor]:
    """(z, counters), as `forward_outputs` has them; taps as `repack` makes them."""
    (B, _, F), K = h.shape, math.isqrt(taps.shape[0])
    z, counters = forward_outputs(h)
    if z.numel():
        tile = FORWARD_TILES[K]
        strips, programs, steps = forward_split(B, height, width, K)
        launch(
            gelu_dwconv_forward_kernel, (triton.cdiv(F, BLOCK), programs), tile.num_warps, p_h=h, p_bias=bias, p_taps=taps,
            p_conv_bias=conv_bias, p_z=z, p_counters=counters, num_strips=strips, steps=steps, H=height, W=width, F=F, K=K,
            STRIPS=tile.strips, COLS=tile.columns, BLOCK=BLOCK,
            EXACT=exact or h.dtype != torch.bfloat16 or triton.knobs.runtime.interpret,
        )  # fmt: skip
    return z, counters


def backward(
    dz: Tensor, h: Tensor, bias: Tensor, taps: Tensor, height: int, width: int, counters: Tensor, launch: Launch, arch: int = 80
) -> tuple[Tensor, Tensor]:
    """(dh, sums), as `backward_outputs` has them, by the tile of this architecture. counters are 0, and 0 again afterwards."""
    (B, _, F), K = h.shape, math.isqrt(taps.shape[0])
    dh, sums = backward_outputs(h, bias, taps)
    if not h.numel():
        return dh, sums.zero_()
    tile = backward_tile(K, arch)
    strips, programs, steps = backward_split(B, height, width, K, arch)
    partials = taps.new_empty(1, programs, (K * K + 2) * F)
    here = adds_partials(programs, K, arch)
    launch(
        gelu_dwconv_backward_kernel, (triton.cdiv(F, BLOCK), programs), tile.num_warps, p_dz=dz, p_h=h, p_bias=bias,
        p_taps=taps, p_dh=dh, p_partials=partials, p_counters=counters if here else None, p_sums=sums, num_strips=strips,
        steps=steps, H=height, W=width, F=F, K=K, STRIPS=tile.strips, COLS=tile.columns, BLOCK=BLOCK,
    )  # fmt: skip
    if not here:
        sum_partials(partials, sums[None], launch, taps=K * K)
    return dh, sums


def traffic(B: int, height: int, width: int, F: int, K: int, stream: int, parameter: int, arch: int = 80) -> dict[str, int]:
    """Bytes each direction touches: each program's distinct addresses, summed. `stream` and `parameter` are bytes per element.

    The floor of 2 and 3 streams; columns that neighbouring programs both read; taps and biases, once a program; the fp32
    partials, written and read, and their sum, as the parameters are; counters, written forward and once more backward.
    """
    column = height * F * stream
    before, after = (K - 1) // 2, K // 2
    ahead, back = forward_split(B, height, width, K), backward_split(B, height, width, K, arch)
    h_read = columns_read(ahead, width, FORWARD_TILES[K], before, after)
    dz_read = columns_read(back, width, backward_tile(K, arch), after, before)
    sums, counters = (K * K + 2) * F, 4 * triton.cdiv(F, BLOCK)
    each = F * (4 * K * K + parameter) + 8 * sums
    counted = counters * adds_partials(back.programs, K, arch)
    return {
        "forward": (B * width + h_read) * column + ahead.programs * F * (4 * K * K + 2 * parameter) + counters,
        "backward": (2 * B * width + dz_read) * column + back.programs * each + parameter * sums + counted,
    }


Forward = tuple[Tensor, Tensor, Tensor]


# custom_op for ln_modulate's reasons.
@torch.library.custom_op("fastdit::gelu_dwconv", mutates_args=())
def _op(h: Tensor, bias: Tensor, weight: Tensor, conv_bias: Tensor, height: int, width: int, exact: bool) -> Forward:
    taps = repack(weight)
    return *forward(h, bias, taps, conv_bias, height, width, exact, run), taps


@_op.register_fake
def _(h: Tensor, bias: Tensor, weight: Tensor, conv_bias: Tensor, height: int, width: int, exact: bool) -> Forward:
    return *forward_outputs(h), repack(weight)


@torch.library.custom_op("fastdit::gelu_dwconv_backward", mutates_args=())
def _backward_op(
    dz: Tensor, h: Tensor, bias: Tensor, taps: Tensor, height: int, width: int, counters: Tensor
) -> tuple[Tensor, Tensor]:
    return backward(dz, h, bias, taps, height, width, counters, run, architecture(h.device))


@_backward_op.register_fake
def _(dz: Tensor, h: Tensor, bias: Tensor, taps: Tensor, height: int, width: int, counters: Tensor) -> tuple[Tensor, Tensor]:
    return backward_outputs(h, bias, taps)


def _save(ctx, inputs, output) -> None:
    (h, bias, weight, _, *ctx.grid, _), (_, counters, taps) = inputs, output
    ctx.shape = weight.shape
    ctx.save_for_backward(h, bias, taps, counters)
    ctx.mark_non_differentiable(counters, taps)


def _differentiate(ctx, dz: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    h, bias, taps, counters = ctx.saved_tensors
    dh, sums = _backward_op(dz.contiguous(), h, bias, taps, *ctx.grid, counters)
    dweight, dbias, dconv_bias = gradients(sums, len(bias))
    return dh, dbias, dweight.view(ctx.shape), dconv_bias, None, None, None


_op.register_autograd(_differentiate, setup_context=_save)


def gelu_dwconv(h: Tensor, bias: Tensor, weight: Tensor, conv_bias: Tensor, *grid: int, exact: bool = False) -> Tensor:
    """Depthwise convolution of GELU_tanh(h + bias) on the token grid (LocalViT, arXiv 2104.05707, is its case of images).

    h [B, T, F], contiguous, bf16, fp16 or fp32, F up to 8192; bias, conv_bias [F] and weight contiguous, of one such dtype. The
    grid, whose product is T, is (length) for a weight [F, 1, K], K in {3, 4, 5, 7}, or (height, width) for one of [F, 1, K, K],
    K in {3, 4, 5}, as nn.Conv1d and nn.Conv2d keep them. (frames, height, width) convolves each frame as an image. Zero padding
    of the activation keeps the grid: (K-1)//2 before and K//2 after. Returns [B, T, F] in h's dtype. Raises ValueError for
    anything else.

    In the forward of a bf16 stream tanh is the GPU's own instruction, whose relative error is 2⁻¹¹, an eighth of bf16's.
    `exact` asks for one formed from exp. Gradients and other streams always get that one: the instruction's error is as large
    as fp16's rounding. So does the interpreter, which has no such instruction.
    """
    require_stream(OP, "h", h, "[B, T, F]")
    _, T, F = h.shape
    if len(grid) not in (1, 2, 3) or min(grid) < 1 or math.prod(grid) != T:
        raise ValueError(f"{OP}: h has {T} tokens; the grid has 1, 2 or 3 lengths whose product they are, and is {grid}")
    sides, sizes = (1, tuple(gelu_dwconv1d.FORWARD_TILES)) if len(grid) == 1 else (2, tuple(FORWARD_TILES))
    K, dims = weight.shape[-1] if weight.ndim else 0, f"[F, 1, {', '.join('K' * sides)}]"
    if weight.ndim != 2 + sides or K not in sizes:
        raise ValueError(
            f"{OP}: weight has shape {list(weight.shape)}; expected {dims} with K in {sizes} for a grid of {len(grid)}"
        )
    require(OP, "bias", bias, "[F]", (F,), STREAM_DTYPES, h.device)
    require(OP, "weight", weight, dims, (F, 1, *(K,) * sides), (bias.dtype,), h.device)
    require(OP, "conv_bias", conv_bias, "[F]", (F,), (bias.dtype,), h.device)
    if sides == 1:
        return gelu_dwconv1d.gelu_dwconv1d(h, bias, weight, conv_bias, exact)[0]
    height, width = grid[-2:]
    images = h.view(-1, height * width, F) if len(grid) == 3 else h  # each frame is one
    return _op(images, bias, weight, conv_bias, height, width, exact)[0].view(h.shape)
