"""A trained model as a policy: an observation in physical units goes in, a chunk of actions in physical units comes out."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdit import sampling
from fastdit.config import UserError, plain, replace, times
from fastdit.given import Given
from fastdit.runtime.latency import measure
from fastdit.runtime.ranks import World
from fastdit.weights.folder import Located, load_model, locate

CHUNKS = 1_000  # of an episode; noise is numbered by them
WARM_UP = 10  # calls before those that are timed


class Policy:
    """Chunks of actions from a model over sequences with a condition.

    The noise of a chunk is a function of the seed and the chunk's number: the same chunk from the same observation.
    """

    def __init__(self, found: Located, device: torch.device | str | None = None) -> None:
        m, normaliser = found.config.model, found.normaliser
        if not m.condition or len(m.input_size) != 1 or normaliser is None or normaliser.condition is None:
            raise UserError(
                f"{plain(found.weights)}: a policy makes sequences for a condition; this model makes "
                f"{times((m.channels, *m.input_size))} for a condition of {m.condition or 'no'} numbers"
            )
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = load_model(found.weights, found.config, World(0, 1, 0, 1, self.device))
        self.config, self.class_names = found.config, list(found.class_names)
        self.x, self.condition = normaliser.x, normaliser.condition

    @staticmethod
    def load(source: str | Path, device: torch.device | str | None = None) -> "Policy":
        """The policy in a run folder, a checkpoint or an exported folder. Raises UserError, one line."""
        return Policy(locate(source), device)

    def plan(
        self, observations: NDArray[Any] | Tensor, label: int | None = None, *, steps: int = 1, seed: int = 0, number: int = 0
    ) -> Tensor:
        """Actions [B, n, A], fp32 on the CPU, for observations [B, K], in `steps` evaluations of the network.

        label: the task, where the model has classes. number: of the chunk of the first observation; the others follow.
        Raises UserError for observations of another size.
        """
        given = torch.as_tensor(np.asarray(observations), dtype=torch.float64)
        m = self.config.model
        if given.ndim != 2 or given.shape[1] != m.condition:
            raise UserError(f"observations of {times(tuple(given.shape))}; this policy takes [B, {m.condition}]")
        if not given.isfinite().all():
            raise UserError("an observation holds numbers that are not finite")
        if (label is None) == (m.num_classes > 0) or (label is not None and not 0 <= label < m.num_classes):
            known = f"tasks 0 … {m.num_classes - 1}" if m.num_classes else "no tasks"
            raise UserError(f"task {label}; this policy knows {known}")
        config, count = replace(self.config, sample={"steps": steps}), len(given)
        asked = Given(sampling.labels(config, number, count, label), self.condition.normalise(given))
        modulations = sampling.ahead(self.model, config, asked, count, self.device)
        x0 = sampling.x0_of(self.model, config, asked, modulations, number, count, seed)
        return self.x.physical(x0.cpu()).transpose(1, 2)  # [B, n, A]

    def latency(self, steps: int, repeats: int = 200) -> tuple[float, float]:
        """Median and 99th percentile of the milliseconds that a chunk takes at batch 1, from observation to actions."""
        observation = np.zeros((1, self.config.model.condition))
        label = 0 if self.config.model.num_classes else None
        for _ in range(WARM_UP):
            self.plan(observation, label, steps=steps)
        found = measure(lambda n: self.plan(observation, label, steps=steps, number=n), repeats, self.device)
        return 1e3 * found.median, 1e3 * found.p99
