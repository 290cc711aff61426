"""A run's folder: its config.json, who may write in it, and what a resumed run may change.

runs/NAME/
    config.json       every setting of the run, as it stands
    changes.jsonl     what was changed when the run was resumed, and at how many images
    metrics.jsonl     samples/  checkpoints/  evaluations.jsonl
"""

import dataclasses
import json
import stat
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from fastdit.config import Config, UserError, nearest, plain, replace, validate
from fastdit.runtime.files import write_text

FORMAT = 2  # of config.json; 1 had no such line, and settings that are gone or derived today
LIMIT = 1 << 20  # bytes of config.json; a real one has thousands
CONFIG, CHANGES, LOCK = "config.json", "changes.jsonl", "lock"


def save_config(config: Config, path: Path) -> None:
    """Write config.json, unless it says the same already. Raises OSError."""
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(config)}, indent=2) + "\n"
    if not path.is_file() or path.read_text() != text:
        write_text(path, text)


def load_config(path: Path) -> Config:
    """Read a run's config.json, of this format or the one before. Raises UserError naming the file and the field."""
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > LIMIT:
            raise ValueError(f"not a plain file of at most {LIMIT} bytes")
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable config ({plain(error, 200)})") from None
    written = data.pop("format", 1) if isinstance(data, dict) else 1
    if written not in (1, FORMAT):
        raise UserError(f"{path}: format {plain(repr(written), 20)}; this version reads 1 and {FORMAT}")
    config = _build(Config, _upgrade(data, str(path)) if written == 1 else data, str(path))
    try:
        validate(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config


# Settings of format 1 that are gone, and the value that means the same today. Another value cannot be had any more.
GONE: dict[str, Any] = {
    "data.device_gib": ...,  # how a pack is read changes no result
    "data.streaming": ...,
    "diffusion.min_snr": 0.0,
    "parallel.residual": "same",
}
EMPTY = {
    "run.name": "",
    "data.path": "",
    "data.num_images": 0,
    "data.vae": "",
    "eval.every_images": 0,
    "eval.reference": "",
    "train.spike_sigma": 0.0,
    "train.init_from": "",
    "parallel.shard": 0,
    "parallel.threads": 0,
    "log.print_every": 0,
    "log.sample_every": 0,
    "log.save_every": 0,
    "log.wandb": "",
    "log.peak_tflops": 0.0,
}  # values of format 1 that are None today


def _upgrade(data: Any, where: str) -> Any:
    """The settings of a config.json of format 1 as format 2 has them. Raises UserError for what cannot be had any more."""
    if not isinstance(data, dict) or not all(isinstance(group, dict) for name, group in data.items() if name in GROUPS):
        return data
    flat = {f"{g}.{n}": v for g, group in data.items() if g in GROUPS for n, v in group.items()}
    for name, same in GONE.items():
        value = flat.pop(name, same)
        if same is not ... and value != same:
            said = plain(repr(value), 40)
            raise UserError(f"{where}: {name} is {said}, which is no longer an option; start anew, or use fastdit 0.1")
    for name, empty in EMPTY.items():
        if name in flat and flat[name] == empty and type(flat[name]) in (type(empty), int):
            flat[name] = None
    if "sample.guidance_low" in flat or "sample.guidance_high" in flat:
        flat["sample.guidance_interval"] = [flat.pop("sample.guidance_low", 0.0), flat.pop("sample.guidance_high", 1.0)]
    source, split = flat.pop("data.source", "cats"), flat.pop("data.split", "train")
    revision, vae_revision = flat.pop("data.revision", ""), flat.pop("data.vae_revision", "")
    if source == "cats":
        flat["data.path"] = None
    elif source == "hub" and flat.get("data.path"):
        flat["data.path"] += ("" if split == "train" else f":{split}") + (f"@{revision}" if revision else "")
    if flat.get("data.vae") and vae_revision:
        flat["data.vae"] += f"@{vae_revision}"
    if flat.get("model.num_classes") == 0:
        flat["data.label_column"] = None
    if flat.get("diffusion.kind") == "flow" and "diffusion.flow_t_logit" not in flat:
        flat["diffusion.prediction"] = "velocity"  # it did, whatever `prediction` said
    flat.setdefault("diffusion.flow_t_logit", [0.0, 1.0])
    flat.setdefault("data.crop", "none")  # every picture was squashed
    upgraded = {name: value for name, value in data.items() if name not in GROUPS}
    for name, value in flat.items():
        group, _, leaf = name.partition(".")
        upgraded.setdefault(group, {})[leaf] = value
    return upgraded


GROUPS = {f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.default_factory)}


