"""Where images come from: embedded drawn cats, a dataset through `datasets`, or a folder. uint8 RGB [H, W, 3] by number.

Every byte is untrusted: pictures are decoded from bytes held in memory, a row's own `path` is never opened, no link is followed
out of a folder, nothing is executed. What cannot be decoded is named with its reason and left to the caller to count.
"""

import io
import itertools
import os
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fastdit.config import DataConfig, UserError
from fastdit.data import cats

Pixels = NDArray[np.uint8]

MAX_PIXELS = 50_000_000  # of one picture; a PNG of 172 kB can ask for 675 MB
MAX_BYTES = 1 << 29  # of one encoded file
# Not all that Pillow can open: its EPS plugin, for one, runs Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"}

# Pillow only warns of a picture of 90 Mpx or more; `decode` refuses it at MAX_PIXELS, before a pixel is decoded.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


class Example(NamedTuple):
    """One image of a source, or the reason why there is none."""

    number: int
    name: str  # where it came from, for reports
    image: Pixels | None  # uint8 [H, W, 3]
    label: int | None
    reason: str = ""


class Row(NamedTuple):
    """One image before it is decoded: a composed picture, an encoded one, the file of one, or a reason why there is none."""

    name: str
    content: Pixels | bytes | Path | str
    label: int | None


@dataclass(frozen=True)
class ImageSource:
    """Images 0 … length - 1, read in any order by any number of ranks."""

    name: str  # what it is, for reports and the pack's manifest
    length: int  # rows; of a stream, at most so many
    image_size: tuple[int, int]  # rows and columns every image is resized to
    labelled: bool
    class_names: tuple[str, ...]  # empty where unlabelled, or where classes are known by number only
    rows: Callable[[int, int], Iterator[Row]]
    threads: int = 1  # that decode

    def read(self, start: int, stop: int) -> Iterator[Example]:
        """Images start … stop - 1 in order, decoded ahead by the threads; fewer where a stream ends."""
        pending: deque[Future[Example]] = deque()
        with ThreadPoolExecutor(self.threads) as pool:
            for number, row in enumerate(self.rows(start, stop), start):
                pending.append(pool.submit(self._example, number, row))
                if len(pending) > 4 * self.threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def _example(self, number: int, row: Row) -> Example:
        if isinstance(row.content, str):
            return Example(number, row.name, None, None, row.content)
        if self.labelled and (row.label is None or row.label < 0 or 0 < len(self.class_names) <= row.label):
            return Example(number, row.name, None, None, f"label {row.label} is not a class")
        try:
            if isinstance(row.content, np.ndarray):
                image = row.content
            else:
                image = resize(
                    decode(row.content if isinstance(row.content, bytes) else _file_bytes(row.content)), self.image_size
                )
        except (ValueError, OSError) as error:
            return Example(number, row.name, None, None, str(error))
        return Example(number, row.name, image, row.label if self.labelled else None)


def open_images(data: DataConfig, held_out: bool = False, threads: int = 1) -> ImageSource:
    """The images a config names; `held_out`: cats that no training set has. Raises UserError where there are none."""
    if held_out and data.source != "cats":
        raise UserError(f"--data.source {data.source} has no held-out images of its own; name another split or folder")
    if data.source == "cats":
        return _cats(data, held_out, threads)
    if data.source == "hub":
        options = {"split": data.split, "revision": data.revision or None}
        return _dataset(data, data.path, options, f"{data.path} {data.split}{data.revision and '@' + data.revision}", threads)
    return _folder(data, threads)


# --- decoding ---


def decode(data: bytes) -> Image.Image:
    """An upright RGB picture from an encoded file's bytes, transparency on white. Raises ValueError saying why it cannot be."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}×{image.height} pixels; at most {MAX_PIXELS:,} are decoded")
            image.load()
            return _rgb(_upright(image))
    except Image.UnidentifiedImageError:
        raise ValueError("empty" if not data else "not an image in a known format") from None
    except Exception as error:  # Pillow's plugins raise almost anything on corrupt bytes
        raise ValueError(" ".join(str(error).split())[:200] or type(error).__name__) from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a picture with broken EXIF is still a picture
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"grey values from {grey.min()} to {grey.max()}; 8 and 16 bits are decoded")
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def resize(image: Image.Image, size: tuple[int, int]) -> Pixels:
    """uint8 [H, W, 3] by torchvision's Resize: bilinear, antialiased, the aspect ratio not kept."""
    from torchvision.transforms.v2 import functional  # here: it takes seconds to import, and the embedded cats need none of it

    return np.array(functional.resize(image, list(size), antialias=True))


def _file_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES:,} bytes")
    return data


# --- embedded cats ---


def _cats(data: DataConfig, held_out: bool, threads: int) -> ImageSource:
    num = data.num_images or (5_000 if held_out else 20_000)
    composed = cats.Cats(num, data.image_size[0], held_out, threads)

    def rows(start: int, stop: int) -> Iterator[Row]:
        for i in range(start, min(stop, num), cats.CHUNK):
            end = min(i + cats.CHUNK, stop, num)
            for n, image, label in zip(range(i, end), composed.images(i, end), composed.labels(i, end), strict=True):
                yield Row(f"cat {n}", image, label)

    name = f"{num:,} {'held-out ' if held_out else ''}embedded cats"
    return ImageSource(name, num, data.image_size, True, cats.COLOURS, rows)


