"""What must hold of a config, before anything touches the disk or the network."""

import dataclasses
import math
import re
from typing import Literal

from fastdit.config import Config, DiffusionConfig, UserError, plain, replace, times


def fit(
    config: Config,
    shape: tuple[int, ...],
    num_classes: int,
    condition: int = 0,
    normaliser: str = "",
    latents: Literal["scalar", "channel"] = "scalar",
) -> Config:
    """The config with the model's input as the encoded data have it: (channels, rows, columns); num_classes 0: no labels.

    Of arrays: (channels, …) of a grid of one to three dimensions, the width of their condition, and what normalised them.
    """
    classes = num_classes if config.data.label_column else 0
    network = {"channels": shape[0], "input_size": tuple(shape[1:]), "num_classes": classes, "condition": condition}
    fitted = replace(config, model=network, data={"kind": "arrays" if normaliser else "images", "latents": latents})
    if normaliser:
        # Arrays normalised to mean 0 and deviation 1 go beyond ±1, those normalised to their least and most do not.
        fitted = replace(fitted, data={"normaliser": normaliser}, diffusion={"clip_x0": normaliser == "min_max"})
    validate(fitted)
    return fitted


def validate(config: Config, encoded: bool = True) -> None:
    """Raise UserError, one line naming the field and what would be valid, for any value that cannot work.

    encoded: whether the data are encoded already, so that it is known and not guessed what a path holds, pictures or arrays of
    some grid, and how large a VAE's latents are.
    """
    _validate_numbers(config)
    m, d = config.model, config.data
    known = encoded or d.path is None
    _validate_model(config, known)
    if (encoded or (known and not d.vae)) and any(side % p for side, p in zip(m.input_size, m.patches, strict=True)):
        axes = " rows and columns" if len(m.input_size) == 3 else ""
        raise UserError(f"--model.patch {m.patch} does not divide the network's input of {times(m.input_size)}{axes}")
    _validate_diffusion(config.diffusion)
    every = config.diffusion.consistency_every
    if config.diffusion.consistency and config.train.batch % every:
        raise UserError(f"--train.batch {config.train.batch} is no multiple of {every}, which --diffusion.consistency needs")
    _validate_data(config)
    _validate_sampling(config)
    name = config.run.name or "x"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UserError(f"--run.name {name!r}: use letters, digits, '.', '_' and '-', starting with a letter or digit")
    if not 0 <= config.profile <= MOST:
        raise UserError(f"--profile is {config.profile}; it must be a number of steps, or 0 for none")


def _validate_model(config: Config, known: bool) -> None:
    m = config.model
    if m.width % m.num_heads:
        raise UserError(f"{m.num_heads} attention heads do not divide --model.width {m.width}")
    if m.width % 4:
        raise UserError(f"--model.width {m.width} is not a multiple of 4, which the position embedding needs")
    valid = (3, 4, 5) if known and len(m.input_size) > 1 else (3, 4, 5, 7)
    if m.conv_kernel not in (0, *valid):
        kernels = ", ".join(map(str, valid))
        raise UserError(f"--model.conv_kernel is {m.conv_kernel}; valid are {kernels}, and 0 for a plain MLP")
    if m.token_drop and (config.data.kind == "arrays" or len(m.grid) != 2 or any(side % 2 for side in m.grid) or m.depth < 3):
        said = f"{times(m.grid)} tokens and {m.depth} blocks"
        raise UserError(
            f"--model.token_drop needs pictures of even rows and columns of tokens and 3 blocks, and there are {said}"
        )
    if known and m.class_dropout and not m.num_classes and not m.condition:
        raise UserError("--model.class_dropout needs classes or conditions, and the data have none")
    if config.diffusion.kind == "flow" and m.learn_sigma:
        raise UserError("learned sigma is a DDPM option; flow has no variance to learn")
    diffusion = config.diffusion
    if diffusion.model_guidance and not m.class_dropout:
        raise UserError(f"--diffusion.model_guidance {diffusion.model_guidance:g} needs a --model.class_dropout above 0")


