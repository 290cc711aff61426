"""Measure a trained model: make pictures, compare them with real ones, and keep the figures in its folder.

torchrun --nproc-per-node N shares the work. Picture n of a seed is always the same. Pictures are kept in the run folder as they
are made: after a kill the same command goes on where it stopped, on any number of processes.
"""

import fastdit  # noqa: F401  # isort: skip  before torch
from fastdit import command  # isort: skip
from fastdit.options import Evaluate as Options  # isort: skip

if command.is_program("evaluate", __name__):
    command.at_once(lambda argv: command.parse_args(Options, argv, "fastdit/evaluate.py", __doc__ or ""))  # before torch

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from fastdit import sampling
from fastdit.config import Config, UserError, plain
from fastdit.data import vae
from fastdit.model import DiT
from fastdit.planning import memory as footprint
from fastdit.quality import evaluation, features, fid, references
from fastdit.robot import closed_loop
from fastdit.runtime import ranks
from fastdit.runtime.files import atomic, write_text
from fastdit.runtime.hardware import memory_bytes, precision
from fastdit.runtime.ranks import World
from fastdit.weights.averages import at_length
from fastdit.weights.folder import Located, load_model, locate

CHUNK = 256  # pictures between two commits; what a kill can cost each process
OFFLINE_NUM = 5_000  # pictures and real images that the offline metric compares at most


def main() -> None:
    """torchrun fastdit/evaluate.py RUN [--field VALUE …]"""
    command.run(evaluate, lambda argv: command.parse_args(Options, argv, "fastdit/evaluate.py", __doc__ or ""))


def evaluate(options: Options) -> None:
    """Make the pictures that are missing, on all processes; then the first process measures."""
    found = locate(options.source)
    config = chosen(found.config, options)
    if config.data.kind == "arrays":
        closed_loop.evaluate(found, config, options.steps, options.num_images, options.out)
        return
    footprint.check_sampling(config, memory_bytes())
    # "auto": for small images the metric that needs no download; for others FID, which the field reports.
    small = max(config.data.image_size) <= 64 or bool(options.reference)
    metric = options.metric if options.metric != "auto" else "offline" if small else "fidelity"
    num = options.num_images or (2_000 if metric == "offline" else 50_000)
    require(metric)

    world = ranks.init(config.parallel)
    found = ranks.once(world, lambda: found)  # a run that goes on may have a newer checkpoint by now
    console = Console(quiet=world.rank > 0)
    if (length := options.ema) is not None:
        found = ranks.once(world, lambda: at_length(found, length))
    folder = ranks.once(world, lambda: prepare(options, config, found, world.device))
    missing = ranks.once(world, lambda: [c for c in chunks(num) if not whole(folder / name(c), c, config)])
    mine = missing[world.rank :: world.size]
    if missing:
        model = ranks.every(world, lambda: load_model(found.weights, config, world))
        latents_by = "" if options.vae else found.latents_by
        autoencoder = ranks.every(world, lambda: vae.of(config, world.device, latents_by, found.normaliser))
        for chunk in track(mine, "sampling", console=console, disable=not console.is_terminal):
            make(folder / name(chunk), chunk, model, config, autoencoder, world, options)
        del model, autoencoder
    ranks.shutdown()  # nobody waits for the first process to measure
    if world.rank == 0:
        measure(options, config, found, Chunks([folder / name(c) for c in chunks(num)]), metric, folder, world, console)


def chosen(config: Config, options: Options) -> Config:
    """The run's config with what the options change. Raises UserError."""
    if options.reference_num < 0:
        raise UserError(f"--reference_num is {options.reference_num}; it must not be negative")
    if options.batch <= 0:
        raise UserError(f"--batch is {options.batch}; it must be positive")
    if options.num_images is not None and options.num_images < (16 if config.data.kind == "images" else 1):
        raise UserError(f"--num_images is {options.num_images}; a metric needs at least 16 pictures")
    return command.chosen(config, options, run={"seed": options.seed})


def require(metric: str) -> None:
    """Raise UserError, one line, where a metric's packages are not installed: before a picture is made."""
    if metric in ("offline", "both"):
        features.require()
    if metric in ("fidelity", "both"):
        fid.require()


# --- pictures, in chunks on the disk ---


def chunks(num: int) -> list[range]:
    """Pictures 0 … num - 1 by number."""
    return [range(start, min(start + CHUNK, num)) for start in range(0, num, CHUNK)]


def name(chunk: range) -> str:
    return f"{chunk.start:08d}-{len(chunk)}.npy"


def whole(path: Path, chunk: range, config: Config) -> bool:
    """Whether a chunk's pictures are there."""
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    return bool(
        images.dtype == np.uint8
        and images.shape[0] == len(chunk)
        and images.shape[1] in (1, 3)
        and images.shape[2:] == config.data.image_size
    )


