"""The plan against a real run: bytes of every state and of the activations that two ranks allocate, and the bounds by hand."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from fastdit_kernels.cpu import CPU
from fastdit_kernels.reference import REFERENCE
from torch.nn import functional as F

from fastdit import config as configs
from fastdit import plan
from fastdit.config import Config, ModelConfig, ParallelConfig, TrainConfig, UserError
from fastdit.diffusion import choose_objective
from fastdit.model import DiT
from fastdit.optim import Optimizer
from fastdit.planning import activations, costs
from fastdit.planning import memory as footprint
from fastdit.planning.flops import train_flops_per_image
from fastdit.planning.gpus import GPUS
from fastdit.recipes import RECIPES, dit
from fastdit.runtime import ranks, sharding
from fastdit.runtime.sharding import local

BATCH = 6


def fused(qkv):
    q, k, v = (t.transpose(1, 2) for t in (qkv.unbind(2) if isinstance(qkv, torch.Tensor) else qkv))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


OPS = REFERENCE._replace(attention=fused)


def small(recompute: bool = False, **model) -> Config:
    """Awkward throughout: 60 tokens, heads of 44, rows of 7 that two ranks do not share evenly; bf16, as on a planned GPU."""
    m = {"input_size": (20, 12), "channels": 4, "num_classes": 7, "depth": 3, "width": 132, "num_heads": 3, **model}
    return Config(
        model=ModelConfig(**m),
        train=TrainConfig(batch=BATCH),
        parallel=ParallelConfig(precision="bf16", checkpoint_activations=recompute, compile="off", threads=1),
    )


def storages(tensors) -> int:
    """Bytes of the storages behind these tensors, each once."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def allocated(config: Config) -> dict[str, int]:
    """One rank's training step: bytes of its states after it, and of what the forward kept for the backward."""
    world = ranks.init(config.parallel)
    with torch.device("meta"):
        model = DiT(config.model, OPS)
    sharding.checkpoint(model, config.parallel)
    sharding.shard(model, config.parallel, world)
    model.init_weights(0)
    optimizer = Optimizer(model, config.train, config.train.batch * world.size)
    m = config.model
    objective = choose_objective(config, world.device)
    x0, y = torch.randn(BATCH, m.channels, *m.input_size), torch.arange(BATCH) % m.num_classes

    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = objective.loss(model, x0, y, seed=0, first=0)
    gathered = list(model.parameters())  # between forward and backward these are the gathered weights
    weights = {p.untyped_storage().data_ptr() for p in gathered}
    found = {"gathered weights": storages(gathered)}
    found["activations"] = storages(t for t in kept if t.untyped_storage().data_ptr() not in weights)
    kept.clear()
    loss.backward()
    found["parameters"] = storages(local(p) for p in optimizer.adamw.named.values())
    found["gradients"] = storages(local(p.grad) for p in optimizer.adamw.named.values())
    optimizer.step(optimizer.rates(0))
    tensors = optimizer.tensors()
    found["AdamW moments"] = storages(local(t) for n, t in tensors.items() if n.startswith("exp_avg"))
    found["EMA"] = storages(local(t) for n, t in tensors.items() if n.startswith("ema."))
    return found


@pytest.mark.parametrize(
    ("model", "recompute"),
    [({}, False), ({}, True), ({"conv_kernel": 0, "qk_norm": True, "learn_sigma": True}, False)],
    ids=["depthwise", "recomputed", "plain"],
)
def test_planned_bytes_are_what_two_ranks_allocate(run_ranks, model, recompute):
    config = small(recompute, **model)
    planned = footprint.state_bytes(config, 2)
    planned["activations"] = activations.activations(config, BATCH, OPS).saved
    for found in run_ranks(2, allocated, config):
        assert found.keys() == planned.keys()
        for name, size in found.items():
            assert planned[name] == pytest.approx(size, rel=0.05), name


