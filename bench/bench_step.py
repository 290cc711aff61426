"""The whole training step, as train.py runs it: objective, forward, backward, clipping, AdamW, averaged weights.

On a CPU: B/2, batch 8 (on a slow one 2 of its 12 blocks), eager and compiled, side by side in turns, with the step's own matrix
products alone as one more row: what `of the bound` is a fraction of is the time all the step's arithmetic would take at their
rate. On a GPU: each alone, B/2 and XL/2. The ops of a step are counted, and a step of ours is taken apart by kind of op.
"""

import dataclasses
import importlib.util

import pytest
import torch

from fastdit.config import replace
from fastdit.diffusion import choose_objective, schedule
from fastdit.model import on_kernels
from fastdit.optim import Optimizer
from fastdit.planning.flops import train_flops_per_image
from fastdit.recipes import RECIPES, SIZES, dit
from fastdit.runtime.hardware import peak_tflops
from fastdit.weights import start

pytestmark = [
    # PyTorch says of padding="same" with an even kernel that it copies the padded input: that is the seed's way.
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.filterwarnings("ignore:The .grad attribute"),  # torch.compile looks at that of each tensor it is given
]

CONFIG = RECIPES["cats-256"]
SEED = "the seed's way"
STANDARD = "standard DiT"
DIFFUSERS = "diffusers' DiTTransformer2DModel"
TIMM = "DiT of timm's attention and MLP"
PLAIN = "fastdit, plain MLP"
COMPILED = ", torch.compile"
AUTOCAST = ", autocast to bf16"
HEADLINE = {
    ("fastdit" + COMPILED, "B", 32),
    (SEED + COMPILED, "B", 32),
    (STANDARD + COMPILED, "B", 32),
    ("fastdit" + COMPILED, "XL", 32),
}


def model_config(name: str, size: str, depth: int = 0):
    """What each computes: the same DiT, with the default convolution (K = 3), the seed's (K = 4) or none; 0: all its blocks."""
    kernel = {"fastdit": 3, SEED: 4}.get(name.removesuffix(COMPILED).removesuffix(AUTOCAST), 0)
    model = dit(size, 2, channels=4, num_classes=0, conv_kernel=kernel)
    return dataclasses.replace(model, depth=depth or model.depth)


def training(name: str, size: str, batch: int, world, baselines, dtype: torch.dtype, depth: int = 0, **options: str):
    """A call that takes one training step. Options are fields of our config: kernels, attention."""
    x0 = torch.randn(batch, 4, 32, 32, device=world.device)
    if not name.startswith("fastdit"):
        makers = {SEED: baselines.seed_repository, DIFFUSERS: baselines.of_diffusers, TIMM: baselines.of_timm}
        make = makers.get(name.removesuffix(COMPILED).removesuffix(AUTOCAST), baselines.standard)
        alphas_cumprod = schedule(CONFIG.diffusion)[1].to(world.device)
        return baselines.training_step(
            make(model_config(name, size, depth), world.device), alphas_cumprod, x0, name.endswith(COMPILED), dtype
        )
    compile = "on" if name.endswith(COMPILED) else "off"
    config = replace(CONFIG, model=vars(model_config(name, size, depth)), train={"batch": batch}, parallel={"compile": compile})
    config = dataclasses.replace(config, **options)
    model = start.build(config, world)
    optimizer = Optimizer(model, config.train, batch, kernel=on_kernels(config, world.device))
    objective = choose_objective(config, world.device)
    seen = [0]

    def step() -> None:
        objective.loss(model, x0, None, 0, seen[0]).backward()
        optimizer.step(optimizer.rates(seen[0]))
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
@pytest.mark.parametrize(("ours", "theirs"), [pytest.param("fastdit", SEED, marks=pytest.mark.headline), (PLAIN, STANDARD)])
def test_step_in_turns(side_by_side, tally, counting, device, world, baselines, dtype, numbers, slow, ours, theirs):
    if device.type == "cuda":
        pytest.skip("on a GPU test_step times each alone, with the memory to itself")
    size, batch, depth = "B", 8, 2 if slow else 12
    what = shape(size, depth, batch, numbers)
    names = [name + how for name in (ours, theirs) for how in ("", COMPILED)]
    calls = {name: training(name, size, batch, world, baselines, dtype, depth) for name in names}
    for name, call in calls.items():
        tally(counting.count(call), of="a step", baseline=name, shape=what)
    in_turns(side_by_side, calls, device, dtype, what, depth, batch)


