"""Encoding: a dataset becomes a pack (fastdit/data/pack.py) once, on all ranks together; training only ever reads packs.

Images are encoded in chunks, which the ranks take in turn. A chunk is committed by a rename, so a killed encode goes on where
it was, on any number of ranks, and the finished data file has the same bytes whichever way it came about. The pack appears
under its name all at once; the name ends in a hash of everything its content follows from.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from fastdit.config import Config, DataConfig, UserError, plain
from fastdit.data import array_chunks, chunks, experts, images, own
from fastdit.data import vae as autoencoders
from fastdit.data.arrays import ArraySource, open_arrays
from fastdit.data.cats import COLOURS
from fastdit.data.decode import TRANSFORMS
from fastdit.data.lerobot import open_lerobot
from fastdit.data.manifest import FORMAT
from fastdit.data.pack import Batch, Manifest, Pack, read_manifest, verify
from fastdit.data.source import ImageSource
from fastdit.recipes import family
from fastdit.runtime.ranks import World, every, gather, once
from fastdit.runtime.validation import fit

__all__ = ["Batch", "Manifest", "Pack", "ensure", "folder", "open_pack", "pack_dataset", "read_manifest", "verify"]

Progress = Callable[[int, int, int], None]  # images done, images in all, images skipped


def ensure(
    config: Config,
    world: World,
    log: Callable[[str], None] = print,
    progress: Progress | None = None,
) -> Path:
    """The folder of the pack that a config's data and VAE make, encoded now by all ranks together if it is not there yet.

    Only rank 0's log and progress are called. Raises UserError, on every rank alike, where the data or the VAE cannot be had,
    too many images are bad, or the model does not fit the images.
    """
    if world.rank:
        log, progress = (lambda line: None), (lambda done, total, skipped: None)
    path = once(world, lambda: folder(config.data))
    if not once(world, path.exists):
        cores = len(os.sched_getaffinity(0)) // world.local_size
        source = every(world, lambda: open_source(config.data, threads=max(1, cores)))
        autoencoder = every(world, lambda: autoencoders.load(config.data, world.device) if config.data.vae else None)
        every(world, lambda: fit(config, *fits(source, autoencoder)))  # said before the hours of encoding
        encode(source, autoencoder, world, path, config.data.max_bad, log, progress)
    elif world.rank == 0:
        shutil.rmtree(chunks.staging_of(path), ignore_errors=True)  # a kill between naming the pack and clearing up leaves it
    manifest = once(world, lambda: read_manifest(path))
    if bool(manifest.vae) != bool(config.data.vae):
        raise UserError(
            f"{plain(path)} holds latents of {plain(manifest.vae)}; name it by --data.vae"
            if manifest.vae
            else f"{plain(path)} holds pixels, and --data.vae is {plain(config.data.vae)}"
        )
    return path


def open_pack(config: Config, world: World, log: Callable[[str], None] = print) -> Pack:
    """The config's pack, encoded first if need be, as a training loop reads it: each rank's batches one micro-step apart."""
    d, stride = config.data, config.train.batch * world.size
    return Pack(ensure(config, world, log), world.device, config.run.seed, d.hflip, stride=stride)


def class_names(data: DataConfig) -> list[str]:
    """The names of this data's classes, by number; empty where its pack is not here or knows its classes by number only."""
    try:
        if images.origin(data).kind == "cats":
            return list(COLOURS)
        return read_manifest(folder(data)).class_names
    except (UserError, OSError):
        return []


