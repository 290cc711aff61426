"""Memory of the PTX machine (ptx.py): values, and for every 16 bits whether they exist, were written, and who touched them.

16 bits are the smallest access our kernels make.
Sources: PTX ISA, "Addresses as Operands" and "Vectors as Operands" (alignment), "Memory Consistency Model" (races).
"""

from collections.abc import Mapping

import numpy as np
import torch
from ptx_order import Clocks
from torch import Tensor

UNIT = 2  # bytes
NOBODY, MANY = -1, -2


class Fault(Exception):
    """What no kernel may do. `lane` counts the accesses of the instruction; the machine says which program and thread it is."""

    def __init__(self, message: str, lane: int = 0):
        super().__init__(message)
        self.lane = lane


def refuse(bad: np.ndarray, message: str) -> None:
    """Raise a Fault for the first lane that is bad; bad [lanes] or [lanes, units]."""
    if bad.any():
        raise Fault(message, int(np.argmax(bad.reshape(len(bad), -1).any(1))))


class Touched:
    """Who read and who wrote each unit since the last barrier. Two touch one, one of them writes: a race.

    clocks, of programs, which have no barrier: two may touch one if the second knows of the first's time.
    """

    def __init__(self, shape: tuple[int, ...], who: str):
        self.reader, self.writer, self.who = np.full(shape, NOBODY), np.full(shape, NOBODY), who
        self.clocks: Clocks | None = None
        self.read_at, self.written_at = np.zeros(0, np.int32), np.zeros(0, np.int32)

    def order(self, clocks: Clocks) -> None:
        self.clocks = clocks
        self.read_at, self.written_at = (np.zeros(self.reader.shape, np.int32) for _ in range(2))

    def _apart(self, units: np.ndarray, agents: np.ndarray, others: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Where `others` touched these units and nothing puts that before what `agents` do now."""
        apart = (others != NOBODY) & (others != agents)
        if self.clocks is None or not apart.any():
            return apart
        return apart & ~self.clocks.knows(np.broadcast_to(agents, units.shape), others, times[units])

    def _between_atomics(self, units: np.ndarray, agents: np.ndarray) -> np.ndarray:
        """Lanes that touch plainly what another program counted with, and do not know that it did."""
        if self.clocks is None or not self.clocks.counted:
            return np.zeros(len(units), bool)
        missed = self.clocks.missed
        return np.array([any(missed(int(a), u) for u in row) for a, row in zip(agents.ravel(), units.tolist(), strict=True)])

    def read(self, units: np.ndarray, agents: np.ndarray) -> None:
        writer, reader = self.writer.ravel()[units], self.reader.ravel()[units]
        apart = self._apart(units, agents, writer, self.written_at)
        refuse(apart, f"race: reads what another {self.who} wrote with no barrier between")
        refuse(self._between_atomics(units, agents), "race: reads what another program counts with")
        if self.clocks is not None:
            self.read_at[units] = self.clocks.time[agents]
        now = np.where((reader == NOBODY) | (reader == agents), agents, MANY)
        self.reader.ravel()[units] = now
        lost = self.reader.ravel()[units] != now  # several of this instruction's lanes read one unit
        self.reader.ravel()[units[lost]] = MANY

    def write(self, units: np.ndarray, agents: np.ndarray, twice: np.ndarray) -> None:
        """twice [lanes, units]: where a lane of this instruction writes another number to the same place."""
        writer, reader = self.writer.ravel()[units], self.reader.ravel()[units]
        apart = self._apart(units, agents, writer, self.written_at)
        refuse(apart, f"race: writes what another {self.who} wrote, no barrier between")
        apart = self._apart(units, agents, reader, self.read_at)
        refuse(apart, f"race: writes what another {self.who} reads, no barrier between")
        refuse(self._between_atomics(units, agents), "race: writes what another program counts with")
        if self.clocks is not None:
            self.written_at[units] = self.clocks.time[agents]
        self.writer.ravel()[units] = agents
        refuse(twice & (self.writer.ravel()[units] != agents), f"race: two {self.who}s write one address at once")

    def barrier(self) -> None:
        self.reader.fill(NOBODY)
        self.writer.fill(NOBODY)


class Shared:
    """Shared memory of P programs, `size` bytes each; nothing in it is written at first."""

    def __init__(self, programs: int, size: int):
        shape = (programs, -(-size // UNIT))
        self.size = size
        self.values, self.written = np.zeros(shape, np.uint16), np.zeros(shape, bool)
        self.threads = Touched(shape, "thread")

    def of(self, rows: np.ndarray) -> "Shared":
        """The shared memory of some of the programs."""
        part = Shared(0, self.size)
        part.values, part.written = self.values[rows], self.written[rows]
        part.threads.reader, part.threads.writer = self.threads.reader[rows], self.threads.writer[rows]
        return part

    def _units(self, rows: np.ndarray, address: np.ndarray, size: int) -> np.ndarray:
        refuse((address < 0) | (address + size > self.size), f"outside of the program's {self.size} bytes of shared memory")
        return (rows * self.values.shape[1] + address // UNIT)[:, None] + np.arange(size // UNIT)

    def load(self, rows: np.ndarray, threads: np.ndarray, address: np.ndarray, size: int) -> np.ndarray:
        units = self._units(rows, address, size)
        refuse(~self.written.ravel()[units], "reads shared memory that nothing wrote")
        self.threads.read(units, threads[:, None])
        return self.values.ravel()[units]

    def store(self, rows: np.ndarray, threads: np.ndarray, address: np.ndarray, new: np.ndarray) -> None:
        units = self._units(rows, address, new.shape[1] * UNIT)
        self.values.ravel()[units] = new
        self.threads.write(units, threads[:, None], self.values.ravel()[units] != new)
        self.written.ravel()[units] = True


class Global:
    """The tensors that a launch may touch: their elements, and nothing between or around them.

    NaN counts as never written (tests allocate with NaN, fixture nan_filled). `commit` copies the numbers back.
    """

    def __init__(self, tensors: Mapping[str, Tensor], threads: int):
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors.values() if t.numel()}
        starts = sorted(storages)
        self.storages = [storages[start] for start in starts]
        self.starts = np.array(starts, np.int64)
        sizes = np.array([s.nbytes() for s in self.storages], np.int64)
        self.ends, self.bases = self.starts + sizes, np.concatenate([[0], np.cumsum(-(-sizes // UNIT))])
        shape = (int(self.bases[-1]),)
        self.values, self.exists, self.written = np.zeros(shape, np.uint16), np.zeros(shape, bool), np.zeros(shape, bool)
        for base, storage in zip(self.bases, self.storages, strict=False):
            halves = self._halves(storage)
            self.values[base : base + len(halves)] = halves
        for tensor in tensors.values():
            if tensor.numel():
                self._admit(tensor)
        self.names = {name: (t.data_ptr(), t.numel()) for name, t in tensors.items()}
        self.num_threads = threads
        self.programs = Touched(shape, "program")
        self.threads = Touched(shape, "thread")

    @staticmethod
    def _halves(storage: torch.UntypedStorage) -> np.ndarray:
        return torch.empty(0, dtype=torch.int16).set_(storage).numpy().view(np.uint16)

    def _admit(self, tensor: Tensor) -> None:
        """Mark the elements of a tensor, which may be a view, as existing, and those that are not NaN as written."""
        storage = tensor.untyped_storage()
        base = int(self.bases[np.searchsorted(self.starts, storage.data_ptr())])
        unwritten = tensor.isnan() if tensor.is_floating_point() else torch.zeros(tensor.shape, dtype=torch.bool)
        for flags, value in ((self.exists, torch.ones(tensor.shape, dtype=torch.bool)), (self.written, ~unwritten)):
            elements = torch.zeros(storage.nbytes() // tensor.itemsize, dtype=torch.bool)
            elements.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(value)
            halves = elements.numpy().repeat(tensor.itemsize // UNIT)
            flags[base : base + len(halves)] |= halves

    def _units(self, address: np.ndarray, size: int) -> np.ndarray:
        i = np.searchsorted(self.starts, address, "right") - 1
        refuse((i < 0) | (address + size > self.ends[i]), "out of bounds: outside of every tensor of the launch")
        units = (self.bases[i] + (address - self.starts[i]) // UNIT)[:, None] + np.arange(size // UNIT)
        refuse(~self.exists[units], "out of bounds: beside the elements of a tensor of the launch")
        return units

    def load(self, programs: np.ndarray, threads: np.ndarray, address: np.ndarray, size: int) -> np.ndarray:
        units = self._units(address, size)
        refuse(~self.written[units], "reads global memory that nothing wrote")
        self.programs.read(units, programs[:, None])
        self.threads.read(units, (programs * self.num_threads + threads)[:, None])
        return self.values[units]

    def store(self, programs: np.ndarray, threads: np.ndarray, address: np.ndarray, new: np.ndarray) -> None:
        units = self._units(address, new.shape[1] * UNIT)
        self.values[units] = new
        self.programs.write(units, programs[:, None], np.ones(units.shape, bool))
        self.threads.write(units, (programs * self.num_threads + threads)[:, None], self.values[units] != new)
        self.written[units] = True

    def begin(self, count: int) -> None:
        """Of a launch of so many programs."""
        self.programs.order(Clocks(count))

    def count(self, program: int, thread: int, address: int, add: int, order: str, scope: str) -> int:
        """An atomic addition to 32 bits. Returns what stood there."""
        units = self._units(np.array([address]), 4)
        refuse(~self.written[units], "reads global memory that nothing wrote")
        agent, clocks = np.array([[program]]), self.programs.clocks
        assert clocks is not None
        apart = self.programs._apart(units, agent, self.programs.writer[units], self.programs.written_at)
        refuse(apart, "race: counts with what another program wrote")
        for unit in units[0].tolist():
            clocks.atomic(program, unit, order, scope)
        before = self.values[units[0]].view(np.uint32)
        self.values[units[0]] = (before + np.uint32(add)).view(np.uint16)
        return int(before[0])

    def commit(self) -> None:
        for base, storage in zip(self.bases, self.storages, strict=False):
            halves = self._halves(storage)
            halves[:] = self.values[base : base + len(halves)]
