"""A pack: a dataset encoded once into one file, and batches of it that are a function of images seen alone.

A pack is a folder of two files. data.bin holds `count` rows, then their labels as int64; a row is either uint8 pixels
[3, H, W], or the bf16 moments of an image and of its mirror image, [2, 2·C, h, w]: the posterior is drawn afresh each time
an image is seen. Or it is an array of fp32 numbers, normalised, and the samples' conditions as fp32 [K] and their lengths as
int64 follow the labels, where there are such. manifest.json says what the rows are and where they came from, and holds their
checksums.
"""

import contextlib
import hashlib
import os
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastdit.config import RankError, UserError, plain
from fastdit.data import classes
from fastdit.data.manifest import DTYPES, FORMAT, Manifest, changes, identity, read_manifest, scaling
from fastdit.data.normaliser import Normaliser
from fastdit.given import Given
from fastdit.runtime import rng

__all__ = ["DTYPES", "FORMAT", "Manifest", "changes", "identity", "read_manifest"]

VERIFY_BYTES = 1 << 30  # packs up to this size are hashed whenever they are opened: at most 0.6 s
PIECE = 16 << 20  # bytes read at a time


class DataFile:
    """data.bin of a pack, open. It is read and never mapped: a mapped file that is cut short kills whoever reads it (SIGBUS).

    The operating system's page cache keeps what is read often, once for all ranks of a node.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.labels_start = manifest.count * manifest.row_bytes
        self.conditions_start = self.labels_start + 8 * manifest.count * manifest.labelled
        self.lengths_start = self.conditions_start + 4 * manifest.count * manifest.condition
        self.size = self.lengths_start + 8 * manifest.count * manifest.lengths
        fd, found = -1, 0
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            if not path.is_symlink():
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                found = os.fstat(fd).st_size
        if found != self.size:
            if fd >= 0:
                os.close(fd)
            raise UserError(
                f"{plain(path)}: {found:,} bytes, expected {self.size:,}; delete {plain(path.parent)} to encode anew"
            )
        self.fd = fd
        weakref.finalize(self, os.close, fd)

    def read(self, start: int, into: Tensor) -> Tensor:
        """Fill a contiguous tensor with the bytes that begin at `start`. Raises RankError where the file has become shorter."""
        self.fill(start, bytes_of(into))
        return into

    def fill(self, start: int, left: memoryview) -> None:
        while left:
            count = os.preadv(self.fd, [left], start)
            if not count:
                raise RankError(f"{plain(self.path)} was cut short while it was being read")
            left, start = left[count:], start + count

    def pieces(self, start: int, stop: int) -> Iterator[Tensor]:
        """The bytes from start to stop - 1, uint8, at most PIECE at a time; each piece may overwrite the one before."""
        buffer = torch.empty(min(PIECE, max(stop - start, 0)), dtype=torch.uint8)
        for at in range(start, stop, PIECE):
            yield self.read(at, buffer[: min(PIECE, stop - at)])


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def open_data(path: Path) -> tuple[Manifest, DataFile]:
    """A pack's manifest and its data file. Raises UserError where they do not fit each other."""
    manifest = read_manifest(path)
    return manifest, DataFile(path / "data.bin", manifest)


def verify(path: Path) -> Manifest:
    """Hash the whole pack, about 2 GB/s, against its manifest. Raises UserError naming the images that changed."""
    m, data = open_data(path)

    def digest(start: int, stop: int) -> str:
        found = hashlib.sha256()
        for piece in data.pieces(start, stop):
            found.update(piece.numpy().data)
        return found.hexdigest()

    first = 0
    for count, expected in m.chunks:
        if digest(first * m.row_bytes, (first + count) * m.row_bytes) != expected:
            raise UserError(
                f"{plain(data.path)}: rows {first} to {first + count - 1} are damaged; delete {plain(path)} to encode anew"
            )
        first += count
    if m.labelled and digest(data.labels_start, data.conditions_start) != m.labels_sha256:
        raise UserError(f"{plain(data.path)}: the labels are damaged; delete {plain(path)} to encode anew")
    if m.beside_sha256 and digest(data.conditions_start, data.size) != m.beside_sha256:
        raise UserError(f"{plain(data.path)}: the conditions or lengths are damaged; delete {plain(path)} to encode anew")
    return m


# --- batches ---


class Batch(NamedTuple):
    x0: Tensor  # fp32 [count, C, h, w]: pixels in [-1, 1], or scaled latents; [count, C, …]: normalised arrays
    y: Tensor | None  # int64 [count]; None where the dataset is unlabelled
    condition: Tensor | None = None  # fp32 [count, K], normalised; None where the dataset has none, as images have none
    length: Tensor | None = None  # int64 [count], along the grid's first axis; what is beyond is padding. None: there is none


def normalise(pixels: Tensor) -> Tensor:
    """uint8 0 … 255 → fp32 -1 … 1, each rounded once."""
    return (2 * pixels.float() - 255) / 255


