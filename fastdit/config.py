"""What a run is: frozen dataclasses, the recipes, what must hold, and JSON. The trailing comments are the help."""

import dataclasses
import difflib
import json
import math
import re
import stat
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """Something the user gave is wrong. All ranks raise it alike; rank 0 prints it in one line, and all exit with status 2."""


class RankError(UserError):
    """Something befell this rank alone: it prints the line itself, whichever it is, and exits with status 1 at once."""


def plain(said: object, most: int = 300) -> str:
    """What a file or a library says, fit to stand in a line for a terminal: printable and not too long."""
    text = "".join(c if c.isprintable() else " " for c in str(said)[: most + 1])
    return text if len(text) <= most else f"{text[:most]}…"


def nearest(word: str, valid: typing.Iterable[str], dashes: str = "") -> str:
    """What was probably meant by a word that is not valid, as the end of a sentence; empty where nothing is like it."""
    near = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"; did you mean {dashes}{near[0]}?" if near else ""


@dataclass(frozen=True)
class RunConfig:
    name: str = ""  # run folder under --run.folder; empty: the recipe's name
    folder: str = "runs"  # where run folders live
    fresh: bool = False  # start anew in NAME-2, NAME-3, … instead of resuming NAME
    seed: int = 0  # weights, data order, flips, noise and timesteps all follow from it


@dataclass(frozen=True)
class DataConfig:
    source: Literal["cats", "hub", "folder"] = "cats"  # embedded cats, a dataset by name, or a folder of images or parquet
    path: str = ""  # the hub dataset's name, or the folder
    split: str = "train"  # of a hub dataset
    revision: str = ""  # of a hub dataset: branch, tag or commit to pin
    streaming: bool = False  # read a hub dataset as it downloads instead of caching it first
    image_column: str = "image"  # of a hub dataset or parquet
    label_column: str = "label"  # of a hub dataset or parquet; unlabelled where there is no such column
    num_images: int = 0  # use only the first so many images; 0: all (cats: 20,000)
    image_size: tuple[int, int] = (32, 32)  # rows and columns of every image
    crop: Literal["center", "random", "none"] = "center"  # how pictures get that size, the aspect ratio kept; none: squashed
    hflip: bool = True  # see each image mirrored half of the time
    vae: str = ""  # folder or hub id of a diffusers AutoencoderKL; empty: train on pixels
    vae_revision: str = ""  # hub revision of the VAE to pin
    packs: str = "packs"  # where encoded datasets live
    device_gib: float = 16.0  # a pack up to this size stays on the device, a larger one is read ahead from disk
    max_bad: float = 0.01  # share of undecodable images above which encoding fails


@dataclass(frozen=True)
class ModelConfig:
    input_size: tuple[int, int] = (32, 32)  # rows and columns the network sees: pixels, or the VAE's latents
    channels: int = 3  # of the network's input: 3 for pixels, 4 for SD latents
    num_classes: int = 15  # 0: unconditional
    patch: int = 2  # side of the square patch that becomes one token
    depth: int = 6  # blocks
    width: int = 192  # D, of the residual stream
    num_heads: int = 3  # attention heads; must divide width
    mlp_ratio: int = 4  # hidden width of the MLP, F, over D
    conv_kernel: int = 3  # depthwise convolution in the MLP: 3, 4 or 5; 0: plain MLP
    class_dropout: float = 0.0  # share of labels replaced by the null class, for classifier-free guidance
    learn_sigma: bool = False  # predict the reverse process's variance too (twice the output channels)
    qk_norm: bool = False  # RMS-normalise q and k per head
    time_embedding: Literal["dit", "diffusers", "seed", "sit"] = (
        "dit"  # whose sinusoids of t; weights trained elsewhere need theirs
    )
    position: Literal["learned", "fixed"] = "learned"  # embedding of the token's place, from a sinusoidal start


