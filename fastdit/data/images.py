"""Where images come from: drawn cats, a folder of pictures, parquet files, or a dataset of the hub.

Every byte is untrusted: pictures are decoded from bytes held in memory, a row's own `path` is never opened, no link is followed
out of a folder, and nothing is executed. A picture that cannot be decoded gets a reason, and the caller counts it.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from fastdit.config import DataConfig, UserError, plain
from fastdit.data import arrays, cats, experts, lerobot, pack, tables
from fastdit.data.decode import SUFFIXES
from fastdit.data.source import ImageSource, Row

Parts = tuple[str, ...]  # a file's path below the folder of pictures, split at the slashes


# --- which source a path names ---


class Origin(NamedTuple):
    """What --data.path names."""

    kind: Literal["cats", "folder", "parquet", "pack", "hub", "arrays", "lerobot", "robot"]
    path: str = ""  # as given; of the hub, OWNER/NAME
    split: str = "train"  # of a hub dataset
    revision: str = ""  # of a hub dataset: branch, tag or commit; empty for the newest


HUB = re.compile(r"(?P<name>[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*)(:(?P<split>[^@]+))?(@(?P<revision>[\w./-]+))?")


def kind_of(path: str | None) -> Origin:
    """What a path names; what is on the disk comes before the hub. Raises UserError where it can name nothing.

    None: drawn cats; experts.PATH: the robot's simulator. A folder: a pack or a LeRobot dataset where it is one, else arrays in
    safetensors files, else pictures (sub-folders are classes) or parquet files. A file: safetensors, or parquet, of arrays
    where it has a column x. Anything else must be a hub name, OWNER/NAME[:SPLIT][@REVISION].
    """
    if not path:
        return Origin("cats")
    if path == experts.PATH:
        return Origin("robot", path)
    place = os.path.expanduser(path)
    if os.path.isdir(place):
        packed = os.path.isfile(os.path.join(place, "manifest.json")) and os.path.isfile(os.path.join(place, "data.bin"))
        if packed:
            return Origin("pack", path)
        if lerobot.is_lerobot(path):
            return Origin("lerobot", path)
        return Origin("arrays" if arrays.array_files(path) else "folder", path)
    if os.path.exists(place):
        if place.endswith(".safetensors"):
            return Origin("arrays", path)
        if not place.lower().endswith(".parquet"):
            raise UserError(
                f"--data.path {plain(path)} is one file, and neither parquet nor safetensors; name the folder it is in"
            )
        return Origin("arrays" if arrays.is_parquet_of_arrays(path) else "parquet", path)
    if found := HUB.fullmatch(path):
        return Origin("hub", found["name"], found["split"] or "train", found["revision"] or "")
    raise UserError(
        f"--data.path {plain(path)}: no such folder or file, and not the name of a hub dataset, OWNER/NAME[:SPLIT][@REVISION]"
    )


def origin(data: DataConfig) -> Origin:
    """What a config's data is. Raises UserError."""
    return kind_of(data.path)


def open_images(data: DataConfig, held_out: bool = False, threads: int = 1) -> ImageSource:
    """The images a config names; `held_out`: cats that no training set has. Raises UserError where there are none."""
    source = origin(data)
    if held_out and source.kind != "cats":
        raise UserError(f"--data.path {plain(source.path)} has no held-out images of its own; name another split or folder")
    if source.kind == "cats":
        return _cats(data, held_out, threads)
    if source.kind in ("arrays", "lerobot", "robot"):
        raise UserError(f"--data.path {plain(source.path)} holds arrays, and no pictures")
    if source.kind == "pack":
        return _packed(data, Path(source.path).expanduser(), threads)
    if source.kind == "folder":
        root, files, refused = scan(source.path)
        parquet = [f for f in files if f[-1].lower().endswith(".parquet")]
        if not parquet:
            return _folder(data, root, files, refused, threads)
        if len(parquet) < len(files):
            raise UserError(
                f"--data.path {plain(source.path)} holds both parquet files and images; put them in folders of their own"
            )
        local = [os.path.join(root, *f) for f in parquet]
    else:
        local = [os.path.expanduser(source.path)] if source.kind == "parquet" else []
    if local:
        return tables.open_parquet(data, source.path, local, threads)
    return tables.open_hub(data, source.path, source.split, source.revision, threads)