def _build(cls: Any, data: Any, where: str) -> Any:
    """A value of type cls out of parsed JSON, strictly: the file may come from anywhere."""
    if dataclasses.is_dataclass(cls):
        if not isinstance(data, dict):
            raise UserError(f"{where}: expected a group of settings, found {plain(repr(data), 60)}")
        hints = typing.get_type_hints(cls)
        for name in data:
            if name not in hints:
                raise UserError(f"{where}: unknown setting {plain(repr(name), 60)}{nearest(str(name), hints)}")
        return typing.cast(Any, cls)(**{name: _build(hints[name], value, f"{where}: {name}") for name, value in data.items()})
    origin = typing.get_origin(cls)
    if origin is types.UnionType:  # X | None
        return None if data is None else _build(typing.get_args(cls)[0], data, where)
    if origin is Literal:
        if data not in typing.get_args(cls):
            raise UserError(f"{where} is {plain(repr(data), 60)}; valid are {', '.join(map(repr, typing.get_args(cls)))}")
        return data
    if origin is tuple:
        kinds = typing.get_args(cls)
        if kinds[1:] == (...,):
            kinds = kinds[:1] * (len(data) if isinstance(data, list) and 0 < len(data) <= 3 else 1)
        if not isinstance(data, list) or len(data) != len(kinds):
            raise UserError(f"{where} is {plain(repr(data), 60)}; expected {len(kinds)} values")
        return tuple(_build(kind, x, where) for kind, x in zip(kinds, data, strict=True))
    if cls is float and type(data) is int:
        return float(data)
    if type(data) is not cls:
        raise UserError(f"{where} is {plain(repr(data), 60)}; expected {cls.__name__}")
    return data


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
FREE: tuple[str, ...] = ("run.name", "run.folder", "run.fresh", "log.", "parallel.", "sample.", "eval.", "kernels")
FREE += ("attention", "profile", "data.packs", "data.max_bad", "train.batch", "train.grad_accum", "train.max_skips")
NOT_FREE: tuple[str, ...] = ("parallel.precision",)
# What one may change on purpose, by naming the run's folder and a flag. It is said, and kept in changes.jsonl.
DELIBERATE: tuple[str, ...] = ("train.images", "train.lr", "train.lr_decay", "train.warmup_images", "train.weight_decay")
DELIBERATE += ("train.ema", "train.spike_sigma", "data.path", "data.vae")
# Settings that follow from the data. The checkpoint knows which data those were.
FROM_DATA: tuple[str, ...] = ("model.input_size", "model.channels", "model.num_classes", "model.condition")
FROM_DATA += ("data.kind", "data.normaliser", "diffusion.clip_x0")


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
    while config.run.fresh and folder.exists():
        folder, number = root / f"{config.run.name}-{number}", number + 1
    for path in (folder, *(sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else ())):
        if path.is_symlink():
            raise UserError(f"{path} is a symbolic link; a run folder and what is in it must be its own")
    config = adopt(replace(config, run={"name": folder.name, "fresh": False}), folder / CONFIG)
    if not (folder / CONFIG).exists():
        if folder.exists() and any(entry.name != LOCK for entry in folder.iterdir()):
            raise UserError(f"{folder} is not empty and holds no config.json; choose another --run.name")
        return config, folder, []
    before = load_config(folder / CONFIG)
    free = (*FREE, *FROM_DATA) if before.train.lr_decay == "cosine" else (*FREE, *FROM_DATA, "train.images")
    if (folder / "checkpoints").is_dir() and any((folder / "checkpoints").iterdir()):
        free += ("train.init_from",)  # it was read before the first checkpoint
    changed = [d for d in differences(config, before) if not d.startswith(free) or d.startswith(NOT_FREE)]
    refused = [d for d in changed if not (on_purpose and d.startswith(DELIBERATE))]
    if refused:
        way = "start anew with --run.name or --run.fresh"
        if all(d.startswith(DELIBERATE) for d in refused):
            way += f", or change the run on purpose: train.py {folder} and the flag"
        raise UserError(f"{folder} holds a run of another config ({'; '.join(refused)}); {way}")
    return config, folder, changed


def record_changes(folder: Path, changed: list[str], images_seen: int) -> None:
    """Keep what a resumed run was changed in on purpose."""
    if changed:
        with (folder / CHANGES).open("a") as file:
            file.write(json.dumps({"images": images_seen, "changed": changed}) + "\n")
