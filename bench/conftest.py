"""One way to measure. `pytest bench/` prints a table and writes bench/results/<bench>-<device>.json.

A file is written again after each bench. On a GPU a time is the median between device events, with L2 flushed before each round
and the device kept busy until the host has launched what is timed; on a CPU it is wall clock. Every bandwidth
stands beside the copy, and every rate of arithmetic beside the matrix product, measured in the same run.
"""

import fastdit  # noqa: F401  # isort: skip  before torch

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastdit.config import ParallelConfig
from fastdit.runtime import ranks
from fastdit.runtime.hardware import DTYPES, precision
from fastdit.runtime.profiler import kinds, own_times
from fastdit.runtime.ranks import World


def _module(stem: str) -> ModuleType:
    """A module of this folder, which is no package and not on the path."""
    name = f"fastdit_bench_{stem}"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{stem}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    with pytest.MonkeyPatch.context() as patch:  # what it imports lies beside it
        patch.syspath_prepend(Path(__file__).parent)
        spec.loader.exec_module(module)
    return module


summary = _module("summary")
Row, Ceilings = summary.Row, summary.Ceilings
SPIN_CYCLES = 4_000_000  # 2 to 3 ms, longer than the host takes to launch a kernel and its backward
STASH = summary.Session()  # pytest hands fixtures and hooks no object in common


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def numbers(device: torch.device) -> str:
    """What a training step computes in on this device, by its short name: bf16, or fp32 where it has no bf16."""
    return precision("auto", device)


@pytest.fixture(scope="session")
def dtype(numbers: str) -> torch.dtype:
    return DTYPES[numbers]


@pytest.fixture(scope="session")
def slow(device: torch.device, ceilings: "Ceilings") -> bool:
    """Whether a step of B/2 at batch 8 takes this device more than some three seconds: less of it, then, is timed."""
    return device.type == "cpu" and ceilings.matmul < 0.6e12


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """The device, for a bench of kernels; without a GPU the bench is skipped and the static table stands in."""
    if device.type != "cuda":
        pytest.skip("no GPU here: what is known without one is printed by `python -m fastdit_kernels.aot`")
    return device


@pytest.fixture(scope="session")
def baselines() -> ModuleType:
    """bench/baselines.py: what others run."""
    return _module("baselines")


@pytest.fixture(scope="session")
def counting() -> ModuleType:
    """bench/counting.py: ops and bytes of a call."""
    return _module("counting")


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """A process group of one."""
    yield ranks.init(ParallelConfig())
    ranks.shutdown()


@pytest.fixture(scope="session")
def seconds(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """seconds(call): how long one call takes, its inputs not in L2."""
    if device.type != "cuda":

        def on_cpu(call: Callable[[], object]) -> float:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return on_cpu
    # While the device spins the host launches: the events then bracket kernels back to back, not the host's dispatch of them.
    flush = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)

    def on_gpu(call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        torch.cuda._sleep(SPIN_CYCLES)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    return on_gpu


@pytest.fixture(scope="session")
def ceilings(device: torch.device, dtype: torch.dtype, seconds) -> Ceilings:
    """The copy and the matrix product this device reaches now: what every other row is a percentage of."""
    size, side = (2**30, 8192) if device.type == "cuda" else (2**26, 2048)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=device, dtype=dtype)

    def best(call: Callable[[], object]) -> float:
        return min([seconds(call) for _ in range(25)][5:])  # a ceiling is the fastest seen

    reached = Ceilings(2 * size / best(lambda: target.copy_(source)), 2 * side**3 / best(lambda: a @ a))
    STASH.ceilings = reached
    return reached


@pytest.fixture
def measure(benchmark, request: pytest.FixtureRequest, seconds, ceilings: Ceilings) -> Callable[..., Row]:
    """measure(call, op=, baseline=, shape=, bytes=, flops=, rounds=): time one call and add its row to the table.

    `bytes` and `flops` are what this implementation moves and computes in one call, by construction.
    """

    def measure(
        call: Callable[[], object],
        *,
        op: str,
        baseline: str,
        shape: str,
        bytes: int | None = None,
        flops: int | None = None,
        rounds: int = 50,
    ) -> Row:
        times: list[float] = []
        # pytest-benchmark keeps its own statistics of the same rounds, for --benchmark-compare; wall clock, synchronised.
        benchmark.pedantic(lambda: times.append(seconds(call)), rounds=rounds, warmup_rounds=5)
        median = statistics.median(times[5:] or times)  # with --benchmark-disable there is one
        bandwidth, rate = (None if n is None else n / median for n in (bytes, flops))
        row = Row(
            request.path.stem, op, baseline, shape, median * 1e6, rounds,
            bytes, bandwidth and bandwidth / 1e9, bandwidth and 100 * bandwidth / ceilings.copy,
            flops, rate and rate / 1e12, rate and 100 * rate / ceilings.matmul,
        )  # fmt: skip
        benchmark.extra_info.update(row._asdict())
        STASH.rows.append(row)
        return row

    return measure


