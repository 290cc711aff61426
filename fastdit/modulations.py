"""The modulation that sampling asks for again and again, computed ahead: it depends on the time and what is given alone."""

import itertools
from typing import Any

import torch
from torch import Tensor

from fastdit.given import Given

FEW = 8  # steps of a schedule that a network which has learnt jumps takes as jumps
MODULATION_BYTES = 256 << 20  # of modulation computed at once


def jump_lengths(times: list[float], jumps: bool) -> dict[float, float]:
    """The length of the step from each time, as the network is given it: 0 in a longer schedule, which follows plain flow."""
    few = jumps and len(times) <= FEW
    return {t: t - after if few else 0.0 for t, after in itertools.pairwise([*times, 0.0])}


class Modulations:
    """The modulation of a schedule of sampling times, looked up by time; for what is given of B samples, on the CPU.

    Modulation depends on the time, the class and the condition alone. So one product computes it for many steps and for each
    class that occurs, and reads the projection's weights once; at batch 1 they are a third of the weights that each step would
    read again. With conditions every sample has its own.
    """

    def __init__(self, model: Any, times: list[float], given: Given, batch: int, device: torch.device):
        self.model, self.times, self.device = model, times, device
        self.lengths = jump_lengths(times, model.config.jumps)
        y, self.conditions, _ = given.each(lambda part: part.to(device))
        self.classes, row = y, torch.arange(batch)
        if given.condition is None and given.y is not None:
            classes, row = given.y.unique(return_inverse=True)
            self.classes = classes.to(device)
        elif given.condition is None:
            row = torch.zeros(batch, dtype=torch.int64)
        self.num_rows = int(row.max()) + 1
        self.row = row.to(device)
        self.together = max(1, MODULATION_BYTES // (self.num_rows * model.adaLN_modulation.out_features * 4))
        self.known: dict[float, Tensor] = {}  # time → [num_rows, 6·L + 2, D]

    def at(self, time: float) -> Tensor:
        """[B, 6·L + 2, D]. A time outside the schedule is computed on its own."""
        if time not in self.known:
            i = self.times.index(time) if time in self.times else None
            self._compute([time] if i is None else self.times[i : i + self.together])
        return self.known[time].index_select(0, self.row)

    def _compute(self, times: list[float]) -> None:
        t = torch.tensor(times, device=self.device).repeat_interleave(self.num_rows)
        y = None if self.classes is None else self.classes.repeat(len(times))
        condition = None if self.conditions is None else self.conditions.repeat(len(times), 1)
        lengths = [self.lengths.get(time, 0.0) for time in times]
        jump = torch.tensor(lengths, device=self.device).repeat_interleave(self.num_rows)
        modulation = self.model.condition(t, y, jump, condition).view(len(times), self.num_rows, -1, self.model.config.width)
        self.known = dict(zip(times, modulation, strict=True))
