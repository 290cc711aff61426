"""The recipes, and what follows from the settings laid over them: sizes, channels, classes, heads and the run's name."""

import json
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fastdit.config import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig, replace

# The DiT paper's sizes (arXiv 2212.09748, table 1): depth, width, heads.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


def dit(size: str, patch: int, **fields: Any) -> ModelConfig:
    """A model of the paper's sizes, S, B, L or XL, e.g. dit("XL", 2, num_classes=1000) for DiT-XL/2."""
    depth, width, num_heads = SIZES[size]
    return ModelConfig(depth=depth, width=width, num_heads=num_heads, patch=patch, **fields)


RECIPES = {
    # Drawn cats composed from layers that a dependency ships: no GPU and no download, cats within minutes on two CPU cores.
    # After so few images a network that predicts x0 makes cats where one that predicts noise still makes noise, and many small
    # steps of a narrow network are worth more than few large ones (docs/quality.md). All cats look one way: none is flipped.
    "cats": Config(
        data=DataConfig(hflip=False),
        model=ModelConfig(patch=4, depth=6, width=192, num_heads=3),
        diffusion=DiffusionConfig("flow", "x0", flow_t="logit_normal"),
        train=TrainConfig(images=60_000, batch=16, lr=4e-3, beta2=0.99, lr_decay="cosine", warmup_images=5_000),
    ),
    # A policy for a simulated arm at six tasks: chunks of 16 actions, the observation for a condition and the task for a class.
    "robot": Config(
        data=DataConfig("robot:metaworld", hflip=False, kind="arrays", normaliser="min_max"),
        model=ModelConfig(patch=2, depth=3, width=128, num_heads=2, input_size=(16,), channels=4, num_classes=6, condition=39),
        diffusion=DiffusionConfig("flow", "x0", flow_t="logit_normal"),
        train=TrainConfig(images=300_000, batch=128, lr=2e-3, lr_decay="cosine", warmup_images=12_800),
    ),
    # The paper recipe of this repository: huggan/cats at 256 pixels, DiT-B/2 on SD latents, 8 GPUs. Squashed, as there.
    "cats-256": Config(
        data=DataConfig("huggan/cats", image_size=(256, 256), crop="none", vae="stabilityai/sd-vae-ft-mse"),
        model=dit("B", 2, input_size=(32, 32), channels=4, num_classes=0),
        diffusion=DiffusionConfig(clip_x0=False),
        train=TrainConfig(images=10_000_000, batch=32, lr=1e-4, weight_decay=1e-2),
    ),
    # DiT-XL/2 on ImageNet at 256 pixels, by the DiT paper's settings: global batch 256, 400k steps, plain MLP, learned sigma.
    # DiT's own train.py differs: its position embedding is fixed, it does not clip gradients, and its EMA does not warm up.
    "imagenet-256-xl": Config(
        data=DataConfig("ILSVRC/imagenet-1k", image_size=(256, 256), vae="stabilityai/sd-vae-ft-ema"),
        model=dit("XL", 2, channels=4, num_classes=1000, conv_kernel=0, class_dropout=0.1, learn_sigma=True),
        diffusion=DiffusionConfig(beta_schedule="linear", clip_x0=False),
        train=TrainConfig(images=102_400_000, batch=32, lr=1e-4, weight_decay=0.0),
    ),
    # cats-256 with what helped on drawn cats, or computes less: flow that predicts x0 (docs/objectives.md), half of the FLOPs
    # by token drop, averages whose length is chosen afterwards. Nobody has trained it yet.
    "cats-256-fast": Config(
        data=DataConfig("huggan/cats", image_size=(256, 256), crop="none", vae="stabilityai/sd-vae-ft-mse"),
        model=dit("B", 2, input_size=(32, 32), channels=4, num_classes=0, token_drop=True),
        diffusion=DiffusionConfig("flow", "x0", flow_t="logit_normal", clip_x0=False),
        train=TrainConfig(images=10_000_000, batch=32, lr=1e-4, weight_decay=1e-2, ema="posthoc"),
    ),
    # cats-256-fast on latents of a newer autoencoder, which was trained for the models that learn them (arXiv 2504.10483): 32
    # channels, a sixteenth of the pixels along a side, hence as many tokens at patch 1. Nobody has trained it yet.
    "cats-256-vavae": Config(
        data=DataConfig("huggan/cats", image_size=(256, 256), crop="none", vae="REPA-E/e2e-vavae-hf", latents="channel"),
        model=dit("B", 1, input_size=(16, 16), channels=32, num_classes=0, token_drop=True),
        diffusion=DiffusionConfig("flow", "x0", flow_t="logit_normal", clip_x0=False),
        train=TrainConfig(images=10_000_000, batch=32, lr=1e-4, weight_decay=1e-2, ema="posthoc"),
    ),
}


