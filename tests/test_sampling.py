"""Pictures: the modulation computed ahead is the one each step would compute, and no order of calls changes it."""

import dataclasses
import itertools

import pytest
import torch
from fastdit_kernels.reference import REFERENCE

from fastdit import config as C
from fastdit import modulations, sampling
from fastdit.given import Given
from fastdit.model import DiT
from fastdit.recipes import RECIPES
from fastdit.runtime import hardware
from fastdit.runtime.ranks import World
from fastdit.runtime.tensors import save_weights
from fastdit.weights.folder import load_model

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture(params=["labels", "unconditional", "guided"])
def case(request) -> tuple[C.Config, DiT]:
    config = C.replace(
        RECIPES["cats"],
        model={"patch": 8, "depth": 2, "width": 32, "num_heads": 2},
        sample={"steps": 5},
        parallel={"precision": "fp32"},
    )
    if request.param == "unconditional":
        config = C.replace(config, model={"num_classes": 0})
    if request.param == "guided":
        config = C.replace(config, model={"class_dropout": 0.1}, sample={"guidance": 3.0})
    model = DiT(config.model, REFERENCE)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * 0.1)
    return config, model


@pytest.mark.parametrize("group_bytes", [256 << 20, 1])
def test_pictures_are_those_of_a_model_conditioned_anew_each_step(case, group_bytes, monkeypatch):
    config, model = case
    monkeypatch.setattr(modulations, "MODULATION_BYTES", group_bytes)
    found = sampling.make(model, config, None, ALONE, first=3, count=4, seed=1)
    m, s = config.model, config.sample
    x0 = sampling.sample(
        model,
        config.diffusion,
        (4, m.channels, *m.input_size),
        torch.arange(3, 7) % m.num_classes if m.num_classes else None,
        sampler=s.sampler,
        steps=s.steps,
        guidance=s.guidance,
        seed=1,
        first=3,
        null_class=m.num_classes if m.class_dropout else None,
    )
    expected = (x0.clamp(-1, 1) + 1) * 127.5
    assert found.dtype == torch.uint8
    assert (found.double() - expected.double()).abs().max() <= 0.501  # a product of other height may sum in another order
    assert expected.std() > 1


def test_modulation_is_that_of_the_time_whatever_the_order_of_calls(case, monkeypatch):
    """A solver may evaluate twice in a step, or between two times."""
    config, model = case
    monkeypatch.setattr(modulations, "MODULATION_BYTES", 2 * 4 * 4 * model.adaLN_modulation.out_features)  # two times at once
    y = torch.tensor([3, 0, 3, 1]) if config.model.num_classes else None
    times = sampling.sampling_times(config.diffusion, 5)
    ahead = sampling.Modulations(model, times, Given(y), 4, ALONE.device)
    with torch.no_grad():
        for time in (times[0], times[1], times[1], times[2], 123.5, times[4], times[0], times[3]):
            torch.testing.assert_close(ahead.at(time), model.condition(torch.full((4,), time), y).expand_as(ahead.at(time)))


def test_a_solver_that_evaluates_twice_makes_the_same_pictures_with_modulation_computed_ahead(case, monkeypatch):
    """Heun's method on the x0 that the network predicts, its second evaluation at the next step's time."""
    config, model = case
    config = C.replace(config, diffusion={"kind": "flow", "prediction": "x0"})

    def heun(network):
        x = sampling.rng.normal((3, 32, 32), 0, "sample noise", 0, 4, ALONE.device)
        times = [*sampling.sampling_times(config.diffusion, 5), 0.0]
        for t, after in itertools.pairwise(times):
            slope = (x - network(x, t)) / t
            moved = x + (after - t) * slope
            if after:
                slope = (slope + (moved - network(moved, after)) / after) / 2
            x = x + (after - t) * slope
        return x

    y = torch.tensor([3, 0, 3, 1]) if config.model.num_classes else None
    ahead = sampling.Modulations(model, sampling.sampling_times(config.diffusion, 5), Given(y), 4, ALONE.device)
    with torch.no_grad():
        anew = heun(lambda x, t: model(x, torch.full((4,), t), y))
        got = heun(lambda x, t: model(x, torch.full((4,), t), y, modulation=ahead.at(t)))
    torch.testing.assert_close(got, anew, rtol=1e-4, atol=1e-4)


def test_the_projection_is_applied_once_for_a_whole_schedule(case):
    config, model = case
    rows = []
    model.adaLN_modulation.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    sampling.make(model, config, None, ALONE, first=0, count=4, seed=1)
    classes = {"labels": 4, "unconditional": 1, "guided": 5}
    kind = "guided" if config.sample.guidance != 1 else "labels" if config.model.num_classes else "unconditional"
    assert rows == [5 * classes[kind]]


def test_labels_take_turns_or_are_all_the_same():
    config = RECIPES["cats"]
    assert sampling.labels(config, 13, 4).tolist() == [13, 14, 0, 1]
    assert sampling.labels(config, 13, 2, label=7).tolist() == [7, 7]
    unconditional = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=0))
    assert sampling.labels(unconditional, 0, 4) is None


@pytest.mark.parametrize("fast", [True, False])
def test_by_default_a_model_is_in_what_the_device_computes_fast(case, fast, tmp_path, monkeypatch):
    config, model = case
    monkeypatch.setitem(hardware.FAST, torch.bfloat16, fast)
    weights = tmp_path / "ema.safetensors"
    save_weights(weights, dict(model.state_dict()))
    found = load_model(weights, C.replace(config, parallel={"precision": "auto"}), ALONE)
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16 if fast else torch.float32}


def test_compiled_pictures_are_the_same(case):
    """But for a unit in the last place of a pixel here and there."""
    config, model = case
    expected = sampling.make(model, config, None, ALONE, first=0, count=4, seed=2)
    found = sampling.make(sampling.compiled(model, ALONE.device), config, None, ALONE, first=0, count=4, seed=2)
    assert (found.int() - expected.int()).abs().max() <= 1
    assert not found.is_inference()
