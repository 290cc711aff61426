"""Every kernel compiled for an A100 and an H100 with no GPU, and what the compiler made of it, read from the cubin.

    python -m fastdit_kernels.aot [--json bench/results/static.json]

prints, for each direction of each op: registers, spills, the widths of its global loads and stores, fp64 instructions,
instructions per element, and the times that bytes, instruction issue and the special-function unit set as lower BOUNDS.
Nothing here is a measurement.

What is compiled is what an op launches: its own function runs on meta tensors with a recorder in the launch's place.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastdit_kernels import adamw_ema, gate_residual_ln_modulate, gelu_dwconv, ln_modulate, sass
from fastdit_kernels.launch import Launch
from fastdit_kernels.partials import UNROLL, sum_partials_kernel

SAMPLES, TOKENS = 32, 256  # of one GPU's batch at 256×256 pixels
WIDTHS = (768, 1024, 1152, 1536)
HIDDEN = ((3072, 3), (4608, 3), (3072, 4), (3072, 5))  # width of the MLP, and side of its convolution
ELEMENT = 2  # bytes of a bf16


class Device(NamedTuple):
    """A GPU as its data sheet has it; four schedulers an SM issue one warp instruction a clock each."""

    arch: int
    bandwidth: float  # bytes/s
    sms: int
    clock: float  # Hz, boost

    @property
    def issue(self) -> float:
        return self.sms * 4 * 32 * self.clock  # thread instructions/s

    @property
    def special(self) -> float:
        return self.sms * 16 * self.clock  # MUFU results/s


DEVICES = {
    "A100 SXM 40 GB": Device(80, 1.555e12, 108, 1.41e9),
    "H100 SXM": Device(90, 3.35e12, 132, 1.83e9),
}


class Recorded(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    num_warps: int
    max_registers: int | None
    args: dict[str, Any]


class Case(NamedTuple):
    """One direction of an op at one size."""

    name: str
    width: int
    elements: int  # that the floor of bytes counts: of the stream, or of the hidden layer
    floor: int  # bytes per element
    moved: int  # bytes in all, with partials
    build: Callable[[Launch], object]
    trips: dict[str, tuple[int, ...]]  # by kernel name, as `sass.read` takes them; none for partial sums or where nothing loops


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def record(build: Callable[[Launch], object]) -> list[Recorded]:
    """The launches an op's function would make, with meta tensors for arguments."""
    launches: list[Recorded] = []

    def launch(kernel: Any, grid: tuple[int, ...], num_warps: int, max_registers: int | None = None, **args: Any) -> None:
        launches.append(Recorded(kernel, grid, num_warps, max_registers, args))

    build(launch)
    return launches


