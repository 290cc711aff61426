"""Sampling, per step: one picture's latency and the throughput of 64, as sample.py makes them by dpm++, against the seed's way.

The seed's way runs every sample twice, labelled and unlabelled, under autocast, and computes each timestep's modulation anew.
Ours runs each once, and computes the modulation of a schedule before it starts: that time is in the figures.

One sample of the cats recipe in 1, 2, 4 and 20 steps, as a control loop calls for it: warm, the modulation of its class kept.

One picture of the same weights, exported with a plain MLP, by diffusers' DiTPipeline as its page calls it: the same picture.
"""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from fastdit_kernels.reference import REFERENCE

from fastdit import sampling
from fastdit.config import replace
from fastdit.export import Options as ExportOptions
from fastdit.export import export
from fastdit.model import DiT, choose_ops
from fastdit.planning.flops import macs_per_image
from fastdit.recipes import RECIPES, dit
from fastdit.runtime import rng
from fastdit.sample import Sampler
from fastdit.weights.folder import locate, save_pretrained

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers"),
]

SEED, COMPILED = "the seed's way", ", torch.compile"


def ours(config, batch: int, steps: int, world, dtype: torch.dtype, compiled: bool = False):
    config = replace(config, sample={"steps": steps})
    model = DiT(config.model, choose_ops(config, world.device))
    model.init_weights(0)
    model = model.to(world.device, dtype).eval().requires_grad_(False)
    if compiled:
        sampling.compiled(model, world.device)
    return lambda: sampling.make(model, config, None, world, first=0, count=batch, seed=0)


def seeds_way(baselines, batch: int, steps: int, device: torch.device, dtype: torch.dtype, compiled: bool = False):
    model = baselines.seed_repository(dit("B", 2), device).eval()
    if compiled:
        for block in model.blocks:  # alike, so that the compiler meets one
            block.compile()
    noise = torch.randn(batch, 4, 32, 32, device=device)

    @torch.no_grad()
    def call():
        solver = DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", solver_order=2)
        solver.set_timesteps(steps)
        x = noise
        for t in solver.timesteps:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                labelled, unlabelled = model(torch.cat([x, x]), t.to(device).expand(2 * batch)).float().chunk(2)
            x = solver.step(unlabelled + 4.0 * (labelled - unlabelled), t, x).prev_sample
        return x

    return call


@pytest.mark.timeout(0)  # a busy CPU may take minutes
@pytest.mark.parametrize("batch", [1, pytest.param(64, marks=pytest.mark.headline)])
def test_sampling(side_by_side, device, world, baselines, dtype, numbers, slow, batch):
    batch = 4 if slow and batch == 64 else batch
    config = RECIPES["cats-256"]
    gpu = device.type == "cuda"
    steps = 20 if gpu else (3 if slow else 5) if batch == 1 else (1 if slow else 2)  # a CPU takes seconds for each
    flops = 2 * batch * steps * sum(macs_per_image(config.model).values())
    side_by_side(
        {
            "fastdit": ours(config, batch, steps, world, dtype),
            "fastdit" + COMPILED: ours(config, batch, steps, world, dtype, compiled=True),
            SEED: seeds_way(baselines, batch, steps, device, dtype),
            SEED + COMPILED: seeds_way(baselines, batch, steps, device, dtype, compiled=True),
        },
        op=f"sampling, {steps} dpm++ step{'s'[: steps - 1]}",
        shape=f"B/2, batch {batch}, 32×32×4 {numbers}",
        rounds=20 if gpu else 2 if batch > 1 or slow else 3,
        warmup=3 if gpu else 1,
        flops={"fastdit": flops, "fastdit" + COMPILED: flops, SEED: 2 * flops, SEED + COMPILED: 2 * flops},
        images=batch,
        extra=lambda _, s: {"ms per step": 1000 * s / steps},
    )
    torch._dynamo.reset()


