"""A checkpoint's folder: what is in it, which there are, and what is wrong with one. Every byte is verified before it is used.

    000000012800/                           images seen
        shards/00000-of-00002.safetensors   what rank 0 of 2 held: a shard of every tensor, in torch's DCP layout
        ema.safetensors                     the averaged weights, whole, for sampling
        checkpoint.json                     images seen, world size, sizes, and the caller's state
        SHA256SUMS                          written last

It is written as 000000012800.MARK.tmp, and renamed once the disk has confirmed all of it.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdit.config import plain
from fastdit.runtime.files import SUMS, read_file, read_sums, verify

FORMAT = 1
ABOUT, WEIGHTS, SHARDS = "checkpoint.json", "ema.safetensors", "shards"
AVERAGES = "averages"  # folder beside the checkpoints, of snapshots of post-hoc averages: checkpoints without weights
FILES = r"checkpoint\.json|ema\.safetensors|shards/[0-9]{5}-of-[0-9]{5}\.safetensors"
LIMIT = 16 << 20  # bytes of checkpoint.json; a real one has thousands
FOLDER, LEFTOVER = re.compile(r"[0-9]{12}"), re.compile(r"[0-9]{12}(\.old)?(\.[0-9a-f]{8})?\.tmp")


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint of those in a folder; None where there is none. Its bytes are not verified."""
    return max((folder / name for name in complete(folder)), default=None)


def complete(folder: Path) -> list[str]:
    """The checkpoints whose last file is there, oldest first."""
    return [name for name in names(folder) if (folder / name / SUMS).is_file()]


def names(folder: Path) -> list[str]:
    """Folders named as checkpoints are, oldest first; links do not count."""
    if not folder.is_dir():
        return []
    return sorted(e.name for e in os.scandir(folder) if FOLDER.fullmatch(e.name) and e.is_dir(follow_symlinks=False))


def damage(folder: Path, rank: int, world: int) -> str:
    """What is wrong with a checkpoint's bytes; "" where nothing is. Each rank hashes its share of the files."""
    try:
        sums = read_sums(folder, FILES)
        about = read_about(folder, sums)
        if set(about["files"]) | {ABOUT} != set(sums):
            raise ValueError(f"{ABOUT} and {SUMS} list different files")
        for name, size in about["files"].items():
            found = os.lstat(folder / name).st_size
            if found != size:
                raise ValueError(f"{name} has {found} of {size} bytes")
        verify(folder, sums, sorted(about["files"])[rank::world])
    except OSError as error:
        return plain(f"{error.strerror or error} ({error.filename})")
    except ValueError as error:
        return plain(error)
    return ""


def read_about(folder: Path, sums: Mapping[str, str]) -> dict[str, Any]:
    """checkpoint.json, verified. Raises ValueError or OSError."""
    if ABOUT not in sums:
        raise ValueError(f"{SUMS} does not list {ABOUT}")
    verify(folder, sums, [ABOUT])
    try:
        about = json.loads(read_file(folder / ABOUT, LIMIT))
    except RecursionError:
        raise ValueError(f"{ABOUT} is nested too deeply") from None
    kinds = {"format": int, "images_seen": int, "world_size": int, "fingerprint": str, "state": dict, "files": dict}
    if not isinstance(about, dict) or {k: type(v) for k, v in about.items()} != kinds:
        raise ValueError(f"{ABOUT} is not what this program writes")
    if about["format"] != FORMAT:
        raise ValueError(f"it is in format {about['format']}; this version of fastdit reads {FORMAT}")
    if f"{about['images_seen']:012d}" != folder.name:
        raise ValueError(f"the folder holds the checkpoint of {about['images_seen']} images")
    return about
