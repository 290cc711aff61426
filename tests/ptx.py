"""A machine that executes PTX, the code our kernels compile to, without a GPU: many programs and all their threads at once.

A register is a NumPy array [programs, threads], of extent 1 where it holds one number for all. All threads of a program go the
same way; programs that part at a branch (loops of unequal length) are split and go on apart. A branch that parts the threads of
one program is refused: our kernels have none.

Checked. Each is a Fault that names kernel, line, program and thread:

    out of bounds   an address that is no element of a tensor of the launch, or beyond the program's shared memory
    alignment       of each access to its whole width, a vector's too
    unwritten       a read of shared or global memory, or of a register, that nothing wrote
    races           in shared memory between barriers; in global memory between threads with no barrier between, or between
                    programs with no atomics that release and acquire between, nor barriers about these (ptx_order.py)
    mnemonics       one that neither ptx_ops.py nor `Machine.special` knows is refused by its name

Not modelled: what ptxas makes of the PTX (it may join mul and add into an fma, which rounds once less); the order of warps,
which go in step here, so races are looked for and not waited for; caches, time, register counts; atomics other than
additions to 32 bits, asynchronous copies and matrix products, which no kernel of ours uses.

Sources: PTX ISA, "State Spaces, Types, and Variables", "Instruction Operands", "Control Flow Instructions", "Parallel
Synchronization and Communication Instructions" (bar.sync, bar.warp.sync). Data movement: ptx_data.py. Arithmetic: ptx_ops.py.
Memory: ptx_memory.py.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ptx_code import Instruction, names, parse
from ptx_data import atomic, load, matrix, shuffle, store
from ptx_memory import Fault, Global, Shared
from ptx_ops import TYPES, approximations, exact
from torch import Tensor

Array = np.ndarray[Any, Any]

MAX_THREADS = 8192  # of the programs that run at once: some registers of so many fit a core's cache
MAX_STEPS = 200_000  # instructions of a program: no test comes near
UNSIGNED = {1: np.bool_, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Programs:
    """Some programs of the grid, all at the same instruction: which they are, their registers and their shared memory."""

    def __init__(self, index: Array, registers: dict[str, Array], shared: Shared, at: int = 0):
        self.index, self.registers, self.shared, self.at, self.running = index, registers, shared, at, True

    def of(self, rows: Array, at: int) -> "Programs":
        """Some of them, at instruction `at`."""
        count = len(self.index)
        registers = {name: value[rows] if len(value) == count else value for name, value in self.registers.items()}
        return Programs(self.index[rows], registers, self.shared.of(rows), at)


Step = Callable[[Programs], None]
Source = Callable[[Programs], Array]


class Machine:
    """Runs the launches of one kernel. sign: which way the approximate instructions err, +1 or -1 (see ptx_ops.py)."""

    def __init__(self, text: str, shared_bytes: int, sign: int):
        self.kernel, self.shared_bytes = parse(text), shared_bytes
        self.ops = exact() | approximations(sign)
        self.special = {
            "ld": load, "st": store, "ldmatrix": matrix, "stmatrix": matrix, "shfl": shuffle,
            "atom": atomic, "bar": barrier, "bra": branch, "ret": leave,
        }  # fmt: skip
        self.executed: dict[str, int] = {}  # by mnemonic; once for all threads of a program

    def run(self, grid: Sequence[int], arguments: Sequence[Tensor | int | float], memory: Global) -> None:
        """Run every program of the grid. arguments: those that were no constants to the compiler, in order."""
        self.memory, self.arguments = memory, arguments
        x, y, z = np.meshgrid(*(np.arange(n, dtype=np.uint32) for n in [*grid, 1, 1][:3]), indexing="ij")
        ids = {"%ctaid.x": x.reshape(-1, 1), "%ctaid.y": y.reshape(-1, 1), "%ctaid.z": z.reshape(-1, 1)}
        thread = np.arange(self.kernel.threads, dtype=np.uint32)[None]
        common = {"%tid.x": thread, "%laneid": thread % np.uint32(32)}
        common |= {f"%nctaid.{axis}": np.array([[n]], np.uint32) for axis, n in zip("xyz", x.shape, strict=True)}
        steps = [self.decode(i) for i in self.kernel.code]
        memory.begin(x.size)
        most = max(1, MAX_THREADS // self.kernel.threads)
        for start in range(0, x.size, most):
            index = np.arange(start, min(start + most, x.size))
            own = {name: value[index] for name, value in ids.items()}
            self.waiting = [Programs(index, common | own, Shared(len(index), self.shared_bytes))]
            with np.errstate(all="ignore"):
                while self.waiting:
                    self.advance(self.waiting.pop(), steps)

    def advance(self, programs: Programs, steps: list[Step]) -> None:
        """Run to the end, or to where some of the programs part from the others."""
        for _ in range(MAX_STEPS):
            if not programs.running:
                return
            instruction, step = self.kernel.code[programs.at], steps[programs.at]
            programs.at += 1
            self.executed[instruction.mnemonic] = self.executed.get(instruction.mnemonic, 0) + len(programs.index)
            try:
                step(programs)
            except (Fault, KeyError) as error:  # a register without a value is a missing key
                fault = error if isinstance(error, Fault) else f"reads register {error}, which nothing wrote"
                raise Fault(f"{self.kernel.name} line {instruction.line}, {instruction.text}: {fault}") from None
        raise Fault(f"{self.kernel.name}: no end after {MAX_STEPS} instructions")

    def decode(self, i: Instruction) -> Step:
        base, *parts = i.mnemonic.split(".")
        if i.mnemonic in self.ops:
            return repack(self, i, parts[-1]) if base == "mov" and "{" in "".join(i.operands) else compute(self, i)
        if base in self.special:
            hintless = [part for part in parts if not part.startswith(("L1::", "L2::"))]  # how long a cache keeps a line
            if (step := self.special[base](self, i, hintless)) is not None:
                return step
        raise Fault(f"{self.kernel.name} line {i.line}: unknown mnemonic {i.mnemonic}, in {i.text}")

    def source(self, operand: str, kind: str) -> Source:
        """Reads an operand as an array of a type."""
        dtype = np.dtype(TYPES[kind])
        if operand.startswith("%"):
            return lambda p: p.registers[operand].view(dtype)
        # 0f and 0d begin the bits of a float. global_smem is the one array in shared memory, and begins it.
        number = 0 if operand == "global_smem" else int(operand[2:], 16) if operand[:2] in ("0f", "0d") else int(operand, 0)
        if kind == "pred":
            constant = np.array([[number != 0]])
        else:
            constant = np.array([[number & (256**dtype.itemsize - 1)]], UNSIGNED[dtype.itemsize]).view(dtype)
        return lambda p: constant

    def guard(self, i: Instruction) -> Source:
        """For which threads an instruction is executed."""
        if i.guard is None:
            return lambda p: np.ones((1, 1), bool)
        predicate = self.source(i.guard, "pred")
        return (lambda p: ~predicate(p)) if i.negated else predicate

    def assign(self, p: Programs, i: Instruction, name: str, value: Array) -> None:
        """Set a register where the guard holds. A narrower number is extended, by its own sign where it has one.

        What a guard leaves unset has all bits set: a NaN, or an address that no tensor has, should anything depend on it.
        """
        if name == "_":
            return
        width = self.kernel.widths[name.lstrip("%").rstrip("0123456789")]
        if value.itemsize < width:
            value = value.astype(np.dtype(f"i{width}") if value.dtype.kind == "i" else UNSIGNED[width])
        value = value.view(UNSIGNED[width])
        if i.guard is not None and not (on := self.guard(i)(p)).all():
            unset = np.array([[256**width - 1]], np.uint64).astype(value.dtype)
            value = np.where(on, value, p.registers.get(name, unset))
        p.registers[name] = value


def compute(machine: Machine, i: Instruction) -> Step:
    op = machine.ops[i.mnemonic]
    target, *operands = i.operands
    sources = [machine.source(o, t) for o, t in zip(operands, op.sources, strict=True)]
    return lambda p: machine.assign(p, i, target, op.compute(*(read(p) for read in sources)))


def repack(machine: Machine, i: Instruction, kind: str) -> Step:
    """mov between a register and its two halves, "{lower, upper}"."""
    half, wide = {"b32": (np.uint16, np.uint32), "b64": (np.uint32, np.uint64)}[kind]
    bits = 8 * np.dtype(half).itemsize
    target, operand = i.operands
    if target.startswith("{"):
        lower, upper = names(target)
        read = machine.source(operand, kind)

        def unpack(p: Programs) -> None:
            machine.assign(p, i, lower, read(p).astype(half))
            machine.assign(p, i, upper, (read(p) >> wide(bits)).astype(half))

        return unpack
    # A half whose register stands nowhere else is one that the compiler left undefined: all bits are set, as in `assign`.
    found = [name for other in machine.kernel.code for o in other.operands for name in names(o)]
    low, high = (machine.source(name if found.count(name) > 1 else "-1", f"b{bits}") for name in names(operand))
    return lambda p: machine.assign(p, i, target, low(p).astype(wide) | high(p).astype(wide) << wide(bits))


def barrier(machine: Machine, i: Instruction, parts: list[str]) -> Step | None:
    """bar.sync of all threads; or bar.warp.sync, which is the same where a program is one warp, and else unknown."""
    of_warp = (parts, i.operands) == (["warp", "sync"], ("-1",)) and machine.kernel.threads == 32
    if i.guard or not (of_warp or (parts, i.operands) == (["sync"], ("0",))):
        return None

    def step(p: Programs) -> None:
        p.shared.threads.barrier()
        machine.memory.threads.barrier()  # of all programs: what these touch is held against others by `programs`
        machine.memory.programs.clocks.barrier(p.index)

    return step


def branch(machine: Machine, i: Instruction, parts: list[str]) -> Step:
    goal, guard = machine.kernel.labels[i.operands[0]], machine.guard(i)

    def step(p: Programs) -> None:
        goes = guard(p)
        taken = goes.all(1)
        if (goes.any(1) != taken).any():
            raise Fault("a branch that parts the threads of a program")
        if taken.all():
            p.at = goal
        elif taken.any():
            machine.waiting += [p.of(np.flatnonzero(taken), goal), p.of(np.flatnonzero(~taken), p.at)]
            p.running = False

    return step


def leave(machine: Machine, i: Instruction, parts: list[str]) -> Step | None:
    def step(p: Programs) -> None:
        p.running = False

    return None if i.guard else step


def execute(
    text: str, shared_bytes: int, grid: Sequence[int], arguments: Mapping[str, Tensor | int | float],
    reachable: Mapping[str, Tensor], sign: int,
) -> dict[str, int]:  # fmt: skip
    """Run a launch. Tensors among the arguments, and those in `reachable`, whose addresses lie in memory, change in place.

    Returns how often each mnemonic was executed, once for all threads of a program. Raises Fault.
    """
    machine = Machine(text, shared_bytes, sign)
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    memory = Global(tensors | dict(reachable), machine.kernel.threads)
    machine.run(grid, list(arguments.values()), memory)
    memory.commit()
    return machine.executed