def pack_dataset(
    dataset: own.Dataset,
    folder: str | Path,
    image_size: tuple[int, int] = (32, 32),
    crop: Literal["center", "random", "none"] = "center",
    vae: str | None = None,
    class_names: Sequence[str] | None = None,
    max_bad: float = 0.01,
) -> Path:
    """Pack any torch.utils.data.Dataset in a new folder, on one process; `--data.path FOLDER` then trains on it.

    dataset: its items are (image, label) or an image; own.as_picture says which pictures, arrays and tensors are images. A
        label is a number from 0, or a string of class_names. Each item is read once, in order: random augmentation is frozen.
    image_size, crop, vae: as the settings --data.image_size, --data.crop and --data.vae.
    class_names: what classes 0, 1, … are called; None: `dataset.classes`, where there is such a thing.
    max_bad: share of items that may be no image; they are left out and named in the manifest.

    Raises UserError, and whatever the dataset itself raises.
    """
    path = Path(folder).expanduser()
    if path.exists():
        raise UserError(f"{plain(path)} is there already; a pack is made in a new folder")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    alone = World(0, 1, 0, 1, device)
    source = own.open_dataset(dataset, image_size, crop, class_names, threads=len(os.sched_getaffinity(0)))
    autoencoder = autoencoders.load(DataConfig(vae=vae, latents=family(vae).latents), device) if vae else None
    row_shape(source, autoencoder)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(chunks.staging_of(path), ignore_errors=True)  # of an earlier try, on another dataset perhaps
    encode(source, autoencoder, alone, path, max_bad, print, None)
    return path


def folder(data: DataConfig) -> Path:
    """Where the pack of this data and VAE is or will be: packs/READABLE-HASH, or the pack that the path names itself."""
    origin = images.origin(data)
    if origin.kind == "pack":
        return Path(origin.path).expanduser()
    if origin.kind in ("arrays", "lerobot", "robot"):
        return _arrays_folder(data, origin)
    autoencoder, revision = autoencoders.vae_name(data.vae) if data.vae else ("", None)
    follows_from = {
        "format": FORMAT,
        "transform": TRANSFORMS["none" if origin.kind == "cats" else data.crop],
        "source": "folder" if origin.kind == "parquet" else origin.kind,
        "path": origin.path,
        "split": origin.split,
        "revision": origin.revision,
        "image_column": data.image_column,
        "label_column": data.label_column,
        "num_images": data.num_images or 0,
        "image_size": data.image_size,
        "vae": autoencoder,
        "vae_revision": revision or "",
        "files": ["" if origin.kind == "hub" and not Path(origin.path).is_dir() else _stamp(origin.path), _stamp(autoencoder)],
    } | ({"latents": data.latents} if data.latents != "scalar" else {})
    words = [
        {"cats": "cats", "hub": origin.path}.get(origin.kind, Path(origin.path).expanduser().resolve().name),
        "x".join(map(str, data.image_size)),
        autoencoder.rstrip("/").split("/")[-1],
    ]
    return _named(data, words, follows_from)


def _arrays_folder(data: DataConfig, origin: images.Origin) -> Path:
    robot = origin.kind == "robot"
    follows_from = {
        "format": FORMAT,
        "source": origin.kind,
        "path": origin.path,
        "label_column": data.label_column,
        "num_images": data.num_images or 0,
        "normaliser": data.normaliser,
        "horizon": data.horizon if origin.kind == "lerobot" else 0,
        "files": experts.TRANSFORM if robot else _stamp(origin.path),
    }
    return _named(data, ["robot" if robot else Path(origin.path).expanduser().resolve().name], follows_from)


def _named(data: DataConfig, words: list[str], follows_from: dict[str, Any]) -> Path:
    """The folder of a pack, named so that a person can read it, and by a hash of all that its content follows from."""
    digest = hashlib.sha256(json.dumps(follows_from, sort_keys=True).encode()).hexdigest()[:10]
    readable = "-".join(re.sub("[^A-Za-z0-9.]+", "-", word)[-40:].strip("-.") for word in words if word)
    return Path(data.packs) / f"{readable.lower()}-{digest}"