@pytest.mark.timeout(0)
@pytest.mark.parametrize("how", ["", COMPILED], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("ours", "theirs"), [("fastdit", (SEED,)), (PLAIN, (STANDARD, DIFFUSERS, TIMM))], ids=["convolution", "plain"]
)
def test_two_blocks_beside_what_is_installed(side_by_side, device, world, baselines, dtype, numbers, ours, theirs, how):
    """diffusers' class and timm's modules as they are, beside the restatements and ours."""
    if device.type == "cuda":
        pytest.skip("on a GPU a step of two blocks is mostly dispatch")
    if TIMM in theirs and importlib.util.find_spec("timm") is None:
        theirs = tuple(name for name in theirs if name != TIMM)  # no dependency of ours
    batch, depth = 8, 2
    names = [ours, *([ours + how] if how else []), *(name + how for name in theirs)]
    calls = {name: training(name, "B", batch, world, baselines, dtype, depth) for name in names}
    in_turns(side_by_side, calls, device, dtype, f"2 blocks of B/2, batch {batch}, 32×32×4 {numbers}", depth, batch)


def in_turns(side_by_side, calls, device: torch.device, dtype: torch.dtype, what: str, depth: int, batch: int) -> None:
    """Time the calls, ours first, and the matrix products alone, round by round."""
    ours, alone = next(iter(calls)), "its matrix products alone"
    flops = {name: batch * train_flops_per_image(model_config(name, "B", depth)) for name in calls}
    more, flops[alone] = products(model_config(ours, "B", depth), batch, device, dtype)
    rows = side_by_side({**calls, alone: more}, op="training step", shape=what, rounds=7, budget=45, flops=flops, images=batch)
    # All by ratios of times in one round, which the machine's ups and downs leave alone.
    times = {name: row.extra.get("x of the first", 1.0) for name, row in rows.items()}
    best = min(times[name] for name in calls if name.startswith("fastdit"))
    for name in calls:
        rows[name].extra["of the bound"] = flops[name] / flops[alone] * times[alone] / times[name]
        if not name.startswith("fastdit"):
            rows[name].extra["x the time of ours at its best"] = times[name] / best
    torch._dynamo.reset()


@pytest.mark.timeout(0)
def test_step_under_autocast(side_by_side, device, world, baselines, numbers):
    """As others' trainers run where they are left to their defaults: in bf16, for which such a CPU has no instructions."""
    if device.type == "cuda" or numbers != "fp32":
        pytest.skip("this device has bf16: every bench of a step is under autocast")
    names = ["fastdit", SEED + AUTOCAST, STANDARD + AUTOCAST]
    side_by_side(
        {name: training(name, "B", 1, world, baselines, torch.bfloat16, depth=1) for name in names},
        op="training step",
        shape="B/2 of 1 block, batch 1, 32×32×4",
        rounds=2,
        warmup=0,
        flops={name: train_flops_per_image(model_config(name, "B", 1)) for name in names},
        images=1,
    )


@pytest.mark.parametrize(
    ("name", "size", "batch"),
    [
        pytest.param(name + how, size, batch, marks=[pytest.mark.headline] * ((name + how, size, batch) in HEADLINE))
        for size, batch in [("B", 32), ("B", 128), ("XL", 32)]
        for name in ("fastdit", PLAIN, SEED, STANDARD)
        for how in (COMPILED, "")
    ],
)
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
def test_what_a_step_does(tally, counting, device, world, baselines, dtype, numbers, slow):
    """Ours on its kernels, wherever it is; on a GPU the seed's way too, which test_step_in_turns counts elsewhere."""
    gpu = device.type == "cuda"
    batch, depth = 32 if gpu else 8, 2 if slow else 12
    for name in ("fastdit", SEED) if gpu else ("fastdit",):
        for how in ("", COMPILED):
            options = {"kernels": "triton"} if gpu else {"kernels": "triton", "attention": "sdpa"}
            call = training(name + how, "B", batch, world, baselines, dtype, depth, **options)
            count = counting.count(call)
            assert name == SEED or not count.host_reads
            of = "a step" if name == SEED else "a step on kernels"
            tally(count, of=of, baseline=name + how, shape=shape("B", depth, batch, numbers))
            torch._dynamo.reset()


@pytest.mark.headline
@pytest.mark.timeout(0)
def test_where_a_step_goes(where_it_goes, device, world, baselines, dtype, numbers, slow):
    """As train.py runs it by default: compiled on a GPU, and not on a CPU."""
    gpu = device.type == "cuda"
    name, batch, depth = "fastdit" + COMPILED * gpu, 32 if gpu else 8, 2 if slow else 12
    step = training(name, "B", batch, world, baselines, dtype, depth)
    for _ in range(2):
        step()
    where_it_goes(step, baseline=name, shape=shape("B", depth, batch, numbers))
    torch._dynamo.reset()
