"""A pack: a dataset encoded once into one memory-mapped file, and batches of it that are a function of images seen alone.

A pack is a folder of two files. data.bin holds `count` rows, then their labels as int64; a row is either uint8 pixels
[3, H, W], or the bf16 moments of an image and of its mirror image, [2, 2·C, h, w]: the posterior is drawn afresh each time
an image is seen. manifest.json says what the rows are and where they came from, and holds their checksums.
"""

import dataclasses
import hashlib
import json
import math
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdit.config import UserError
from fastdit.runtime import rng
from fastdit.runtime.files import read_file

FORMAT = 1
LIMIT = 1 << 28  # bytes of manifest.json; ImageNet's has 5 MB
VERIFY_BYTES = 1 << 30  # packs up to this size are hashed whenever they are opened: at most 0.6 s
DTYPES = {"uint8": torch.uint8, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Manifest:
    """What a pack holds."""

    format: int
    dataset: str
    transform: str
    vae: str  # empty: the rows are pixels
    vae_revision: str
    count: int
    shape: list[int]  # of a row
    dtype: str
    scale: float  # z = (latent - shift)·scale
    shift: float
    labelled: bool
    num_classes: int
    class_names: list[str]
    chunks: list[list[Any]]  # [rows, SHA-256] of each stretch of rows, in order
    labels_sha256: str
    skipped: list[list[str]]  # [image, reason]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[C, h, w] of what the network sees."""
        C, h, w = self.shape[-3:]
        return (C // 2, h, w) if self.vae else (C, h, w)

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def read_manifest(path: Path) -> Manifest:
    """The manifest of the pack in this folder, every field checked: it may come from anywhere. Raises UserError."""
    file = path / "manifest.json"
    try:
        data = json.loads(read_file(file, LIMIT))
        need = {f.name: f.type for f in dataclasses.fields(Manifest)}
        if not isinstance(data, dict) or data.keys() != need.keys():
            raise ValueError(f"fields differ from {', '.join(need)}")
        for name, kind in need.items():
            kind = {"int": int, "str": str, "float": float, "bool": bool}.get(getattr(kind, "__name__", ""), list)
            if type(data[name]) is not kind:
                raise ValueError(f"{name} is {data[name]!r}")
        manifest = Manifest(**data)
        _check(manifest)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not the manifest of a pack ({str(error)[:200]}); delete {path} to encode anew") from None
    return manifest


def _check(m: Manifest) -> None:
    def need(ok: bool, field: str) -> None:
        if not ok:
            raise ValueError(f"{field} is {getattr(m, field)!r}"[:200])

    digest = re.compile("[0-9a-f]{64}")
    need(m.format == FORMAT, "format")
    need(m.dtype == ("bfloat16" if m.vae else "uint8"), "dtype")
    need(all(type(n) is int and 0 < n <= 1 << 16 for n in m.shape), "shape")
    need(len(m.shape) == 4 and m.shape[0] == 2 and m.shape[1] % 2 == 0 if m.vae else len(m.shape) == 3, "shape")
    need(math.isfinite(m.scale) and m.scale > 0, "scale")
    need(math.isfinite(m.shift), "shift")
    need((m.num_classes > 0) == m.labelled and len(m.class_names) in (0, m.num_classes), "num_classes")
    need(all(type(name) is str for name in m.class_names), "class_names")
    need(bool(digest.fullmatch(m.labels_sha256)) if m.labelled else not m.labels_sha256, "labels_sha256")
    for chunk in m.chunks:
        need(type(chunk) is list and [type(x) for x in chunk] == [int, str] and chunk[0] >= 0, "chunks")
        need(bool(digest.fullmatch(chunk[1])), "chunks")
    need(m.count > 0 and m.count == sum(chunk[0] for chunk in m.chunks), "count")
    need(all(type(row) is list and [type(x) for x in row] == [str, str] for row in m.skipped), "skipped")


def open_data(path: Path) -> tuple[Manifest, Tensor]:
    """A pack's manifest and the bytes of its data file, memory-mapped. Raises UserError where they do not fit each other."""
    manifest = read_manifest(path)
    file = path / "data.bin"
    expected = manifest.count * (manifest.row_bytes + 8 * manifest.labelled)
    found = file.stat().st_size if file.is_file() and not file.is_symlink() else 0
    if found != expected:
        raise UserError(f"{file}: {found:,} bytes, expected {expected:,}; delete {path} to encode anew")
    return manifest, torch.from_file(str(file), shared=False, size=expected, dtype=torch.uint8)


def verify(path: Path) -> Manifest:
    """Hash the whole pack, about 2 GB/s, against its manifest. Raises UserError naming the images that changed."""
    manifest, data = open_data(path)
    first = 0
    for count, digest in manifest.chunks:
        rows = data[first * manifest.row_bytes : (first + count) * manifest.row_bytes]
        if hashlib.sha256(rows.numpy().data).hexdigest() != digest:
            raise UserError(
                f"{path / 'data.bin'}: rows {first} to {first + count - 1} are damaged; delete {path} to encode anew"
            )
        first += count
    labels = data[manifest.count * manifest.row_bytes :]
    if manifest.labelled and hashlib.sha256(labels.numpy().data).hexdigest() != manifest.labels_sha256:
        raise UserError(f"{path / 'data.bin'}: the labels are damaged; delete {path} to encode anew")
    return manifest


# --- batches ---


class Batch(NamedTuple):
    x0: Tensor  # fp32 [count, C, h, w]: pixels in [-1, 1], or scaled latents
    y: Tensor | None  # int64 [count]; None where the dataset is unlabelled


def normalise(pixels: Tensor) -> Tensor:
    """uint8 0 … 255 → fp32 -1 … 1, each rounded once."""
    return (2 * pixels.float() - 255) / 255


def posterior(moments: Tensor, eps: Tensor, scale: float, shift: float) -> Tensor:
    """Scaled latents, fp32 [B, C, h, w], drawn from moments [B, 2·C, h, w] of any dtype by standard normal eps [B, C, h, w].

    The log-variance is clamped as AutoencoderKL clamps it (arXiv 1312.6114 section 2.4; arXiv 2112.10752).
    """
    mean, logvar = moments.float().chunk(2, dim=1)
    return (mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * eps - shift) * scale


class Pack:
    """An open pack. `batch` is a pure function of (seed, first image, count); runtime/rng.py says how images are numbered.

    A pack of up to device_gib lives on the device (on a CPU: in the page cache, which all ranks share). A larger one is read
    ahead by a thread, through pinned memory: DEPTH batches, each `stride` images after the one before, as the caller states or
    as its calls show. Either way gives the same bits.
    """

    DEPTH = 3

    def __init__(
        self, path: Path, device: torch.device, seed: int, hflip: bool = True, device_gib: float = 16.0, stride: int = 0
    ) -> None:
        self.manifest, data = open_data(path)
        if data.numel() <= VERIFY_BYTES:
            verify(path)
        m = self.manifest
        self.device, self.seed, self.hflip, self.stride = device, seed, hflip, stride
        self.waited_s = 0.0  # that callers waited for data
        self.resident = m.count * m.row_bytes <= device_gib * (1 << 30)
        rows = data[: m.count * m.row_bytes].view(DTYPES[m.dtype])
        # Of latents, row 2·i is image i and row 2·i + 1 its mirror image.
        self.rows = rows.view(-1, *m.shape[1:]) if m.vae else rows.view(-1, *m.shape)
        if self.resident:
            self.rows = self.rows.to(device)
        self.labels: Tensor | None = None
        if m.labelled:
            labels = torch.from_numpy(data[m.count * m.row_bytes :].numpy().view(np.int64).copy())
            if labels.min() < 0 or labels.max() >= m.num_classes:
                raise UserError(f"{path / 'data.bin'}: labels outside 0 … {m.num_classes - 1}; delete {path} to encode anew")
            self.labels = labels.to(device)
        self._orders: dict[int, Tensor] = {}
        self._ahead: dict[tuple[int, int], Future[tuple[Tensor, Tensor]]] = {}
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._last = -1

    def batch(self, first: int, count: int) -> Batch:
        """Images first … first + count - 1 of the run, mirrored and drawn as their numbers say, with no host sync."""
        m, start = self.manifest, time.perf_counter()
        if self.resident:
            pick = self._to_device(self._pick(first, count))
            rows = self.rows.index_select(0, pick if m.vae else pick // 2)
        else:
            rows, pick = (self._to_device(part) for part in self._next(first, count))
        self.waited_s += time.perf_counter() - start
        if m.vae:
            eps = rng.normal(m.image_shape, self.seed, "posterior", first, count, self.device)
            x0 = posterior(rows, eps, m.scale, m.shift)
        else:
            x0 = normalise(rows)
            if self.hflip:
                x0 = torch.where((pick % 2 == 1).view(-1, 1, 1, 1), x0.flip(-1), x0)
        return Batch(x0, None if self.labels is None else self.labels.index_select(0, pick // 2))

    def close(self) -> None:
        """Stop reading ahead."""
        self._thread.shutdown(cancel_futures=True)

    def _pick(self, first: int, count: int) -> Tensor:
        """int64 [count] on the CPU: 2·(image's place in the pack) + (1 where it is mirrored)."""
        # Flips are drawn on the CPU: the reading thread needs them there, and both ways of reading must agree.
        mirrored = rng.uniform((), self.seed, "flip", first, count, torch.device("cpu")) < 0.5 * self.hflip
        places = []
        n = first
        while n < first + count:
            epoch, offset = divmod(n, self.manifest.count)
            places.append(self._order(epoch)[offset : offset + first + count - n])
            n += len(places[-1])
        return 2 * torch.cat(places) + mirrored

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = rng.order(self.seed, epoch, self.manifest.count)
        return self._orders[epoch]

    def _next(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        wanted = self._ahead.pop((first, count), None)
        if wanted is None:  # the first batch, or the caller jumped
            for future in self._ahead.values():
                future.cancel()
            self._ahead.clear()
            wanted = self._thread.submit(self._read, first, count)
        stride = self.stride or (first - self._last if self._last >= 0 else 0)
        self._last = first
        if stride > 0:
            for n in range(first + stride, first + stride * self.DEPTH + 1, stride):
                if (n, count) not in self._ahead:
                    self._ahead[n, count] = self._thread.submit(self._read, n, count)
        return wanted.result()

    def _read(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        pick = self._pick(first, count)
        pinned = self.device.type == "cuda"
        rows = torch.empty((count, *self.rows.shape[1:]), dtype=self.rows.dtype, pin_memory=pinned)
        return torch.index_select(self.rows, 0, pick if self.manifest.vae else pick // 2, out=rows), pick

    def _to_device(self, tensor: Tensor) -> Tensor:
        # The caching host allocator keeps a pinned block until the copy out of it is done.
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor
