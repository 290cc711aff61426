"""The sizes at which `aot.py` compiles each op's kernels, with meta tensors for arguments, and the bytes each of them moves."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastdit_kernels import adamw_ema, depthwise, gate_residual_ln_modulate, gelu_dwconv, gelu_dwconv1d, ln_modulate, partials
from fastdit_kernels.launch import Launch

SAMPLES, TOKENS = 32, 256  # of one GPU's batch at 256×256 pixels
WIDTHS = (768, 1024, 1152, 1536)
HIDDEN = ((3072, 3), (4608, 3), (3072, 4), (3072, 5))  # width of the MLP, and side of its convolution
HIDDEN_1D = ((3072, 3), (3072, 4), (3072, 5), (3072, 7))  # and taps of one along sequences
ELEMENT = 2  # bytes of a bf16


class Case(NamedTuple):
    """One direction of an op at one size."""

    name: str
    width: int
    elements: int  # that the floor of bytes counts: of the stream, or of the hidden layer
    floor: int  # bytes per element
    moved: int  # bytes in all, with partials
    build: Callable[[Launch], object]
    trips: dict[str, tuple[float, ...]]  # by kernel name, as `sass.read` takes them; none where nothing loops


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def by_one_of(programs: int, rows: int, unroll: int = partials.UNROLL) -> float:
    """Trips of a loop over so many rows that one of so many programs runs."""
    return math.ceil(rows / unroll) / programs


def ln_modulate_cases(B: int, T: int, D: int) -> list[Case]:
    moved = ln_modulate.traffic(B, T, D, ELEMENT, ELEMENT)
    x, packed, statistics = meta(B, T, D), meta(B, 6, D), meta(B, T, dtype=torch.float32)
    shift, scale, counters = packed[:, 0], packed[:, 1], meta(B, dtype=torch.int32)
    forward_rows = ln_modulate.forward_split(B, T, D)[1]
    splits, backward_rows = ln_modulate.backward_split(B, T, D)
    return [
        Case(
            "ln_modulate forward", D, B * T * D, 4, moved["forward"],
            lambda launch: ln_modulate.forward(x, shift, scale, launch),
            {"ln_modulate_forward_kernel": (forward_rows,)},
        ),
        Case(
            "ln_modulate backward", D, B * T * D, 6, moved["backward"],
            lambda launch: ln_modulate.backward(x, x, scale, statistics, statistics, counters, launch),
            {"ln_modulate_backward_kernel": (backward_rows, *[by_one_of(splits, splits)] * 2)},
        ),
    ]  # fmt: skip


def gate_residual_ln_modulate_cases(B: int, T: int, D: int, with_bias: bool = False) -> list[Case]:
    moved = gate_residual_ln_modulate.traffic(B, T, D, ELEMENT, ELEMENT, with_bias)
    op = "gate_residual_ln_modulate" + " with bias" * with_bias
    bias = meta(D) if with_bias else None
    x, packed, statistics = meta(B, T, D), meta(B, 6, D), meta(B, T, dtype=torch.float32)
    gate, shift, scale, counters = packed[:, 2], packed[:, 3], packed[:, 4], meta(B + 1, dtype=torch.int32)
    forward_rows = ln_modulate.forward_split(B, T, D)[1]
    splits, backward_rows = ln_modulate.backward_split(B, T, D)
    adding = [by_one_of(splits, splits)] * 3
    if with_bias:
        adding += [by_one_of(splits, splits), by_one_of(B * splits, B)]
    return [
        Case(
            f"{op} forward", D, B * T * D, 8, moved["forward"],
            lambda launch: gate_residual_ln_modulate.forward(x, x, gate, shift, scale, launch, bias),
            {"gate_residual_ln_modulate_forward_kernel": (forward_rows,)},
        ),
        Case(
            f"{op} backward", D, B * T * D, 12, moved["backward"],
            lambda launch: gate_residual_ln_modulate.backward(
                x, x, x, x, gate, scale, statistics, statistics, counters, launch, bias
            ),
            {"gate_residual_ln_modulate_backward_kernel": (backward_rows, *adding)},
        ),
    ]  # fmt: skip


def gelu_dwconv_cases(B: int, side: int, F: int, K: int, arch: int) -> list[Case]:
    moved = gelu_dwconv.traffic(B, side, side, F, K, ELEMENT, ELEMENT, arch)
    h, bias, taps = meta(B, side * side, F), meta(F), meta(K * K, F, dtype=torch.float32)
    counters = depthwise.forward_outputs(h)[1]
    forward_steps = gelu_dwconv.forward_split(B, side, side, K).steps
    back = gelu_dwconv.backward_split(B, side, side, K, arch)
    adding = [by_one_of(back.programs, back.programs, 4)] * gelu_dwconv.adds_partials(back.programs, K, arch)
    return [
        Case(
            f"gelu_dwconv K={K} forward", F, h.numel(), 4, moved["forward"],
            lambda launch: gelu_dwconv.forward(h, bias, taps, bias, side, side, False, launch),
            {"gelu_dwconv_forward_kernel": (forward_steps, side)},
        ),
        Case(
            f"gelu_dwconv K={K} backward", F, h.numel(), 6, moved["backward"],
            lambda launch: gelu_dwconv.backward(h, h, bias, taps, side, side, counters, launch, arch),
            {
                "gelu_dwconv_backward_kernel": (back.steps, side, *adding),
                "sum_partials_kernel": (math.ceil(back.programs / partials.UNROLL),),
            },
        ),
    ]  # fmt: skip


def gelu_dwconv1d_cases(B: int, L: int, F: int, K: int) -> list[Case]:
    moved = gelu_dwconv1d.traffic(B, L, F, K, ELEMENT, ELEMENT)
    h, bias, taps = meta(B, L, F), meta(F), meta(K, F, dtype=torch.float32)
    counters = depthwise.forward_outputs(h)[1]
    ahead, back = gelu_dwconv1d.forward_split(B, L, K), gelu_dwconv1d.backward_split(B, L, K)
    adding = by_one_of(back.programs, back.programs, 4)
    return [
        Case(
            f"gelu_dwconv1d K={K} forward", F, h.numel(), 4, moved["forward"],
            lambda launch: gelu_dwconv1d.forward(h, bias, taps, bias, False, launch),
            {"gelu_dwconv1d_forward_kernel": (ahead.steps, ahead.segment // gelu_dwconv1d.FORWARD_TILES[K].tokens)},
        ),
        Case(
            f"gelu_dwconv1d K={K} backward", F, h.numel(), 6, moved["backward"],
            lambda launch: gelu_dwconv1d.backward(h, h, bias, taps, counters, launch),
            {"gelu_dwconv1d_backward_kernel": (back.steps, back.segment // gelu_dwconv1d.BACKWARD_TILES[K].tokens, adding)},
        ),
    ]  # fmt: skip


def sum_partials_case(F: int, K: int) -> Case:
    """The partials of the K×K convolution where they are too many for a last program."""
    S, N = depthwise.MAX_PROGRAMS, (K * K + 2) * F
    given, sums = meta(1, S, N, dtype=torch.float32), meta(1, N)
    return Case(
        "sum_partials", F, S * N, 4, 4 * S * N + ELEMENT * N,
        lambda launch: partials.sum_partials(given, sums, launch, taps=K * K),
        {"sum_partials_kernel": (math.ceil(S / partials.UNROLL),)},
    )  # fmt: skip


def adamw_ema_cases(D: int) -> list[Case]:
    """Tensors of a block's shapes: its four matrices' worth of numbers, and biases. All fp32; then with gradients and copies in
    16 bits, as a network has them that computes in these.
    """
    shapes = ((3 * D, D), (D, D), (4 * D, D), (D, 4 * D), (3 * D,), (D,), (4 * D,), (D,))
    tensors, copies = ([meta(*shape, dtype=dtype) for shape in shapes] for dtype in (torch.float32, torch.bfloat16))
    numbers, number = meta(len(shapes), dtype=torch.float32), meta(dtype=torch.float32)
    sizes = [t.numel() for t in tensors]

    def build(grads: list[Tensor], copies: list[Tensor]) -> Callable[[Launch], object]:
        return lambda launch: adamw_ema.update(
            tensors, grads, tensors, tensors, tensors, copies, numbers, numbers, number, number, number, number, None,
            0.9, 0.999, 1e-8, launch,
        )  # fmt: skip

    bytes_moved = adamw_ema.traffic(sizes), adamw_ema.traffic(sizes, ELEMENT, ELEMENT)
    return [
        Case("adamw_ema", D, sum(sizes), 36, bytes_moved[0], build(tensors, []), {}),
        Case("adamw_ema with copies", D, sum(sizes), 36, bytes_moved[1], build(copies, copies), {}),
    ]


def cases(arch: int, widths: tuple[int, ...] = WIDTHS) -> list[Case]:
    """What the table shows and the tests hold to the bar: every op, forward and backward, at every width."""
    adaln = [
        case
        for D in widths
        for of_op in (ln_modulate_cases, gate_residual_ln_modulate_cases)
        for case in of_op(SAMPLES, TOKENS, D)
    ]
    side = math.isqrt(TOKENS)
    adaln += [case for D in widths for case in gate_residual_ln_modulate_cases(SAMPLES, TOKENS, D, with_bias=True)]
    convolution = [case for F, K in HIDDEN for case in gelu_dwconv_cases(SAMPLES, side, F, K, arch)]
    convolution += [case for F, K in HIDDEN_1D for case in gelu_dwconv1d_cases(SAMPLES, TOKENS, F, K)]
    convolution.append(sum_partials_case(*HIDDEN[0]))
    return adaln + convolution + adamw_ema_cases(widths[0])  # whatever the widths, it is one kernel
