"""fastdit: train Diffusion Transformers fast. Start with train.py; the verbs are the files beside it."""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

# Run as a script, a verb has this folder first on sys.path, and evaluate.py or data/ here would stand in for an installed
# package of that name.
_here = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != _here]

# How long an OpenMP thread spins before it sleeps, where the user has not said. By default nearly for ever: beside one other
# busy process each parallel region then waits for the scheduler, and training may take ten times as long. docs/results.md has
# what each count gives, alone and beside others. OpenMP reads it when torch loads, so a verb imports fastdit before torch.
SPINS = "2000"
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = SPINS

# What a Python program wants of fastdit, by the file it comes from. It is imported when it is first asked for, so that `import
# fastdit` takes no time. `sample` is the verb's module, which Python binds to that name in any case: it can be called.
_API = {"DiT": "fastdit.model", "load": "fastdit.weights.folder", "sample": ""}
__all__ = ["DiT", "load", "sample"]


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'fastdit' has no attribute {name!r}")
    return getattr(importlib.import_module(_API[name]), name) if _API[name] else importlib.import_module(f"fastdit.{name}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
