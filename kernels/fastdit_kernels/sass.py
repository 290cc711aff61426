"""What is in a cubin: registers, spills, the width of every global access, and how many instructions a thread issues.

Read with the `cuobjdump` and `nvdisasm` that come with Triton; no GPU is involved.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import triton

__all__ = ["Compiled", "read"]


class Compiled(NamedTuple):
    """What the compiler made of one kernel launch. Counts are per thread, of instructions as they stand in the SASS."""

    kernel: str
    registers: int
    spills: int  # local loads and stores, and bytes of local memory
    stack: int
    shared: int  # bytes
    loads: dict[str, int]  # global loads by width in bits
    stores: dict[str, int]
    fp64: int  # instructions in the SASS and in the PTX
    issued: float  # instructions a thread issues from entry to exit, loops counted
    special: float  # of these, MUFU


def _tool(name: str, *arguments: str) -> str:
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def _instructions(sass: str) -> Iterator[tuple[str, int | None]]:
    """(instruction, index it may jump back to) of each line of SASS, without the padding after the last exit."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            lines.append(instruction[1])
    for i, line in enumerate(lines):
        target = re.search(r"\bBRA\b.*\((\.L_x_\d+)\)", line)
        head = labels[target[1]] if target else None
        if head == i:
            return  # a kernel ends in a jump to itself, then NOPs
        yield line, head if head is not None and head < i else None


def _width(instruction: str) -> str:
    """Bits of one access, from the suffixes of its opcode: LDG.E.128, LDG.E.U16, LDG.E."""
    opcode = instruction.split("[")[0]
    return next((width for width in ("128", "64", "16", "8") if re.search(rf"\.[US]?{width}\b", opcode)), "32")


def read(kernel: str, cubin: bytes, ptx: str, trips: Sequence[float]) -> Compiled:
    """Registers, memory accesses and instruction counts of a cubin.

    `trips` says how often each loop of its SASS runs per entry, on average over programs, in the order of their addresses.
    Raises ValueError where there are more or fewer loops. The PTX is searched for fp64 too.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = list(_instructions(_tool("nvdisasm", "-c", file.name)))
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    loops: dict[int, int] = {}  # head to last instruction
    for i, (_, head) in enumerate(sass):
        if head is not None:
            loops[head] = i
    if len(loops) != len(trips):
        raise ValueError(f"{kernel}: its SASS has {len(loops)} loops, and {len(trips)} trip counts were given")
    weights = [1.0] * len(sass)
    for (head, last), count in zip(sorted(loops.items()), trips, strict=True):
        for i in range(head, last + 1):
            weights[i] *= count
    loads: Counter[str] = Counter()
    stores: Counter[str] = Counter()
    local, fp64 = 0, len(re.findall(r"\.f64\b", ptx))
    for line, _ in sass:
        loads[_width(line)] += bool(re.search(r"\bLDG(STS)?\.", line))
        stores[_width(line)] += bool(re.search(r"\bSTG\.", line))
        local += bool(re.search(r"\b(LDL|STL)\b", line))
        fp64 += bool(re.search(r"\bD(ADD|MUL|FMA|MNMX|SETP|MMA)\b|\bF2F\.\w*F64|\.F64\b|64H\b", line))
    special = sum(weight for weight, (line, _) in zip(weights, sass, strict=True) if "MUFU" in line)
    return Compiled(
        kernel, used["REG"], local + used["LOCAL"], used["STACK"], used["SHARED"], dict(+loads), dict(+stores), fp64,
        sum(weights), special,
    )  # fmt: skip
