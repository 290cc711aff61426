"""A GPU's memory and energy while a call is repeated."""

import time
from collections.abc import Callable

import torch

from fastdit.runtime.hardware import Energy


def power_and_memory(call: Callable[[], object], device: torch.device, images: int) -> dict[str, float]:
    """GiB at a call's peak, and watts and J/img over two seconds of calls: NVML's counter moves tens of times a second."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    energy, start, count = Energy(torch.cuda.device_count()), time.perf_counter(), 0
    before = energy.joules()
    while time.perf_counter() - start < 2:
        call()
        torch.cuda.synchronize(device)
        count += 1
    after, elapsed = energy.joules(), time.perf_counter() - start
    found = {"GiB": torch.cuda.max_memory_allocated(device) / 2**30}
    if before is not None and after is not None:
        found["W"] = (after - before) / elapsed
        if images:
            found["J/img"] = (after - before) / (count * images)
    return found
