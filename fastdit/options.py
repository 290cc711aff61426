"""What the verbs take on their command lines. Nothing here imports torch, so that help and errors in options come at once."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from fastdit.config import Config

Kind = Literal["auto", "dit", "sit", "lightningdit", "repa"]


@dataclass(frozen=True)
class Sample:
    source: Annotated[str, tyro.conf.Positional]  # run folder, checkpoint, exported folder, safetensors file or hub id
    num_images: int = 64  # pictures to make (torchrun takes a plain --num for its own)
    first: int = 0  # number of the first; pictures are numbered per seed
    seed: int = 0  # picture n of a seed is always the same
    ema: float | None = None  # length of the averaged weights, a share of the run, after --train.ema posthoc; e.g. 0.07
    label: str | None = None  # class of all pictures, by name or number; without it each class in turn
    condition: str | None = None  # .npy or .safetensors of conditions [n, K] in physical units, one a sample or one for all
    length: int | None = None  # of all samples, along the first axis of their grid; by default all of it
    sampler: Literal["auto", "ddpm", "ddim", "dpm++", "euler"] | None = None  # instead of the run's own
    steps: int | None = None  # network evaluations per picture, instead of the run's own
    guidance: float | None = None  # classifier-free guidance scale, instead of the run's own; 1 is off
    guidance_interval: tuple[float, float] | None = None  # guide only in this part of the process, 0 … 1
    batch: int = 64  # pictures made at once, per process
    compile: bool = False  # compile the network first, which takes a while: for many pictures, or many calls of one
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of the network; auto: bf16 where the device has it
    vae: str | None = None  # folder or hub id of the autoencoder, instead of the run's own
    out: str | None = None  # folder to write to, instead of pictures/ in the run folder or beside the file
    singles: bool = False  # write each picture as a PNG of its own, besides the grid
    latency: bool = False  # make no files: time 200 calls at batch 1 and print the figures


@dataclass(frozen=True)
class Evaluate:
    source: Annotated[str, tyro.conf.Positional]  # run folder, checkpoint, exported folder, safetensors file or hub id
    num_images: int | None = None  # pictures to make: 50,000, or 2,000 for the offline metric; of a policy, episodes a task: 50
    metric: Literal["auto", "offline", "fidelity", "both", "none"] = (
        "auto"  # fidelity: FID, KID, precision, recall by Inception
    )
    seed: int = 0  # picture n of a seed is always the same
    ema: float | None = None  # length of the averaged weights, a share of the run, after --train.ema posthoc; e.g. 0.07
    sampler: Literal["auto", "ddpm", "ddim", "dpm++", "euler"] | None = None  # instead of the run's own
    steps: int | None = None  # network evaluations per picture, instead of the run's own
    guidance: float | None = None  # classifier-free guidance scale, instead of the run's own; 1 is off
    guidance_interval: tuple[float, float] | None = None  # guide only in this part of the process, 0 … 1
    batch: int = 64  # pictures made at once, per process
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of the network; auto: bf16 where the device has it
    vae: str | None = None  # folder or hub id of the autoencoder, instead of the run's own
    reference: str | None = None  # folder of images to compare with, instead of held-out cats or training images
    reference_num: int = 50_000  # real images that fidelity compares with, chosen at random; 0: all
    npz: bool = False  # write the pictures as one .npz for the ADM evaluation suite
    out: str | None = None  # folder to keep pictures in, instead of evaluations/ in the run folder or beside the file


@dataclass(frozen=True)
class Export:
    source: Annotated[str, tyro.conf.Positional]  # run folder, checkpoint, exported or converted folder, or hub id
    format: Literal["fastdit", "release", "diffusers", "pipeline"] = "fastdit"  # what is to open it
    out: str = ""  # folder to write; empty: export-FORMAT in the run folder
    weights: Literal["ema", "live"] = "ema"  # averaged, or as the optimizer left them
    ema: float | None = None  # length of the averaged weights, a share of the run, after --train.ema posthoc; e.g. 0.07
    vae: str = ""  # folder or hub id of the autoencoder; empty: as the run's config says
    license: str = ""  # of the weights, for the card, as the hub names it: mit, cc-by-4.0 …; empty: not stated
    push: str = ""  # hub repository to upload the folder to; empty: none
    private: bool | None = None  # make that repository private if it is new; without it, as your hub account's default


@dataclass(frozen=True)
class Convert:
    source: Annotated[str, tyro.conf.Positional]  # .pt, .ckpt, .bin or .safetensors file, or a folder of diffusers
    out: str = ""  # folder to write; empty: beside the source, its name and -fastdit
    weights: Literal["ema", "model"] = "ema"  # which of the two sets in a training checkpoint
    kind: Kind = "auto"  # whose process a file of DiT's names was trained for; auto: as it says, else DiT's
    num_heads: int = 0  # 0: as the file or the paper's table of sizes says
    num_classes: int = 0  # 0: as many as the file has, less the null class where its kind has one
    patch: int = 0  # of the seed repository's files, which may not say; 0: as they say, or for 4 channels
    vae: str = ""  # folder or hub id of the autoencoder; empty: the kind's usual one; none: the model sees pixels


@dataclass(frozen=True)
class Report:
    run: Annotated[str, tyro.conf.Positional]  # run folder
    out: str | None = None  # file to write, instead of report.html in the run folder
    grids: int = 12  # sample grids shown at most, evenly spread over the run, the last one always


@dataclass(frozen=True)
class Plan(Config):
    """A recipe, where it would run, and what to suppose."""

    gpu: str = "a100-80gb"  # a100-40gb, a100-80gb, h100, h200, b200, l40s or rtx-4090
    gpus: int = 8  # in all
    nodes: int = 0  # they are spread over; 0: eight to a node
    network: float = 25.0  # GB/s between nodes, each direction and GPU: 25 is a 200 Gbit/s link for each
    efficiency: tuple[float, float, float] = (0.35, 0.5, 0.65)  # shares of the bound to suppose
    hours: float = 0.0  # say how many images so much time is good for
    table: bool = False  # print the markdown table of docs/scaling.md instead
