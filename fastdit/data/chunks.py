"""The work of encoding: images become chunks of rows in a staging folder, and the chunks become a pack.

A chunk is two files: NUMBER.bin has its rows, and NUMBER.json, written after it, says that they are all there.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdit.config import UserError, plain
from fastdit.data import manifest as manifests
from fastdit.data import vae
from fastdit.data.arrays import ArraySource
from fastdit.data.decode import TRANSFORMS, Pixels
from fastdit.data.manifest import Manifest
from fastdit.data.normaliser import Moments
from fastdit.data.pack import normalise
from fastdit.data.source import ImageSource
from fastdit.runtime import files

CHUNK = 256  # images between two commits; what a kill can cost each rank
BATCH = 64  # images the VAE is given at once
COMMIT = {"sha256", "bytes", "shape", "labels", "skipped", "grey"}  # fields of NUMBER.json; of latents "moments" too


def staging_of(path: Path) -> Path:
    """The folder beside a pack in which it is being made."""
    return path.with_name(path.name + ".partial")


@contextlib.contextmanager
def locked(staging: Path) -> Iterator[None]:
    """Hold the staging folder; the lock goes with the process that holds it, however it ends."""
    staging.mkdir(parents=True, exist_ok=True)
    with (staging / "lock").open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is encoding into {plain(staging)}; run again when it is done") from None
        yield


def num_chunks(source: ImageSource) -> int:
    return -(-source.length // CHUNK)


def committed(staging: Path, number: int, fields: set[str]) -> dict[str, Any] | None:
    """The content of a chunk's NUMBER.json, which has these fields; None where the chunk is not there as a whole."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        part = json.loads((staging / f"{number:07d}.json").read_text(encoding="utf-8"))
        if isinstance(part, dict) and part.keys() == fields and (staging / f"{number:07d}.bin").stat().st_size == part["bytes"]:
            return part
    return None


def encode(source: ImageSource, autoencoder: vae.VAE | None, staging: Path, number: int) -> dict[str, Any] | None:
    """Encode images CHUNK·number … into a chunk, unless it is there already. Returns the content of its NUMBER.json.

    None where there are no such images.
    """
    if number * CHUNK >= source.length:
        return None
    file, commit = staging / f"{number:07d}.bin", staging / f"{number:07d}.json"
    if found := committed(staging, number, COMMIT | ({"moments"} if autoencoder else set())):
        return found
    labels: list[int | None] = []
    skipped: list[tuple[str, str]] = []
    batch: list[Pixels] = []
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
    part = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "shape": list(rows[0].shape[1:]) if rows else [],
        "labels": labels,
        "skipped": skipped,
        "grey": autoencoder is None and all(bool((row == row[:, :1]).all()) for row in rows),
    }
    if autoencoder is not None:
        part["moments"] = _total([_moments(row).to_list() for row in rows])
    # Not synced, which would take longer than encoding small pictures: `join` compares the hash, and has a chunk that a power
    # cut damaged encoded again.
    write(file, [content], sync=False)
    write(commit, [json.dumps(part).encode()], sync=False)
    return part


def _rows(batch: list[Pixels], autoencoder: vae.VAE | None) -> Tensor:
    """uint8 pixels [B, 3, H, W], or the bf16 moments of both flips [B, 2, 2·C, h, w]."""
    pixels = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).contiguous()  # [B, 3, H, W]
    if autoencoder is None:
        return pixels
    x = normalise(pixels.to(autoencoder.device))
    both = torch.stack([autoencoder.moments(x), autoencoder.moments(x.flip(-1))], dim=1)  # [B, 2, 2·C, h, w]
    if not both.isfinite().all():
        raise UserError("the VAE gives latents that are not finite; is it the right one?")
    return both.bfloat16().cpu().contiguous()


