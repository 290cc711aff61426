"""fastdit: train Diffusion Transformers fast. Start with train.py; the verbs are the files beside it."""

import os
import sys
from pathlib import Path

# Run as a script, a verb has this folder first on sys.path, and evaluate.py or data/ here would stand in for an installed
# package of that name.
_here = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != _here]

# How long an OpenMP thread spins before it sleeps, where the user has not said. By default nearly for ever: beside one other
# busy process each parallel region then waits for the scheduler, and training takes ten times as long; so few turns cost an
# idle machine nothing. OpenMP reads it when torch loads, so a verb imports fastdit before torch.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "2000"
