"""What a run is: frozen dataclasses, the recipes, and what must hold. The trailing comments are the help.

A setting that follows from the data or from another setting is `Derived`: `derive` fills it in, config.json records it, and no
command line takes it. Tests and weights from elsewhere set such fields in Python.
"""

import dataclasses
import difflib
import math
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


class UserError(ValueError):
    """Something the user gave is wrong. Every rank raises it; rank 0 prints it in one line, and all exit with status 2."""


class RankError(UserError):
    """Failure on one rank. That rank prints the error in one line and exits with status 1 at once."""


def plain(said: object, most: int = 300) -> str:
    """Text from a file or a library, made fit for one line of a terminal: printable and not too long."""
    text = "".join(c if c.isprintable() else " " for c in str(said)[: most + 1])
    return text if len(text) <= most else f"{text[:most]}…"


def nearest(word: str, valid: typing.Iterable[str], dashes: str = "") -> str:
    """The valid word that is most like a wrong one, as the end of a sentence; empty if none is like it."""
    near = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"; did you mean {dashes}{near[0]}?" if near else ""


T = typing.TypeVar("T")
Derived = Annotated[T, tyro.conf.Suppress]  # filled in by `derive`, or by weights from elsewhere; never typed


@dataclass(frozen=True)
class RunConfig:
    name: str | None = None  # the run's folder under --run.folder; by default named after the recipe or the data
    folder: str = "runs"  # where run folders live
    fresh: bool = False  # start a new run, NAME-2, NAME-3, …, instead of resuming NAME
    checkpoints: str | None = None  # keep checkpoints in NAME/ in this folder, of another disk; by default in the run folder
    seed: int = 0  # decides weights, data order, flips, noise and timesteps


@dataclass(frozen=True)
class DataConfig:
    path: str | None = None  # pictures or arrays: folder, file, or hub OWNER/NAME[:SPLIT][@REVISION]; by default drawn cats
    label_column: str | None = "label"  # class labels; None: train without classes, also from a folder with sub-folders
    num_images: int | None = None  # use only so many images
    image_size: tuple[int, int] = (32, 32)  # rows and columns that every image is brought to
    crop: Literal["center", "random", "none"] = "center"  # how: cut out the middle, cut at random, or squash the whole
    hflip: bool = True  # show each image mirrored half of the time
    vae: str | None = None  # folder or hub ID[@REVISION] of a diffusers AutoencoderKL; by default train on pixels
    packs: str = "packs"  # where encoded data sets are kept
    kind: Derived[Literal["images", "arrays"]] = "images"  # what the pack holds
    normaliser: Derived[Literal["mean_std", "min_max"]] = "mean_std"  # what brings arrays to the numbers trained on
    image_column: Derived[str] = "image"
    max_bad: Derived[float] = 0.01  # share of images that cannot be decoded above which encoding fails

    @property
    def source(self) -> Literal["cats", "folder", "hub"]:
        """Where the images come from, by the path alone."""
        if self.path is None:
            return "cats"
        return "folder" if Path(self.path).expanduser().exists() else "hub"


@dataclass(frozen=True)
class ModelConfig:
    patch: int = 2  # side of the square patch that becomes one token
    depth: int = 6  # number of blocks
    width: int = 192  # D, of the residual stream; a head has 64 of it
    conv_kernel: int = 3  # side of the depthwise convolution in the MLP: 3, 4 or 5; 0: plain MLP
    class_dropout: float = 0.0  # share of labels replaced by the null class, for classifier-free guidance
    qk_norm: bool = False  # RMS-normalise q and k per head
    input_size: Derived[tuple[int, ...]] = (32, 32)  # rows and columns the network sees: pixels, the VAE's latents; or a grid
    channels: Derived[int] = 3  # of the network's input
    num_classes: Derived[int] = 15  # 0: unconditional
    condition: Derived[int] = 0  # K, numbers in the vector that conditions a sample; 0: there is none
    num_heads: Derived[int] = 3
    learn_sigma: Derived[bool] = False  # predict the reverse process's variance too (twice the output channels)
    time_embedding: Derived[Literal["dit", "diffusers", "seed", "sit"]] = "dit"  # whose sinusoids of t
    mlp_ratio: Derived[int] = 4  # hidden width of the MLP over the width
    position: Derived[Literal["learned", "fixed"]] = "learned"  # embedding of the token's place, from a sinusoidal start