@pytest.mark.parametrize(
    ("change", "ranks", "on_gpu", "size"),
    [
        ({}, 1, True, 2),
        ({}, 1, False, 4),
        ({}, 2, True, 4),
        ({"train": {"grad_accum": 2}}, 1, True, 4),
        ({"train": {"ema": "posthoc"}}, 1, True, 4),
        ({"parallel": {"precision": "fp32"}}, 1, True, 4),
    ],
)
def test_a_gradient_takes_16_bits_where_the_optimizers_kernel_reads_it_so(change, ranks, on_gpu, size):
    config = configs.replace(small(), **change)
    held = footprint.state_bytes(config, ranks, on_gpu)
    assert held["gradients"] == size * footprint.sizes(config.model, ranks).trained


@pytest.mark.parametrize("recompute", [False, True])
def test_the_peak_of_a_step_is_that_of_the_same_step_with_real_numbers(recompute):
    config = small(recompute)
    model = DiT(config.model, OPS)
    sharding.checkpoint(model, config.parallel)
    model.init_weights(0)
    model.bfloat16()
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(activations._forget)
    x, t, y = torch.randn(BATCH, 4, 20, 12), torch.zeros(BATCH), torch.arange(BATCH)
    model.condition(t, y)  # makes the table of frequencies, which stays
    with activations.Alive() as alive:
        (model(x, t, y) - x).square().mean().backward()
    assert alive.now == 0
    assert activations.activations(config, BATCH, OPS).peak == pytest.approx(alive.peak, rel=0.05)


def test_alive_counts_each_storage_while_it_is_referenced():
    with activations.Alive() as alive:
        a = torch.zeros(100)
        b = a.view(10, 10)[2:]
        c = b + 1
        assert alive.now == 400 + 320
        del a, b
        assert alive.now == 320
        c.add_(1)
        del c
    assert (alive.now, alive.peak) == (0, 720)


def test_kernels_keep_less_than_the_reference_and_recomputing_less_still():
    config = RECIPES["cats-256"]
    reference = activations.activations(config, 8, REFERENCE)
    kernels = activations.activations(config, 8)
    again = activations.activations(footprint.recomputing(config, True), 8)
    assert again.saved < kernels.saved < reference.saved
    # By hand, what a token keeps in a block, in bf16 elements: r and m of two norms, q, k, v, attention's output and its
    # projection, the MLP's output, each D; h and its convolution, each 4·D.
    assert kernels.saved / 8 == pytest.approx(12 * 256 * 18 * 768 * 2, rel=0.02)
    # Recomputed, a block keeps the two streams it is given.
    assert again.saved / 8 == pytest.approx(12 * 256 * 2 * 768 * 2, rel=0.15)


def test_the_largest_batch_fits_and_one_more_does_not():
    config, memory = RECIPES["cats-256"], 6e9
    fits = footprint.largest_batch(config, 8, memory)
    states = sum(footprint.state_bytes(config, 8).values()) + footprint.RESERVED
    need = [states + sum(footprint.batch_bytes(config, n).values()) for n in (fits, fits + 1)]
    assert need[0] <= memory * 1.001
    assert need[1] > memory * 0.999
    assert footprint.largest_batch(config, 8, 2.3e9) == 0
    assert f"--train.batch {fits} fits, or " in footprint.advice(config, 8, memory)
    assert "no batch fits" in footprint.advice(config, 1, 2.3e9)


def test_eight_a100s_bound_the_paper_models_as_their_flops_say():
    where = costs.Cluster(GPUS["a100-80gb"], 8, 1, 25)
    for size, rate in (("B", 18_083), ("XL", 3_507)):
        m = dit(size, 2, channels=4, num_classes=1000, conv_kernel=0, learn_sigma=True)
        bound = costs.bound(Config(model=m), where)
        assert bound.images / bound.compute_s == pytest.approx(rate, abs=0.5)
        assert bound.step_s >= max(bound.compute_s, bound.memory_s, bound.network_s)