def _stamp(path: str) -> str:
    """A hash of the names, sizes and times of a local folder's files, or of one file; empty for what is not on the disk."""
    root = os.path.expanduser(path)
    if not path or not os.path.exists(root):
        return ""
    found = []
    for where, _, names in os.walk(root):
        inside = os.path.relpath(where, root)
        for name in names:
            if not name.startswith("."):
                stat = os.lstat(os.path.join(where, name))
                found.append((os.path.normpath(os.path.join(inside, name)), stat.st_size, stat.st_mtime_ns))
    if os.path.isfile(root):
        stat = os.stat(root)
        found.append((os.path.basename(root), stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(repr(sorted(found)).encode()).hexdigest()


def open_source(data: DataConfig, threads: int = 1) -> ImageSource | ArraySource:
    """What a config's data are made of. Raises UserError where it cannot be had."""
    kind = images.origin(data).kind
    if kind == "robot":
        return experts.open_experts(data)
    if kind == "lerobot":
        return open_lerobot(data)
    return open_arrays(data) if kind == "arrays" else images.open_images(data, threads=threads)


def fits(source: ImageSource | ArraySource, autoencoder: autoencoders.VAE | None) -> tuple[tuple[int, ...], int, int, str]:
    """what the pack of a source will have for `validation.fit`: all but the number of classes, where they have no names."""
    classes = len(source.class_names) or int(source.labelled)
    if isinstance(source, ArraySource):
        return source.shape, classes, source.condition, source.normaliser
    return row_shape(source, autoencoder), classes, 0, ""


def row_shape(source: ImageSource, autoencoder: autoencoders.VAE | None) -> tuple[int, int, int]:
    """[C, h, w] of what the network will see of a source in colour. Raises UserError for a size the VAE cannot take."""
    rows, columns = source.image_size
    if autoencoder is None:
        return 3, rows, columns
    if rows % autoencoder.factor or columns % autoencoder.factor:
        raise UserError(
            f"--data.image_size {rows}×{columns}: {plain(autoencoder.name)} needs multiples of {autoencoder.factor}"
        )
    return autoencoder.channels, rows // autoencoder.factor, columns // autoencoder.factor


class Work(NamedTuple):
    """How the chunks of a source are made, and what joins them."""

    total: int  # chunks
    size: int  # items of one
    items: str  # what they are
    what: str  # they become
    make: Callable[[int], dict[str, Any] | None]
    join: Callable[[Path, list[dict[str, Any]], float], Manifest]


def _work(source: ImageSource | ArraySource, autoencoder: autoencoders.VAE | None, staging: Path) -> Work:
    if isinstance(source, ArraySource):
        return Work(
            array_chunks.num_chunks(source),
            source.chunk,
            source.items,
            "samples",
            lambda number: array_chunks.encode(source, staging, number),
            lambda path, parts, max_bad: array_chunks.join(source, staging, path, parts, max_bad),
        )
    return Work(
        chunks.num_chunks(source),
        chunks.CHUNK,
        "images",
        "images",
        lambda number: chunks.encode(source, autoencoder, staging, number),
        lambda path, parts, max_bad: chunks.join(source, autoencoder, staging, path, parts, max_bad),
    )


def encode(
    source: ImageSource | ArraySource,
    autoencoder: autoencoders.VAE | None,
    world: World,
    path: Path,
    max_bad: float,
    log: Callable[[str], None],
    progress: Progress | None,
) -> None:
    """Make the pack of a source at `path`, on all ranks together, going on from the chunks that are there already."""
    staging = chunks.staging_of(path)
    with contextlib.ExitStack() as stack:
        once(world, lambda: stack.enter_context(chunks.locked(staging)))
        if once(world, path.exists):  # another process finished it meanwhile
            return
        total, size, items, what, make, join = _work(source, autoencoder, staging)
        there = len(list(staging.glob("*.json")))
        log(f"encoding {plain(source.name)} into {plain(path)}; {there} of {total} chunks are there already")
        parts: list[dict[str, Any]] = []
        num_skipped = 0
        start = logged = time.monotonic()
        for first in range(0, total, world.size):
            chunk = functools.partial(make, first + world.rank)
            for part in filter(None, gather(world, every(world, chunk))):
                parts.append(part)
                num_skipped += len(part["skipped"])
            if num_skipped > max_bad * source.length:
                skipped = [row for part in parts for row in part["skipped"]]
                once(world, functools.partial(chunks.reject, path, skipped, source.length, max_bad, what))
            done = min((first + world.size) * size, source.length)
            if progress:
                progress(done, source.length, num_skipped)
            elif time.monotonic() - logged > 10:
                logged = time.monotonic()
                log(f"encoded {done:,} of {source.length:,} {items}")
        manifest = once(world, lambda: join(path, parts, max_bad))
        log(f"encoded {manifest.count:,} {what} in {time.monotonic() - start:.1f} s; {num_skipped} skipped")
    if not all(gather(world, path.exists())):
        raise UserError(f"{plain(path)} is not there on every node; --data.packs must be a folder that all nodes share")
