"""The default model on a machine that others use too: images a second alone, and beside one and four busy processes.

The training has C threads on C cores. Beside N busy processes C + N want to run, and a fair scheduler gives it C / (C + N) of
the machine. `share_of_fair` is what was reached of that much of the rate alone; at least 0.8 is asked.

python bench/bench_busy.py [--seconds 20] [--write]: "before" is without fastdit's bound on OpenMP's spinning.
"""

import fastdit  # isort: skip  before torch

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from fastdit.diffusion import choose_objective, draw
from fastdit.model import DiT, choose_ops
from fastdit.optim import Optimizer
from fastdit.recipes import RECIPES
from fastdit.train import update

ROOT = Path(__file__).parent.parent
BUSY = "while True: pass"
DEFAULT = "300000"  # OpenMP's own count of turns, which no variable set means


def measure(seconds: float) -> float:
    """Images a second of the default recipe's step, by itself."""
    config = RECIPES["cats"]
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    device = torch.device("cpu")
    model = DiT(config.model, choose_ops(config, device))
    model.init_weights(0)
    batch = config.train.batch
    optimizer = Optimizer(model, config.train, batch)
    objective = choose_objective(config, device)
    x0, y = torch.randn(batch, config.model.channels, *config.model.input_size), torch.zeros(batch, dtype=torch.int64)

    def step(number: int) -> None:
        update(model, objective, optimizer, [draw(objective, x0, y, 0, number * batch)], optimizer.rates(number * batch))

    for number in range(3):
        step(number)
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        step(3 + steps)
        steps += 1
    return steps * batch / (time.perf_counter() - start)


def beside(busy: int, seconds: float, spins: str) -> float:
    """The same in a process of its own, beside `busy` others that never rest."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
    try:
        env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | {"GOMP_SPINCOUNT": spins}
        command = [sys.executable, __file__, "--measure", "--seconds", str(seconds)]
        return float(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.measure:
        print(measure(options.seconds))
        return
    cores, rows, load = len(os.sched_getaffinity(0)), [], os.getloadavg()[0]
    for name, spins in (("before", DEFAULT), ("after", fastdit.SPINS)):
        alone = beside(0, options.seconds, spins)
        for busy in (0, 1, 4):
            rate = beside(busy, options.seconds, spins) if busy else alone
            row = {"spinning": name, "GOMP_SPINCOUNT": int(spins), "busy_processes": busy, "img_per_s": round(rate, 1)}
            row["share_of_fair"] = round(rate / (alone * cores / (cores + busy)), 3)
            rows.append(row)
            print(json.dumps(row), flush=True)
    if options.write:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        found = {
            "device": f"{cores} CPU cores, {platform.processor() or platform.machine()}",
            "torch": torch.__version__,
            "commit": commit.stdout.strip(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "load_before": load,
            "rows": rows,
        }
        (ROOT / "bench" / "results" / "bench_busy-cpu.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