def _moments(rows: Tensor) -> Moments:
    """Of latents [B, 2, 2·C, h, w] as packed, by channel, over the posterior: its variance adds to that of its means."""
    mean, logvar = rows.double().transpose(0, 2).flatten(1).numpy().reshape(2, rows.shape[2] // 2, -1)  # [C, ·] each
    # By NumPy, whose sums are the same on any number of threads: so are the statistics.
    total, variance = mean.sum(1), np.exp(logvar.clip(-30, 20)).sum(1)
    squares = ((mean - total[:, None] / mean.shape[1]) ** 2).sum(1) + variance
    parts = (total, squares, mean.min(1), mean.max(1))
    return Moments(mean.shape[1], *map(torch.from_numpy, parts))


def _total(moments: list[list[Any]]) -> list[Any]:
    """Added up in their order; empty where there are none."""
    found = [Moments.from_list(part) for part in moments if part]
    return functools.reduce(Moments.plus, found).to_list() if found else []


def join(
    source: ImageSource,
    autoencoder: vae.VAE | None,
    staging: Path,
    path: Path,
    parts: list[dict[str, Any]],
    max_bad: float,
) -> Manifest:
    """Put the chunks together, aside, and give the whole its name. Grey pictures keep one channel of their equal three."""
    rows = gather(source, path, parts, max_bad, "images")
    shape = next(part["shape"] for part in parts if part["labels"])
    grey = all(part["grey"] for part in parts)
    written: list[list[Any]] = []  # [rows, SHA-256] of each chunk

    def content() -> Iterator[bytes]:
        for number, part in enumerate(parts):
            file = staging / f"{number:07d}.bin"
            pixels = file.read_bytes()
            if hashlib.sha256(pixels).hexdigest() != part["sha256"]:
                file.with_suffix(".json").unlink()
                raise UserError(f"{plain(file)} was damaged since it was written; run again to encode its images anew")
            if grey:
                pixels = np.frombuffer(pixels, np.uint8).reshape(-1, *shape)[:, :1].tobytes()
            written.append([len(part["labels"]), hashlib.sha256(pixels).hexdigest()])
            yield pixels
        yield rows.label_bytes

    write_data(staging, content())
    mean, std = _statistics(parts) if autoencoder else (torch.empty(0), torch.empty(0))
    normaliser = None
    if autoencoder is not None and autoencoder.latents == "channel":
        normaliser = autoencoder.own or vae.per_channel(mean, std)
    return finish(
        source,
        rows,
        staging,
        path,
        chunks=written,
        transform=TRANSFORMS[source.crop],
        vae=autoencoder.name if autoencoder else "",
        vae_revision=autoencoder.revision if autoencoder else "",
        shape=[1, *shape[1:]] if grey else shape,
        dtype="bfloat16" if autoencoder else "uint8",
        scale=autoencoder.scale if autoencoder else 1.0,
        shift=autoencoder.shift if autoencoder else 0.0,
        revision=source.revision,
        vae_sha256=autoencoder.sha256() if autoencoder else "",
        latents_mean=mean.tolist(),
        latents_std=std.tolist(),
        normaliser=normaliser.to_dict() if normaliser else None,
    )


def _statistics(parts: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of all latents by channel, unscaled, fp64 [C]. Chunk by chunk, so the same on any number of ranks."""
    found = Moments.from_list(_total([part["moments"] for part in parts]))
    return found.total / found.num, (found.squares / found.num).sqrt()


# --- what joins of images and of arrays share ---


Source = ImageSource | ArraySource


class Rows(NamedTuple):
    """The rows of all chunks: their labels, also as data.bin holds them, and what was left out, by name and reason."""

    labels: list[Any]
    label_bytes: bytes
    skipped: list[list[Any]]


def gather(source: Source, path: Path, parts: list[dict[str, Any]], max_bad: float, what: str) -> Rows:
    """The rows of these chunks. Raises UserError where too many could not be used."""
    skipped = [[name, reason] for part in parts for name, reason in part["skipped"]]
    labels = [label for part in parts for label in part["labels"]]
    if not labels or len(skipped) > max_bad * (len(labels) + len(skipped)):
        reject(path, skipped, len(labels) + len(skipped), max_bad, what)
    return Rows(labels, np.array(labels, np.int64).tobytes() if source.labelled else b"", skipped)


def write_data(staging: Path, content: Iterable[bytes]) -> None:
    """Write data.bin of the pack in the staging folder."""
    whole = staging / "pack"
    whole.mkdir(exist_ok=True)
    write(whole / "data.bin", content)


def finish(source: Source, rows: Rows, staging: Path, path: Path, **fields: Any) -> Manifest:
    """Write the manifest of a pack whose data.bin is in the staging folder, and give the whole its name.

    fields: of the manifest, those that do not follow from the source and the rows.
    """
    manifest = Manifest(
        format=manifests.FORMAT,
        dataset=source.name,
        count=len(rows.labels),
        labelled=source.labelled,
        num_classes=(len(source.class_names) or max(rows.labels) + 1) if source.labelled else 0,
        class_names=list(source.class_names),
        labels_sha256=hashlib.sha256(rows.label_bytes).hexdigest() if source.labelled else "",
        skipped=rows.skipped,
        **fields,
    )
    whole = staging / "pack"
    write(whole / "manifest.json", [manifests.write(manifest)])
    whole.rename(path)
    files.sync_folder(path.parent)
    shutil.rmtree(staging, ignore_errors=True)
    return manifest


def reject(path: Path, skipped: list[Any], total: int, max_bad: float, what: str = "images") -> None:
    """Write the report of what cannot be used, beside where the pack would be, and raise UserError."""
    report = path.with_name(path.name + ".rejected.txt")
    lines = [f"{name!r}: {reason}" for name, reason in skipped]
    write(report, ["\n".join([*lines, ""]).encode()])
    found = f"{len(skipped):,} of {total:,} {what} cannot be used; {max_bad:.1%} are allowed; mend or remove them"
    raise UserError(f"{found} ({plain('; '.join(lines[:3]))}; all in {plain(report)})")


def write(path: Path, blocks: Iterable[bytes], sync: bool = True) -> None:
    """Write a file that appears under its name only when it is whole. Raises OSError, which names the file."""
    with files.atomic(path, sync) as file:
        file.writelines(blocks)
