"""What a run is: frozen dataclasses. The trailing comments are the help.

A setting that follows from the data or from another setting is `Derived`: `derive` fills it in, config.json records it, and no
command line takes it. Tests and weights from elsewhere set such fields in Python.
"""

import dataclasses
import difflib
import math
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
    vae: str | None = None  # folder or hub ID[/SUBFOLDER][@REVISION] of an AutoencoderKL; by default train on pixels
    packs: str = "packs"  # where encoded data sets are kept
    kind: Derived[Literal["images", "arrays"]] = "images"  # what the pack holds
    normaliser: Derived[Literal["mean_std", "min_max"]] = "mean_std"  # what brings arrays to the numbers trained on
    latents: Derived[Literal["scalar", "channel"]] = "scalar"  # one scale for all, or each channel by its mean and deviation
    horizon: Derived[int] = 16  # actions of a chunk, of a LeRobot dataset
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
    patch: int = 2  # side of the patch that becomes one token: of pixels, or steps of a sequence; each frame has its own tokens
    depth: int = 6  # number of blocks
    width: int = 192  # D, of the residual stream; a head has 64 of it
    conv_kernel: int = 3  # side of the depthwise convolution in the MLP: 3, 4 or 5, of a sequence also 7; 0: plain MLP
    class_dropout: float = 0.0  # share of samples trained without class and condition, for classifier-free guidance
    qk_norm: bool = False  # RMS-normalise q and k per head
    token_drop: bool = False  # train the middle blocks on one token in four, but for the run's last tenth
    input_size: Derived[tuple[int, ...]] = (32, 32)  # rows and columns the network sees: pixels, the VAE's latents; or a grid
    channels: Derived[int] = 3  # of the network's input
    num_classes: Derived[int] = 15  # 0: unconditional
    jumps: Derived[bool] = False  # the network is given the length of a step beside t
    condition: Derived[int] = 0  # K, numbers in the vector that conditions a sample; 0: there is none
    num_heads: Derived[int] = 3
    learn_sigma: Derived[bool] = False  # predict the reverse process's variance too (twice the output channels)
    time_embedding: Derived[Literal["dit", "diffusers", "seed", "sit"]] = "dit"  # whose sinusoids of t
    mlp_ratio: Derived[int] = 4  # hidden width of the MLP over the width
    position: Derived[Literal["learned", "fixed"]] = "learned"  # embedding of the token's place, from a sinusoidal start

    @property
    def patches(self) -> tuple[int, ...]:
        """Sides of a token's patch along each axis of the input: (length), (rows, columns) or (frames, rows, columns)."""
        return (1, self.patch, self.patch) if len(self.input_size) == 3 else (self.patch,) * len(self.input_size)

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens along each axis."""
        return tuple(side // p for side, p in zip(self.input_size, self.patches, strict=True))

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def patch_size(self) -> int:
        """Positions of the input in a patch."""
        return math.prod(self.patches)

    @property
    def conv_taps(self) -> int:
        """Of one channel's convolution: a sequence has a line of them, images and each frame of a video a square."""
        return self.conv_kernel ** min(2, len(self.input_size))


@dataclass(frozen=True)
class DiffusionConfig:
    kind: Literal["ddpm", "flow"] = "ddpm"  # discrete DDPM, or rectified flow
    prediction: Literal["epsilon", "v", "x0", "velocity"] = "epsilon"  # of the network; under flow velocity or x0
    flow_t: Derived[Literal["uniform", "logit_normal"]] = "uniform"  # distribution of t under flow
    flow_t_logit: Derived[tuple[float, float]] = (0.8, 0.8)  # mean and deviation of logit(t) under logit_normal
    flow_clamp: Derived[float] = 0.05  # least share of noise that weights the loss where flow predicts x0
    model_guidance: float = 0.0  # train classes in as a guidance of scale 1/(1 - this) would sample them; 0: off
    consistency: float = 0.0  # share of training, its last, that teaches flow to sample in 1, 2 or 4 steps; 0: off
    consistency_every: Derived[int] = 4  # one image in so many learns jumps meanwhile, the others plain flow
    beta_schedule: Derived[Literal["squaredcos_cap_v2", "linear", "scaled_linear"]] = "squaredcos_cap_v2"
    timesteps: Derived[int] = 1000  # of the training process
    clip_x0: Derived[bool] = True  # clip predicted x0 to ±1 while sampling: right for pixels, wrong for latents


@dataclass(frozen=True)
class SampleConfig:
    steps: int = 20  # network evaluations per image
    guidance: float = 1.0  # classifier-free guidance scale; 1: off, one forward per step
    sampler: Derived[Literal["auto", "ddpm", "ddim", "dpm++", "euler"]] = "auto"  # auto: dpm++, or euler under flow
    guidance_interval: Derived[tuple[float, float]] = (0.0, 1.0)  # guide only in this part of the process
    num: Derived[int] = 64  # pictures in the grid


@dataclass(frozen=True)
class EvalConfig:
    every_images: int | None = None  # images between evaluations during training; by default none
    reference: Derived[str | None] = None  # folder to compare with; None: held-out cats, or the training images
    num: Derived[int] = 500  # pictures made for each, and real images they are compared with


@dataclass(frozen=True)
class TrainConfig:
    images: int = 100_000  # images to see, then stop
    batch: int = 64  # images per rank and micro-step
    grad_accum: int = 1  # micro-steps per optimizer step
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: on the matrices of the blocks, at AdamW's lr and weight decay
    lr: float = 1e-4  # peak, AdamW and Muon
    lr_decay: Literal["constant", "cosine"] = "constant"  # after the warm-up; cosine falls to zero at the last image
    warmup_images: int = 0  # linear warm-up of the learning rate, in images seen
    weight_decay: float = 1e-2  # on matrices only
    ema: float | Literal["posthoc"] = 0.9999  # decay of the averaged weights; posthoc: --ema of sample.py says their length
    spike_sigma: float | None = None  # skip a step whose loss is so many deviations above the recent mean; by default none
    init_from: str | None = None  # run, checkpoint, export, safetensors or hub id to start from; by default random weights
    grad_clip: Derived[float] = 1.0  # global norm; 0: off
    beta2: Derived[float] = 0.999  # AdamW; beta1 is 0.9
    whole_share: Derived[float] = 0.1  # of the run, at its end, that trains on all tokens
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
    peak_tflops: Derived[float | None] = None  # dense bf16 peak of the device for MFU; None: by the device's name
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


def replace(config: Config, **groups: dict[str, Any]) -> Config:
    """A copy with fields of groups changed: replace(config, train={"batch": 8}, run={"name": "short"})."""
    return dataclasses.replace(config, **{g: dataclasses.replace(getattr(config, g), **f) for g, f in groups.items()})


def times(size: tuple[int, ...]) -> str:
    return "×".join(map(str, size))
