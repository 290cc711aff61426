"""Every kernel compiled for an A100, an H100 and a B200 with no GPU, and what the compiler made of it, read from the cubin.

    python -m fastdit_kernels.aot [--json bench/results/static.json]

prints, for each direction of each op: registers, spills, the widths of its global loads and stores, fp64 instructions, warps
that share an SM, how many times the grid fills the GPU, bytes that an SM's warps load before they wait, instructions per
element, and the times that bytes, instruction issue and the special-function unit set as lower BOUNDS. Nothing here is a
measurement.

    python -m fastdit_kernels.aot --arch 120 [--json …]

says for any other architecture only what the compiler made of each kernel.

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

from fastdit_kernels import sass
from fastdit_kernels.aot_cases import SAMPLES, TOKENS, Case, cases
from fastdit_kernels.launch import Launch


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
    "B200": Device(100, 8e12, 148, 1.85e9),
}
MAX_WARPS, MAX_PROGRAMS = 64, 32  # of an SM of these


class Recorded(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    num_warps: int
    max_registers: int | None
    args: dict[str, Any]


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


def compile_launch(launch: Recorded, arch: int, trips: Sequence[float] = ()) -> sass.Compiled:
    """Compile one recorded launch for sm_<arch>, with no GPU, and read the result."""
    options = {"num_warps": launch.num_warps, "maxnreg": launch.max_registers, "enable_fp_fusion": True}
    compiled = triton.compile(source(launch), target=GPUTarget("cuda", arch, 32), options=options)
    return sass.read(launch.kernel.__name__, compiled.asm["cubin"], compiled.asm["ptx"], trips)


def resident(registers: int, shared: int, num_warps: int) -> int:
    """Programs that share an SM. Each of its four parts has 16,384 registers, handed to a warp in units of 256."""
    warps_of_part = 16384 // (math.ceil(registers / 8) * 8 * 32)
    by_memory = 160 * 1024 // (shared + 1024)  # the smallest of these GPUs' shared memory, less 1 KB for each program
    return min(4 * warps_of_part // num_warps, MAX_WARPS // num_warps, MAX_PROGRAMS, by_memory)


def kernels_of(case: Case, arch: int) -> list[tuple[Recorded, sass.Compiled]]:
    """Each launch of a case, and what the compiler made of it for sm_<arch>."""
    found = []
    for launch in record(case.build):
        found.append((launch, compile_launch(launch, arch, case.trips.get(launch.kernel.__name__, ()))))
    return found


def examine(case: Case, device: str) -> dict[str, Any]:
    """The row of one case on one device: what `sass.Compiled` holds of each kernel, and what their sums bound the time by."""
    limits = DEVICES[device]
    kernels, issued, special = [], 0.0, 0.0
    for launch, compiled in kernels_of(case, limits.arch):
        threads = 32 * launch.num_warps * math.prod(launch.grid)
        issued += compiled.issued * threads
        special += compiled.special * threads
        programs = resident(compiled.registers, compiled.shared, launch.num_warps)
        loaded = sum(int(width) * count for width, count in compiled.loads.items()) // 8  # bytes of a thread
        kernels.append(
            {
                **compiled._asdict(),
                "grid": launch.grid,
                "num_warps": launch.num_warps,
                "warps_per_sm": programs * launch.num_warps,
                "waves": math.prod(launch.grid) / (programs * limits.sms),
                "bytes_in_flight_per_sm": programs * launch.num_warps * 32 * loaded,
            }
        )
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


def compiled_only(case: Case, arch: int) -> dict[str, Any]:
    """The row of one case for an architecture of which no data sheet is kept here."""
    kernels = [{**compiled._asdict(), "num_warps": launch.num_warps} for launch, compiled in kernels_of(case, arch)]
    return {"op": case.name, "width": case.width, "arch": f"sm_{arch}", "kernels": kernels}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each kernel, and under an op's kernels what they add up to."""

    def widths(counts: dict[str, int]) -> str:
        return " ".join(f"{count}×{width}b" for width, count in sorted(counts.items(), key=lambda item: -int(item[0])))

    lines = [
        f"{'op, kernel':61} {'arch':6} {'width':>5} {'regs':>4} {'spills':>6} {'stack':>5} {'fp64':>4}"
        f" {'warps/SM':>8} {'waves':>5} {'KB/SM':>5}  {'loads':16} stores",
        "  bytes, instructions and special-function results per element; lower bounds in µs, not measurements",
    ]
    for row in rows:
        for k in row["kernels"]:
            filled = ""
            if "waves" in k:
                filled = f" {k['warps_per_sm']:8} {k['waves']:5.2f} {k['bytes_in_flight_per_sm'] / 1024:5.1f}"
            lines.append(
                f"{row['op'] + ', ' + k['kernel']:61} {row['arch']:6} {row['width']:5} {k['registers']:4} {k['spills']:6}"
                f" {k['stack']:5} {k['fp64']:4}{filled}  {widths(k['loads']):16} {widths(k['stores'])}"
            )
        if "bound_us" not in row:
            continue
        bound = ", ".join(f"{name} {microseconds:.1f}" for name, microseconds in row["bound_us"].items())
        lines.append(
            f"  {row['bytes_per_element']:.2f} B (floor {row['floor_bytes_per_element']}),"
            f" {row['instructions_per_element']:.1f} instructions, {row['special_per_element']:.3f} special;"
            f" {row['device']}, B={SAMPLES} T={TOKENS}: {bound}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every kernel for a GPU that is not here, and print what bounds it.")
    parser.add_argument("--arch", type=int, nargs="+", help="other architectures, such as 86 or 120, instead of the devices'")
    parser.add_argument("--json", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: the kernels are interpreted functions and cannot be compiled")
    if arguments.arch:
        rows = [compiled_only(case, arch) for arch in arguments.arch for case in cases(arch, (768, 1152))]
    else:
        rows = [examine(case, device) for device, limits in DEVICES.items() for case in cases(limits.arch)]
    print(table(rows))
    if arguments.json:
        about = {"kind": "bounds from the compiled code, not measurements", "samples": SAMPLES, "tokens": TOKENS}
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({**about, **versions, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
