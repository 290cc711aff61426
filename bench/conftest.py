"""One way to measure. `pytest bench/` prints a table and writes bench/results/<bench>-<device>.json.

On a GPU a time is the median between device events with L2 flushed before each round; on a CPU it is wall clock. Every
bandwidth stands beside the copy, and every rate of arithmetic beside the matrix product, measured in the same run.
"""

import importlib.util
import json
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import triton
from torch.profiler import ProfilerActivity, profile

from fastdit import parallel
from fastdit.config import ParallelConfig
from fastdit.gauges import DTYPES, Energy, has_bf16, precision
from fastdit.parallel import World
from fastdit.profiler import kinds, own_times

RESULTS = Path(__file__).parent / "results"


class Row(NamedTuple):
    """One measurement. `bytes` and `flops` are what the variant moves and computes by construction, None where not stated."""

    bench: str  # the file it came from
    op: str
    baseline: str  # which implementation this is: "fastdit", "eager", "torch.compile" …
    shape: str
    microseconds: float
    rounds: int
    bytes: int | None = None
    gb_per_s: float | None = None
    percent_of_copy: float | None = None
    flops: int | None = None
    tflop_per_s: float | None = None
    percent_of_matmul: float | None = None
    extra: dict[str, float] | None = None  # what else was measured or follows, by name with its unit


class Ceilings(NamedTuple):
    copy: float  # bytes/s, read and written
    matmul: float  # FLOP/s


@dataclass
class Session:
    """What the summary prints: pytest hands fixtures and hooks no object in common."""

    rows: list[Row] = field(default_factory=list)
    ceilings: Ceilings | None = None


STASH = Session()


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
    """The module bench/baselines.py. A fixture, since files of bench/ are no package and cannot import each other."""
    spec = importlib.util.spec_from_file_location("baselines", Path(__file__).with_name("baselines.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """A process group of one."""
    yield parallel.init(ParallelConfig())
    parallel.shutdown()


@pytest.fixture(scope="session")
def seconds(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """seconds(call): how long one call takes, its inputs not in L2."""
    if device.type != "cuda":

        def on_cpu(call: Callable[[], object]) -> float:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return on_cpu
    flush = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)

    def on_gpu(call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
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
        return statistics.median([seconds(call) for _ in range(25)][5:])

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
            more |= _power_and_memory(call, device, images) if device.type == "cuda" else {}
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


def _power_and_memory(call: Callable[[], object], device: torch.device, images: int) -> dict[str, float]:
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


def _commit() -> str:
    root = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--", ":/", ":(top,exclude)bench/results"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    return commit + (" with changes" if changed else "")


def _form(number: float | None, form: str) -> str:
    return "-" if number is None else format(number, form)


def _processor() -> str:
    """The CPU by name, the instructions and the threads PyTorch uses of it."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"CPU, {names[0] if names else 'unknown'}, {instructions}, {torch.get_num_threads()} threads"


def pytest_terminal_summary(terminalreporter) -> None:
    if not STASH.rows or STASH.ceilings is None:
        return
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    write = terminalreporter.write_line
    copy, matmul = STASH.ceilings.copy / 1e9, STASH.ceilings.matmul / 1e12
    write(f"\n{name}: copy {copy:.0f} GB/s, matrix product {matmul:.3g} TFLOP/s, measured in this run")
    write(
        f"{'op':36} {'implementation':28} {'shape':32} {'µs':>10} {'MB':>9} {'GB/s':>7} {'% copy':>6} {'TFLOP/s':>7}"
        " % of matrix product"
    )
    for r in STASH.rows:
        bandwidth = (
            f"{_form(r.bytes and r.bytes / 1e6, '.1f'):>9} {_form(r.gb_per_s, '.4g'):>7} {_form(r.percent_of_copy, '.0f'):>6}"
        )
        arithmetic = f"{_form(r.tflop_per_s, '.3g'):>7} {_form(r.percent_of_matmul, '.0f')}"
        more = "  ".join(f"{value:.4g} {name}" for name, value in (r.extra or {}).items())
        write(f"{r.op:36} {r.baseline:28} {r.shape:32} {r.microseconds:10.1f} {bandwidth} {arithmetic}  {more}".rstrip())
    RESULTS.mkdir(exist_ok=True)
    fp32 = "" if torch.cuda.is_available() or has_bf16(torch.device("cpu")) else " fp32"  # of another kind: a file of its own
    slug = re.sub(r"[^a-z0-9]+", "-", (name + fp32).lower()).strip("-")
    about = {
        "device": name if torch.cuda.is_available() else _processor(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }
    about |= {"commit": _commit(), "copy_gb_per_s": copy, "matmul_tflop_per_s": matmul}
    for bench in {r.bench for r in STASH.rows}:
        path = RESULTS / f"{bench}-{slug}.json"
        path.write_text(json.dumps({**about, "rows": [r._asdict() for r in STASH.rows if r.bench == bench]}, indent=1) + "\n")
        write(f"wrote {path}")
