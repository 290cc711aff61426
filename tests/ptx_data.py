"""The PTX instructions that move data between registers, memory and threads, for the machine in ptx.py.

Sources: PTX ISA, "Data Movement and Conversion Instructions": ld, st, shfl.sync; "Parallel Synchronization and Communication
Instructions": atom; "Warp-level Matrix Load Instruction: ldmatrix"
and "Warp-level Matrix Store Instruction: stmatrix". Each function returns what executes the instruction, or None for a form of
it that is not known.
"""

import re

import numpy as np
from ptx_code import names
from ptx_memory import UNIT, Fault, refuse
from ptx_ops import TYPES
from ptx_order import ORDERS
from torch import Tensor

SPACES = {"global": "global", "shared": "shared", "shared::cta": "shared"}
LANES = np.arange(32)
ALL = np.ones((1, 1), bool)


def address(machine, operand, space):
    """[register + offset] as signed 64-bit numbers."""
    base, offset = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand).groups()
    read = machine.source(base, "u64" if space == "global" else "u32")
    return lambda p: read(p).astype(np.int64) + int(offset or 0)


def lanes(machine, p, mask, *arrays):
    """Rows and threads for which mask holds, and what each array has there: all in one dimension."""
    shape = (len(p.index), machine.kernel.threads)
    rows, threads = np.nonzero(np.broadcast_to(mask, shape))
    return rows, threads, *(np.broadcast_to(a, shape)[rows, threads] for a in arrays)


def checked(access, p, rows, threads, where, size):
    """access(), with whatever it may not do told of the program, thread and address that did it."""
    try:
        refuse(where % size != 0, f"misaligned: {size} bytes at once")
        return access()
    except Fault as fault:
        program, thread, at = p.index[rows[fault.lane]], threads[fault.lane], where[fault.lane]
        raise Fault(f"program {program}, thread {thread}, address {at:#x}: {fault}") from None


def read(machine, p, space, mask, where, size):
    """(rows, threads, units [lanes, size/2]) of the threads for which mask holds."""
    rows, threads, where = lanes(machine, p, mask, where)
    memory, programs = (p.shared, rows) if space == "shared" else (machine.memory, p.index[rows])
    return rows, threads, checked(lambda: memory.load(programs, threads, where, size), p, rows, threads, where, size)


def write(machine, p, space, mask, where, values):
    rows, threads, where, *columns = lanes(machine, p, mask, where, *values)
    new = np.stack(columns, 1).view(np.uint16)  # little-endian: the lower half first
    memory, programs = (p.shared, rows) if space == "shared" else (machine.memory, p.index[rows])
    checked(lambda: memory.store(programs, threads, where, new), p, rows, threads, where, new.shape[1] * UNIT)


def load(machine, i, parts):
    space, *vector, kind = parts
    if space == "param":
        return parameter(machine, i, kind)
    targets, guard, dtype = names(i.operands[0]), machine.guard(i), np.dtype(TYPES.get(kind, "V1"))
    if space not in SPACES or kind not in TYPES or vector != [f"v{len(targets)}"][: len(targets) - 1]:
        return None
    where = address(machine, i.operands[1], SPACES[space])

    def step(p):
        size = len(targets) * dtype.itemsize
        rows, threads, units = read(machine, p, SPACES[space], guard(p), where(p), size)
        values = units.view(dtype)
        for k, name in enumerate(targets):
            whole = np.zeros((len(p.index), machine.kernel.threads), dtype)
            whole[rows, threads] = values[:, k]
            machine.assign(p, i, name, whole)

    return step


def parameter(machine, i, kind):
    """An argument of the launch. Those beyond the kernel's own are Triton's scratch memory, of which we use none: null."""
    position = machine.kernel.parameters[i.operands[1].strip("[]")]
    argument = machine.arguments[position] if position < len(machine.arguments) else 0
    if isinstance(argument, Tensor):
        argument = argument.data_ptr()
    elif isinstance(argument, float):
        argument = int(np.float32(argument).view(np.uint32))
    constant = machine.source(str(argument), kind)
    return lambda p: machine.assign(p, i, i.operands[0], constant(p))