def test_bytes_of_the_fused_parts_are_their_floors():
    m = dit("B", 2, channels=4, num_classes=0)
    config = Config(model=m, train=TrainConfig(batch=4, grad_accum=3))
    by_name = {p.name: p for p in costs.parts(config, costs.Cluster(GPUS["h100"], 1, 1, 25))}
    tokens, D = 3 * 4 * 256, 768
    assert by_name["norms and residuals"].bytes == tokens * D * (4 + 6 + 24 * (8 + 12))
    assert by_name["GELU and convolution"].bytes == 12 * tokens * 4 * D * (4 + 6)
    assert by_name["bias gradients"].bytes == 12 * tokens * 3 * D * 2  # of qkv alone
    assert by_name["attention"].bytes == 12 * tokens * D * (8 + 16 + 12)  # the last is the stack of its gradients
    assert sum(p.flops for p in by_name.values()) == 12 * train_flops_per_image(m)


@pytest.mark.parametrize(
    ("gpus", "grad_accum", "kernels", "precision", "optimizer", "casts"),
    [
        (1, 1, "auto", "bf16", 38, 0),  # the kernel reads 16-bit gradients and writes the copies
        (1, 3, "auto", "bf16", 42, 6 + 2 * 10),  # summed in fp32: one cast, and two sums
        (1, 1, "reference", "bf16", 48, 6 + 6),  # gradients cast, and weights
        (1, 1, "auto", "fp32", 40, 0),
        (8, 1, "auto", "bf16", 40 / 8, 6 / 8 + 4 + 6),
    ],
)
def test_bytes_of_a_parameter(gpus, grad_accum, kernels, precision, optimizer, casts):
    m = dit("B", 2, channels=4, num_classes=0)
    config = Config(model=m, train=TrainConfig(batch=4, grad_accum=grad_accum), kernels=kernels)
    config = configs.replace(config, parallel={"precision": precision})
    by_name = {p.name: p for p in costs.parts(config, costs.Cluster(GPUS["h100"], gpus, 1, 25))}
    num_parameters = sum(math.prod(p.shape) for p in _meta(m).parameters())
    assert by_name["optimizer and EMA"].bytes / num_parameters == pytest.approx(optimizer, rel=1e-3)
    assert by_name["casts and copies"].bytes / num_parameters == pytest.approx(casts, rel=1e-3)


def _meta(m: ModelConfig) -> DiT:
    with torch.device("meta"):
        return DiT(m, REFERENCE)


def test_messages_of_one_node_and_of_eight():
    config = RECIPES["cats-256"]
    whole = footprint.sizes(config.model, 1).whole
    gather, reduce = costs.messages(config, costs.Cluster(GPUS["a100-80gb"], 8, 1, 25))
    assert gather.bytes == pytest.approx(2 * whole * 7 / 8)
    assert reduce.bytes == pytest.approx(4 * whole * 7 / 8)
    assert reduce.seconds == pytest.approx(4 * whole * 7 / 8 / 300e9)
    *inside, across = costs.messages(config, costs.Cluster(GPUS["a100-80gb"], 64, 8, 25))
    assert inside == [gather, reduce]
    assert across.bytes == pytest.approx(2 * 7 / 8 * 4 * whole / 8)
    assert across.seconds == pytest.approx(across.bytes / 25e9)
    # Sharded over all 64: no copies to agree, and the network carries the gathering.
    everywhere = configs.replace(config, parallel={"shard": 64})
    far = costs.messages(everywhere, costs.Cluster(GPUS["a100-80gb"], 64, 8, 25))
    assert [m.name for m in far] == [gather.name, reduce.name]
    assert far[0].seconds == pytest.approx(2 * whole * 7 / 8 / (8 * 25e9))
    assert costs.messages(config, costs.Cluster(GPUS["a100-80gb"], 1, 1, 25)) == []


def test_every_gpu_has_a_peak_and_a_source():
    for gpu in GPUS.values():
        assert gpu.flops > 1e14
        assert gpu.source


@pytest.mark.parametrize(
    "argv", [["cats-256", "--gpus", "8", "--gpu", "a100-80gb", "--hours", "2"], ["--gpus", "1"], ["cats-256", "--gpus", "64"]]
)
def test_what_it_prints(capsys, argv):
    plan.plan(plan.parse(argv))
    text = capsys.readouterr().out
    for words in ("largest batch that fits", "optimizer and EMA", "binds", "kWh", "not measurements"):
        assert words in text
    assert ("all-reduce" in text) == ("64" in argv)
    assert ("2 h at 50%" in text) == ("--hours" in argv)


