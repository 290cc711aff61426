"""Encoding: a dataset becomes a pack (fastdit/data/pack.py) once, on all ranks together; training only ever reads packs.

Images are encoded in chunks, dealt to the ranks in turn. A chunk is committed by a rename, so a killed encode goes on where it
was, on any number of ranks, and the finished data file has the same bytes whichever way it came about. The pack appears under
its name all at once; the name ends in a hash of everything its content follows from.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdit.config import Config, DataConfig, UserError
from fastdit.data import images, vae
from fastdit.data.pack import FORMAT, Batch, Manifest, Pack, normalise, read_manifest, verify
from fastdit.runtime.ranks import World, every, gather, once

__all__ = ["Batch", "Manifest", "Pack", "ensure", "open_pack", "read_manifest", "verify"]

Progress = Callable[[int, int, int], None]  # images done, images in all, images skipped

CHUNK = 256  # images between two commits; what a kill can cost each rank
BATCH = 64  # images the VAE is given at once
TRANSFORM = "upright RGB on white; resized bilinear, antialiased; [0, 255] to [-1, 1]"


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
        _encode(config, world, path, log, progress)
    elif world.rank == 0:
        shutil.rmtree(_staging(path), ignore_errors=True)  # a kill between naming the pack and clearing up leaves it
    manifest = once(world, lambda: read_manifest(path))
    _fits(config, manifest.image_shape, manifest.num_classes, manifest.vae)
    return path


def open_pack(config: Config, world: World, log: Callable[[str], None] = print) -> Pack:
    """The config's pack, encoded first if need be, as a training loop reads it: each rank's batches one micro-step apart."""
    d, stride = config.data, config.train.batch * world.size
    return Pack(ensure(config, world, log), world.device, config.run.seed, d.hflip, d.device_gib, stride)


def folder(data: DataConfig) -> Path:
    """Where the pack of this data and VAE is or will be: packs/READABLE-HASH."""
    follows_from = {
        "format": FORMAT,
        "transform": TRANSFORM,
        **{f.name: getattr(data, f.name) for f in dataclasses.fields(data)},
        "files": [_stamp(data.path), _stamp(data.vae)],
    }
    for name in ("packs", "device_gib", "max_bad", "hflip", "streaming"):  # change where it is, or how it is read
        del follows_from[name]
    digest = hashlib.sha256(json.dumps(follows_from, sort_keys=True).encode()).hexdigest()[:10]
    words = [
        {"cats": "cats", "folder": Path(data.path).resolve().name, "hub": data.path}[data.source],
        "x".join(map(str, data.image_size)),
        data.vae.rstrip("/").split("/")[-1],
    ]
    readable = "-".join(re.sub("[^A-Za-z0-9.]+", "-", word)[-40:].strip("-.") for word in words if word)
    return Path(data.packs) / f"{readable.lower()}-{digest}"


def _staging(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _stamp(path: str) -> str:
    """A hash of a local folder's file names, sizes and times; empty for what is not a local folder."""
    root = Path(path).expanduser()
    if not path or not root.is_dir():
        return ""
    files = sorted(Path(where, name) for where, _, names in os.walk(root) for name in names if not name.startswith("."))
    stamps = [(str(f.relative_to(root)), (s := f.lstat()).st_size, s.st_mtime_ns) for f in files]
    return hashlib.sha256(repr(stamps).encode()).hexdigest()


def _fits(config: Config, shape: tuple[int, ...], num_classes: int, vae_name: str) -> None:
    m, what = config.model, f"the latents of {vae_name}" if vae_name else "the images"
    if m.channels != shape[0]:
        raise UserError(f"--model.channels is {m.channels}; {what} have {shape[0]}")
    if m.input_size != shape[1:]:
        raise UserError(f"--model.input_size is {m.input_size[0]}×{m.input_size[1]}; {what} are {shape[1]}×{shape[2]}")
    if m.num_classes and not num_classes:
        raise UserError(f"--model.num_classes is {m.num_classes}, but the images have no labels; 0 trains without")
    if 0 < m.num_classes < num_classes:
        raise UserError(f"--model.num_classes is {m.num_classes}; the images have {num_classes} classes (0 ignores them)")