def store(machine, i, parts):
    space, *vector, kind = parts
    sources, guard = names(i.operands[1]), machine.guard(i)
    if space not in SPACES or kind not in TYPES or vector != [f"v{len(sources)}"][: len(sources) - 1]:
        return None
    where, values = address(machine, i.operands[0], SPACES[space]), [machine.source(name, kind) for name in sources]
    return lambda p: write(machine, p, SPACES[space], guard(p), where(p), [value(p) for value in values])


def atomic(machine, i, parts):
    """atom.add of 32 bits, one thread after the other: in the order of programs, which is as good as any."""
    target, operand, value = i.operands
    if len(parts) != 5 or (parts[0], *parts[3:]) != ("global", "add", "u32") or parts[2] not in ORDERS:
        return None
    guard, where, add = machine.guard(i), address(machine, operand, "global"), machine.source(value, "u32")

    def step(p):
        rows, threads, places, added = lanes(machine, p, guard(p), where(p), add(p))
        whole = np.zeros((len(p.index), machine.kernel.threads), np.uint32)
        for row, thread, place, number in zip(rows, threads, places, added, strict=True):
            at = np.array([place])

            def count(row=row, thread=thread, place=place, number=number):
                return machine.memory.count(int(p.index[row]), int(thread), int(place), int(number), parts[2], parts[1])

            whole[row, thread] = checked(count, p, [row], [thread], at, 4)
        machine.assign(p, i, target, whole)

    return step


def matrix(machine, i, parts):
    """ldmatrix and stmatrix: 1, 2 or 4 matrices of 8 rows of 8 16-bit numbers. Thread 8k + r of a warp names row r of the k-th.

    Of each matrix, thread t holds two numbers, 2·(t mod 4) and the next, of row t div 4; if it is transposed, of that column.
    """
    if parts[:3] != ["sync", "aligned", "m8n8"] or parts[-2:] != ["shared", "b16"] or i.guard:
        return None
    transposed, loads = "trans" in parts, i.mnemonic.startswith("ldmatrix")
    registers, memory = i.operands if loads else i.operands[::-1]
    registers, where = names(registers), address(machine, memory, "shared")
    if [f"x{len(registers)}", *["trans"] * transposed] != parts[3:-2]:
        return None

    def pieces(p, k):
        """(addresses, bytes there) that thread t reads or writes of matrix k, the lower first."""
        given = np.broadcast_to(where(p), (len(p.index), machine.kernel.threads)).reshape(len(p.index), -1, 32)
        if (given[:, :, 8 * k : 8 * k + 8] % 16).any():
            raise Fault("misaligned: a row of 16 bytes")

        def of(row, column):
            return (given[:, :, 8 * k + row] + UNIT * column).reshape(len(p.index), -1)

        if transposed:
            return [(of(LANES % 4 * 2 + n, LANES // 4), 2) for n in (0, 1)]
        return [(of(LANES // 4, LANES % 4 * 2), 4)]

    def load(p):
        for k, name in enumerate(registers):
            halves = [read(machine, p, "shared", ALL, at, size)[2] for at, size in pieces(p, k)]
            value = np.concatenate(halves, 1).view(np.uint32)
            machine.assign(p, i, name, value.reshape(len(p.index), -1))

    def store(p):
        for k, name in enumerate(registers):
            value = machine.source(name, "b32")(p)
            for n, (at, size) in enumerate(pieces(p, k)):
                part = value if size == 4 else (value >> np.uint32(16 * n)).astype(np.uint16)
                write(machine, p, "shared", ALL, at, [part])

    return load if loads else store


def shuffle(machine, i, parts):
    """shfl.sync of all 32 threads: each takes the number of another, whose lane is i, or its own xor i."""
    target, value, lane, *rest = i.operands
    if parts not in (["sync", "bfly", "b32"], ["sync", "idx", "b32"]) or rest != ["31", "-1"] or i.guard:
        return None
    given, partner = machine.source(value, "b32"), machine.source(lane, "u32")
    own = np.arange(machine.kernel.threads)[None]

    def step(p):
        other = partner(p).astype(np.int64) & 31
        taken = own ^ other if parts[1] == "bfly" else own & ~31 | other
        shape = (len(p.index), machine.kernel.threads)
        machine.assign(p, i, target, np.take_along_axis(*(np.broadcast_to(a, shape) for a in (given(p), taken)), 1))

    return step