@dataclass(frozen=True)
class DiffusionConfig:
    kind: Literal["ddpm", "flow"] = "ddpm"  # discrete DDPM, or rectified flow
    prediction: Literal["epsilon", "v", "x0", "velocity"] = "epsilon"  # of the network; under flow velocity or x0
    flow_t: Derived[Literal["uniform", "logit_normal"]] = "uniform"  # distribution of t under flow
    flow_t_logit: Derived[tuple[float, float]] = (0.8, 0.8)  # mean and deviation of logit(t) under logit_normal
    flow_clamp: Derived[float] = 0.05  # least share of noise that weights the loss where flow predicts x0
    model_guidance: float = 0.0  # train classes in as a guidance of scale 1/(1 - this) would sample them; 0: off
    beta_schedule: Derived[Literal["squaredcos_cap_v2", "linear", "scaled_linear"]] = "squaredcos_cap_v2"
    timesteps: Derived[int] = 1000  # of the training process
    clip_x0: Derived[bool] = True  # clip predicted x0 to ±1 while sampling: right for pixels, wrong for latents


@dataclass(frozen=True)
class SampleConfig:
    sampler: Literal["auto", "ddpm", "ddim", "dpm++", "euler"] = "auto"  # auto: dpm++, or euler under flow
    steps: int = 20  # network evaluations per image
    guidance: float = 1.0  # classifier-free guidance scale; 1: off, one forward per step
    guidance_interval: Derived[tuple[float, float]] = (0.0, 1.0)  # guide only in this part of the process; outside, one forward
    num: Derived[int] = 64  # pictures in the grid


@dataclass(frozen=True)
class EvalConfig:
    every_images: int | None = None  # images between evaluations during training; by default none
    reference: str | None = None  # folder to compare with; by default held-out cats, or the training images
    num: Derived[int] = 500  # pictures made for each, and real images they are compared with


@dataclass(frozen=True)
class TrainConfig:
    images: int = 100_000  # images to see, then stop
    batch: int = 64  # images per rank and micro-step
    grad_accum: int = 1  # micro-steps per optimizer step
    lr: float = 1e-4  # peak, AdamW
    lr_decay: Literal["constant", "cosine"] = "constant"  # after the warm-up; cosine falls to zero at the last image
    warmup_images: int = 0  # linear warm-up of the learning rate, in images seen
    weight_decay: float = 1e-2  # on matrices only
    ema: float = 0.9999  # decay of the averaged weights per step; warms up as (1 + step) / (10 + step)
    spike_sigma: float | None = None  # skip a step whose loss is so many deviations above the recent mean; by default none
    init_from: str | None = None  # run, checkpoint, export, safetensors or hub id to start from; by default random weights
    grad_clip: Derived[float] = 1.0  # global norm; 0: off
    beta2: Derived[float] = 0.999  # AdamW; beta1 is 0.9
    max_skips: Derived[int] = 20  # skipped steps in a row that stop the run


@dataclass(frozen=True)
class ParallelConfig:
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # what the network computes in; auto: bf16 if the device has it
    reshard_after_forward: bool = False  # free gathered weights between forward and backward: less memory, more traffic
    checkpoint_activations: bool = False  # recompute each block in the backward: less memory, a third more FLOPs
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile each block; auto: on a GPU
    deterministic: bool = False  # the same bits from every run on the same GPUs, at some cost in speed
    timeout_minutes: float = 10.0  # a rank silent for longer ends the run
    shard: Derived[int | None] = None  # ranks a copy of the weights is sharded over; None: those of one node (HSDP)
    threads: Derived[int | None] = None  # CPU threads per rank; None: this rank's share of the cores
    graph: Derived[Literal["auto", "on", "off"]] = "auto"  # the whole step as one CUDA graph; auto: on one GPU


@dataclass(frozen=True)
class LogConfig:
    sample_every: int | None = None  # images between sample grids; by default a tenth of the run
    save_every: int | None = None  # images between checkpoints; by default a tenth of the run
    wandb: str | None = None  # Weights & Biases project to log to
    peak_tflops: float | None = None  # dense bf16 peak of the device for MFU; by default looked up by the device's name
    print_every: Derived[int | None] = None  # images between lines of metrics.jsonl; None: one in 200 of the run
    keep: Derived[int] = 3  # newest checkpoints kept


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
    # After so few images a network that predicts x0 makes cats where one that predicts noise still makes noise. All cats look
    # one way, so they are not flipped.
    "cats": Config(
        data=DataConfig(hflip=False),
        model=ModelConfig(patch=4, depth=6, width=256, num_heads=4),
        diffusion=DiffusionConfig("flow", "x0", flow_t="logit_normal"),
        train=TrainConfig(images=36_000, batch=32, lr=2e-3, lr_decay="cosine", warmup_images=3_000),
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
}


def replace(config: Config, **groups: dict[str, Any]) -> Config:
    """A copy with fields of groups changed: replace(config, train={"batch": 8}, run={"name": "short"})."""
    return dataclasses.replace(config, **{g: dataclasses.replace(getattr(config, g), **f) for g, f in groups.items()})


