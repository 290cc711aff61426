"""The whole training step, as train.py runs it: objective, forward, backward, clipping, AdamW, averaged weights.

On a CPU: B/2, batch 8 (on a slow one 4 of its 12 blocks), eager and compiled, side by side in turns, with the step's own matrix
products alone as one more row: what `of the bound` is a fraction of is the time all the step's arithmetic would take at their
rate. On a GPU: each alone, B/2 and XL/2. Then a step of ours by kind of op, compiled or not as train.py has it by default.
"""

import dataclasses
import logging

import pytest
import torch
from torch._inductor import metrics
from torch._inductor.compile_fx import inductor_metrics_log
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdit import train
from fastdit.config import RECIPES, SIZES, dit, replace
from fastdit.diffusion import Objective, schedule
from fastdit.footprint import flash_attention
from fastdit.gauges import peak_tflops
from fastdit.model import Block, train_flops_per_image
from fastdit.optim import Optimizer

pytestmark = [
    # PyTorch says of padding="same" with an even kernel that it copies the padded input: that is the seed's way.
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.filterwarnings("ignore:The .grad attribute"),  # torch.compile looks at that of each tensor it is given
]

CONFIG = RECIPES["cats-256"]
SEED = "the seed's way"
STANDARD = "standard DiT"
PLAIN = "fastdit, plain MLP"
COMPILED = ", torch.compile"


def model_config(name: str, size: str, depth: int = 0):
    """What each computes: the same DiT, with the default convolution (K = 3), the seed's (K = 4) or none; 0: all its blocks."""
    kernel = {"fastdit": 3, SEED: 4}.get(name.removesuffix(COMPILED), 0)
    model = dit(size, 2, channels=4, num_classes=0, conv_kernel=kernel)
    return dataclasses.replace(model, depth=depth or model.depth)


def training(name: str, size: str, batch: int, world, baselines, dtype: torch.dtype, depth: int = 0):
    """A call that takes one training step."""
    x0 = torch.randn(batch, 4, 32, 32, device=world.device)
    if not name.startswith("fastdit"):
        make = baselines.seed_repository if name.startswith(SEED) else baselines.standard
        alphas_cumprod = schedule(CONFIG.diffusion)[1].to(world.device)
        return baselines.training_step(
            make(model_config(name, size, depth), world.device), alphas_cumprod, x0, name.endswith(COMPILED), dtype
        )
    compile = "on" if name.endswith(COMPILED) else "auto"
    config = replace(CONFIG, model=vars(model_config(name, size, depth)), train={"batch": batch}, parallel={"compile": compile})
    model = train.build(config, world)
    optimizer, objective = Optimizer(model, config.train, batch), Objective(config.diffusion, device=world.device)
    seen = [0]

    def step() -> None:
        objective.loss(model, x0, None, 0, seen[0]).backward()
        optimizer.step(seen[0])
        seen[0] += batch

    return step


def shape(size: str, depth: int, batch: int, numbers: str) -> str:
    blocks = "" if depth == SIZES[size][0] else f" of {depth} blocks"
    return f"{size}/2{blocks}, batch {batch}, 32×32×4 {numbers}"


def products(model, batch: int, device: torch.device, dtype: torch.dtype):
    """The matrix products of one step's blocks, forward and backward, alone; and their FLOPs."""
    depth, D = model.depth, model.width
    rows = batch * 256
    shapes = [(D, 3 * D), (D, D), (D, 4 * D), (4 * D, D)]
    weights = [[torch.randn(o, i, device=device, dtype=dtype) for i, o in shapes] for _ in range(depth)]
    inputs, outputs = ({n: torch.randn(rows, n, device=device, dtype=dtype) for n in (D, 3 * D, 4 * D)} for _ in "io")

    def call() -> None:
        for block in weights:
            for w in block:
                o, i = w.shape
                torch.mm(inputs[i], w.t())
                torch.mm(outputs[o], w)
                torch.mm(outputs[o].t(), inputs[i])

    return call, 6 * rows * depth * sum(i * o for i, o in shapes)


@pytest.mark.timeout(0)  # a busy CPU may take minutes
@pytest.mark.parametrize(("ours", "theirs"), [("fastdit", SEED), (PLAIN, STANDARD)])
def test_step_in_turns(side_by_side, device, world, baselines, dtype, numbers, slow, ours, theirs):
    if device.type == "cuda":
        pytest.skip("on a GPU test_step times each alone, with the memory to itself")
    size, batch, depth = "B", 8, 4 if slow else 12
    names = [name + how for name in (ours, theirs) for how in ("", COMPILED)]
    calls = {name: training(name, size, batch, world, baselines, dtype, depth) for name in names}
    flops = {name: batch * train_flops_per_image(model_config(name, size, depth)) for name in names}
    alone = "its matrix products alone"
    calls[alone], flops[alone] = products(model_config(ours, size, depth), batch, device, dtype)
    medians: dict[str, float] = {}
    rows = side_by_side(
        calls,
        op="training step",
        shape=shape(size, depth, batch, numbers),
        rounds=5,
        budget=45,
        warmup=2,
        flops=flops,
        images=batch,
        extra=lambda name, s: medians.update({name: s}) or {},
    )
    rate = flops[alone] / medians[alone]
    for name in names:
        rows[name].extra["of the bound"] = flops[name] / rate / medians[name]
    best = min(medians[ours], medians[ours + COMPILED])
    rows[theirs].extra["x the time of ours at its best"] = medians[theirs] / best
    rows[theirs + COMPILED].extra["x the time of ours at its best"] = medians[theirs + COMPILED] / best
    torch._dynamo.reset()