@dataclass(frozen=True)
class DiffusionConfig:
    kind: Literal["ddpm", "flow"] = "ddpm"  # discrete DDPM, or rectified flow
    prediction: Literal["epsilon", "v", "x0", "velocity"] = "epsilon"  # of the network; under flow it is velocity or x0
    beta_schedule: Literal["squaredcos_cap_v2", "linear", "scaled_linear"] = "squaredcos_cap_v2"  # as diffusers names them
    timesteps: int = 1000  # of the training process
    flow_t: Literal["uniform", "logit_normal"] = "uniform"  # distribution of t under flow
    flow_t_logit: tuple[float, float] = (0.8, 0.8)  # mean and deviation of logit(t / timesteps) under logit_normal
    flow_clamp: float = 0.05  # least share of noise that weights the loss where flow predicts x0
    model_guidance: float = 0.0  # train classes in as a guidance of scale 1/(1 - this) would sample them; 0: off
    clip_x0: bool = True  # clip predicted x0 to ±1 while sampling: right for pixels, wrong for latents


@dataclass(frozen=True)
class SampleConfig:
    sampler: Literal["auto", "ddpm", "ddim", "dpm++", "euler"] = "auto"  # auto: dpm++, or euler under flow
    steps: int = 20  # network evaluations per image
    guidance: float = 1.0  # classifier-free guidance scale; 1: off, one forward per step
    guidance_low: float = 0.0  # guide only from this share of the process's timesteps …
    guidance_high: float = 1.0  # … to this one; steps outside take one forward
    num: int = 64  # images in the grid


@dataclass(frozen=True)
class EvalConfig:
    every_images: int = 0  # images between evaluations during training, the offline metric on EMA weights; 0: none
    num: int = 500  # pictures made for each, and real images they are compared with
    reference: str = ""  # folder of images not trained on to compare with; empty: held-out cats, else training images


@dataclass(frozen=True)
class TrainConfig:
    images: int = 100_000  # images to see, then stop
    batch: int = 64  # images per rank and micro-step
    grad_accum: int = 1  # micro-steps per optimizer step
    lr: float = 1e-4  # peak, AdamW
    lr_decay: Literal["constant", "cosine"] = "constant"  # after the warm-up; cosine falls to zero at the last image
    warmup_images: int = 0  # linear warm-up of the learning rate, in images seen
    weight_decay: float = 1e-2  # on matrices only
    beta2: float = 0.999  # AdamW; beta1 is 0.9
    grad_clip: float = 1.0  # global norm; 0: off
    ema: float = 0.9999  # decay of the averaged weights per step; warms up as (1 + step) / (10 + step)
    spike_sigma: float = 0.0  # skip a step whose loss is so many deviations above the last 128 losses' mean; 0: off
    init_from: str = ""  # run, checkpoint, export, safetensors file or hub id to start from; empty: random weights
    max_skips: int = 20  # stop after so many skipped steps in a row


@dataclass(frozen=True)
class ParallelConfig:
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of the network, sums apart; auto: bf16 where the device has it
    residual: Literal["same", "fp32"] = "same"  # the residual stream between blocks: in `precision`, or kept in fp32
    shard: int = 0  # ranks a copy of the weights is sharded over; 0: the ranks of one node (HSDP across nodes)
    reshard_after_forward: bool = False  # free gathered weights between forward and backward: less memory, more traffic
    checkpoint_activations: bool = False  # recompute each block in the backward: less memory, a third more FLOPs
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile each block; auto: on a GPU
    graph: Literal["auto", "on", "off"] = "auto"  # the whole step as one CUDA graph; auto: on one GPU
    threads: int = 0  # CPU threads per rank; 0: this rank's share of the cores
    timeout_minutes: float = 10.0  # a rank silent for longer in a collective ends the run


