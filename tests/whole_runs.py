"""What tests of whole runs share: a small run, one that a signal reaches at a step, and what is read of them afterwards."""

import json
import os
import signal
from pathlib import Path

import torch

from fastdit import config as C
from fastdit import train
from fastdit.config import Config
from fastdit.optim import Optimizer
from fastdit.recipes import RECIPES
from fastdit.runtime.tensors import load_weights

STEPS, BATCH = 6, 16


def tiny(folder: Path, **groups) -> Config:
    """Six steps of 16 images on a network of 30 thousand parameters; every step is printed, every second one saved."""
    config = C.replace(
        RECIPES["cats"],
        run={"name": "tiny", "folder": str(folder / "runs")},
        data={"num_images": 200, "packs": str(folder / "packs")},
        model={"patch": 8, "depth": 2, "width": 32, "num_heads": 2},
        sample={"num": 4, "steps": 2},
        train={"images": STEPS * BATCH, "batch": BATCH, "warmup_images": 32},
        log={"print_every": BATCH, "sample_every": 3 * BATCH, "save_every": 2 * BATCH},
        parallel={"threads": 1},
    )
    return C.replace(config, **groups)


def run(config: Config) -> int:
    """One rank's whole run."""
    return train.train(config)


def run_signalled(config: Config, after: int, number: int = signal.SIGKILL) -> int:
    """A run that a signal reaches in its optimizer step number `after`, before anything of it is applied."""
    before, calls = Optimizer.step, [0]

    def step(self, *args):
        calls[0] += 1
        if calls[0] == after:
            os.kill(os.getpid(), number)
        return before(self, *args)

    Optimizer.step = step
    return train.train(config)


def metrics(folder: Path, name: str = "tiny") -> list[dict]:
    return [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def curve(folder: Path, name: str = "tiny") -> list[tuple]:
    return [(line["images"], line["loss"], line["grad_norm"], line["lr"]) for line in metrics(folder, name)]


def weights(folder: Path, images: int = STEPS * BATCH) -> dict[str, torch.Tensor]:
    """The averaged weights of the checkpoint at so many images."""
    [path] = (folder / "runs" / "tiny" / "checkpoints").glob(f"*{images}/ema.safetensors")
    return load_weights(path)[0]