def _cats(data: DataConfig, held_out: bool, threads: int) -> ImageSource:
    num = data.num_images or (5_000 if held_out else 20_000)
    drawn = cats.Cats(num, data.image_size[0], held_out, threads)

    def rows(start: int, stop: int) -> Iterator[Row]:
        for i in range(start, min(stop, num), cats.CHUNK):
            end = min(i + cats.CHUNK, stop, num)
            for n, image, label in zip(range(i, end), drawn.images(i, end), drawn.labels(i, end), strict=True):
                yield Row(f"cat {n}", image, label)

    name = f"{num:,} {'held-out ' if held_out else ''}embedded cats"
    return ImageSource(name, num, data.image_size, True, cats.COLOURS, rows)


def _packed(data: DataConfig, path: Path, threads: int) -> ImageSource:
    """The images of a pack of pixels; of latents, what was encoded is gone. Raises UserError."""
    m, opened = pack.open_data(path)
    if m.arrays:
        raise UserError(f"--data.path {plain(path)} is a pack of arrays, and holds no pictures")
    if m.vae:
        raise UserError(f"--data.path {plain(path)} is a pack of latents, and the images themselves are not in it")
    length = min(m.count, data.num_images or m.count)
    labels = opened.read(opened.labels_start, torch.empty(m.count, dtype=torch.int64)).tolist() if m.labelled else []

    def rows(start: int, stop: int) -> Iterator[Row]:
        for i in range(start, min(stop, length)):
            image = opened.read(i * m.row_bytes, torch.empty(m.shape, dtype=torch.uint8)).numpy().transpose(1, 2, 0)
            yield Row(f"image {i}", np.broadcast_to(image, (*image.shape[:2], 3)), labels[i] if labels else None)

    size = m.image_shape[1], m.image_shape[2]
    return ImageSource(m.dataset, length, size, m.labelled, tuple(m.class_names), rows, threads, revision=m.revision)


# --- a folder ---


def _folder(data: DataConfig, root: Path, files: list[Parts], refused: dict[Parts, str], threads: int) -> ImageSource:
    parts = sorted([*files, *refused])
    path = plain(data.path)
    if not parts:
        raise UserError(f"--data.path {path}: no image ({', '.join(sorted(SUFFIXES))}) and no parquet file in this folder")
    names = tuple(sorted({part[0] for part in parts if len(part) > 1})) if data.label_column else ()
    if names and min(map(len, parts)) == 1:
        raise UserError(f"--data.path {path} holds images beside class folders such as {names[0]!r}; move one or the other")
    numbers = {name: n for n, name in enumerate(names)}
    length = min(len(parts), data.num_images or len(parts))

    def rows(start: int, stop: int) -> Iterator[Row]:
        for part in parts[start : min(stop, length)]:
            content = refused.get(part) or root.joinpath(*part)
            yield Row("/".join(part), content, numbers.get(part[0]) if names else None)

    return ImageSource(plain(root, 4096), length, data.image_size, bool(names), names, rows, threads, data.crop)


def scan(path: str) -> tuple[Path, list[Parts], dict[Parts, str]]:
    """A folder's real path, its images and parquet files, and the links among them that are not followed, with the reason.

    Hidden files and folders are left out, and no linked folder is entered. Raises UserError, or OSError for a folder that may
    not be read.
    """
    root = os.path.realpath(os.path.expanduser(path))
    if not os.path.isdir(root):
        raise UserError(f"--data.path {plain(path)}: no such folder")
    files: list[Parts] = []
    refused: dict[Parts, str] = {}
    folders: list[Parts] = [()]
    while folders:
        inside = folders.pop()
        with os.scandir(os.path.join(root, *inside)) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                part = (*inside, entry.name)
                if entry.is_dir(follow_symlinks=False):
                    folders.append(part)
                elif os.path.splitext(entry.name)[1].lower() not in SUFFIXES | {".parquet"}:
                    continue
                elif not entry.is_symlink():
                    if entry.is_file():  # a pipe or a device is none
                        files.append(part)
                elif not os.path.realpath(entry.path).startswith(root + os.sep):
                    refused[part] = "a link out of the folder"
                elif not os.path.exists(entry.path):  # one in a circle too
                    refused[part] = "a link that leads nowhere"
                elif entry.is_file():
                    files.append(part)
    return Path(root), sorted(files), refused
