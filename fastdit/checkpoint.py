"""The checkpoints of a run: complete or absent, written while training goes on, and read back onto any number of ranks.

torch.distributed.checkpoint says which part of a tensor a rank holds, and reads the shards; no file holds a pickle. The folder
of a checkpoint is known to runtime/saved.py.
"""

import json
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException

from fastdit.config import UserError, plain
from fastdit.runtime import saved
from fastdit.runtime.files import Written, read_sums, sync_folder, write_file, write_sums
from fastdit.runtime.process import ignored
from fastdit.runtime.saved import ABOUT, FILES, FOLDER, FORMAT, LEFTOVER, SHARDS, WEIGHTS
from fastdit.runtime.tensors import Piece, contents, fit, owned, write_safetensors, write_shard

T = TypeVar("T")


class Checkpoints:
    """The checkpoints of a run. Every rank makes one and calls its methods alike; all succeed or raise the same error."""

    def __init__(
        self,
        folder: Path,
        keep: int,
        fingerprint: str = "",
        group: dist.ProcessGroup | None = None,
        timeout: timedelta = timedelta(minutes=10),
        say: Callable[[str], None] = print,
        alone: Callable[[], bool] = lambda: True,
    ):
        """Touches nothing on the disk.

        Args:
            keep: newest checkpoints to keep.
            fingerprint: of whatever must not change between saving and loading; a checkpoint with another one is refused.
            group: a gloo group that nothing else uses, since a background thread does; None makes one.
            timeout: how long a rank waits for the others, for the group that is made.
            say: called on rank 0 with a line for the user, when a damaged checkpoint is passed over.
            alone: whether rank 0 holds the run's lock, so that no other process saves here; only then others' leftovers go.
        """
        self.folder, self.keep, self.fingerprint, self.say, self.alone = Path(folder), keep, fingerprint, say, alone
        self.mark = secrets.token_hex(4)  # in the names of what this process has under way
        self.group: Any = group
        if group is None and dist.is_initialized():
            self.group = dist.new_group(backend="gloo", timeout=timeout)
        self.rank, self.world = (dist.get_rank(self.group), dist.get_world_size(self.group)) if self.group else (0, 1)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._buffers: dict[str, Tensor] = {}  # on the host, kept from save to save
        self._damaged: set[str] = set()
        self._verified: str | None = None
        self._tidied = False

    # --- saving ---

    def save(
        self,
        images_seen: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Copy the tensors to the host, return, and write them in the background. `wait` for the previous save comes first.

        When it returns, the tensors may change. A checkpoint of the same images that is already there and sound is left alone.

        Args:
            tensors: the same names on every rank, each of one dimension or more; a DTensor is saved by the ranks that hold it,
                a plain tensor by rank 0.
            state: what JSON carries; rank 0's is saved.
            weights: rank 0's become ema.safetensors; CPU tensors that nobody changes afterwards.
        """
        self.wait()
        about = {"format": FORMAT, "images_seen": images_seen, "world_size": self.world, "fingerprint": self.fingerprint}
        about["state"] = json.loads(json.dumps(state, allow_nan=False))
        name = f"{images_seen:012d}"
        if not FOLDER.fullmatch(name):
            raise ValueError(f"{images_seen} is not a number of images seen")
        pieces, self._verified = self._stage(tensors), None
        self._thread = threading.Thread(target=self._write_or_keep_error, args=(name, pieces, about, dict(weights or {})))
        self._thread.start()

    def wait(self) -> None:
        """Wait until the last save is on the disk. Raises UserError, on every rank, if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _stage(self, tensors: Mapping[str, Tensor]) -> list[Piece]:
        pieces, pinned = [], torch.cuda.is_available()
        for name, offset, shard in owned(tensors, self.rank):
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != shard.shape or buffer.dtype != shard.dtype:
                buffer = self._buffers[name] = torch.empty(shard.shape, dtype=shard.dtype, pin_memory=pinned)
            buffer.copy_(shard, non_blocking=pinned)
            pieces.append(Piece(name, offset, buffer))
        if pinned:
            torch.cuda.current_stream().synchronize()
        return pieces

    def _write_or_keep_error(self, name: str, pieces: list[Piece], about: dict, weights: dict[str, Tensor]) -> None:
        try:
            self._write(name, pieces, about, weights)
        except BaseException as error:  # raised by the next `wait`, in the thread that can act on it
            self._error = error

    def _write(self, name: str, pieces: list[Piece], about: dict, weights: dict[str, Tensor]) -> None:
        final = self.folder / name

        def begin() -> str:
            """Rank 0's name to write under; "" where nothing is to be written. A weight once NaN stays NaN: nobody wants it."""
            for piece in pieces:
                if piece.shard.is_floating_point() and not piece.shard.isfinite().all():
                    raise ValueError(f"{piece.name} is not finite")
            if self.rank != 0:
                return ""
            self._tidy()
            if final.exists() and not saved.damage(final, 0, 1):
                return ""
            aside = f"{name}.{self.mark}.tmp"
            for new in (self.folder / aside, self.folder / aside / SHARDS):
                new.mkdir()  # nothing above: where another disk has gone since, none of it is made up here
            return aside

        def write(aside: Path) -> dict[str, Written]:
            written = {}
            if pieces:
                shard = f"{SHARDS}/{self.rank:05d}-of-{self.world:05d}.safetensors"
                written[shard] = write_shard(aside / shard, pieces)
            if weights and self.rank == 0:
                written[WEIGHTS] = write_safetensors(aside / WEIGHTS, weights, {"format": "pt"})
            return written

        def finish(aside: Path, files: dict[str, Written]) -> None:
            if self.rank != 0:
                return
            about["files"] = {n: f.size for n, f in files.items()}
            files[ABOUT] = write_file(aside / ABOUT, [json.dumps(about, indent=1).encode()])
            sync_folder(aside / SHARDS)
            write_sums(aside, {n: f.sha256 for n, f in files.items()})
            self._remove(final)  # not there, or damaged
            os.rename(aside, final)
            sync_folder(self.folder)
            self._damaged.discard(name)
            try:
                self._retain(name)
            except OSError as error:  # the new checkpoint is safe all the same
                self.say(plain(f"an old checkpoint was not removed: {error}"))

        try:
            if under_way := self._together(begin, name)[0]:
                aside = self.folder / under_way
                files = {n: f for part in self._together(lambda: write(aside), name) for n, f in part.items()}
                self._together(lambda: finish(aside, files), name)
        except BaseException:
            if self.rank == 0:
                shutil.rmtree(self.folder / f"{name}.{self.mark}.tmp", ignore_errors=True)  # on a full disk it is in the way
            raise

    def _together(self, step: Callable[[], T], name: str) -> list[T]:
        """Run a step of a save on every rank. Returns each rank's value; raises the same UserError on all if one failed."""
        for rank, (_, problem) in enumerate(found := self._gather(step)):
            if problem:
                raise UserError(f"checkpoint {name} was not saved: rank {rank}: {problem}; earlier ones are untouched")
        return [value for value, _ in found]

    def _gather(self, step: Callable[[], T]) -> list[tuple[T, str]]:
        """(value, "") or (None, problem) of every rank."""
        mine: tuple[Any, str]
        try:
            mine = (step(), "")
        except OSError as error:
            mine = (None, plain(f"{error.strerror or error} ({error.filename or self.folder})"))
        except ValueError as error:
            mine = (None, plain(error))
        except Exception as error:  # the other ranks wait for an answer, whatever it is
            mine = (None, plain(f"{type(error).__name__}: {error}"))
        every: list[Any] = [mine]
        if self.group is not None:
            every = [None] * self.world
            dist.all_gather_object(every, mine, group=self.group)
        return every

    def _tidy(self) -> None:
        """Remove what killed saves of this run left, once; not beside another process, which may have a save under way."""
        if self._tidied:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.alone():
            for entry in list(os.scandir(self.folder)):
                if LEFTOVER.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
        self._tidied = True

    def _remove(self, final: Path) -> None:
        """Remove a checkpoint so that, killed half-way, it is gone rather than damaged."""
        if os.path.lexists(final):
            doomed = final.with_name(f"{final.name}.old.{self.mark}.tmp")
            os.rename(final, doomed)
            shutil.rmtree(doomed)

    def _retain(self, newest: str) -> None:
        """Remove all but the last `keep`. What is incomplete, known to be damaged, or later neither counts nor goes."""
        names = [n for n in saved.complete(self.folder) if n <= newest and n not in self._damaged]
        for name in names[: -self.keep]:
            self._remove(self.folder / name)

    def forget_after(self, images_seen: int) -> None:
        """Remove later checkpoints: they are of a course that the run does not go on with. Rank 0 does. Raises UserError."""

        def forget() -> None:
            for name in saved.names(self.folder) if self.rank == 0 else ():
                if int(name) > images_seen:
                    self._remove(self.folder / name)

        for _, problem in self._gather(forget):
            if problem:
                raise UserError(f"cannot remove what is later than {images_seen:,} images from {self.folder}: {problem}")

    # --- loading ---

    def latest(self) -> int | None:
        """Images seen of the newest checkpoint that is sound in every byte; None if there are none at all.

        The ranks share the reading. One that is damaged is passed over with a line to the user. Raises UserError if all are.
        """
        self.wait()
        [(names, problem), *_] = self._gather(lambda: saved.names(self.folder))
        if problem:
            raise UserError(f"cannot read {self.folder}: {problem}")
        problems = []
        for name in reversed(names):
            found = self._gather(lambda name=name: saved.damage(self.folder / name, self.rank, self.world))  # type: ignore[misc]
            said = next((text for damage, problem in found if (text := damage or problem)), "")
            if not said:
                self._verified = name
                return int(name)
            problems.append(f"checkpoint {name} is passed over: {said}")
            self._damaged.add(name)
            if self.rank == 0:
                self.say(problems[-1])
        if problems:
            raise UserError(f"no checkpoint in {self.folder} is usable; {problems[0]}; move the folder away to start anew")
        return None

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Fill the tensors in place from the newest sound checkpoint, whatever number of ranks wrote it. Returns its state.

        Raises UserError, before any tensor changes, if there is none or it does not fit.
        """
        if self._verified is None and self.latest() is None:
            raise UserError(f"there is no checkpoint in {self.folder}")
        assert self._verified is not None
        folder, self._verified = self.folder / self._verified, None

        def check() -> dict[str, Any]:
            about = saved.read_about(folder, read_sums(folder, FILES))
            if about["fingerprint"] != self.fingerprint:
                raise ValueError(f"it was saved under another configuration ({about['fingerprint']}, here {self.fingerprint})")
            fit(contents(folder / SHARDS), tensors)
            return about["state"]

        found = self._gather(check)
        for _, problem in found:
            if problem:
                raise UserError(f"checkpoint {folder.name} cannot be resumed: {problem}")
        try:
            with ignored("torch.distributed is disabled"):
                reader = HuggingFaceStorageReader(str(folder / SHARDS))
                dcp.load(dict(tensors), storage_reader=reader, process_group=self.group, no_dist=self.group is None)
        except CheckpointException as error:  # a BaseException
            first = plain(next(iter(error.failures.values()))[0])
            raise UserError(f"checkpoint {folder.name} cannot be read: {first}") from None
        return found[0][0]
