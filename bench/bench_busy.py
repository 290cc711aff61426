"""The default model on a machine that others use too: images a second alone, and beside one and four busy processes.

What is fair: T threads and N busy processes share C cores, so the fullest core has ceil((T + N) / C) of them, and its scheduler
treats them alike. At each barrier all threads of a training wait for the slowest one. So the fair rate is 1 / ceil((T + N) / C)
of the rate alone: for two threads on two cores, 1/2 beside one busy process and 1/3 beside four. `share_of_fair` is what was
reached of it; at least 0.8 is asked. `share_of_equal` is of C / (T + N), which is what a training without barriers would get.
A rank of several has its part of the threads, so its fullest core is the same.

One process for each GOMP_SPINCOUNT waits for its turn (300000 is OpenMP's own, which no variable set means). In a turn one of
them trains for a few seconds, in each of so many rounds; the figure is the median over the rounds. A turn in which other
processes of the machine took more than `QUIET` of it is made again, and counted as disturbed where `TRIES` were not quiet.
--first, for root, lets this session go before all others. On a machine that others use, nothing else gives steady figures.

python bench/bench_busy.py [--seconds 2] [--rounds 7] [--spins 2000 …] [--first] [--write | --least 0.8]
"""

import fastdit  # noqa: F401  # isort: skip  before torch

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fastdit.diffusion import choose_objective, draw
from fastdit.model import DiT, choose_ops
from fastdit.optim import Optimizer
from fastdit.recipes import RECIPES
from fastdit.train import update

ROOT = Path(__file__).parent.parent
BUSY = "while True: pass"
SPINS = ("0", "500", "2000", "10000", "300000")
LOADS = (0, 1, 4)
QUIET, TRIES = 0.1, 2
CORES = len(os.sched_getaffinity(0))
TICK = 1 / os.sysconf("SC_CLK_TCK")


def work() -> None:
    """Train the default recipe's network whenever a line with a number of seconds comes, and say what was done."""
    config = RECIPES["cats"]
    torch.set_num_threads(CORES)
    device = torch.device("cpu")
    model = DiT(config.model, choose_ops(config, device))
    model.init_weights(0)
    batch = config.train.batch
    optimizer = Optimizer(model, config.train, batch)
    objective = choose_objective(config, device)
    x0, y = torch.randn(batch, config.model.channels, *config.model.input_size), torch.zeros(batch, dtype=torch.int64)
    number = 0

    def step() -> None:
        nonlocal number
        update(model, objective, optimizer, [draw(objective, x0, y, 0, number * batch)], optimizer.rates(number * batch))
        number += 1

    for _ in range(3):
        step()
    print("ready", flush=True)
    for line in sys.stdin:
        first, start, used = number, time.perf_counter(), time.process_time()
        while time.perf_counter() - start < float(line):
            step()
        seconds = time.perf_counter() - start
        print(json.dumps({"rate": (number - first) * batch / seconds, "cpu_s": time.process_time() - used}), flush=True)


class Worker:
    """A process that trains with one count of spins, in its turns."""

    def __init__(self, spins: str):
        env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | {"GOMP_SPINCOUNT": spins}
        command = [sys.executable, __file__, "--work"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=env, text=True, **pipes)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def turn(self, busy: int, seconds: float) -> tuple[float, float]:
        """Images a second beside so many busy processes, and the share of the machine that none of these took."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
        try:
            time.sleep(0.3)
            machine, theirs, start = _machine_s(), sum(_used_s(p.pid) for p in others), time.perf_counter()
            self.process.stdin.write(f"{seconds}\n")
            self.process.stdin.flush()
            found = json.loads(self.process.stdout.readline())
            elapsed = time.perf_counter() - start
            ours = sum(_used_s(p.pid) for p in others) - theirs + found["cpu_s"]
            return found["rate"], (_machine_s() - machine - ours) / (elapsed * CORES)
        finally:
            for other in others:
                other.kill()
                other.wait()


def _machine_s() -> float:
    """Seconds of CPU that anybody used since the machine's start, and that its host took away."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) * TICK


def _used_s(pid: int) -> float:
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])) * TICK


def rows(turns: dict[tuple[str, int], list[tuple[float, float]]]) -> list[dict[str, Any]]:
    """A row for each count of spins and load, from (rate, share of others) of its turns."""
    found = []
    for (spins, busy), made in turns.items():
        rates = sorted(rate for rate, _ in made)
        rate, alone = statistics.median(rates), statistics.median(rate for rate, _ in turns[spins, 0])
        row = {"GOMP_SPINCOUNT": int(spins), "busy_processes": busy, "img_per_s": round(rate, 1)}
        row |= {"least": round(rates[0], 1), "most": round(rates[-1], 1), "turns": len(rates)}
        row |= {"share_of_fair": round(rate / alone * math.ceil((CORES + busy) / CORES), 3)}
        row |= {"share_of_equal": round(rate / alone * (CORES + busy) / CORES, 3)}
        found.append(row | {"disturbed": sum(others > QUIET for _, others in made)})
    return found


def take_turns(spins: list[str], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Measure, and return the rows."""
    workers = {count: Worker(count) for count in spins}
    turns: dict[tuple[str, int], list[tuple[float, float]]] = {(count, busy): [] for count in spins for busy in LOADS}
    try:
        for _ in range(rounds):
            for count, busy in turns:
                tries: list[tuple[float, float]] = []
                while len(tries) < TRIES and (not tries or tries[-1][1] > QUIET):
                    tries.append(workers[count].turn(busy, seconds))
                turns[count, busy].append(min(tries, key=lambda found: found[1]))
    finally:
        for worker in workers.values():
            worker.process.kill()
            worker.process.wait()
    return rows(turns)


def write(found: list[dict[str, Any]], options: argparse.Namespace) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    about = {
        "device": f"{CORES} CPU cores, {platform.processor() or platform.machine()}",
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds_a_turn": options.seconds,
        "before_other_sessions": options.first,
    }
    (ROOT / "bench" / "results" / "bench_busy-cpu.json").write_text(json.dumps(about | {"rows": found}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--spins", nargs="+", default=list(SPINS))
    parser.add_argument("--first", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--least", type=float, default=0, help="exit with 1 where a share of the fair rate is less")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work()
        return
    if options.first:
        os.setsid()
        Path("/proc/self/autogroup").write_text("-20")
    found = take_turns(options.spins, options.rounds, options.seconds)
    for row in found:
        print(json.dumps(row))
    if options.write:
        write(found, options)
    sys.exit(any(row["share_of_fair"] < options.least for row in found))


if __name__ == "__main__":
    main()