@dataclass(frozen=True)
class LogConfig:
    print_every: int = 0  # images between lines of metrics.jsonl; 0: one in 200 of the run
    sample_every: int = 0  # images between sample grids; 0: one in 10 of the run
    save_every: int = 0  # images between checkpoints; 0: one in 10 of the run
    keep: int = 3  # newest checkpoints kept
    wandb: str = ""  # Weights & Biases project to log to; empty: none
    peak_tflops: float = 0.0  # dense bf16 peak of the device for MFU; 0: looked up by its name, no MFU where unknown


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    log: LogConfig = field(default_factory=LogConfig)
    kernels: Literal["auto", "triton", "reference"] = "auto"  # auto: Triton on a GPU, PyTorch's fastest ops elsewhere
    attention: Literal["auto", "eager", "sdpa", "flash"] = "auto"  # auto: flash-attn where installed; on a CPU eager; else SDPA
    profile: int = 0  # early steps to trace; the trace, and a table of where the time went, go to profile/ in the run folder


# The DiT paper's sizes (arXiv 2212.09748, table 1): depth, width, heads.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


def dit(size: str, patch: int, **fields: Any) -> ModelConfig:
    """A model of the paper's sizes, S, B, L or XL, e.g. dit("XL", 2, num_classes=1000) for DiT-XL/2."""
    depth, width, num_heads = SIZES[size]
    return ModelConfig(depth=depth, width=width, num_heads=num_heads, patch=patch, **fields)


RECIPES = {
    # Drawn cats composed from layers that a dependency ships: no GPU and no download, cats within minutes on two CPU cores.
    # After so few images predicting x0 draws cats where predicting noise still draws noise; they all look one way, so no flip.
    "cats": Config(
        data=DataConfig(hflip=False),
        model=ModelConfig(patch=4, depth=6, width=256, num_heads=4),
        diffusion=DiffusionConfig(prediction="x0"),
        train=TrainConfig(images=36_000, batch=32, lr=1e-3, lr_decay="cosine", warmup_images=3_000),
    ),
    # The paper recipe of this repository: huggan/cats at 256 pixels, DiT-B/2 on SD latents, 8 GPUs.
    "cats-256": Config(
        data=DataConfig("hub", path="huggan/cats", image_size=(256, 256), crop="none", vae="stabilityai/sd-vae-ft-mse"),
        model=dit("B", 2, channels=4, num_classes=0),
        diffusion=DiffusionConfig(clip_x0=False),
        train=TrainConfig(images=10_000_000, batch=32, lr=1e-4, weight_decay=1e-2),
    ),
    # DiT-XL/2 on ImageNet at 256 pixels, as in the DiT paper: global batch 256, 400k steps, plain MLP, learned sigma.
    "imagenet-256-xl": Config(
        data=DataConfig("hub", path="ILSVRC/imagenet-1k", image_size=(256, 256), vae="stabilityai/sd-vae-ft-ema"),
        model=dit("XL", 2, channels=4, num_classes=1000, conv_kernel=0, class_dropout=0.1, learn_sigma=True),
        diffusion=DiffusionConfig(beta_schedule="linear", clip_x0=False),
        train=TrainConfig(images=102_400_000, batch=32, lr=1e-4, weight_decay=0.0),
    ),
}


def replace(config: Config, **groups: dict[str, Any]) -> Config:
    """A copy with fields of groups changed: replace(config, train={"batch": 8}, run={"name": "short"})."""
    return dataclasses.replace(config, **{g: dataclasses.replace(getattr(config, g), **f) for g, f in groups.items()})


# --- what must hold, before anything touches the disk or the network ---