def prepare(options: Options, config: Config, found: Located, device: torch.device) -> Path:
    """The folder for the pictures of these weights and settings, which a file in it records. Rank 0 alone calls this."""
    follows_from: dict[str, Any] = {
        "weights": digest(found.weights),
        "seed": options.seed,
        "precision": precision(options.precision, device),
        "vae": config.data.vae,
        **{group: dataclasses.asdict(getattr(config, group)) for group in ("model", "diffusion", "sample")},
    }
    del follows_from["sample"]["num"]
    text = json.dumps(follows_from, indent=2, sort_keys=True)
    root = Path(options.out) if options.out else found.home / "evaluations"
    seen = found.images_seen
    key = hashlib.sha256(text.encode()).hexdigest()[:12]
    folder = root / f"{found.weights.stem if seen is None else f'{seen:012d}'}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "pictures.json", text + "\n")
    return folder


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make(
    path: Path, chunk: range, model: DiT, config: Config, autoencoder: vae.VAE | None, world: World, options: Options
) -> None:
    """Make a chunk's pictures and keep them, all at once or not at all."""
    parts = [
        sampling.make(
            model,
            config,
            autoencoder,
            world,
            first=start,
            count=min(options.batch, chunk.stop - start),
            seed=options.seed,
        )
        for start in range(chunk.start, chunk.stop, options.batch)
    ]
    with atomic(path) as file:
        np.save(file, torch.cat(parts).numpy())


class Chunks(Dataset[Tensor]):
    """The pictures of chunk files as one set of uint8 [3, H, W], read from the disk as they are asked for."""

    def __init__(self, paths: Sequence[Path]):
        self.chunks = [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]

    def __len__(self) -> int:
        return sum(map(len, self.chunks))

    def __getitem__(self, n: int) -> Tensor:
        if not 0 <= n < len(self):
            raise IndexError(n)
        return torch.from_numpy(np.array(self.chunks[n // CHUNK][n % CHUNK]))

    def first(self, num: int) -> Tensor:
        """Pictures 0 … num - 1, uint8 [num, 3, H, W]."""
        used = self.chunks[: -(-num // CHUNK)]
        return torch.from_numpy(np.concatenate([np.asarray(c) for c in used])[:num])


# --- measuring, by one process ---


def measure(
    options: Options,
    config: Config,
    located: Located,
    made: Chunks,
    metric: str,
    folder: Path,
    world: World,
    console: Console,
) -> None:
    """Score the pictures, print the figures, keep them in the run's evaluations.jsonl and its curve."""
    seen, home = located.images_seen, located.home
    length = {} if options.ema is None else {"ema": options.ema}
    say(console, f"{len(made):,} pictures of {located.weights}: {folder}")
    if options.npz:
        path = folder / f"pictures-{len(made)}x{config.data.image_size[0]}x{config.data.image_size[1]}x3.npz"
        write_npz(path, made)
        say(console, f"for the ADM suite: {path}")
    if metric in ("offline", "both"):
        judge = references.open_judge(config, min(len(made), OFFLINE_NUM), world.device, options.reference or "")
        entry = evaluation.line(config, seen, judge, made.first(judge.num)) | length
        evaluation.record(home, entry)
        say(console, evaluation.say(entry))
        console.print("these figures are not comparable with published FID or KID", highlight=False)
    if metric in ("fidelity", "both"):
        real = fid.Real(*references.references(config, options.reference_num, options.reference or ""))
        entry = {
            **evaluation.how(config, seen, "fidelity", len(made), options.seed),
            **length,
            "against": f"{len(real):,} images of {real.source.name}",
            **fid.fidelity(made, real, world.device, options.batch),
        }
        evaluation.record(home, entry)
        figures = "  ".join(f"{key} {entry[key]:.4f}" for key in ("fid", "inception_kid", "precision", "recall"))
        say(console, f"{figures}  on {len(made):,} pictures against {entry['against']}")


def say(console: Console, text: str) -> None:
    """Print a line; what is in it from paths and datasets neither colours nor moves a terminal."""
    console.print(plain(text, 4000), markup=False, highlight=False, soft_wrap=True)


def write_npz(path: Path, made: Chunks) -> None:
    """Write arr_0, uint8 [n, H, W, 3], as the ADM suite (openai/guided-diffusion) reads it, a chunk at a time."""
    shape = (len(made), *made.chunks[0].shape[2:], 3)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with (
        atomic(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as array,
    ):
        np.lib.format.write_array_header_1_0(array, header)
        for chunk in made.chunks:
            array.write(np.ascontiguousarray(chunk.transpose(0, 2, 3, 1)).tobytes())


if __name__ == "__main__":
    main()
