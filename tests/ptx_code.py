"""PTX text to instructions. Source: PTX ISA, "Syntax" and "Directives"; what has no meaning for a run is skipped."""

import re
from typing import NamedTuple

import numpy as np
from ptx_memory import Fault
from ptx_ops import TYPES


class Instruction(NamedTuple):
    line: int
    text: str
    guard: str | None  # a predicate register
    negated: bool
    mnemonic: str
    operands: tuple[str, ...]


class Kernel(NamedTuple):
    name: str
    threads: int
    parameters: dict[str, int]  # position, by name
    widths: dict[str, int]  # bytes of a register, by the prefix of its name
    code: list[Instruction]
    labels: dict[str, int]  # the position of the instruction that follows


def names(operand: str) -> list[str]:
    """The registers of a vector such as "{%r1, %r2}", or the one register."""
    return re.findall(r"[%\w]+", operand)


def parse(text: str) -> Kernel:
    """The one kernel of a PTX file."""
    entry = re.search(r"\.entry\s+(\w+)\s*\(", text)
    size = re.search(r"\.reqntid\s+(\d+)", text)
    if entry is None or size is None:
        raise Fault("no .entry with .reqntid in this PTX")
    parameters: dict[str, int] = {}
    widths: dict[str, int] = {}
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    inside = False
    for number, whole in enumerate(text.splitlines(), 1):
        line = whole.split("//")[0].strip()
        if found := re.match(r"\.param\s.*?(\w+),?$", line):
            parameters[found[1]] = len(parameters)
        elif found := re.match(r"\.reg\s+\.(\w+)\s+%(\w+)<\d+>;", line):
            widths[found[2]] = np.dtype(TYPES[found[1]]).itemsize
        elif found := re.match(r"([\w$]+):$", line):
            labels[found[1]] = len(code)
        elif line == "{":
            inside = True
        elif line == "}":
            break  # what follows is for debuggers
        elif inside and line and not line.startswith("."):
            found = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*?)\s*;", line)
            if found is None:
                raise Fault(f"{entry[1]} line {number}: cannot read {line!r}")
            operands = tuple(re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", found[4]))
            code.append(Instruction(number, line, found[2], found[1] == "!", found[3], operands))
    return Kernel(entry[1], int(size[1]), parameters, widths, code, labels)
