"""The folder that a run starts or resumes in, and the settings that a resumed run may change."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdit.config import Config, UserError, plain, replace
from fastdit.runtime import saved
from fastdit.runtime.files import read_sums
from fastdit.runtime.lock import Lock
from fastdit.runtime.run import (
    CHANGES,
    CONFIG,
    LOCK,
    checkpoints_of,
    create_place,
    load_config,
    place,
    refuse_others,
    save_config,
)


def differences(ours: Any, theirs: Any, prefix: str = "") -> list[str]:
    """The settings in which two configs differ: ["train.lr: 0.0001 here, 0.001 there", …]."""
    found: list[str] = []
    for f in dataclasses.fields(ours):
        a, b = getattr(ours, f.name), getattr(theirs, f.name)
        if dataclasses.is_dataclass(a) and not isinstance(a, type):
            found += differences(a, b, f"{prefix}{f.name}.")
        elif a != b:
            found.append(f"{prefix}{f.name}: {a} here, {b} there")
    return found


# Settings that a resumed run may change without a word: where and how it runs, not what it computes. The batch may be split
# otherwise as long as its product with the ranks stays; `train.resume` checks that.
FREE: tuple[str, ...] = ("run.name", "run.folder", "run.fresh", "run.checkpoints", "log.", "parallel.", "sample.", "eval.")
FREE += ("kernels", "attention", "profile", "data.packs", "data.max_bad", "train.batch", "train.grad_accum", "train.max_skips")
NOT_FREE: tuple[str, ...] = ("parallel.precision",)
# What one may change on purpose, by naming the run's folder and a flag. It is said, and kept in changes.jsonl.
DELIBERATE: tuple[str, ...] = ("train.images", "train.lr", "train.lr_decay", "train.warmup_images", "train.weight_decay")
DELIBERATE += ("train.ema", "train.spike_sigma", "data.path", "data.vae")
# Settings that follow from the data. The checkpoint knows which data those were.
FROM_DATA: tuple[str, ...] = ("model.input_size", "model.channels", "model.num_classes", "model.condition")
FROM_DATA += ("data.kind", "data.normaliser", "data.latents", "diffusion.clip_x0")


def open_run(config: Config, on_purpose: bool, adopt: Callable[[Config, Path], Config]) -> tuple[Config, Path, list[str]]:
    """The run's folder, new or made before by the same config; the config with its final name; what was changed on purpose.

    adopt: completes a config by what the model that it starts from decides, given the path of the run's config.json.
    on_purpose: the user named the run's folder, so whatever differs from its config was typed behind it. Changes nothing on
    the disk. Rank 0 alone calls this. Raises UserError.
    """
    root = Path(config.run.folder)
    assert config.run.name is not None
    folder = root / config.run.name
    number = 2
    if config.run.checkpoints is not None:
        config = replace(config, run={"checkpoints": str(Path(config.run.checkpoints).expanduser().absolute())})
    while config.run.fresh and (folder.exists() or place(folder, config).exists()):
        folder, number = root / f"{config.run.name}-{number}", number + 1
    for path in (folder, *(sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else ())):
        if path.is_symlink():
            raise UserError(f"{path} is a symbolic link; a run folder and what is in it must be its own")
    config = adopt(replace(config, run={"name": folder.name, "fresh": False}), folder / CONFIG)
    if not (folder / CONFIG).exists():
        if folder.exists() and any(entry.name != LOCK for entry in folder.iterdir()):
            raise UserError(f"{folder} is not empty and holds no config.json; choose another --run.name")
        _require_new(folder, config)
        return config, folder, []
    before = load_config(folder / CONFIG)
    config = replace(_kept(folder, config, before, on_purpose), data={"latents": before.data.latents})  # of its own pack
    free = (*FREE, *FROM_DATA) if before.train.lr_decay == "cosine" else (*FREE, *FROM_DATA, "train.images")
    if saved.complete(place(folder, config)):
        free += ("train.init_from",)  # it was read before the first checkpoint
    changed = [d for d in differences(config, before) if not d.startswith(free) or d.startswith(NOT_FREE)]
    refused = [d for d in changed if not (on_purpose and d.startswith(DELIBERATE))]
    if refused:
        way = "start anew with --run.name or --run.fresh"
        if all(d.startswith(DELIBERATE) for d in refused):
            way += f", or change the run on purpose: train.py {folder} and the flag"
        raise UserError(f"{folder} holds a run of another config ({'; '.join(refused)}); {way}")
    return config, folder, changed


def _require_new(folder: Path, config: Config) -> None:
    """Raise UserError unless a new run can keep its checkpoints where it was told to."""
    found = place(folder, config)
    if config.run.checkpoints is not None and not found.parent.is_dir():
        raise UserError(f"--run.checkpoints {found.parent}: no such folder; is its disk mounted?")
    if config.run.checkpoints is not None and os.path.lexists(found):
        raise UserError(f"{found} is there already, and {folder} is a new run; choose another --run.name, or delete it")


def _kept(folder: Path, config: Config, before: Config, on_purpose: bool) -> Config:
    """The config with the place where a run's checkpoints are: as it was, or where they were moved on purpose."""
    if config.run.checkpoints is None and not on_purpose:
        config = replace(config, run={"checkpoints": before.run.checkpoints})
    if config.run.checkpoints == before.run.checkpoints:
        checkpoints_of(folder, config)
        return config
    now, then = place(folder, config), place(folder, before)
    if not on_purpose or saved.complete(then) or now.is_symlink() or not now.is_dir():
        way = f"move that to {now}, then train.py {folder} --run.checkpoints {config.run.checkpoints}"
        raise UserError(f"{folder} keeps its checkpoints in {then}; {way}")
    refuse_others(folder, now)
    return config


def has_worked(folder: Path, config: Config, num_ranks: int) -> bool:
    """Whether as many ranks saved a checkpoint of this run under the same settings: it then needs no plan of its memory."""
    newest = saved.newest(place(folder, config))
    try:
        about = saved.read_about(newest, read_sums(newest, saved.FILES)) if newest else None
        return about is not None and about["world_size"] == num_ranks and load_config(folder / CONFIG) == config
    except (OSError, ValueError):
        return False


def record_changes(folder: Path, changed: list[str], images_seen: int) -> None:
    """Append the deliberate changes of a resumed run to changes.jsonl."""
    if changed:
        with (folder / CHANGES).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"images": images_seen, "changed": changed}) + "\n")


def start_run(config: Config, folder: Path, changed: list[str], images_seen: int, lock: Lock) -> None:
    """Make the run's folder, once all that a config can get wrong has gone right. Rank 0 alone calls this."""
    folder.mkdir(parents=True, exist_ok=True)
    if lock.file is None:  # there was no run here a moment ago
        warn(lock.take())
        if saved.newest(place(folder, config)) is not None and images_seen == 0:
            raise UserError(f"another process began a run in {folder} meanwhile; the same command goes on with it")
    record_changes(folder, changed, images_seen)
    create_place(folder, config)
    save_config(config, folder / CONFIG)
    for change in changed:
        print(f"changed on purpose, from {images_seen:,} images on: {plain(change)}", flush=True)


def warn(text: str) -> None:
    if text:
        print(plain(f"warning: {text}", 1000), flush=True)