@pytest.fixture
def side_by_side(
    benchmark, request: pytest.FixtureRequest, device: torch.device, seconds, ceilings: Ceilings
) -> Callable[..., dict[str, Row]]:
    """side_by_side(calls, op=, shape=, rounds=, …): time several implementations in turn, round after round, a row for each.

    Where `rounds` of them would take more than `budget` seconds there are fewer, but two.
    Whatever else the machine does then falls on all of them alike: compare by `x of the first`, the median of the rounds'
    ratios. The first one's rounds are what pytest-benchmark keeps. flops and bytes are by name, images those of one call.
    `extra(name, seconds)` adds what follows from a median. On a GPU each row also says its peak memory and its power.
    """

    def side_by_side(
        calls: Mapping[str, Callable[[], object]],
        *,
        op: str,
        shape: str,
        rounds: int,
        warmup: int = 1,
        budget: float = 60,
        bytes: Mapping[str, int] | None = None,
        flops: Mapping[str, int] | None = None,
        images: int = 0,
        extra: Callable[[str, float], dict[str, float]] | None = None,
    ) -> dict[str, Row]:
        first, *others = calls
        times: dict[str, list[float]] = {name: [] for name in calls}

        def time_others() -> None:
            for name in others:
                times[name].append(seconds(calls[name]))

        turn = sum([0.0, *(seconds(call) for _ in range(warmup))][-1] for call in calls.values())
        rounds = max(2, min(rounds, int(budget / turn))) if turn else rounds
        benchmark.pedantic(lambda: times[first].append(seconds(calls[first])), setup=time_others, rounds=rounds)
        found = {}
        for name, call in calls.items():
            median = statistics.median(times[name])
            moved, computed = (bytes or {}).get(name), (flops or {}).get(name)
            bandwidth, rate = moved and moved / median, computed and computed / median
            more: dict[str, float] = {"img/s": images / median} if images else {}
            if name != first:
                more["x of the first"] = statistics.median(b / a for a, b in zip(times[first], times[name], strict=False))
            more |= extra(name, median) if extra else {}
            more |= _module("power").power_and_memory(call, device, images) if device.type == "cuda" else {}
            found[name] = Row(
                request.path.stem, op, name, shape, median * 1e6, rounds,
                moved, bandwidth and bandwidth / 1e9, bandwidth and 100 * bandwidth / ceilings.copy,
                computed, rate and rate / 1e12, rate and 100 * rate / ceilings.matmul, more,
            )  # fmt: skip
            STASH.rows.append(found[name])
        benchmark.extra_info.update({name: row._asdict() for name, row in found.items()})
        return found

    return side_by_side


@pytest.fixture
def where_it_goes(request: pytest.FixtureRequest, device: torch.device) -> Callable[..., None]:
    """where_it_goes(call, baseline=, shape=, steps=): trace a step and add a row for each kind of op, as train.py's profile."""

    def where_it_goes(call: Callable[[], object], *, baseline: str, shape: str, steps: int = 3) -> None:
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        with profile(activities=activities, acc_events=True) as trace:
            start = time.perf_counter()
            for _ in range(steps):
                call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            whole = (time.perf_counter() - start) / steps
        found = kinds(own_times(trace.key_averages(), device), steps)
        times = [(kind.name, kind.seconds, {"calls": kind.calls}) for kind in found]
        times.append(("not in any op", whole - sum(kind.seconds for kind in found), {}))
        for name, spent, more in times:
            share = {"% of the step": 100 * spent / whole, **more}
            STASH.rows.append(Row(request.path.stem, f"of a step: {name}", baseline, shape, spent * 1e6, steps, extra=share))

    return where_it_goes


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Callable[..., None]:
    """tally(count, of=, baseline=, shape=): add a row of what was counted; with `each`, one for each op that memory binds too.

    elements: of the stream, to say bytes per element.
    """

    def tally(count: Any, *, of: str, baseline: str, shape: str, elements: int = 0, each: bool = False) -> None:
        def row(op: str, calls: int, moved: int, **more: float) -> None:
            more = ({"B per element": moved / elements} if elements else {}) | more
            STASH.rows.append(Row(request.path.stem, op, baseline, shape, None, 1, moved, extra={"calls": calls, **more}))

        calls = sum(calls for calls, _ in count.memory.values())
        row(f"of {of}: all that memory binds", calls, count.bytes, ops=count.ops, **{"host reads": count.host_reads})
        small = [0, 0]
        for name, (times, moved) in sorted(count.memory.items(), key=lambda item: -item[1][1]) if each else ():
            if moved >= count.bytes / 200:
                row(f"of {of}: {name}", times, moved)
            else:
                small = [small[0] + times, small[1] + moved]
        if small[0]:
            row(f"of {of}: what is under 0.5 % each", *small)

    return tally


def pytest_runtest_teardown() -> None:
    """Save the rows before the next bench starts: a killed session loses the rows of one bench at most."""
    summary.save(STASH)


def pytest_terminal_summary(terminalreporter) -> None:
    write = terminalreporter.write_line
    for line in summary.skipped(terminalreporter.stats.get("skipped", [])):
        write(line)
    if STASH.rows:
        summary.show(STASH, write)
        for path in summary.save(STASH):
            write(f"wrote {path}")
