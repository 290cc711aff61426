"""A run's folder: its config.json, and where its checkpoints are.

runs/NAME/
    config.json       every setting of the run, as it stands
    changes.jsonl     what was changed when the run was resumed, and at how many images
    metrics.jsonl     samples/  checkpoints/  evaluations.jsonl

With --run.checkpoints DIR, checkpoints/ is DIR/NAME/ instead. A file in it, `run`, holds the path of the run's folder.
"""

import dataclasses
import json
import stat
import types
import typing
from pathlib import Path
from typing import Any, Literal

from fastdit.config import Config, UserError, nearest, plain
from fastdit.runtime.files import read_file, write_text
from fastdit.runtime.validation import validate

FORMAT = 2  # of config.json; 1 had no such line, and settings that are gone or derived today
LIMIT = 1 << 20  # bytes of config.json; a real one has thousands
CONFIG, CHANGES, LOCK = "config.json", "changes.jsonl", "lock"
CHECKPOINTS, OWNER = "checkpoints", "run"


def save_config(config: Config, path: Path) -> None:
    """Write config.json, unless it says the same already. Raises OSError."""
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(config)}, indent=2) + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def load_config(path: Path) -> Config:
    """Read a run's config.json, of this format or the one before. Raises UserError naming the file and the field."""
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > LIMIT:
            raise ValueError(f"not a plain file of at most {LIMIT} bytes")
        data = json.loads(path.read_text(encoding="utf-8"))
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
    if origin in (types.UnionType, typing.Union):  # X | None, or a number | a word
        first, second = typing.get_args(cls)
        if second is type(None):
            return None if data is None else _build(first, data, where)
        return _build(second if isinstance(data, str) else first, data, where)
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


# --- checkpoints on another disk ---


def place(folder: Path, config: Config) -> Path:
    """Where the run in a folder keeps its checkpoints, whether that is there or not."""
    elsewhere = config.run.checkpoints
    return folder / CHECKPOINTS if elsewhere is None else Path(elsewhere) / folder.absolute().name


def checkpoints_of(folder: Path, config: Config) -> Path:
    """The same, for whoever reads them. Raises UserError where the disk is gone, or what is there is not this run's."""
    found = place(folder, config)
    if found.is_symlink():
        raise UserError(f"{found} is a symbolic link, which is not followed; --run.checkpoints keeps checkpoints elsewhere")
    if config.run.checkpoints is None:
        return found
    if not found.is_dir():
        way = f"mount its disk, or say where they were moved: train.py {folder} --run.checkpoints DIR"
        raise UserError(f"the checkpoints of {folder} are in {found}, which is not there; {way}")
    if not (found / OWNER).is_file():
        raise UserError(f"{found} has no file {OWNER!r} that says whose checkpoints it holds; {folder} cannot use them")
    refuse_others(folder, found)
    return found


def run_of(checkpoints: Path) -> Path:
    """The folder of the run that keeps its checkpoints in a folder. Raises UserError where there is none."""
    run = checkpoints.parent
    if (checkpoints / OWNER).is_file():
        run = Path(read_file(checkpoints / OWNER, LIMIT).decode(errors="replace").strip())
        if not (run / CONFIG).is_file() or place(run, load_config(run / CONFIG)).resolve() != checkpoints.resolve():
            raise UserError(f"{checkpoints}: the run in {plain(run)} does not keep its checkpoints there; name the run itself")
    if not (run / CONFIG).is_file():
        raise UserError(f"{checkpoints}: there is no config.json in {run} that says what model it holds")
    return run


def create_place(folder: Path, config: Config) -> None:
    """Make the folder of checkpoints that a new run keeps elsewhere, and say in it whose they are. Raises OSError."""
    found, owner = place(folder, config), f"{folder.resolve()}\n"
    if config.run.checkpoints is None:
        return
    if not (folder / CONFIG).exists():
        found.mkdir()  # whoever makes it has it
    if not (found / OWNER).is_file() or (found / OWNER).read_text(encoding="utf-8") != owner:
        write_text(found / OWNER, owner)


def refuse_others(folder: Path, found: Path) -> None:
    """Raise UserError where another run keeps its checkpoints in a folder. Its copy does not have them too."""
    try:
        owner = Path(read_file(found / OWNER, LIMIT).decode().strip())
        config = load_config(owner / CONFIG)
    except (OSError, ValueError):
        return  # it was moved or deleted
    if owner.resolve() != folder.resolve() and place(owner, config).resolve() == found.resolve():
        raise UserError(f"the checkpoints in {found} belong to the run {plain(owner)}, not to {folder}")