def test_few_steps(side_by_side, numbers, slow, tmp_path):
    """The default's 20 steps, plain flow, and a network of the same size that knows jumps in 1, 2 and 4."""
    config = RECIPES["cats"]
    calls = {}
    for steps in (20, 1, 2, 4):
        config = replace(config, model={"jumps": steps < 20}, sample={"steps": steps})
        model = DiT(config.model, REFERENCE)
        model.init_weights(0)
        folder = tmp_path / str(steps)
        save_pretrained(model, folder, config)
        calls[f"{steps} step{'s'[: steps - 1]}"] = Sampler(locate(folder))
    side_by_side(
        calls,
        op="one sample in few steps",
        shape=f"cats, batch 1, 32×32×3 {numbers}",
        rounds=20 if slow else 60,
        warmup=3,
        images=1,
        extra=lambda name, s: {"evaluations per second": int(name.split()[0]) / s},
    )


@pytest.mark.timeout(0)
def test_beside_diffusers(side_by_side, device, dtype, numbers, slow, tmp_path, monkeypatch):
    """B/2 with a plain MLP and 1000 classes, guidance off in both: diffusers' default of 4 would double its work."""
    from diffusers import AutoencoderKL, DiTPipeline
    from diffusers.pipelines.dit import pipeline_dit

    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, layers_per_block=1
    )  # small: it is not what is timed
    autoencoder.save_pretrained(tmp_path / "vae")
    shape = {"channels": 4, "input_size": (32, 32), "conv_kernel": 0, "num_classes": 1000}
    config = replace(
        RECIPES["imagenet-256-xl"],
        model=vars(dit("B", 2, **shape, time_embedding="diffusers", position="fixed")),
        data={"vae": str(tmp_path / "vae"), "image_size": (32, 32)},
        sample={"steps": 5 if slow else 20},
        parallel={"precision": numbers},
    )
    model = DiT(config.model, REFERENCE)
    model.init_weights(0)
    with torch.no_grad():  # as initialised it predicts 0
        for name, p in model.named_parameters():
            if name not in model.fixed():
                p.add_(0.02 * torch.randn(p.shape))
    save_pretrained(model, tmp_path / "ours", config)
    theirs = export(ExportOptions(str(tmp_path / "ours"), format="diffusers", out=str(tmp_path / "theirs")))
    pipe = DiTPipeline.from_pretrained(theirs).to(device, dtype)
    pipe.set_progress_bar_config(disable=True)
    ours, steps = Sampler(locate(tmp_path / "ours")), config.sample.steps

    def of_diffusers():
        return pipe(class_labels=[207], num_inference_steps=steps, guidance_scale=1.0, output_type="np").images

    # The same noise at the same times of the process gives the same picture.
    noise = rng.normal((4, 32, 32), 0, "sample noise", 0, 1, device)
    spaced = pipe.scheduler.set_timesteps
    with monkeypatch.context() as patch:
        times = [int(time) for time in sampling.sampling_times(config.diffusion, steps)]
        patch.setattr(pipeline_dit, "randn_tensor", lambda *_, **__: noise.to(dtype))
        patch.setattr(pipe.scheduler, "set_timesteps", lambda _: spaced(timesteps=times))
        picture = torch.from_numpy(of_diffusers())[0].permute(2, 0, 1)
    apart = (picture - ((ours(207).cpu() + 1) / 2).clamp(0, 1)).abs().max().item()
    assert picture.std() > 0.05
    assert apart < (1e-3 if dtype == torch.float32 else 0.1), apart
    side_by_side(
        {"fastdit": lambda: ours(207), "diffusers' DiTPipeline": of_diffusers},
        op=f"one sample of the same weights, {steps} dpm++ steps",
        shape=f"B/2 with a plain MLP, batch 1, 32×32×4 {numbers}",
        rounds=20 if device.type == "cuda" else 7,
        warmup=2,
        images=1,
        extra=lambda _, s: {"ms per step": 1000 * s / steps},
    )