@pytest.mark.parametrize(("size", "batch"), [("B", 32), ("B", 128), ("XL", 32)])
@pytest.mark.parametrize("name", ["fastdit", PLAIN, SEED, SEED + COMPILED, STANDARD, STANDARD + COMPILED])
def test_step(side_by_side, gpu, world, baselines, dtype, numbers, name, size, batch):
    peak = peak_tflops(torch.cuda.get_device_name(gpu))
    flops = batch * train_flops_per_image(model_config(name, size))
    try:
        side_by_side(
            {name: training(name, size, batch, world, baselines, dtype)},
            op="training step",
            shape=shape(size, SIZES[size][0], batch, numbers),
            rounds=20,
            warmup=5,
            flops={name: flops},
            images=batch,
            extra=lambda _, s: {"MFU": flops / s / peak / 1e12} if peak else {},
        )
    except torch.cuda.OutOfMemoryError:
        pytest.skip(f"{name}, {size}/2 with batch {batch} does not fit this GPU's memory")
    finally:
        torch._dynamo.reset()
        torch.cuda.empty_cache()


@pytest.mark.timeout(0)
def test_where_a_step_goes(where_it_goes, device, world, baselines, dtype, numbers, slow):
    batch, depth = 32 if device.type == "cuda" else 8, 4 if slow else 12
    step = training("fastdit", "B", batch, world, baselines, dtype, depth)
    for _ in range(2):
        step()
    where_it_goes(step, baseline="fastdit", shape=shape("B", depth, batch, numbers))
    torch._dynamo.reset()


# --- one block: ops and bytes, counted where no number is computed ---

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product", "attention")


# Bytes per element of [B, T, D] of a seed's block compiled for a GPU, forward and backward, read from the code that Inductor
# generates: the first norm 4 + 10, the gated residual and its norm 8 + 18, the last gated residual 6 + 6, GELU and convolution
# between transposes 13 + 26 for each of 4 hidden elements, and a pass for every Linear's bias gradient, 18.
COMPILED_BYTES_ON_A_GPU = 14 + 26 + 12 + 4 * 39 + 18


class Count(TorchDispatchMode):
    """Ops that reach a device, and the bytes that those which are no matrix product and no attention read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, made = ([t for t in tree_leaves(x) if isinstance(t, torch.Tensor)] for x in ((args, kwargs), out))
        if func.is_view or any(word in func.__name__ for word in ("empty", "detach", "_unsafe_view", "reshape_alias")):
            return out
        self.ops += 1
        if not func.__name__.startswith(PRODUCTS):
            self.bytes += sum(min(t.numel(), t.untyped_storage().nbytes() // t.itemsize) * t.itemsize for t in (*given, *made))
        return out


def compiled_bytes(block: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> int:
    """What Inductor counts that its own loops and the convolutions read and write in a forward and a backward."""
    monitor = inductor_metrics_log  # it counts where this one speaks
    level = monitor.level
    metrics.reset()
    monitor.setLevel(logging.INFO)
    try:
        with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
            outputs = torch.compile(block)(*inputs)
            torch.autograd.backward(outputs, torch.ones_like(outputs))
    finally:
        monitor.setLevel(level)
    ours = [(node, 4 * words) for node, words in metrics.nodes_num_elem]
    return sum(size for node, size in ours if not node.is_extern() or "convolution" in str(node.node.python_kernel_name))


def test_block_ops(baselines, device, monkeypatch):
    """One B/2 block, forward and backward, on the meta device: ours on its kernels against the seed's, both in bf16 throughout.

    Autocast's casts, which the seed's way adds, are not counted, nor is anything inside an op, nor products and attention.
    The seed's block is also compiled for the device at hand, with a batch of two: the bytes are Inductor's own count.
    """
    from fastdit_kernels.triton_ops import TRITON

    B, D, H = 32, 768, 12
    with torch.device(device):
        x, c = (torch.randn(2, *shape, dtype=torch.bfloat16, requires_grad=True) for shape in ((256, D), (D,)))
        compiled = compiled_bytes(baselines.PlainBlock(D, H, (16, 16), conv=True).bfloat16(), (x, c)) / x.numel()
    torch._dynamo.reset()
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", heads_first)
    with torch.device("meta"):
        x, y = (torch.empty(B, 256, D, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        modulation = torch.empty(B, 6, D, dtype=torch.bfloat16, requires_grad=True)
        c = torch.empty(B, D, dtype=torch.bfloat16, requires_grad=True)
        ours = Block(model_config("fastdit", "B"), TRITON._replace(attention=flash_attention), recompute=False).bfloat16()
        seed = baselines.PlainBlock(D, H, (16, 16), conv=True).bfloat16()
    counts = {}
    for name, block, inputs in (("fastdit", ours, (x, y, modulation)), (SEED, seed, (x, c))):
        with Count() as count:
            outputs = tree_leaves(block(*inputs))
            torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])
        counts[name] = count
        print(f"\n{name}: {count.ops} ops, {count.bytes / (B * 256 * D):.0f} bytes per element of the stream", end="")
    print(f"\n{SEED}{COMPILED}: {compiled:.0f} bytes on this {device.type}, {COMPILED_BYTES_ON_A_GPU} on a GPU", end="")
    assert counts["fastdit"].bytes < counts[SEED].bytes / 2
    assert counts["fastdit"].bytes < min(compiled, COMPILED_BYTES_ON_A_GPU) / 2 * B * 256 * D


def heads_first(q, k, v):
    """Attention on [B, H, T, K] that keeps what any fused one does; PyTorch takes its unfused path on the meta device."""
    B, H, T, K = q.shape
    return flash_attention(tuple(t.transpose(1, 2) for t in (q, k, v))).view(B, T, H, K).transpose(1, 2)