# --- encoding ---


def _encode(config: Config, world: World, path: Path, log: Callable[[str], None], progress: Progress | None) -> None:
    data, staging = config.data, _staging(path)
    cores = len(os.sched_getaffinity(0)) // world.local_size
    source = every(world, lambda: images.open_images(data, threads=max(1, cores)))
    autoencoder = every(world, lambda: vae.load(data, world.device) if data.vae else None)
    shape = (3, *data.image_size)
    if autoencoder:
        if any(side % autoencoder.factor for side in data.image_size):
            size = "×".join(map(str, data.image_size))
            raise UserError(f"--data.image_size {size}: {data.vae} needs multiples of {autoencoder.factor}")
        shape = (autoencoder.channels, *(side // autoencoder.factor for side in data.image_size))
    _fits(config, shape, len(source.class_names) or int(source.labelled), data.vae)

    with contextlib.ExitStack() as stack:
        once(world, lambda: stack.enter_context(_locked(staging)))
        if once(world, path.exists):  # another process finished it meanwhile
            return
        num_chunks = -(-source.length // CHUNK)
        log(f"encoding {source.name} into {path}; {len(list(staging.glob('*.json')))} of {num_chunks} chunks are there already")
        parts: list[dict[str, Any]] = []
        skipped: list[Any] = []
        start = logged = time.monotonic()
        for first in range(0, num_chunks, world.size):
            encode = functools.partial(_chunk, source, autoencoder, staging, first + world.rank)
            for part in filter(None, gather(world, every(world, encode))):
                parts.append(part)
                skipped += part["skipped"]
            if len(skipped) > data.max_bad * source.length:
                once(world, functools.partial(_reject, path, skipped, source.length, data.max_bad))
            done = min((first + world.size) * CHUNK, source.length)
            if progress:
                progress(done, source.length, len(skipped))
            elif time.monotonic() - logged > 10:
                logged = time.monotonic()
                log(f"encoded {done:,} of {source.length:,} images")
        count = once(world, lambda: _join(data, source, autoencoder, staging, path, parts))
        log(f"encoded {count:,} images in {time.monotonic() - start:.1f} s; {len(skipped)} skipped")
    if not all(gather(world, path.exists())):
        raise UserError(f"{path} is not there on every node; --data.packs must be a folder that all nodes share")


@contextlib.contextmanager
def _locked(staging: Path) -> Iterator[None]:
    """Hold the staging folder; the lock goes with the process that holds it, however it ends."""
    staging.mkdir(parents=True, exist_ok=True)
    with (staging / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is encoding into {staging}; run again when it is done") from None
        yield


def _chunk(source: images.ImageSource, autoencoder: vae.VAE | None, staging: Path, number: int) -> dict[str, Any] | None:
    """Encode images CHUNK·number … into staging/NUMBER.bin, unless NUMBER.json says that they are; its content is returned.

    None where there are no such images.
    """
    if number * CHUNK >= source.length:
        return None
    file, commit = staging / f"{number:07d}.bin", staging / f"{number:07d}.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(commit.read_text())
    labels: list[int | None] = []
    skipped: list[tuple[str, str]] = []
    batch: list[images.Pixels] = []
    rows: list[Tensor] = []
    for example in source.read(number * CHUNK, min((number + 1) * CHUNK, source.length)):
        if example.image is None:
            skipped.append((example.name, example.reason))
        else:
            batch.append(example.image)
            labels.append(example.label)
        if len(batch) == BATCH:
            rows.append(_rows(batch, autoencoder))
            batch = []
    rows += [_rows(batch, autoencoder)] if batch else []
    content = b"".join(row.view(torch.uint8).numpy().tobytes() for row in rows)
    shape = list(rows[0].shape[1:]) if rows else []
    part = {"sha256": hashlib.sha256(content).hexdigest(), "shape": shape, "labels": labels, "skipped": skipped}
    # Not flushed to the disk: `_join` compares the hash, and has a chunk that a power cut damaged encoded again.
    _write(file, [content])
    _write(commit, [json.dumps(part).encode()])
    return part


def _rows(batch: list[images.Pixels], autoencoder: vae.VAE | None) -> Tensor:
    pixels = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).contiguous()  # [B, 3, H, W]
    if autoencoder is None:
        return pixels
    x = normalise(pixels.to(autoencoder.device))
    both = torch.stack([autoencoder.moments(x), autoencoder.moments(x.flip(-1))], dim=1)  # [B, 2, 2·C, h, w]
    if not both.isfinite().all():
        raise UserError("the VAE gives latents that are not finite; is it the right one?")
    return both.bfloat16().cpu().contiguous()


def _join(
    data: DataConfig,
    source: images.ImageSource,
    autoencoder: vae.VAE | None,
    staging: Path,
    path: Path,
    parts: list[dict[str, Any]],
) -> int:
    """Put the chunks together, aside, and give the whole its name. Returns the number of images."""
    skipped = [[name, reason] for part in parts for name, reason in part["skipped"]]
    labels = [label for part in parts for label in part["labels"]]
    if not labels or len(skipped) > data.max_bad * (len(labels) + len(skipped)):
        _reject(path, skipped, len(labels) + len(skipped), data.max_bad)
    label_bytes = np.array(labels, np.int64).tobytes() if source.labelled else b""
    manifest = Manifest(
        format=FORMAT,
        dataset=source.name,
        transform=TRANSFORM,
        vae=data.vae,
        vae_revision=autoencoder.revision or data.vae_revision if autoencoder else "",
        count=len(labels),
        shape=next(part["shape"] for part in parts if part["labels"]),
        dtype="bfloat16" if autoencoder else "uint8",
        scale=autoencoder.scale if autoencoder else 1.0,
        shift=autoencoder.shift if autoencoder else 0.0,
        labelled=source.labelled,
        num_classes=(len(source.class_names) or max(labels) + 1) if source.labelled else 0,
        class_names=list(source.class_names),
        chunks=[[len(part["labels"]), part["sha256"]] for part in parts],
        labels_sha256=hashlib.sha256(label_bytes).hexdigest() if source.labelled else "",
        skipped=skipped,
    )

    def content() -> Iterator[bytes]:
        for number, part in enumerate(parts):
            file = staging / f"{number:07d}.bin"
            rows = file.read_bytes()
            if hashlib.sha256(rows).hexdigest() != part["sha256"]:
                file.with_suffix(".json").unlink()
                raise UserError(f"{file} was damaged since it was written; run again to encode its images anew")
            yield rows
        yield label_bytes

    whole = staging / "pack"
    whole.mkdir(exist_ok=True)
    _write(whole / "data.bin", content(), flush=True)
    _write(whole / "manifest.json", [json.dumps(dataclasses.asdict(manifest), indent=1).encode()], flush=True)
    whole.rename(path)
    _flush(path)
    _flush(path.parent)
    shutil.rmtree(staging, ignore_errors=True)
    return manifest.count


def _reject(path: Path, skipped: list[Any], total: int, max_bad: float) -> None:
    report = path.with_name(path.name + ".rejected.txt")
    lines = [f"{name!r}: {reason}" for name, reason in skipped]
    report.write_text("\n".join([*lines, ""]))
    found = f"{len(skipped):,} of {total:,} images cannot be used; --data.max_bad allows {max_bad:.1%}"
    raise UserError(f"{found} ({'; '.join(lines[:3])}; all in {report})")


def _write(path: Path, blocks: Iterable[bytes], flush: bool = False) -> None:
    """Write a file that appears under its name only when it is whole."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("wb") as file:
        for block in blocks:
            file.write(block)
        if flush:
            file.flush()
            os.fsync(file.fileno())
    partial.replace(path)


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
