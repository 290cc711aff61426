"""How long single calls take, one after the other: what a control loop waits for."""

import statistics
from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

import torch


class Latency(NamedTuple):
    """Seconds of a call."""

    median: float
    p99: float  # 99th percentile
    mean: float


def measure(call: Callable[[int], object], calls: int, device: torch.device) -> Latency:
    """Time call(0) … call(calls - 1), each until the device has finished. The call should be warm; at least two calls."""
    seconds = []
    for number in range(calls):
        start = perf_counter()
        call(number)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(perf_counter() - start)
    return Latency(statistics.median(seconds), statistics.quantiles(seconds, n=100)[98], statistics.fmean(seconds))
