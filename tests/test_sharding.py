"""One rank without FSDP against FSDP over one rank, and what several ranks send each other, in which order."""

import dataclasses
import os
import warnings

import pytest
import torch
from fastdit_kernels.reference import REFERENCE
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdit.checkpoint import Checkpoints
from fastdit.config import ModelConfig, ParallelConfig, TrainConfig
from fastdit.model import DiT
from fastdit.optim import Optimizer
from fastdit.runtime import ranks, sharding

MODEL = ModelConfig(input_size=(8, 8), patch=2, depth=3, width=32, num_heads=2, num_classes=5)
TRAIN = TrainConfig(lr=1e-2, ema=0.9, batch=4)
BF16 = ParallelConfig(precision="bf16", compile="off", threads=1)


def made(fsdp: bool, parallel: ParallelConfig = BF16) -> DiT:
    """The model as train.py places it, or as FSDP would over the ranks there are."""
    world = ranks.init(parallel)
    with torch.device("meta"):
        model = DiT(MODEL, REFERENCE)
    if fsdp:
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for block in model.blocks:
            fully_shard(block, mp_policy=policy, reshard_after_forward=False)
        fully_shard(model, mp_policy=policy, reshard_after_forward=False)
        model.to_empty(device="cpu")
    else:
        sharding.shard(model, parallel, world)
    model.init_weights(0)
    return model


def backward(model: DiT, number: int) -> float:
    rng = torch.Generator().manual_seed(number)
    x, t = torch.randn(4, 3, 8, 8, generator=rng), torch.rand(4, generator=rng) * 1000
    loss = (model(x, t, torch.arange(4)) - x).square().mean()
    loss.backward()
    return loss.item()


def trained(fsdp: bool, accum: int, folder) -> tuple[list[float], dict[str, torch.Tensor], torch.Tensor, dict[str, bytes]]:
    """Losses, every tensor of a checkpoint, pictures of the averaged weights, and the checkpoint's files."""
    model = made(fsdp)
    optimizer = Optimizer(model, TRAIN, 4)
    losses = []
    for step in range(3):
        for micro in range(accum):
            sharding.communicate(model, last=micro == accum - 1)
            losses.append(backward(model, step * accum + micro))
        losses.append(optimizer.step(optimizer.rates(step * 4)).item())
    with optimizer.ema.applied(model), torch.no_grad():
        averaged = model(torch.ones(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    with torch.no_grad():
        losses.append(model(torch.ones(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64)).sum().item())
    checkpoints = Checkpoints(folder, 1)
    checkpoints.save(12, optimizer.tensors(), {}, weights=optimizer.ema.full_tensors())
    checkpoints.wait()
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    tensors = {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach() for n, t in optimizer.tensors().items()}
    ranks.shutdown()
    return losses, tensors, averaged, files


@pytest.mark.parametrize("accum", [1, 3])
def test_one_rank_computes_and_saves_what_fsdp_does_to_the_bit(run_ranks, tmp_path, accum):
    """In bf16, whose gradients are summed over micro-steps in fp32."""
    [(losses, tensors, averaged, files)] = run_ranks(1, trained, False, accum, tmp_path / "plain", init=False)
    [(expected, theirs, their_average, their_files)] = run_ranks(1, trained, True, accum, tmp_path / "fsdp", init=False)
    assert losses == expected
    assert torch.equal(averaged, their_average)
    assert tensors.keys() == theirs.keys()
    assert [n for n, t in tensors.items() if t.dtype != torch.float32 or not torch.equal(t, theirs[n])] == []
    assert files == their_files


def resumed(folder) -> tuple[torch.Tensor, torch.Tensor]:
    """An output of the model after training, and of another model that has loaded what the first one saved."""
    model = made(False)
    optimizer = Optimizer(model, TRAIN, 4)
    backward(model, 0)
    optimizer.step(optimizer.rates(0))
    checkpoints = Checkpoints(folder, 1)
    checkpoints.save(4, optimizer.tensors(), {})
    checkpoints.wait()
    other = made(False)
    loaded = Optimizer(other, TRAIN, 4)
    checkpoints.load(loaded.tensors())
    sharding.refresh(other)
    with torch.no_grad():
        x = torch.ones(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
        found = model(*x), other(*x)
    ranks.shutdown()
    return found


def test_one_rank_computes_with_what_it_has_loaded(run_ranks, tmp_path):
    [(ours, theirs)] = run_ranks(1, resumed, tmp_path / "checkpoints", init=False)
    assert ours.count_nonzero()
    assert torch.equal(ours, theirs)


class Sent(TorchDispatchMode):
    """Writes down each collective and the number of elements a rank gives."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.calls.append((func.__name__.partition(".")[0].strip("_"), args[1].numel()))
        return func(*args, **(kwargs or {}))


def sent() -> tuple[list[int], dict[str, int]]:
    """Sizes of the reduce-scatters of a backward, in order, and parameters of each part of the model."""
    model = made(False)
    Optimizer(model, TRAIN, 4)
    sharding.communicate(model, last=True)
    backward(model, 0)  # the first backward also sets FSDP up
    with Sent() as calls:
        backward(model, 1)
    parts = {"block": sum(p.numel() for p in model.blocks[0].parameters())}
    parts["modulation"] = sum(p.numel() for p in model.adaLN_modulation.parameters())
    parts["root"] = sum(p.numel() for p in model.parameters()) - 3 * parts["block"] - parts["modulation"]
    ranks.shutdown()
    return [size for name, size in calls.calls if name.startswith("reduce_scatter")], parts


def test_the_modulation_is_reduced_when_its_gradient_is_whole_and_the_root_last(run_ranks):
    for sizes, parts in run_ranks(2, sent, init=False):
        names = [min(parts, key=lambda part: abs(parts[part] - size)) for size in sizes]
        assert names == ["block", "block", "block", "modulation", "root"]


def settings(parallel: ParallelConfig) -> tuple[bool, bool, bool, bool, str]:
    model = made(False, parallel)
    losses = [backward(model, 0), backward(model, 0)]  # and no op refuses
    ranks.shutdown()
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled() or torch.backends.cuda.cudnn_sdp_enabled(),
        losses[0] == losses[1],
        os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""),
    )


def test_deterministic_leaves_a_gpu_no_choice(run_ranks):
    asked = dataclasses.replace(BF16, deterministic=True)
    assert run_ranks(1, settings, asked, init=False) == [(True, True, False, True, ":4096:8")]
    assert run_ranks(1, settings, BF16, init=False) == [(False, True, True, True, "")]


def visible() -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def test_ranks_of_a_test_see_no_gpu(run_ranks, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert run_ranks(2, visible) == ["", ""]
