"""What programs of one launch may know of each other: through atomics that release and acquire, and in no other way.

A program's time counts its barriers. An atomic with release semantics, by one thread, hands on all that the program's threads
did before the last barrier, and what it knew of others by then. One with acquire semantics takes what was handed on at its
address; the program's other threads have it from their next barrier on. An access that another program's access must precede
(one of them writes) is a race unless the program knows of the other's time.

Stricter than the PTX ISA in two ways that no kernel of ours minds: what the counting thread itself did since the last barrier
is not handed on, and it does not know what it acquired until the next. Source: PTX ISA, "Memory Consistency Model": release
and acquire patterns, causality order, and barriers as synchronization within a program.
"""

from collections import defaultdict

import numpy as np

ORDERS = {"relaxed": (False, False), "acquire": (True, False), "release": (False, True), "acq_rel": (True, True)}


class Clocks:
    """Vector clocks of `count` programs: known[p, q] is the last time of q that p knows of; its own is never asked for."""

    def __init__(self, count: int):
        self.time = np.ones(count, np.int32)
        self.known: np.ndarray | None = None  # [programs, programs] from the first atomic on
        self.coming: dict[int, np.ndarray] = {}  # what a program acquired, until its next barrier
        self.released: dict[int, np.ndarray] = {}  # by 16-bit unit
        self.counted: defaultdict[int, dict[int, int]] = defaultdict(dict)  # by unit: the last time of each program's atomic

    def barrier(self, programs: np.ndarray) -> None:
        self.time[programs] += 1
        for program in programs.tolist() if self.coming else ():
            if (coming := self.coming.pop(program, None)) is not None:
                assert self.known is not None
                np.maximum(self.known[program], coming, out=self.known[program])

    def knows(self, programs: np.ndarray, others: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Where `programs` know of `others` at `times`; negative numbers, which name no program, are never known."""
        if self.known is None:
            return np.zeros(np.broadcast_shapes(programs.shape, others.shape), bool)
        return (others >= 0) & (self.known[programs, np.maximum(others, 0)] >= times)

    def missed(self, program: int, unit: int) -> bool:
        """Whether an atomic of another program at this unit is unknown to `program`."""
        mine = np.zeros(0) if self.known is None else self.known[program]
        return any(other != program and mine[other] < time for other, time in self.counted.get(unit, {}).items())

    def atomic(self, program: int, unit: int, order: str, scope: str) -> None:
        """An atomic of one thread of `program`. Within the scope of a program alone it orders nothing between programs."""
        if self.known is None:
            self.known = np.zeros((len(self.time), len(self.time)), np.int32)
        acquires, releases = ORDERS[order] if scope in ("gpu", "sys") else (False, False)
        if acquires and unit in self.released:
            taken = self.coming.get(program, self.released[unit])
            self.coming[program] = np.maximum(taken, self.released[unit])
        handed = int(self.time[program]) - 1
        if releases:
            clock = self.known[program].copy()
            clock[program] = handed
            self.released[unit] = np.maximum(self.released.get(unit, clock), clock)
        self.counted[unit][program] = handed