def posterior(moments: Tensor, eps: Tensor, scale: float | Tensor, shift: float | Tensor) -> Tensor:
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
        self.manifest, self.data = open_data(path)
        if self.data.size <= VERIFY_BYTES:
            verify(path)
        m = self.manifest
        self.device, self.seed, self.hflip, self.stride = device, seed, hflip and not m.arrays, stride
        self.waited_s = self.reported_s = 0.0  # that callers waited for data
        self.resident = m.count * m.row_bytes <= device_gib * (1 << 30)
        # Of latents, row 2·i is image i and row 2·i + 1 its mirror image.
        self.row_shape = m.shape[1:] if m.vae else m.shape
        self.scaling = scaling(m, device)
        self.rows = self._load() if self.resident and device.type != "cpu" else None
        self.labels, self.conditions, self.lengths = self._beside()
        self._orders: dict[int, Tensor] = {}
        self._ahead: dict[tuple[int, int], Future[tuple[Tensor, Tensor]]] = {}
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._last = -1

    @property
    def normaliser(self) -> Normaliser | None:
        """As Manifest.units has it."""
        return self.manifest.units

    def describe(self, folder: Path) -> None:
        """Keep in a run's folder what whoever loads its weights wants to know: the classes' names and the normaliser."""
        classes.write(folder, self.manifest.class_names)
        if self.normaliser is not None:
            self.normaliser.write(folder)

    def examples(self, first: int, count: int, labelled: bool) -> Given | None:
        """What is given of samples first … first + count - 1 of the data, over and over, in physical units, for the training's
        own samples; None where no condition and no length is, and classes in turn serve.
        """
        if self.conditions is None and self.lengths is None:
            return None
        numbers = torch.arange(first, first + count, device=self.device) % self.manifest.count
        given = Given(self.labels if labelled else None, self.conditions, self.lengths).each(lambda part: part[numbers])
        normaliser = self.normaliser
        if given.condition is None or normaliser is None or normaliser.condition is None:
            return given
        return given._replace(condition=normaliser.condition.physical(given.condition))

    def waited(self) -> float:
        """Seconds that callers of `batch` waited for data since this was last asked."""
        seconds, self.reported_s = self.waited_s - self.reported_s, self.waited_s
        return seconds

    def batch(self, first: int, count: int) -> Batch:
        """Images first … first + count - 1 of the run, mirrored and drawn as their numbers say, with no host sync."""
        m, start = self.manifest, time.perf_counter()
        if self.rows is not None:
            pick = self._to_device(self._pick(first, count))
            rows = self.rows.index_select(0, pick if m.vae else pick // 2)
        elif self.resident:
            rows, pick = self._read(first, count)
        else:
            rows, pick = (self._to_device(part) for part in self._next(first, count))
        self.waited_s += time.perf_counter() - start
        if m.vae:
            eps = rng.normal(m.image_shape, self.seed, "posterior", first, count, self.device)
            x0 = posterior(rows, eps, *self.scaling)
        elif m.arrays:
            x0 = rows
        else:
            x0 = normalise(rows)
            if self.hflip:
                x0 = torch.where((pick % 2 == 1).view(-1, 1, 1, 1), x0.flip(-1), x0)
        beside = (self.labels, self.conditions, self.lengths)
        return Batch(x0, *(None if values is None else values.index_select(0, pick // 2) for values in beside))

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
        rows = torch.empty((count, *self.row_shape), dtype=DTYPES[self.manifest.dtype], pin_memory=pinned)
        memory, row_bytes = bytes_of(rows), rows[0].nbytes
        for i, place in enumerate((pick if self.manifest.vae else pick // 2).tolist()):
            self.data.fill(place * row_bytes, memory[i * row_bytes : (i + 1) * row_bytes])
        return rows, pick

    def _load(self) -> Tensor:
        """All rows, on the device."""
        m = self.manifest
        rows = torch.empty(self.data.labels_start, dtype=torch.uint8, device=self.device)
        at = 0
        for piece in self.data.pieces(0, self.data.labels_start):
            rows[at : at + len(piece)] = piece
            at += len(piece)
        return rows.view(DTYPES[m.dtype]).view(-1, *self.row_shape)

    def _beside(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """All labels, conditions and lengths, on the device; None where there are none. Raises UserError."""
        m, data = self.manifest, self.data
        labels = conditions = lengths = None
        if m.labelled:
            labels = data.read(data.labels_start, torch.empty(m.count, dtype=torch.int64))
            self._within(labels, 0, m.num_classes - 1, "labels")
        if m.condition:
            conditions = data.read(data.conditions_start, torch.empty(m.count, m.condition))
        if m.lengths:
            lengths = data.read(data.lengths_start, torch.empty(m.count, dtype=torch.int64))
            self._within(lengths, 1, m.shape[1], "lengths")
        labels, conditions, lengths = (None if part is None else part.to(self.device) for part in (labels, conditions, lengths))
        return labels, conditions, lengths

    def _within(self, values: Tensor, least: int, most: int, what: str) -> None:
        if values.min() < least or values.max() > most:
            path = self.data.path
            raise UserError(f"{plain(path)}: {what} outside {least} … {most}; delete {plain(path.parent)} to encode anew")

    def _to_device(self, tensor: Tensor) -> Tensor:
        # The caching host allocator keeps a pinned block until the copy out of it is done.
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor
