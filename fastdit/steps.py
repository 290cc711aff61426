"""The steps of sampling a flow as one function of noise: shapes and times are fixed, and what the steps share is made once.

For a control loop, which asks for one sample at a time and waits for it. On a GPU all steps are one CUDA graph, whose noise and
modulation are copied in: one graph serves all classes and conditions.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdit.config import DiffusionConfig
from fastdit.runtime.graph import WARM_UPS, Graphed


class EulerSteps:
    """x0 from noise, by Euler's steps at these times, for batches of one size: what `sampling.sample` makes, to the bit.

    Nothing is made in a call but what the network computes: x moves in place. graph: whether all steps become one CUDA graph,
    after `warm_ups` calls; backend: as `Graphed` takes it.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        config: DiffusionConfig,
        times: Sequence[float],
        batch: int,
        device: torch.device,
        graph: bool = False,
        backend: Any = None,
    ):
        self.model, self.config = model, config
        self.times = [torch.full((batch,), time, device=device) for time in times]
        self.shares = [time / config.timesteps for time in times]
        self.ratios = [after / time for time, after in itertools.pairwise([*times, 0.0])]
        self.run: Callable[..., Tensor] = Graphed(self._steps, backend=backend) if graph else self._steps
        self.warm_ups = WARM_UPS + 1 if graph else 1

    def __call__(self, noise: Tensor, modulations: Sequence[Tensor]) -> Tensor:
        """x0 [B, C, *size], kept until the next call, from noise, which is overwritten; modulations [B, 6·L + 2, D] a step."""
        return self.run(noise, *modulations)

    def _steps(self, x: Tensor, *modulations: Tensor) -> Tensor:
        x0 = x
        for t, share, ratio, modulation in zip(self.times, self.shares, self.ratios, modulations, strict=True):
            out = self.model(x, t, modulation=modulation).float()
            x0 = out if self.config.prediction == "x0" else x - share * out
            if self.config.clip_x0:
                x0 = x0.clamp(-1, 1)
            if ratio:
                x.sub_(x0).mul_(ratio).add_(x0)  # along the straight line through x and x0
        return x0
