"""The steps of a flow as one function: those of `sample` to the bit. test_graph.py has them as one graph."""

import pytest
import torch
from fastdit_kernels.reference import REFERENCE

from fastdit import config as C
from fastdit import modulations, sampling
from fastdit.given import Given
from fastdit.model import DiT
from fastdit.recipes import RECIPES
from fastdit.runtime import rng
from fastdit.steps import EulerSteps

CPU = torch.device("cpu")


def network(jumps: bool, prediction: str) -> tuple[C.Config, DiT]:
    config = C.replace(
        RECIPES["cats"],
        model={"patch": 8, "depth": 2, "width": 32, "num_heads": 2, "jumps": jumps},
        diffusion={"prediction": prediction},
    )
    model = DiT(config.model, REFERENCE).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return config, model


def parts(config, model, steps: int):
    times = sampling.sampling_times(config.diffusion, steps)
    euler = EulerSteps(model, config.diffusion, times, 2, CPU)
    y = torch.tensor([3, 11])
    ahead = modulations.Modulations(model, times, Given(y), 2, CPU)
    return euler, y, [ahead.at(time) for time in times]


@pytest.mark.parametrize("prediction", ["x0", "velocity"])
@pytest.mark.parametrize(("steps", "jumps"), [(1, True), (2, True), (4, True), (20, True), (4, False)])
def test_they_are_the_steps_of_sample_to_the_bit(steps, jumps, prediction):
    config, model = network(jumps, prediction)
    euler, y, each = parts(config, model, steps)
    found = {}
    for known in (jumps, False):
        kept = modulations.Modulations(model, sampling.sampling_times(config.diffusion, steps), Given(y), 2, CPU)
        kept.lengths = modulations.jump_lengths(kept.times, known)
        options = {"steps": steps, "seed": 4, "first": 6, "modulation": kept.at}
        found[known] = sampling.sample(model, config.diffusion, (2, 3, 32, 32), y, **options)
    got = euler(rng.normal((3, 32, 32), 4, "sample noise", 6, 2, CPU), each)
    assert torch.equal(got, found[jumps])
    if jumps and steps <= modulations.FEW:
        assert not torch.allclose(got, found[False], atol=1e-3)  # the lengths of the jumps are what the network is given