def _validate_diffusion(d: DiffusionConfig) -> None:
    *fitting, last = ("velocity", "x0") if d.kind == "flow" else ("epsilon", "v", "x0")
    if d.prediction not in (*fitting, last):
        said = f"--diffusion.prediction {d.prediction} does not go with --diffusion.kind {d.kind}"
        raise UserError(f"{said}; use {', '.join(fitting)} or {last}")
    if d.consistency and d.kind != "flow":
        raise UserError(f"--diffusion.consistency {d.consistency:g} needs --diffusion.kind flow")
    if d.consistency > 1:
        raise UserError(f"--diffusion.consistency is {d.consistency:g}; it must be a share, 0 to 1")
    if d.consistency_every < 2:
        raise UserError(f"--diffusion.consistency_every is {d.consistency_every}; it must be at least 2")
    if d.timesteps > MOST_TIMESTEPS:
        raise UserError(f"--diffusion.timesteps is {d.timesteps}; it must be at most {MOST_TIMESTEPS}")
    mean, deviation = d.flow_t_logit
    if not math.isfinite(mean) or not 0 < deviation < math.inf:
        raise UserError(f"logit(t) ~ N({mean:g}, {deviation:g}): the mean must be finite, the deviation positive")


def _validate_data(config: Config) -> None:
    m, d = config.model, config.data
    if d.kind == "arrays":
        if d.vae:
            raise UserError(f"--data.vae {plain(d.vae)}: an autoencoder is for pictures, and the data are arrays")
        if config.eval.every_images:
            raise UserError(f"--eval.every_images {config.eval.every_images}: it compares pictures, and the data are arrays")
        return
    if d.source == "cats" and d.image_size not in ((32, 32), (64, 64)):
        raise UserError(f"--data.image_size {times(d.image_size)}: the embedded cats come at 32×32 or 64×64")
    if not d.vae and m.channels not in (1, 3):
        raise UserError(f"the model has {m.channels} channels; pixels have 3, or 1 if all are grey")
    if not d.vae and m.input_size != d.image_size:
        raise UserError(f"the model's input of {times(m.input_size)} is not --data.image_size {times(d.image_size)}")


def _validate_sampling(config: Config) -> None:
    s, diffusion = config.sample, config.diffusion
    if s.steps > diffusion.timesteps:
        raise UserError(f"--sample.steps {s.steps} is more than the {diffusion.timesteps} timesteps of the process")
    if s.guidance != 1 and not config.model.class_dropout:
        raise UserError(f"--sample.guidance {s.guidance:g} needs a --model.class_dropout above 0")
    low, high = s.guidance_interval
    if not 0 <= low < high <= 1:
        raise UserError(f"--guidance_interval {low:g} {high:g}: 0 ≤ low < high ≤ 1")
    flow = diffusion.kind == "flow"
    if s.sampler != "auto" and (s.sampler == "euler") != flow:
        fitting = "euler" if flow else "ddpm, ddim or dpm++"
        raise UserError(f"--sampler {s.sampler} does not sample --diffusion.kind {diffusion.kind}; use {fitting}")
    if config.eval.num < 16:
        raise UserError(f"an evaluation of {config.eval.num} pictures; the metric needs at least 16")


POSITIVE = {
    "train": ("images", "batch", "grad_accum", "lr", "max_skips"),
    "model": ("channels", "patch", "depth", "width", "num_heads", "mlp_ratio", "input_size"),
    "data": ("image_size", "num_images"),
    "diffusion": ("timesteps", "flow_clamp"),
    "sample": ("steps", "num"),
    "eval": ("every_images",),
    "parallel": ("timeout_minutes", "shard", "threads"),
    "log": ("keep", "sample_every", "save_every", "print_every"),
}
BELOW_ONE = {"train": ("ema", "beta2"), "model": ("class_dropout",), "diffusion": ("model_guidance",)}
MOST = 2**31 - 1  # of a whole number; more overflows somewhere below
MOST_TIMESTEPS = 10**6  # diffusers makes the schedules in a loop
MOST_IMAGES = 10**12 - 1  # a checkpoint's name has twelve digits


def _validate_numbers(config: Config) -> None:
    """Numbers are finite, not huge and not negative (the seed may be anything), some are positive, some below 1."""
    for group in dataclasses.fields(config):
        settings = getattr(config, group.name)
        for f in dataclasses.fields(settings) if dataclasses.is_dataclass(settings) else ():
            value = getattr(settings, f.name)
            for number in value if isinstance(value, tuple) else (value,):
                if not isinstance(number, int | float) or f.name in ("seed", "flow_t_logit"):
                    continue
                most = MOST_IMAGES if f.name == "images" else MOST
                if not 0 <= number < float("inf"):
                    wrong = "finite and not negative"
                elif number == 0 and f.name in POSITIVE.get(group.name, ()):
                    wrong = "positive"
                elif number >= 1 and f.name in BELOW_ONE.get(group.name, ()):
                    wrong = "below 1"
                elif number > 1 and f.name == "max_bad":
                    wrong = "a share, 0 to 1"
                elif isinstance(number, int) and number > most:
                    wrong = f"at most {most}"
                else:
                    continue
                raise UserError(f"--{group.name}.{f.name} is {number:g}; it must be {wrong}")
