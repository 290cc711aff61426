"""The step as one graph, where there is no GPU: a stand-in records the ops of a capture and replays exactly those.

As a CUDA graph does, it keeps the tensors and the numbers that the ops were given, runs nothing of the host in a replay, and
leaves nothing changed by the capture itself. It refuses what a capture refuses: a value read on the host, a random draw.
"""

import dataclasses
import functools
from contextlib import nullcontext

import pytest
import torch
from fastdit_kernels.reference import REFERENCE
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdit import config as C
from fastdit import consistency, train
from fastdit.config import Config, ParallelConfig
from fastdit.diffusion import choose_objective, draw
from fastdit.given import Given
from fastdit.model import DiT
from fastdit.optim import Optimizer
from fastdit.recipes import RECIPES
from fastdit.runtime import graph as graphs
from fastdit.runtime import ranks, sharding
from fastdit.runtime.graph import Graphed
from fastdit.sampling import sampling_times
from fastdit.steps import EulerSteps

REFUSED = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "randn", "rand", "normal_", "uniform_", "bernoulli_")


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Recorder(TorchDispatchMode):
    """Writes down the ops, and what the tensors that were there before held."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple] = []
        self.own: dict[int, torch.Tensor] = {}  # storages made by the ops; kept, so that no address comes twice
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if name in REFUSED:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for t in tensors(value):
                    key = t.untyped_storage().data_ptr()
                    if key not in self.own and key not in self.before:
                        self.before[key] = t.untyped_storage(), t.untyped_storage().clone()
        # The optimizer's kernel finds its tensors by a table that is filled after the capture. Its results are all in place.
        out = None if name == "adamw_ema" else func(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        for t in tensors(out):
            if t.untyped_storage().data_ptr() not in given:
                self.own.setdefault(t.untyped_storage().data_ptr(), t)
        if not func.is_view and name not in ("detach", "empty", "empty_like", "new_empty", "empty_strided"):
            self.ops.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self.ops:
                found = func(*args, **kwargs)
                for new, kept in zip(tensors(found), tensors(out), strict=True):
                    if new.data_ptr() != kept.data_ptr():
                        kept.detach().copy_(new)


class Recorded:
    """graph.Cuda's two methods, on a CPU."""

    def __init__(self) -> None:
        self.captures: list[Recorder] = []

    def warm_up(self):
        return nullcontext()

    def capture(self, call) -> Recorder:
        recorder = Recorder()
        with pytest.MonkeyPatch.context() as patch, recorder:
            patch.setattr(graphs, "capturing", lambda: True)
            call()
        for storage, held in recorder.before.values():
            storage.copy_(held)
        self.captures.append(recorder)
        return recorder


def config(**groups) -> Config:
    tiny = RECIPES["cats"]
    tiny = C.replace(
        tiny,
        model={"input_size": (8, 8), "patch": 2, "depth": 2, "width": 32, "num_heads": 2, "class_dropout": 0.2},
        train={"batch": 4, "images": 64, "warmup_images": 16, "lr": 1e-2},
        parallel={"precision": "bf16", "threads": 1},
    )
    return C.replace(tiny, **groups)


def given_of(config: Config, rng: torch.Generator) -> Given:
    """Classes of four images; with a condition also that and, along the rows, lengths, which differ from step to step."""
    if not config.model.condition:
        return Given(torch.arange(4))
    condition = torch.randn(4, config.model.condition, generator=rng)
    return Given(torch.arange(4), condition, torch.randint(1, 9, (4,), generator=rng))


def trained(config: Config, graphed: bool, kernel: bool, steps: int) -> tuple[list[float], dict[str, torch.Tensor], list[str]]:
    """Losses and norms of some steps, one of them not finite; every tensor after them; and lines that were said."""
    world = ranks.init(config.parallel)
    model = DiT(config.model, REFERENCE).to("meta")
    sharding.shard(model, config.parallel, world)
    model.init_weights(0)
    optimizer = Optimizer(model, config.train, config.train.batch * config.train.grad_accum, kernel=kernel)
    objective = choose_objective(config, world.device)
    said: list[str] = []
    recorded = Recorded()
    step = functools.partial(train.update, model, objective, optimizer)
    if graphed:
        step = Graphed(step, said.append, optimizer.captured, recorded)
    found = []
    for number in range(steps):
        drawn = []
        for micro in range(config.train.grad_accum):
            rng = torch.Generator().manual_seed(number * 10 + micro)
            x0 = torch.randn(4, 3, 8, 8, generator=rng)
            if number == steps - 2:
                x0[0, 0, 0, 0] = torch.nan
            jumps = consistency.on(config, number * config.train.batch * config.train.grad_accum)
            first = 4 * (number * config.train.grad_accum + micro)
            drawn.append(draw(objective, x0, given_of(config, rng), 0, first, jumps))
        loss, norm = step(drawn, optimizer.rates(number * config.train.batch * config.train.grad_accum))
        found += [loss.item(), norm.item()]
        if number == 4:  # a grid between two steps
            with optimizer.ema.applied(model), torch.no_grad():
                given = given_of(config, rng)
                found.append(model(x0, torch.zeros(4), given.y, **given.beside).sum().item())
    if graphed and not said:
        assert len(recorded.captures) == 1 + (config.diffusion.consistency > 0)
        assert config.diffusion.consistency or step.calls == steps
    ranks.shutdown()
    return found, {n: t.detach().clone() for n, t in optimizer.tensors().items()}, said