def source(launch: Recorded) -> ASTSource:
    """The launch specialised as Triton's own launcher does: None and 1 are constants, multiples of 16 are known to be."""
    types = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.args[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = types[value.dtype]
            aligned = value.storage_offset() * value.itemsize % 16 == 0  # the allocator aligns the storage
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            aligned = value % 16 == 0
        elif isinstance(value, float):
            signature[parameter.name], aligned = "fp32", False
        else:
            name = f"{launch.kernel.__name__}: argument {parameter.name}"
            raise TypeError(f"{name} = {value!r}; only numbers and tensors may vary")
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_launch(launch: Recorded, arch: int, trips: Sequence[int] = ()) -> sass.Compiled:
    """Compile one recorded launch for sm_<arch>, with no GPU, and read the result."""
    options = {"num_warps": launch.num_warps, "maxnreg": launch.max_registers}
    compiled = triton.compile(source(launch), target=GPUTarget("cuda", arch, 32), options=options)
    return sass.read(launch.kernel.__name__, compiled.asm["cubin"], compiled.asm["ptx"], trips)


def examine(case: Case, device: str) -> dict[str, Any]:
    """The row of one case on one device: what `sass.Compiled` holds of each kernel, and what their sums bound the time by."""
    limits = DEVICES[device]
    kernels, issued, special = [], 0.0, 0.0
    for launch in record(case.build):
        trips = case.trips
        if launch.kernel is sum_partials_kernel:
            trips = {"sum_partials_kernel": (triton.cdiv(launch.args["S"], UNROLL),)}
        compiled = compile_launch(launch, limits.arch, trips.get(launch.kernel.__name__, ()))
        threads = 32 * launch.num_warps
        for size in launch.grid:
            threads *= size
        issued += compiled.issued * threads
        special += compiled.special * threads
        kernels.append({**compiled._asdict(), "grid": launch.grid, "num_warps": launch.num_warps})
    bounds = {
        "bytes": case.moved / limits.bandwidth,
        "issue": issued / limits.issue,
        "special": special / limits.special,
    }
    return {
        "op": case.name,
        "width": case.width,
        "device": device,
        "arch": f"sm_{limits.arch}",
        "elements": case.elements,
        "floor_bytes_per_element": case.floor,
        "bytes_per_element": case.moved / case.elements,
        "instructions_per_element": issued / case.elements,
        "special_per_element": special / case.elements,
        "bound_us": {name: seconds * 1e6 for name, seconds in bounds.items()},
        "bound_by": max(bounds, key=lambda name: bounds[name]),
        "kernels": kernels,
    }


def ln_modulate_cases(B: int, T: int, D: int) -> list[Case]:
    moved = ln_modulate.traffic(B, T, D, ELEMENT, ELEMENT)
    x, packed, statistics = meta(B, T, D), meta(B, 6, D), meta(B, T, dtype=torch.float32)
    shift, scale = packed[:, 0], packed[:, 1]
    forward_rows = ln_modulate.forward_split(B, T, D)[1]
    backward_rows = ln_modulate.backward_split(B, T, D)[1]
    return [
        Case(
            "ln_modulate forward", D, B * T * D, 4, moved["forward"],
            lambda launch: ln_modulate.forward(x, shift, scale, launch),
            {"ln_modulate_forward_kernel": (forward_rows,)},
        ),
        Case(
            "ln_modulate backward", D, B * T * D, 6, moved["backward"],
            lambda launch: ln_modulate.backward(x, x, scale, statistics, statistics, launch),
            {"ln_modulate_backward_kernel": (backward_rows,)},
        ),
    ]  # fmt: skip


def gate_residual_ln_modulate_cases(B: int, T: int, D: int) -> list[Case]:
    moved = gate_residual_ln_modulate.traffic(B, T, D, ELEMENT, ELEMENT)
    x, packed, statistics = meta(B, T, D), meta(B, 6, D), meta(B, T, dtype=torch.float32)
    gate, shift, scale = packed[:, 2], packed[:, 3], packed[:, 4]
    forward_rows = ln_modulate.forward_split(B, T, D)[1]
    backward_rows = ln_modulate.backward_split(B, T, D)[1]
    return [
        Case(
            "gate_residual_ln_modulate forward", D, B * T * D, 8, moved["forward"],
            lambda launch: gate_residual_ln_modulate.forward(x, x, gate, shift, scale, launch),
            {"gate_residual_ln_modulate_forward_kernel": (forward_rows,)},
        ),
        Case(
            "gate_residual_ln_modulate backward", D, B * T * D, 12, moved["backward"],
            lambda launch: gate_residual_ln_modulate.backward(x, x, x, x, gate, scale, statistics, statistics, launch),
            {"gate_residual_ln_modulate_backward_kernel": (backward_rows,)},
        ),
    ]  # fmt: skip


def gelu_dwconv_cases(B: int, side: int, F: int, K: int) -> list[Case]:
    moved = gelu_dwconv.traffic(B, side, side, F, K, ELEMENT, ELEMENT)
    h, bias, taps = meta(B, side * side, F), meta(F), meta(K * K, F, dtype=torch.float32)
    forward_steps = gelu_dwconv.forward_split(B, side, side, K).steps
    backward_steps = gelu_dwconv.backward_split(B, side, side, K).steps
    return [
        Case(
            f"gelu_dwconv K={K} forward", F, h.numel(), 4, moved["forward"],
            lambda launch: gelu_dwconv.forward(h, bias, taps, bias, side, side, False, launch),
            {"gelu_dwconv_forward_kernel": (forward_steps, side)},
        ),
        Case(
            f"gelu_dwconv K={K} backward", F, h.numel(), 6, moved["backward"],
            lambda launch: gelu_dwconv.backward(h, h, bias, taps, side, side, launch),
            {"gelu_dwconv_backward_kernel": (backward_steps, side)},
        ),
    ]  # fmt: skip


def adamw_ema_cases(D: int) -> list[Case]:
    """Tensors of a block's shapes: its four matrices' worth of numbers, and biases."""
    shapes = ((3 * D, D), (D, D), (4 * D, D), (D, 4 * D), (3 * D,), (D,), (4 * D,), (D,))
    tensors = [meta(*shape, dtype=torch.float32) for shape in shapes]
    numbers, number = meta(len(shapes), dtype=torch.float32), meta(dtype=torch.float32)
    sizes = [t.numel() for t in tensors]
    return [
        Case(
            "adamw_ema", D, sum(sizes), 36, adamw_ema.traffic(sizes),
            lambda launch: adamw_ema.update(
                *(tensors,) * 5, numbers, numbers, number, number, number, number, None, 0.9, 0.999, 1e-8, launch
            ),
            {},
        )
    ]  # fmt: skip


def cases() -> list[Case]:
    """What the table shows and the tests hold to the bar: every op, forward and backward, at every width."""
    adaln = [
        case
        for D in WIDTHS
        for of_op in (ln_modulate_cases, gate_residual_ln_modulate_cases)
        for case in of_op(SAMPLES, TOKENS, D)
    ]
    side = math.isqrt(TOKENS)
    convolution = [case for F, K in HIDDEN for case in gelu_dwconv_cases(SAMPLES, side, F, K)]
    return adaln + convolution + adamw_ema_cases(WIDTHS[0])  # whatever the widths, it is one kernel


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each kernel, and under an op's kernels what they add up to."""

    def widths(counts: dict[str, int]) -> str:
        return " ".join(f"{count}×{width}b" for width, count in sorted(counts.items(), key=lambda item: -int(item[0])))

    lines = [
        f"{'op, kernel':51} {'arch':5} {'width':>5} {'regs':>4} {'spills':>6} {'stack':>5} {'fp64':>4}  {'loads':16} stores",
        "  bytes, instructions and special-function results per element; lower bounds in µs, not measurements",
    ]
    for row in rows:
        for k in row["kernels"]:
            lines.append(
                f"{row['op'] + ', ' + k['kernel']:51} {row['arch']:5} {row['width']:5} {k['registers']:4} {k['spills']:6}"
                f" {k['stack']:5} {k['fp64']:4}  {widths(k['loads']):16} {widths(k['stores'])}"
            )
        bound = ", ".join(f"{name} {microseconds:.1f}" for name, microseconds in row["bound_us"].items())
        lines.append(
            f"  {row['bytes_per_element']:.2f} B (floor {row['floor_bytes_per_element']}),"
            f" {row['instructions_per_element']:.1f} instructions, {row['special_per_element']:.3f} special;"
            f" {row['device']}, B={SAMPLES} T={TOKENS}: {bound}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every kernel for an A100 and an H100, and print what bounds it.")
    parser.add_argument("--json", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: the kernels are interpreted functions and cannot be compiled")
    rows = [examine(case, device) for case in cases() for device in DEVICES]
    print(table(rows))
    if arguments.json:
        about = {"kind": "bounds from the compiled code, not measurements", "samples": SAMPLES, "tokens": TOKENS}
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({**about, **versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
