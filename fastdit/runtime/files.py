"""Files that are whole or absent. One file is written aside and renamed; a folder carries the hashes of its files.

SHA256SUMS is written last and lists every file of the folder. `sha256sum -c SHA256SUMS` checks by hand what `verify` does here.
"""

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

SUMS = "SHA256SUMS"
PIECE = 8 << 20  # bytes read or written at a time


class Written(NamedTuple):
    """A file on the disk: its bytes and their SHA-256."""

    size: int
    sha256: str


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> Written:
    """Write a new file and have the disk confirm it. Raises OSError; never follows or overwrites what is there."""
    digest, size = hashlib.sha256(), 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    try:
        for piece in pieces:
            whole = memoryview(piece)
            for start in range(0, len(whole), PIECE):
                part = whole[start : start + PIECE]
                digest.update(part)
                size += len(part)
                while part:
                    part = part[os.write(fd, part) :]
        os.fsync(fd)
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from None  # a full disk does not say where
    finally:
        os.close(fd)
    return Written(size, digest.hexdigest())


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Write SHA256SUMS, {file name below folder: hash}, and have the disk confirm the folder's names. Raises OSError."""
    write_file(folder / SUMS, [f"{sums[name]}  {name}\n".encode() for name in sorted(sums)])
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Have the disk confirm the names in a folder: a rename or a new file is only then safe from a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_file(path: Path, limit: int) -> bytes:
    """A small regular file, not a link to one. Raises OSError, or ValueError if it is longer than `limit` bytes."""
    fd = _open(path)
    try:
        size = os.fstat(fd).st_size
        if size > limit:
            raise ValueError(f"{path.name} has {size} bytes; at most {limit} are believable")
        return b"".join(iter(lambda: os.read(fd, PIECE), b""))
    finally:
        os.close(fd)


def read_sums(folder: Path, allowed: str) -> dict[str, str]:
    """SHA256SUMS of a folder, {file name: hash}; any changed byte of it is noticed here or by `verify`.

    Names must match the pattern `allowed`, so that none can lead elsewhere; below `folder` there must be no links, and in its
    subfolders no files that are not listed. Raises ValueError or OSError.
    """
    if not stat.S_ISDIR(os.lstat(folder).st_mode):
        raise ValueError(f"{folder} is not a folder")
    found: dict[str, str] = {}
    *lines, rest = read_file(folder / SUMS, 1 << 20).split(b"\n")
    if rest:
        raise ValueError(f"{SUMS} does not end with a line")
    for line in lines:
        match = re.fullmatch(rb"([0-9a-f]{64})  ([\x21-\x7e]+)", line)
        name = match[2].decode() if match else ""
        if match is None or not re.fullmatch(allowed, name) or name in found:
            raise ValueError(f"{SUMS} has a line that does not belong there: {line[:200]!r}")
        found[name] = match[1].decode()
    for name in {os.path.dirname(name) for name in found} - {""}:
        if not stat.S_ISDIR(os.lstat(folder / name).st_mode):
            raise ValueError(f"{name} is not a folder")
        for extra in {f"{name}/{e}" for e in os.listdir(folder / name)} - set(found):
            raise ValueError(f"{extra} is not listed in {SUMS}")
    for name in found:
        if not os.path.lexists(folder / name):
            raise ValueError(f"{name} is missing")
        if not stat.S_ISREG(os.lstat(folder / name).st_mode):
            raise ValueError(f"{name} is not a plain file")
    return found


def verify(folder: Path, sums: Mapping[str, str], names: Iterable[str]) -> None:
    """Hash the named files. Raises ValueError naming the first whose bytes are not those that were written, or OSError."""
    for name in names:
        fd, digest, buffer = _open(folder / name), hashlib.sha256(), memoryview(bytearray(PIECE))
        try:
            while count := os.readv(fd, [buffer]):
                digest.update(buffer[:count])
        finally:
            os.close(fd)
        if digest.hexdigest() != sums[name]:
            raise ValueError(f"{name} is damaged")


@contextlib.contextmanager
def atomic(path: Path, sync: bool = True) -> Iterator[BinaryIO]:
    """A file to write. When the block ends it is on the disk under `path`; if the block fails, `path` is as it was.

    Meanwhile it is called .NAME.PID.tmp and lies beside `path`. No link is followed. sync=False does not wait for the disk: a
    power cut may then leave the name without the content. Raises OSError, which names `path`.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.unlink(missing_ok=True)  # a killed process of the same number left it
        with open(os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "w+b") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.rename(aside, path)
        if sync:
            sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(aside)):
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from None  # a full disk does not say where
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file by `atomic`."""
    with atomic(path) as file:
        file.write(text.encode())


def json_lines(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in the lines of a text; a line that is none, torn by a kill say, is skipped."""
    for row in text.splitlines():
        try:
            value = json.loads(row)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value


def _open(path: Path) -> int:
    """A descriptor of a regular file. A link is refused, and O_NONBLOCK keeps a pipe from being waited for."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ValueError(f"{path.name} is not a plain file")
    return fd