class Family(NamedTuple):
    """What an autoencoder's latents are, as far as it can be said before it is loaded."""

    channels: int
    factor: int  # pixels per latent along a side
    latents: Literal["scalar", "channel"]  # as DataConfig has it


# By the beginning of a hub id. The channels of SD's latents are alike, and all models of them were trained on one scale.
FAMILIES = {"stabilityai/sd": Family(4, 8, "scalar"), "REPA-E/e2e-vavae-hf": Family(32, 16, "channel")}
NEWER = Family(16, 8, "channel")  # as those of SD 3, FLUX.1 and GLM-Image; where it is not, `fit` corrects the sizes


def family(vae: str) -> Family:
    """Of a folder as its config.json says. Of a hub id by its name alone: a command means the same with no network."""
    try:
        about = json.loads((Path(vae) / "config.json").read_text(encoding="utf-8"))
        channels, blocks = about["latent_channels"], about["block_out_channels"]
        if type(channels) is int and 0 < channels <= 1 << 16 and 0 < len(blocks) < 9:
            own = about.get("latents_mean") is not None and about.get("latents_std") is not None
            return Family(channels, 2 ** (len(blocks) - 1), "channel" if own or channels > 4 else "scalar")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass  # of the hub, or to be refused when it is loaded
    return next((found for name, found in FAMILIES.items() if vae.startswith(name)), NEWER)


def derive(config: Config, before: Config) -> Config:
    """Fill in what follows from other settings, before any data is seen; `fit` corrects it once they are encoded.

    before: the recipe or the run that the settings were laid over.
    """
    d, m = config.data, config.model
    channels, factor, latents = family(d.vae) if d.vae else Family(3, 1, "scalar")
    if not d.label_column:
        classes = 0
    elif d.source == "folder":
        folder = Path(d.path or "").expanduser()
        classes = sum(entry.is_dir() for entry in folder.iterdir()) if folder.is_dir() else 0
    else:
        classes = m.num_classes
    kind = d.kind if d.path == before.data.path else "images"  # of another path, `fit` will say
    heads = {width: num_heads for _, width, num_heads in SIZES.values()} | {before.model.width: before.model.num_heads}
    most = max(1, m.width // 64)
    theirs = [name for name, r in RECIPES.items() if r.data.path == d.path]
    recipe = next((name for name in theirs if RECIPES[name] is before), next(iter(theirs), None))
    pictures = {
        "input_size": (max(1, d.image_size[0] // factor), max(1, d.image_size[1] // factor)),
        "channels": channels,
        "num_classes": classes,
        "condition": 0,
    }
    return replace(
        config,
        run={"name": config.run.name or recipe or run_name(d.path or "")},
        data={"kind": kind, "latents": latents},
        model={
            **(pictures if kind == "images" else {}),
            "jumps": config.diffusion.consistency > 0,
            "num_heads": heads.get(m.width) or next((h for h in range(most, 1, -1) if m.width % h == 0), 1),
        },
        diffusion=({"clip_x0": d.vae is None} if kind == "images" else {})
        | ({"flow_t": "logit_normal"} if _newly_flow_x0(config, before) else {}),
    )


def _newly_flow_x0(config: Config, before: Config) -> bool:
    """Whether the settings made a flow that predicts x0 of something else; it trains on logit-normal times."""
    now, then = config.diffusion, before.diffusion
    return (now.kind, now.prediction) == ("flow", "x0") != (then.kind, then.prediction)


def run_name(path: str) -> str:
    """What a run on these data is called: the last part of the path or name, in letters that a folder's name may have."""
    local = Path(path).expanduser()
    last = local.resolve().name if local.exists() else re.split("[:@]", path)[0].rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last.removesuffix(".parquet"))[:100].strip("-._") or "run"