# --- a folder ---


def _folder(data: DataConfig, threads: int) -> ImageSource:
    root, files, refused = scan(data.path)
    if parquet := [str(f) for f in files if f.suffix.lower() == ".parquet"]:
        if len(parquet) < len(files):
            raise UserError(f"--data.path {data.path} holds both parquet files and images; put them in folders of their own")
        return _dataset(data, "parquet", {"data_files": parquet, "split": "train"}, data.path, threads)
    rows: list[tuple[Path, Path | str]] = [*((f, f) for f in files), *((f, "a link out of the folder") for f in refused)]
    rows.sort(key=lambda row: row[0])
    if not rows:
        raise UserError(f"--data.path {data.path}: no image ({', '.join(sorted(SUFFIXES))}) and no parquet file in this folder")
    parts = [file.relative_to(root).parts for file, _ in rows]
    names = tuple(sorted({part[0] for part in parts if len(part) > 1}))
    if names and min(map(len, parts)) == 1:
        raise UserError(
            f"--data.path {data.path} holds images beside class folders such as {names[0]!r}; move one or the other"
        )
    numbers = {name: n for n, name in enumerate(names)}
    length = min(len(rows), data.num_images or len(rows))

    def read(start: int, stop: int) -> Iterator[Row]:
        for i in range(start, min(stop, length)):
            yield Row("/".join(parts[i]), rows[i][1], numbers.get(parts[i][0]) if names else None)

    return ImageSource(str(root), length, data.image_size, bool(names), names, read, threads)


def scan(path: str) -> tuple[Path, list[Path], list[Path]]:
    """A folder's real path, its images and parquet files, and the links among them that lead out of it. Raises UserError."""
    root = Path(path).expanduser().resolve()
    if not root.is_dir():
        raise UserError(f"--data.path {path}: no such folder")
    files, refused = [], []
    for folder, folders, names in os.walk(root):  # enters no linked folder
        folders[:] = [d for d in folders if not d.startswith(".")]
        for file in (Path(folder, name) for name in names if not name.startswith(".")):
            if file.suffix.lower() in SUFFIXES | {".parquet"}:
                if file.is_symlink() and not file.resolve().is_relative_to(root):
                    refused.append(file)
                elif file.is_file():
                    files.append(file)
    return root, sorted(files), sorted(refused)


# --- a dataset: of the hub, or parquet files ---


def _dataset(data: DataConfig, path: str, options: dict[str, Any], name: str, threads: int) -> ImageSource:
    """Rows with an image column and perhaps a label column, through `datasets`; no code of a dataset's own is run."""
    import datasets

    try:
        table = datasets.load_dataset(path, streaming=data.streaming, **options)
        if table.features is None or data.image_column not in table.features:
            columns = ", ".join(table.column_names or ["unknown"])
            raise UserError(f"{name} has no column --data.image_column {data.image_column!r}; its columns: {columns}")
        # Undecoded: `datasets` would open a row's `path`, which may name any file of this machine.
        table = table.cast_column(data.image_column, datasets.Image(decode=False))
    except UserError:
        raise
    except Exception as error:  # of the network, the hub, the cache or the dataset: all are about what was asked for
        where = "" if Path(data.path).exists() else "no such folder, and not loaded from the hub: "
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise UserError(f"--data.path {data.path}: {where}{reason}") from None

    feature = table.features.get(data.label_column)
    names: tuple[str, ...] = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()
    labelled = bool(names) or (isinstance(feature, datasets.Value) and "int" in feature.dtype)
    table = table.select_columns([data.image_column, data.label_column] if labelled else [data.image_column])
    if data.streaming:
        stated = (table.info.splits or {}).get(options["split"])
        length = data.num_images or (stated.num_examples if stated else 0)
        if not length:
            raise UserError(
                f"{name} does not state its size; give --data.num_images (more than there are will do), or do not stream it"
            )
        chunks = _Stream(table)
    else:
        length = min(len(table), data.num_images or len(table))
        commit = re.search("@([0-9a-f]{40})/", " ".join(table.info.download_checksums or {}))
        name += f" commit {commit[1]}" if commit else ""
        chunks = table
    if not length:
        raise UserError(f"{name} has no rows")

    def rows(start: int, stop: int) -> Iterator[Row]:
        for i in range(start, min(stop, length), 64):  # so many encoded images are held at once
            part = chunks[i : min(i + 64, stop, length)]
            for n, image in enumerate(part[data.image_column]):
                content = (image or {}).get("bytes") or "no image bytes in the row; files it names are not opened"
                yield Row(f"row {i + n}", content, part[data.label_column][n] if labelled else None)

    return ImageSource(name, length, data.image_size, labelled, names, rows, threads)


class _Stream:
    """Slices of an iterable dataset. Slices that follow each other read on; going back starts over."""

    def __init__(self, table: Any) -> None:
        self.table, self.iterator, self.position = table, iter(table), 0

    def __getitem__(self, rows: slice) -> dict[str, list[Any]]:
        if rows.start < self.position:
            self.iterator, self.position = iter(self.table), 0
        for _ in itertools.islice(self.iterator, rows.start - self.position):
            pass
        found = list(itertools.islice(self.iterator, rows.stop - rows.start))
        self.position = rows.stop
        return {column: [row[column] for row in found] for column in self.table.column_names}