def derive(config: Config, before: Config) -> Config:
    """Fill in what follows from other settings, before any data is seen; `fit` corrects it once they are encoded.

    before: the recipe or the run that the settings were laid over.
    """
    d, m = config.data, config.model
    factor, channels = (8, 4) if d.vae else (1, 3)  # of the Stable Diffusion autoencoders
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
    recipe = next((name for name, r in RECIPES.items() if r.data.path == d.path), None)
    pictures = {
        "input_size": (max(1, d.image_size[0] // factor), max(1, d.image_size[1] // factor)),
        "channels": channels,
        "num_classes": classes,
        "condition": 0,
    }
    return replace(
        config,
        run={"name": config.run.name or recipe or run_name(d.path or "")},
        data={"kind": kind},
        model={
            **(pictures if kind == "images" else {}),
            "num_heads": heads.get(m.width) or next((h for h in range(most, 1, -1) if m.width % h == 0), 1),
        },
        diffusion=({"clip_x0": d.vae is None} if kind == "images" else {})
        | ({"flow_t": "logit_normal"} if _newly_flow_x0(config, before) else {}),
    )


def _newly_flow_x0(config: Config, before: Config) -> bool:
    """Whether the settings made a flow that predicts x0 of something else; it trains on logit-normal times."""
    now, then = config.diffusion, before.diffusion
    return (now.kind, now.prediction) == ("flow", "x0") != (then.kind, then.prediction)


def fit(config: Config, shape: tuple[int, ...], num_classes: int, condition: int = 0, normaliser: str = "") -> Config:
    """The config with the model's input as the encoded data have it: (channels, rows, columns); num_classes 0: no labels.

    Of arrays: (channels, …) of a grid of one to three dimensions, the width of their condition, and what normalised them.
    """
    classes = num_classes if config.data.label_column else 0
    network = {"channels": shape[0], "input_size": tuple(shape[1:]), "num_classes": classes, "condition": condition}
    fitted = replace(config, model=network, data={"kind": "arrays" if normaliser else "images"})
    if normaliser:
        # Arrays normalised to mean 0 and deviation 1 go beyond ±1, those normalised to their least and most do not.
        fitted = replace(fitted, data={"normaliser": normaliser}, diffusion={"clip_x0": normaliser == "min_max"})
    validate(fitted)
    return fitted


def run_name(path: str) -> str:
    """What a run on these data is called: the last part of the path or name, in letters that a folder's name may have."""
    local = Path(path).expanduser()
    last = local.resolve().name if local.exists() else re.split("[:@]", path)[0].rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last.removesuffix(".parquet"))[:100].strip("-._") or "run"


# --- what must hold, before anything touches the disk or the network ---


def validate(config: Config, encoded: bool = True) -> None:
    """Raise UserError, one line naming the field and what would be valid, for any value that cannot work.

    encoded: whether the data are encoded already, so that the size of a VAE's latents is known and not guessed.
    """
    _validate_numbers(config)
    _validate_model(config)
    m = config.model
    if (encoded or not config.data.vae) and any(side % m.patch for side in m.input_size):
        raise UserError(f"--model.patch {m.patch} does not divide the network's input of {times(m.input_size)}")
    _validate_diffusion(config.diffusion)
    _validate_data(config)
    _validate_sampling(config)
    name = config.run.name or "x"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UserError(f"--run.name {name!r}: use letters, digits, '.', '_' and '-', starting with a letter or digit")
    if not 0 <= config.profile <= MOST:
        raise UserError(f"--profile is {config.profile}; it must be a number of steps, or 0 for none")


def _validate_model(config: Config) -> None:
    m = config.model
    if m.width % m.num_heads:
        raise UserError(f"{m.num_heads} attention heads do not divide --model.width {m.width}")
    if m.width % 4:
        raise UserError(f"--model.width {m.width} is not a multiple of 4, which the position embedding needs")
    if m.conv_kernel not in (0, 3, 4, 5):
        raise UserError(f"--model.conv_kernel is {m.conv_kernel}; valid are 3, 4, 5, and 0 for a plain MLP")
    if m.class_dropout and not m.num_classes:
        raise UserError("--model.class_dropout needs classes, and the data have none")
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
        raise UserError(f"--sample.guidance_interval {low:g} {high:g}: 0 ≤ low < high ≤ 1")
    flow = diffusion.kind == "flow"
    if s.sampler != "auto" and (s.sampler == "euler") != flow:
        fitting = "euler" if flow else "ddpm, ddim or dpm++"
        raise UserError(f"--sample.sampler {s.sampler} does not sample --diffusion.kind {diffusion.kind}; use {fitting}")
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


def times(size: tuple[int, ...]) -> str:
    return "×".join(map(str, size))
