"""What only a GPU shows of the whole: whole runs on its kernels, as one graph, resumed, and FSDP over NCCL with one rank.

Without a GPU the CPU stands in and runs the same lines: nothing is captured there, nothing compiled, and gloo carries FSDP.
"""

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from fastdit_kernels.attention import choose_attention, eager
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import fastdit
from fastdit import config as C
from fastdit.config import Config, ModelConfig, ParallelConfig, TrainConfig
from fastdit.model import DiT, choose_ops
from fastdit.optim import Optimizer
from fastdit.recipes import RECIPES
from fastdit.runtime import ranks, sharding
from fastdit.runtime.ranks import World
from fastdit.runtime.tensors import load_weights

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parent.parent
STEPS, BATCH = 8, 16  # the graph is captured at the fourth step
TRAIN = "import pickle, sys; from fastdit import train; sys.exit(train.train(pickle.load(sys.stdin.buffer)))"


class Found(NamedTuple):
    """What a run left, and what it printed."""

    curve: list[tuple[int, float, float]]  # images, loss, norm of the gradient
    weights: dict[str, Tensor]
    said: str


def tiny(folder: Path, name: str, **parallel) -> Config:
    """Eight steps on drawn cats; a grid and a checkpoint after every second one."""
    return C.replace(
        RECIPES["cats"],
        run={"name": name, "folder": str(folder / "runs")},
        data={"num_images": 200, "packs": str(folder / "packs")},
        model={"patch": 4, "depth": 2, "width": 64, "num_heads": 2},
        sample={"num": 4, "steps": 2},
        train={"images": STEPS * BATCH, "batch": BATCH, "warmup_images": 2 * BATCH},
        log={"print_every": BATCH, "sample_every": 2 * BATCH, "save_every": 2 * BATCH},
        parallel={"deterministic": True, "threads": 1, **parallel},
    )


def run(config: Config) -> Found:
    """One run in a process of its own: what makes a GPU deterministic must be set before its first product."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    env.pop("TRITON_INTERPRET", None)
    ran = subprocess.run([sys.executable, "-c", TRAIN], input=pickle.dumps(config), env=env, capture_output=True, check=False)
    said = (ran.stdout + ran.stderr).decode()
    assert ran.returncode == 0, said
    folder = Path(config.run.folder) / str(config.run.name)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [(line["images"], line["loss"], line["grad_norm"]) for line in lines]
    return Found(curve, load_weights(max((folder / "checkpoints").iterdir()) / "ema.safetensors")[0], said)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def whole(folder) -> Found:
    """A run as it is by default: on a GPU on the kernels, compiled, and one graph from its fourth step on."""
    return run(tiny(folder, "whole"))


def differ(a: Found, b: Found) -> list[str]:
    return [name for name in a.weights.keys() | b.weights.keys() if not torch.equal(a.weights[name], b.weights[name])]


def test_a_default_run_uses_what_the_device_has(device, whole):
    assert "runs without one" not in whole.said  # the line of a graph that could not be captured
    assert [images for images, *_ in whole.curve] == [BATCH * (i + 1) for i in range(STEPS)]
    if device.type == "cuda":
        assert "Triton" in whole.said
        assert "compiled" in whole.said


def test_a_graph_changes_no_bit(folder, whole):
    plain = run(tiny(folder, "plain", graph="off"))
    assert plain.curve == whole.curve
    assert differ(plain, whole) == []


def test_compiled_kernels_train_as_pytorchs_ops_do(folder, whole):
    """In bf16, so to its rounding."""
    config = tiny(folder, "reference", graph="off", compile="off")
    reference = run(dataclasses.replace(config, kernels="reference"))
    for ours, theirs in zip(whole.curve, reference.curve, strict=True):
        assert ours == pytest.approx(theirs, rel=0.02)


def test_a_run_resumes_to_the_bit(folder, whole):
    """As after a kill between two checkpoints: the newest is gone. On a GPU the second process captures a graph of its own."""
    checkpoints = folder / "runs" / "whole" / "checkpoints"
    shutil.rmtree(max(checkpoints.iterdir()))
    resumed = run(tiny(folder, "whole"))
    assert resumed.curve == whole.curve
    assert differ(resumed, whole) == []


def test_a_run_draws_the_same_pictures_again(folder, whole):
    model = fastdit.load(folder / "runs" / "whole")
    first, second = (fastdit.sample(model, num=5, seed=3) for _ in range(2))
    assert first.shape[0] == 5
    assert first.float().std() > 0
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["auto", "sdpa", "eager"])
def test_attention_of_this_device_is_fp64s_to_bf16(device, name):
    """At B/2's shape, where a GPU takes its fused kernels."""
    rng = torch.Generator().manual_seed(1)
    qkv = torch.randn(2, 256, 3, 12, 64, generator=rng).to(device, torch.bfloat16)
    upstream = torch.randn(2, 256, 12 * 64, generator=rng).to(device, torch.bfloat16)

    def both(function, dtype) -> tuple[Tensor, Tensor]:
        leaf = qkv.to(dtype).requires_grad_()
        out = function(leaf)
        return out.detach(), torch.autograd.grad(out, leaf, upstream.to(dtype))[0]

    truth = both(eager, torch.float64)
    for ours, exact in zip(both(choose_attention(name, device, torch.bfloat16, 64, 256), torch.bfloat16), truth, strict=True):
        assert (ours.double() - exact).norm() <= 0.01 * exact.norm()


@pytest.fixture
def world(device) -> Iterator[World]:
    """A process group of one rank: NCCL on a GPU."""
    threads = torch.get_num_threads()
    yield ranks.init(ParallelConfig(threads=1))
    ranks.shutdown()
    torch.set_num_threads(threads)


def test_fsdp_over_one_rank_trains_as_without(device, world):
    """In bf16: FSDP gathers, casts and reduces with its own kernels, and on a GPU by NCCL on streams of its own."""
    config = Config(
        model=ModelConfig(input_size=(8, 8), patch=2, depth=2, width=64, num_heads=2, num_classes=5),
        parallel=ParallelConfig(precision="bf16", compile="off"),
    )
    rng = torch.Generator().manual_seed(2)
    x, t = torch.randn(4, 3, 8, 8, generator=rng).to(device), 1000 * torch.rand(4, generator=rng).to(device)
    y = torch.arange(4, device=device)
    results = []
    for fsdp in (False, True):
        with torch.device("meta"):
            model = DiT(config.model, choose_ops(config, device))
        if fsdp:
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
            for part in (*model.blocks, model.get_submodule("adaLN_modulation"), model):
                fully_shard(part, mp_policy=policy, reshard_after_forward=False)
            model.to_empty(device=device)
        else:
            sharding.shard(model, config.parallel, world)
        model.init_weights(0)
        optimizer = Optimizer(model, TrainConfig(lr=1e-2, batch=4), 4, kernel=device.type == "cuda")
        losses = []
        for step in range(12):
            sharding.communicate(model, last=True)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
                loss = (model(x, t, y) - x).square().mean()
            loss.backward()
            losses += [loss.item(), optimizer.step(optimizer.rates(4 * step)).item()]
        results.append(losses)
    assert results[0][-2] < 0.9 * results[0][0]
    assert results[1] == pytest.approx(results[0], rel=0.01)