def test_the_table_in_the_docs_is_what_the_command_prints(capsys):
    plan.plan(plan.parse(["--table"]))
    assert capsys.readouterr().out == (Path(plan.__file__).parents[1] / "docs" / "scaling.md").read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gpu", "a100-80g"], "did you mean a100-80gb?"),
        (["cats-265"], "did you mean cats-256?"),
        (["--gpus", "0"], "must be positive"),
        (["--gpus", "9", "--nodes", "2"], "do not spread evenly over --nodes 2"),
        (["--efficiency", "0.5", "2", "0.1"], "at most 1"),
        (["--train.btach", "3"], "did you mean --train.batch?"),
    ],
)
def test_what_cannot_be_planned_is_one_line(argv, message):
    with pytest.raises(UserError) as error:
        plan.plan(plan.parse(argv))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ops", [OPS, CPU], ids=["reference", "CPU"])
def test_a_large_batch_follows_from_two_small_ones(ops):
    config = RECIPES["cats"]
    traced = activations._traced(config.model, config.parallel, 160, ops)
    assert activations.activations(config, 160, ops) == pytest.approx(traced, rel=0.01)


def test_a_run_that_cannot_work_is_refused_in_one_line_before_it_starts(monkeypatch):
    config, cpu = RECIPES["cats"], torch.device("cpu")
    assert footprint.check(config, cpu, num_images=20_000) is None
    assert "more than the 15 images there are" in footprint.check(config, cpu, num_images=15)
    monkeypatch.setattr(footprint, "memory_bytes", lambda: 4 * 10**9)
    assert footprint.check(config, cpu) is None
    line = footprint.check(configs.replace(config, train={"batch": 4096}), cpu)
    fits = int(re.search(r"--train.batch (\d+) fits", line).group(1))
    assert footprint.check(configs.replace(config, train={"batch": fits}), cpu) is None
    assert footprint.check(configs.replace(config, train={"batch": fits + 40}), cpu) is not None
    assert footprint.check(configs.replace(config, train={"batch": fits}), cpu, ranks=2) is not None  # they share the memory
    for huge in ({"depth": 2**31}, {"width": 2**31 - 4}):  # at once: nothing is built
        line = footprint.check(configs.replace(config, model=huge), cpu)
        assert "whatever the batch" in line
        assert "\n" not in line


def test_shards_that_do_not_divide_the_ranks_are_refused():
    options = plan.parse(["--gpus", "8"])
    with pytest.raises(UserError, match="does not divide the 8 ranks"):
        plan.cluster(dataclasses.replace(options, parallel=dataclasses.replace(options.parallel, shard=3)))


def test_the_verdict_comes_first(capsys):
    plan.plan(plan.parse(["cats-256", "--gpus", "8"]))
    first = capsys.readouterr().out.replace("\n", " ").partition(". ")[0]
    place, time = r"cats-256 fits on 8 × A100-SXM4-80GB, in \d+ of 80 GB each", r"10,000,000 images take about \d+ min"
    assert re.fullmatch(f"{place}, and {time} at half of the bound", first)
    plan.plan(plan.parse(["cats-256", "--gpus", "1", "--train.batch", "100000"]))
    verdict, suggestion, _ = capsys.readouterr().out.replace("\n", " ").split(". ", 2)
    assert "does not fit on 1 × A100-SXM4-80GB" in verdict
    fits = int(re.search(r"--train.batch ([\d,]+) fills", suggestion).group(1).replace(",", ""))
    plan.plan(plan.parse(["cats-256", "--gpus", "1", "--train.batch", str(fits)]))
    assert capsys.readouterr().out.startswith("cats-256 fits")


@pytest.mark.parametrize(
    ("hours", "said"),
    [(0.001, "4 s"), (0.02, "72 s"), (0.5, "30 min"), (1.99, "119 min"), (3.34, "3 h 20 min"), (30, "30 h"), (100, "4.2 days")],
)
def test_durations_as_people_say_them(hours, said):
    assert plan.duration(hours) == said
