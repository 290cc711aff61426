"""fastdit: train Diffusion Transformers fast. Start with train.py; the verbs are the files beside it."""

import sys
from pathlib import Path

# Run as a script, a verb has this folder first on sys.path, and evaluate.py or data/ here would stand in for an installed
# package of that name.
_here = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != _here]
