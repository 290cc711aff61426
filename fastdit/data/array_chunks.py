"""The encoding of arrays: samples become chunks of fp32 rows in a staging folder, and the chunks a pack (data/encoding.py).

A chunk's rows are as they were read, but for padding, which is zero. What normalises them follows from all chunks; `join`
applies it. So a pack's bytes are the same whichever ranks made its chunks.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdit.config import UserError, plain
from fastdit.data import chunks
from fastdit.data.arrays import ArraySource, Sample
from fastdit.data.manifest import Manifest
from fastdit.data.normaliser import Affine, Moments, Normaliser

COMMIT = {"sha256", "bytes", "labels", "lengths", "skipped", "moments"}  # fields of NUMBER.json


def num_chunks(source: ArraySource) -> int:
    return -(-source.length // source.chunk)


def encode(source: ArraySource, staging: Path, number: int) -> dict[str, Any] | None:
    """Encode the items of a chunk, unless it is there already. Returns the content of its NUMBER.json; None beyond the last."""
    if number >= num_chunks(source):
        return None
    if found := chunks.committed(staging, number, COMMIT):
        return found
    good: list[Sample] = []
    skipped: list[tuple[str, str]] = []
    for sample in source.samples(number * source.chunk, min((number + 1) * source.chunk, source.length)):
        if reason := source.reason(sample):
            skipped.append((sample.name, plain(reason)))
        else:
            good.append(sample)
    x = np.zeros((len(good), *source.shape), np.float32)
    for row, sample in zip(x, good, strict=True):
        row[:, : sample.length] = sample.x[:, : sample.length]
    condition = np.zeros((len(good), source.condition), np.float32)
    if source.condition and good:
        condition[:] = [s.condition for s in good]
    lengths = [s.length for s in good] if source.lengths else []
    content = x.tobytes() + condition.tobytes()
    part = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "labels": [s.label for s in good] if source.labelled else [None] * len(good),
        "lengths": lengths,
        "skipped": skipped,
        "moments": [_moments(torch.from_numpy(x), lengths), Moments.of(torch.from_numpy(condition)).to_list()] if good else [],
    }
    chunks.write(staging / f"{number:07d}.bin", [content], sync=False)  # not synced: see chunks.encode
    chunks.write(staging / f"{number:07d}.json", [json.dumps(part).encode()], sync=False)
    return part


def _moments(x: Tensor, lengths: list[Any]) -> list[Any]:
    """Of x [n, C, …] per channel, padding left out."""
    values = x.flatten(3).transpose(0, 1) if x.ndim > 3 else x.unsqueeze(-1).transpose(0, 1)  # [C, n, L, ·]
    if lengths:
        valid = torch.arange(x.shape[2]) < torch.tensor(lengths)[:, None]  # [n, L]
        values = values[:, valid]
    return Moments.of(values.flatten(1).T).to_list()


def join(source: ArraySource, staging: Path, path: Path, parts: list[dict[str, Any]], max_bad: float) -> Manifest:
    """Put the chunks together, normalised, and give the whole its name."""
    rows = chunks.gather(source, path, parts, max_bad, "samples")
    normaliser = Normaliser(
        source.normaliser,
        _affine((part["moments"][0] for part in parts if part["moments"]), source.normaliser),
        _affine((part["moments"][1] for part in parts if part["moments"]), source.normaliser) if source.condition else None,
    )
    lengths = np.array([n for part in parts for n in part["lengths"]], np.int64).tobytes()
    written: list[list[Any]] = []  # [rows, SHA-256] of each chunk
    beside = bytearray()  # what stands behind the labels: conditions, then lengths

    def content() -> Iterator[bytes]:
        for number, part in enumerate(parts):
            if part["labels"]:
                x, condition = _normalised(source, normaliser, staging / f"{number:07d}.bin", part)
                numbers = x.numpy().tobytes()
                written.append([len(x), hashlib.sha256(numbers).hexdigest()])
                beside.extend(condition.numpy().tobytes())
                yield numbers
        beside.extend(lengths)
        yield rows.label_bytes
        yield bytes(beside)

    chunks.write_data(staging, content())
    return chunks.finish(
        source,
        rows,
        staging,
        path,
        chunks=written,
        transform=source.transform,
        vae="",
        vae_revision="",
        shape=list(source.shape),
        dtype="float32",
        scale=1.0,
        shift=0.0,
        condition=source.condition,
        lengths=source.lengths,
        normaliser=normaliser.to_dict(),
        beside_sha256=hashlib.sha256(beside).hexdigest() if beside else "",
    )


def _affine(moments: Iterable[list[Any]], kind: str) -> Affine:
    first, *others = map(Moments.from_list, moments)
    for other in others:
        first = first.plus(other)
    return first.affine(kind)


def _normalised(source: ArraySource, normaliser: Normaliser, file: Path, part: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A chunk's x [n, C, …], its padding zero, and conditions [n, K], normalised. Raises UserError for a damaged chunk."""
    content = bytearray(file.read_bytes())
    if hashlib.sha256(content).hexdigest() != part["sha256"]:
        file.with_suffix(".json").unlink()
        raise UserError(f"{plain(file)} was damaged since it was written; run again to encode its samples anew")
    numbers, count = torch.frombuffer(content, dtype=torch.float32), len(part["labels"])
    x, condition = numbers.split([numbers.numel() - count * source.condition, count * source.condition])
    x = normaliser.x.normalise(x.view(count, *source.shape))
    for row, length in zip(x, part["lengths"], strict=False):  # no lengths: no padding
        row[:, length:] = 0
    condition = condition.view(count, source.condition)
    return x.contiguous(), normaliser.condition.normalise(condition) if normaliser.condition else condition
