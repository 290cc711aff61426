"""The board's rows: whose recipe each is, and how it is trained."""

import contextlib
import dataclasses
from typing import Any, NamedTuple

import torch
from baselines import PlainDiT
from torch import Tensor, nn

from fastdit import config as configs
from fastdit import sampling, train
from fastdit.config import Config, DiffusionConfig, ModelConfig, TrainConfig
from fastdit.data import encoding
from fastdit.diffusion import choose_objective
from fastdit.model import on_kernels
from fastdit.optim import Optimizer
from fastdit.quality import evaluation
from fastdit.recipes import RECIPES
from fastdit.runtime.hardware import DTYPES, precision
from fastdit.runtime.ranks import World
from fastdit.weights import start

BATCH = 64  # pictures sampled at once


class Row(NamedTuple):
    """A recipe. plain: trained as others do, on standard modules under autocast; averaged: scored on averaged weights."""

    about: str
    config: Config
    plain: bool = False
    averaged: bool = True


def without(about: str, averaged: bool = True, **groups: dict[str, Any]) -> Row:
    """Our recipe less one ingredient, or with one more."""
    return Row(f"ours, {about}", configs.replace(RECIPES["cats"], **groups), averaged=averaged)


def others(about: str, averaged: bool = True, conv_kernel: int = 0, **diffusion: Any) -> Row:
    """Somebody else's recipe on a network of our size: batch 32, AdamW at 1e-4 without a schedule, EMA 0.9999 if averaged."""
    rate = {"lr": 1e-4, "lr_decay": "constant", "warmup_images": 0}
    config = configs.replace(
        RECIPES["cats"],
        model={"conv_kernel": conv_kernel},
        train={"batch": 32, **rate, "beta2": 0.999, "weight_decay": 0.0, "ema": 0.9999},
    )
    return Row(about, dataclasses.replace(config, diffusion=DiffusionConfig(**diffusion)), plain=True, averaged=averaged)


BEFORE = dataclasses.replace(
    RECIPES["cats"],
    model=ModelConfig(patch=4, depth=6, width=256, num_heads=4),
    diffusion=DiffusionConfig(prediction="x0"),
    train=TrainConfig(images=36_000, batch=32, lr=1e-3, lr_decay="cosine", warmup_images=3_000),
)
VELOCITY = {"kind": "flow", "prediction": "velocity"}
ROWS = {
    "seed": others("the seed repository's way: its block, epsilon, 1e-4, no EMA", averaged=False, conv_kernel=4),
    "standard": others("a standard DiT trainer's way: plain MLP, linear schedule, epsilon, EMA", beta_schedule="linear"),
    "sit": others("SiT's way: plain MLP, flow, velocity, EMA", **VELOCITY),
    "sit-raw": others("SiT's way without EMA: 0.9999 is longer than a short run", averaged=False, **VELOCITY),
    "before": Row("fastdit's cats at commit 9492b0a: DDPM, x0, squaredcos", BEFORE),
    "ours": Row("fastdit's cats", RECIPES["cats"]),
    "ddpm": without("DDPM that predicts x0 instead of flow", diffusion={"kind": "ddpm", "prediction": "x0"}),
    "velocity": without("velocity predicted, not x0", diffusion=VELOCITY),
    "uniform": without("t uniform, not logit-normal", diffusion={"flow_t": "uniform"}),
    "plain-mlp": without("no convolution in the MLP", model={"conv_kernel": 0}),
    "constant": without("no decay of the learning rate", train={"lr_decay": "constant"}),
    "slow": without("a quarter of the learning rate", train={"lr": 1e-3}),
    "batch-32": without("batch 32, at 2e-3 with beta2 0.999", train={"batch": 32, "lr": 2e-3, "beta2": 0.999}),
    "wide": without("width 256, not 192", model={"width": 256, "num_heads": 4}),
    "batch-8": without("batch 8", train={"batch": 8}),
    "no-ema": without("no averaged weights", averaged=False),
    # What is no default, added to ours.
    "posthoc": without("averages that move at one step in eight", train={"ema": "posthoc"}),
    "token-drop": without("token drop", model={"token_drop": True}),
}


# --- a row in training ---