def validate(config: Config) -> None:
    """Raise UserError, one line naming the field and what would be valid, for any value that cannot work."""
    m, d, s, diffusion = config.model, config.data, config.sample, config.diffusion
    flow = diffusion.kind == "flow"
    grid, image = (f"{side[0]}×{side[1]}" for side in (m.input_size, d.image_size))
    _validate_ranges(config)
    for ok, message in (
        (
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", config.run.name or "x"),
            f"--run.name {config.run.name!r}: use letters, digits, '.', '_' and '-', starting with a letter or digit",
        ),
        (m.width % m.num_heads == 0, f"--model.num_heads {m.num_heads} does not divide --model.width {m.width}"),
        (m.width % 4 == 0, f"--model.width {m.width} is not a multiple of 4, which the position embedding needs"),
        (
            all(side > 0 and side % m.patch == 0 for side in m.input_size),
            f"--model.patch {m.patch} does not divide --model.input_size {grid}",
        ),
        (m.conv_kernel in (0, 3, 4, 5), f"--model.conv_kernel is {m.conv_kernel}; valid are 3, 4, 5, and 0 for a plain MLP"),
        (m.num_classes or not m.class_dropout, "--model.class_dropout needs classes, and --model.num_classes is 0"),
        (not (flow and m.learn_sigma), "--model.learn_sigma is a DDPM option; flow has no variance to learn"),
        (
            diffusion.prediction in (("velocity", "x0") if flow else ("epsilon", "v", "x0")),
            f"--diffusion.prediction {diffusion.prediction} does not go with --diffusion.kind {diffusion.kind}; "
            f"use {'velocity or x0' if flow else 'epsilon, v or x0'}",
        ),
        (d.source == "cats" or d.path, f"--data.source {d.source} needs --data.path"),
        (
            d.source != "cats" or d.image_size in ((32, 32), (64, 64)),
            f"--data.image_size {image}: the embedded cats come at 32×32 or 64×64",
        ),
        (
            d.vae or m.channels in (1, 3),
            f"--model.channels is {m.channels}; pixels have 3 or, grey, 1 (latents need --data.vae)",
        ),
        (
            d.vae or m.input_size == d.image_size,
            f"--model.input_size {grid} differs from --data.image_size {image}; without a VAE they are equal",
        ),
        (
            s.steps <= diffusion.timesteps,
            f"--sample.steps {s.steps} is more than --diffusion.timesteps {diffusion.timesteps}",
        ),
        (s.guidance == 1 or m.class_dropout, f"--sample.guidance {s.guidance:g} needs a --model.class_dropout above 0"),
        (
            s.guidance_low < s.guidance_high <= 1,
            f"--sample.guidance_low {s.guidance_low:g} and guidance_high {s.guidance_high:g}: 0 ≤ low < high ≤ 1",
        ),
        (
            not diffusion.model_guidance or m.class_dropout,
            f"--diffusion.model_guidance {diffusion.model_guidance:g} needs a --model.class_dropout above 0",
        ),
        (
            diffusion.timesteps <= MOST_TIMESTEPS,
            f"--diffusion.timesteps is {diffusion.timesteps}; it must be at most {MOST_TIMESTEPS}",
        ),
        (
            all(map(math.isfinite, diffusion.flow_t_logit)) and diffusion.flow_t_logit[1] > 0,
            f"--diffusion.flow_t_logit is {diffusion.flow_t_logit}; the mean must be finite, the deviation positive",
        ),
        (0 <= config.profile <= MOST, f"--profile is {config.profile}; it must be a number of steps, or 0 for none"),
        (config.eval.num >= 16, f"--eval.num is {config.eval.num}; the metric needs at least 16 pictures"),
        (
            s.sampler == "auto" or (s.sampler == "euler") == flow,
            f"--sample.sampler {s.sampler} does not sample --diffusion.kind {diffusion.kind}; "
            f"use {'euler' if flow else 'ddpm, ddim or dpm++'}",
        ),
    ):
        if not ok:
            raise UserError(message)


POSITIVE = {
    "train": ("images", "batch", "grad_accum", "lr", "max_skips"),
    "model": ("channels", "patch", "depth", "width", "num_heads", "mlp_ratio", "input_size"),
    "data": ("image_size",),
    "diffusion": ("timesteps", "flow_clamp"),
    "sample": ("steps", "num"),
    "parallel": ("timeout_minutes",),
    "log": ("keep",),
}
BELOW_ONE = {"train": ("ema", "beta2"), "model": ("class_dropout",), "diffusion": ("model_guidance",)}


MOST = 2**31 - 1  # of a whole number; more overflows somewhere below
MOST_TIMESTEPS = 10**6  # diffusers makes the schedules in a loop
MOST_IMAGES = 10**12 - 1  # a checkpoint's name has twelve digits


