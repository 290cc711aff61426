"""What the progress bar costs a tiny model: images a second with plain lines, with the bar, and with a thread that redraws it.

In turns, each a few seconds of training on a terminal (a pty that somebody reads); the figure is the median over the rounds.
`thread` is what the bar was once: rich's own refreshing, ten times a second, which takes the interpreter from the step.

python bench/bench_meter.py [--seconds 2] [--rounds 7] [--write]
"""

import fastdit  # noqa: F401  # isort: skip  before torch

import argparse
import importlib.metadata
import json
import math
import os
import platform
import pty
import statistics
import subprocess
import sys
import tempfile
import threading
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from rich.progress import Progress

from fastdit import meter as meters
from fastdit.config import replace
from fastdit.diffusion import choose_objective, draw
from fastdit.meter import Meter
from fastdit.model import DiT, choose_ops
from fastdit.optim import Optimizer
from fastdit.recipes import RECIPES
from fastdit.runtime.ranks import World
from fastdit.train import update

ROOT = Path(__file__).parent.parent
MODES = ("plain", "bar", "thread")
CONFIG = replace(
    RECIPES["cats"],
    model={"patch": 8, "depth": 2, "width": 64, "num_heads": 1},
    train={"images": 10**7, "batch": 8},
    log={"print_every": 8 * 50},
)


def work(seconds: float, rounds: int) -> dict[str, list[float]]:
    """Train in turns, with what the meter shows on this process's terminal: {mode: rates}."""
    device, batch = torch.device("cpu"), CONFIG.train.batch
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    world = World(0, 1, 0, 1, device)
    model = DiT(CONFIG.model, choose_ops(CONFIG, device))
    model.init_weights(0)
    optimizer = Optimizer(model, CONFIG.train, batch)
    objective = choose_objective(CONFIG, device)
    x0, y = torch.randn(batch, CONFIG.model.channels, *CONFIG.model.input_size), torch.zeros(batch, dtype=torch.int64)
    rates: dict[str, list[float]] = {mode: [] for mode in MODES}
    often = meters.REFRESH_S
    for turn in range(-len(MODES), rounds * len(MODES)):  # the first turns warm up
        mode = MODES[turn % len(MODES)]
        with tempfile.TemporaryDirectory() as folder:
            console = Console(force_terminal=mode != "plain", width=100)
            meter = Meter(Path(folder), CONFIG, world, batch_images=batch, flops_per_image=1e6, console=console)
            meters.REFRESH_S = often
            if mode == "thread":
                assert meter.bar is not None
                meter.bar = Progress(*meter.bar.columns, console=console)
                meter.task = meter.bar.add_task("", total=CONFIG.train.images, figures="starting")
                meter.bar.start()
                meters.REFRESH_S = math.inf
            seen, start = 0, perf_counter()
            while perf_counter() - start < seconds:
                drawn = draw(objective, x0, y, 0, seen)
                loss, norm = update(model, objective, optimizer, [drawn], optimizer.rates(seen))
                seen += batch
                meter.add(loss, norm, batch)
                if meter.due(seen):
                    meter.report(seen, lr=1e-4)
            if turn >= 0:
                rates[mode].append(seen / (perf_counter() - start))
            meter.close()
    return rates


def on_a_terminal(seconds: float, rounds: int) -> dict[str, list[float]]:
    """`work` in a process whose terminal is a pty, which this process reads as a terminal would."""
    ours, theirs = pty.openpty()

    def drain() -> None:
        while True:
            try:
                if not os.read(ours, 1 << 16):
                    return
            except OSError:
                return  # the other end is closed

    with tempfile.NamedTemporaryFile() as found:
        command = [sys.executable, __file__, "--seconds", str(seconds), "--rounds", str(rounds), "--into", found.name]
        child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"})
        os.close(theirs)
        reader = threading.Thread(target=drain, daemon=True)
        reader.start()
        if child.wait():
            raise RuntimeError(f"the training ended with {child.returncode}")
        return json.loads(Path(found.name).read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="keep bench/results/bench_meter-cpu.json")
    parser.add_argument("--into", help="for the process on the terminal")
    asked = parser.parse_args()
    if asked.into:
        Path(asked.into).write_text(json.dumps(work(asked.seconds, asked.rounds)))
        return
    rates = on_a_terminal(asked.seconds, asked.rounds)
    plain = statistics.median(rates["plain"])
    with torch.device("meta"):
        model = DiT(CONFIG.model, choose_ops(CONFIG, torch.device("cpu")))
    versions = {name: importlib.metadata.version(name) for name in ("torch", "rich")}
    found = {
        "device": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"python": platform.python_version(), **versions},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch": CONFIG.train.batch,
        "seconds": asked.seconds,
        "rounds": asked.rounds,
        "img_per_s": {
            mode: {"median": round(statistics.median(r), 1), "least": round(min(r), 1), "most": round(max(r), 1)}
            for mode, r in rates.items()
        },
        "share_of_plain": {mode: round(statistics.median(r) / plain, 3) for mode, r in rates.items()},
    }
    print(json.dumps(found, indent=1))
    if asked.write:
        (ROOT / "bench" / "results" / "bench_meter-cpu.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