class Training:
    """A model that fastdit trains on a pack, or on what gives batches as one does."""

    def __init__(self, config: Config, world: World, pack: Any):
        self.config, self.world, self.pack = config, world, pack
        self.model = start.build(config, world)
        self.optimizer = Optimizer(self.model, config.train, config.train.batch, kernel=on_kernels(config, world.device))
        self.objective = choose_objective(config, world.device)

    def train(self, images_seen: int, config: Config | None = None) -> Tensor:
        """One step, by another schedule where a config says so. Returns the loss."""
        schedule = config or self.config
        return train.step(self.model, self.objective, self.optimizer, self.pack, schedule, self.world, images_seen)[0]

    def pictures(self, num: int, averaged: bool = True, **sample: Any) -> Tensor:
        """sample: settings of it, instead of the config's."""
        config = configs.replace(self.config, sample=sample)
        with self.optimizer.ema.applied(self.model) if averaged else contextlib.nullcontext():
            return evaluation.make_pictures(self.model, config, None, self.world, num, BATCH)


class Ours:
    """A row that fastdit trains."""

    def __init__(self, row: Row, world: World, pack: encoding.Pack, seconds: float):
        self.row, self.config, self.seconds = row, row.config, seconds
        self.run = Training(row.config, world, pack)
        self.optimizer = self.run.optimizer

    def step(self, images_seen: int, trained_s: float) -> None:
        # The schedule of the learning rate ends with the seconds: at the images that the pace so far will have seen by then.
        config = self.config
        if trained_s:
            images = max(images_seen + 1, round(images_seen * self.seconds / trained_s))
            warmup = min(self.config.train.warmup_images, images // 12)
            config = configs.replace(config, train={"images": images, "warmup_images": warmup})
            self.optimizer.config = config.train
        self.run.train(images_seen, config)

    def pictures(self, num: int) -> Tensor:
        return self.run.pictures(num, self.row.averaged)


class Plain:
    """A row as others train: standard modules under autocast, AdamW, averages by a loop."""

    def __init__(self, row: Row, world: World, pack: encoding.Pack, seconds: float):
        self.row, self.config, self.world, self.pack = row, row.config, world, pack
        m, t = self.config.model, self.config.train
        torch.manual_seed(self.config.run.seed)
        conv = m.conv_kernel > 0
        self.model = PlainDiT(m.input_size[0], m.channels, m.patch, m.depth, m.width, m.num_heads, conv, m.num_classes)
        adaLN_zero(self.model.to(world.device))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=t.lr, weight_decay=t.weight_decay)
        self.ema = {name: p.detach().clone() for name, p in self.model.named_parameters()} if row.averaged else {}
        self.objective = choose_objective(self.config, world.device)
        self.dtype = DTYPES[precision(self.config.parallel.precision, world.device)]

    def network(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(x, t, y)

    def step(self, images_seen: int, trained_s: float) -> None:
        t = self.config.train
        x0, y, *_ = self.pack.batch(images_seen, t.batch)
        self.objective.loss(self.network, x0, y, self.config.run.seed, images_seen).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), t.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for name, average in self.ema.items():
                average.lerp_(self.model.get_parameter(name), 1 - t.ema)

    @torch.no_grad()
    def pictures(self, num: int) -> Tensor:
        own = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        for name, average in self.ema.items():
            self.model.get_parameter(name).copy_(average)
        m, device, parts = self.config.model, self.world.device, []
        for first in range(0, num, BATCH):
            count = min(BATCH, num - first)
            y = sampling.labels(self.config, first, count)
            x0 = sampling.sample(
                self.network,
                self.config.diffusion,
                (count, m.channels, *m.input_size),
                None if y is None else y.to(device),
                steps=self.config.sample.steps,
                seed=self.config.run.seed,
                first=first,
                device=device,
            )
            parts.append(sampling.to_uint8(x0))
        for name, p in own.items():
            self.model.get_parameter(name).copy_(p)
        return torch.cat(parts)


@torch.no_grad()
def adaLN_zero(model: PlainDiT) -> None:
    """Start as the DiT repository does: modulation and the last layer at zero, small embeddings, Xavier-uniform matrices."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for linear in (model.linear, model.modulation[1], *(block.adaLN_modulation[1] for block in model.blocks)):
        nn.init.zeros_(linear.weight)