def _validate_ranges(config: Config) -> None:
    """Numbers are finite, not huge and not negative (the seed may be anything), some are positive, some below 1."""
    for group in dataclasses.fields(config):
        settings = getattr(config, group.name)
        for f in dataclasses.fields(settings) if dataclasses.is_dataclass(settings) else ():
            value = getattr(settings, f.name)
            for number in value if isinstance(value, tuple) else (value,):
                if not isinstance(number, int | float) or f.name in ("seed", "flow_t_logit"):
                    continue
                if not 0 <= number < float("inf"):
                    wrong = "finite and not negative"
                elif number == 0 and f.name in POSITIVE.get(group.name, ()):
                    wrong = "positive"
                elif number >= 1 and f.name in BELOW_ONE.get(group.name, ()):
                    wrong = "below 1"
                elif number > 1 and f.name == "max_bad":
                    wrong = "a share, 0 to 1"
                elif isinstance(number, int) and number > (most := MOST_IMAGES if f.name == "images" else MOST):
                    wrong = f"at most {most}"
                else:
                    continue
                raise UserError(f"--{group.name}.{f.name} is {number:g}; it must be {wrong}")


# --- to and from JSON ---


LIMIT = 1 << 20  # bytes of config.json; a real one has thousands


def to_json(config: Config) -> str:
    """The text of a config.json, which `load` reads."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def load(path: Path) -> Config:
    """Read a run's config.json. Raises UserError naming the file and the field where it is not one."""
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > LIMIT:
            raise ValueError(f"not a plain file of at most {LIMIT} bytes")
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable config ({plain(error, 200)})") from None
    _upgrade(data)
    config = _build(Config, data, str(path))
    try:
        validate(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config


def _upgrade(data: Any) -> None:
    """Say the settings of an older run in today's terms, in place."""
    diffusion = data.get("diffusion") if isinstance(data, dict) else None
    if isinstance(diffusion, dict) and "flow_t_logit" not in diffusion:
        if diffusion.get("kind") == "flow":  # it predicted the velocity, whatever `prediction` said
            diffusion["prediction"] = "velocity"
        diffusion["flow_t_logit"] = [0.0, 1.0]
        if diffusion.get("min_snr") == 0:
            del diffusion["min_snr"]


def _build(cls: Any, data: Any, where: str) -> Any:
    """A value of type cls out of parsed JSON, strictly: the file may come from anywhere."""
    if dataclasses.is_dataclass(cls):
        if not isinstance(data, dict):
            raise UserError(f"{where}: expected a group of settings, found {plain(repr(data), 60)}")
        hints = typing.get_type_hints(cls)
        for name in data:
            if name not in hints:
                raise UserError(f"{where}: unknown setting {plain(repr(name), 60)}{nearest(str(name), hints)}")
        return typing.cast(Any, cls)(**{name: _build(hints[name], value, f"{where}: {name}") for name, value in data.items()})
    origin = typing.get_origin(cls)
    if origin is Literal:
        if data not in typing.get_args(cls):
            raise UserError(f"{where} is {plain(repr(data), 60)}; valid are {', '.join(map(repr, typing.get_args(cls)))}")
        return data
    if origin is tuple:
        kinds = typing.get_args(cls)
        if not isinstance(data, list) or len(data) != len(kinds):
            raise UserError(f"{where} is {plain(repr(data), 60)}; expected {len(kinds)} values")
        return tuple(_build(kind, x, where) for kind, x in zip(kinds, data, strict=True))
    if cls is float and type(data) is int:
        return float(data)
    if type(data) is not cls:
        raise UserError(f"{where} is {plain(repr(data), 60)}; expected {cls.__name__}")
    return data


def differences(ours: Any, theirs: Any, prefix: str = "") -> list[str]:
    """The settings in which two configs differ: ["train.lr: 0.0001 here, 0.001 there", …]."""
    found: list[str] = []
    for f in dataclasses.fields(ours):
        a, b = getattr(ours, f.name), getattr(theirs, f.name)
        if dataclasses.is_dataclass(a) and not isinstance(a, type):
            found += differences(a, b, f"{prefix}{f.name}.")
        elif a != b:
            found.append(f"{prefix}{f.name}: {a} here, {b} there")
    return found