@pytest.mark.parametrize(
    ("groups", "kernel"),
    [
        ({}, False),
        ({}, True),
        ({"train": {"grad_accum": 2, "spike_sigma": 3.0}}, False),
        ({"train": {"grad_accum": 2}}, True),
        ({"diffusion": {"kind": "flow", "model_guidance": 0.3}, "parallel": {"precision": "fp32"}}, False),
        ({"model": {"learn_sigma": True}, "diffusion": {"kind": "ddpm"}}, False),
        ({"model": {"condition": 3}, "diffusion": {"model_guidance": 0.3}}, False),
        # From the fifth step on with jumps: another graph.
        ({"model": {"jumps": True}, "diffusion": {"consistency": 0.75, "model_guidance": 0.3}}, False),
        ({"model": {"jumps": True}, "diffusion": {"consistency": 0.75}}, True),
    ],
    ids=[
        "bf16",
        "kernel",
        "accumulated",
        "kernel, accumulated",
        "flow",
        "learned variance",
        "conditions and lengths",
        "jumps",
        "kernel, jumps",
    ],
)
def test_a_replayed_step_is_the_step_to_the_bit(run_ranks, groups, kernel):
    """Learning rate, averages' weight, step counts, batches, noise and skips all change from replay to replay."""
    steps = 12 if "jumps" in groups.get("model", {}) else 8
    [(losses, weights, _)] = run_ranks(1, trained, config(**groups), False, kernel, steps, init=False)
    [(replayed, theirs, said)] = run_ranks(1, trained, config(**groups), True, kernel, steps, init=False)
    assert not said
    assert [x if x == x else None for x in replayed] == [x if x == x else None for x in losses]
    assert weights.keys() == theirs.keys()
    assert [n for n, t in weights.items() if not torch.equal(t, theirs[n])] == []
    assert weights["skips"].tolist() == [1, 0]


def read_by_the_host(x: torch.Tensor) -> torch.Tensor:
    return x * x.sum().item()


def drawn_inside(x: torch.Tensor) -> torch.Tensor:
    return x + torch.rand_like(x).mul(0) + torch.randn(3)


@pytest.mark.parametrize(("function", "what"), [(read_by_the_host, "_local_scalar_dense"), (drawn_inside, "randn")])
def test_where_a_capture_fails_the_function_goes_on_with_one_line(function, what):
    said: list[str] = []
    told: list[bool] = []
    graphed = Graphed(function, said.append, told.append, Recorded())
    for number in range(6):
        x = torch.arange(3.0) + number
        found = graphed(x)
        if function is read_by_the_host:
            assert torch.equal(found, function(x))
    assert told == [False]
    assert len(said) == 1
    assert "runs without one" in said[0]
    assert what in said[0]


def test_a_number_of_the_host_would_be_frozen():
    """What the test above relies on: the stand-in replays a number that was no argument as it was in the capture."""
    number = [0.0]
    graphed = Graphed(lambda x: x + number[0], backend=Recorded())
    for n in range(6):
        number[0] = float(n)
        found = graphed(torch.zeros(2)).tolist()
    assert found == [3.0, 3.0]


def test_when_a_step_is_a_graph():
    def world(size: int, device: str):
        return ranks.World(0, size, 0, size, torch.device(device))

    auto = ParallelConfig()
    assert graphs.graphs(auto, world(1, "cuda"))
    assert not graphs.graphs(auto, world(2, "cuda"))
    assert not graphs.graphs(auto, world(1, "cpu"))
    assert not graphs.graphs(dataclasses.replace(auto, graph="off"), world(1, "cuda"))


@pytest.mark.parametrize("steps", [1, 4])
def test_all_steps_of_sampling_are_one_graph(steps):
    """After `warm_ups` calls noise and modulation change from replay to replay."""
    settings = config(model={"jumps": True})
    model = DiT(settings.model, REFERENCE).eval().requires_grad_(False)
    model.init_weights(0)
    model.final_layer.linear.weight.normal_(generator=torch.Generator().manual_seed(0))
    times, recorded = sampling_times(settings.diffusion, steps), Recorded()
    graphed = EulerSteps(model, settings.diffusion, times, 1, torch.device("cpu"), graph=True, backend=recorded)
    plain = EulerSteps(model, settings.diffusion, times, 1, torch.device("cpu"))
    for _ in range(graphed.warm_ups):
        assert not recorded.captures
        graphed(torch.randn(1, 3, 8, 8), [torch.randn(1, 14, 32) for _ in times])
    assert len(recorded.captures) == 1
    found = []
    for _ in range(3):
        noise, modulations = torch.randn(1, 3, 8, 8), [torch.randn(1, 14, 32) for _ in times]
        found.append(graphed(noise.clone(), modulations).clone())
        assert torch.equal(found[-1], plain(noise.clone(), modulations))
    assert not torch.equal(found[0], found[1])
    assert len(recorded.captures) == 1
