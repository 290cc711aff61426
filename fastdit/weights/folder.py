"""A trained model by name: a run, one of its checkpoints, a folder that export.py wrote, a file of weights, or a hub id.

A folder of weights is model.safetensors, and config.json with the config of the run that trained it.
"""

import contextlib
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from fastdit_kernels import Ops
from fastdit_kernels.reference import REFERENCE
from torch import Tensor

from fastdit import config as configs
from fastdit.config import Config, UserError, plain
from fastdit.data import classes
from fastdit.data.normaliser import FILE as NORMALISER
from fastdit.data.normaliser import Normaliser
from fastdit.model import DiT, choose_ops
from fastdit.runtime import saved
from fastdit.runtime.files import read_sums
from fastdit.runtime.hardware import compute_dtype
from fastdit.runtime.ranks import World
from fastdit.runtime.run import checkpoints_of, load_config, run_of, save_config
from fastdit.runtime.tensors import load_weights, save_weights
from fastdit.weights.averages import at_length
from fastdit.weights.located import Located

__all__ = ["Located", "from_pretrained", "load", "load_model", "locate", "push_to_hub", "save_pretrained"]

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def locate(source: str | Path, **hub: Any) -> Located:
    """What a run folder, a checkpoint, an exported folder, a safetensors file or a hub id (OWNER/NAME[@REVISION]) means.

    Of a run, the newest checkpoint. hub: revision, token, cache_dir, local_files_only … of huggingface_hub.hf_hub_download.
    Raises UserError, one line.
    """
    path = Path(source)
    if path.is_file() or path.is_dir():
        found = _local(path)
        names, normaliser = classes.read(found.home), _normaliser(found)
    else:
        repo_id, _, revision = str(source).partition("@")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id) or Path(repo_id).parent.is_dir():
            raise UserError(f"{path} does not exist; name a run folder, an exported folder, a safetensors file or a hub id")
        files = _download(repo_id, {**({"revision": revision} if revision else {}), **hub})
        found = Located(files[WEIGHTS], load_config(files[CONFIG]), Path(), None)
        names = classes.read_names(files[classes.FILE]) if classes.FILE in files else []
        kept = files.get(NORMALISER)
        normaliser = Normaliser.read(kept.parent, kept.name) if kept and _normalised(found.config) else None
    _check_units(found.config, normaliser, source)
    names = names if len(names) == found.config.model.num_classes else []
    return found._replace(class_names=names, normaliser=normaliser)


def _normaliser(found: Located) -> Normaliser | None:
    """What is kept beside a model's weights, or in the folder above them that says what they are."""
    if not _normalised(found.config):
        return None
    places = [found.home, *found.weights.resolve().parents[:4]]
    return next((n for place in places if (n := Normaliser.read(place)) is not None), None)


def _normalised(config: Config) -> bool:
    """Whether the model's arrays or latents were normalised per channel."""
    return config.data.kind == "arrays" or config.data.latents == "channel"


def _check_units(config: Config, found: Normaliser | None, source: str | Path) -> None:
    """Raise UserError where a model of arrays, or of latents per channel, has no normaliser, or that of another model."""
    m = config.model
    if not _normalised(config):
        return
    if found is None:
        what = "arrays" if config.data.kind == "arrays" else "latents"
        raise UserError(f"{plain(source)} holds no {NORMALISER}, which says in which units the model's {what} are")
    numbers = (len(found.x.scale), len(found.condition.scale) if found.condition else 0)
    if numbers != (m.channels, m.condition):
        raise UserError(f"{plain(source)}: its {NORMALISER} is not of {m.channels} channels and {m.condition} conditions")


def _local(path: Path) -> Located:
    """`locate` of what is on this machine."""
    if path.is_file():
        folder = path.absolute().parent
        if path.name == saved.WEIGHTS and (folder / saved.ABOUT).is_file():
            return _checkpoint(folder)
        for place in (folder, *path.resolve().parents[:3]):
            if (place / CONFIG).is_file():
                return Located(path, load_config(place / CONFIG), folder, None)
        raise UserError(f"{path}: there is no config.json beside it that says what model it holds")
    if (path / WEIGHTS).is_file():
        return Located(path / WEIGHTS, load_config(path / CONFIG), path, None)
    if (path / saved.ABOUT).is_file():
        return _checkpoint(path.absolute())
    if (path / "model_index.json").is_file():
        raise UserError(
            f"{path} holds a pipeline: open it with FastDiTPipeline.from_pretrained, or bring it in with convert.py"
        )
    if not (path / CONFIG).exists():
        raise UserError(f"{path} holds no checkpoint and no weights, so it is no run and no exported folder")
    config = load_config(path / CONFIG)
    newest = saved.newest(checkpoints_of(path, config))
    if newest is None:
        raise UserError(f"{path} holds no checkpoint yet")
    return Located(newest / saved.WEIGHTS, config, path, int(newest.name), latents_by=_latents_by(newest))


def _checkpoint(folder: Path) -> Located:
    run = run_of(folder.parent)
    config = load_config(run / CONFIG)
    seen = int(folder.name) if folder.name.isdecimal() else None
    return Located(folder / saved.WEIGHTS, config, run, seen, latents_by=_latents_by(folder))


def _latents_by(folder: Path) -> str:
    """What a checkpoint says of the autoencoder behind its data. A damaged one says nothing here; reading it says the rest."""
    try:
        data = saved.read_about(folder, read_sums(folder, saved.FILES))["state"].get("data")
    except (OSError, ValueError):
        return ""
    said = data.get("VAE") if isinstance(data, dict) else None
    return said if isinstance(said, str) and re.fullmatch("[0-9a-f]{16}", said) else ""


def load(
    source: str | Path,
    device: torch.device | str | None = None,
    *,
    precision: str = "auto",
    ema: float | None = None,
    **hub: Any,
) -> DiT:
    """The model that `locate` finds, on its averaged weights, in eval mode, for `fastdit.sample` and for calls model(x, t, y).

    `model.run` is the config of the run that trained it. device: None for the GPU where there is one. precision: auto, bf16 or
    fp32, of the network. ema: length of the averaged weights, of a run with --train.ema posthoc; None: as the run says. Raises
    UserError, one line.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    found = locate(source, **hub)
    found = found if ema is None else at_length(found, ema)
    config = configs.replace(found.config, parallel={"precision": precision})
    model = load_model(found.weights, config, World(0, 1, 0, 1, where))
    model.run, model.class_names, model.normaliser = found.config, list(found.class_names), found.normaliser
    model.latents_by = found.latents_by
    return model


def from_pretrained(
    source: str | Path,
    *,
    ops: Ops = REFERENCE,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **hub: Any,
) -> tuple[DiT, Config]:
    """The model that `locate` finds, to train or to take apart: on the reference ops, in fp32. And its run's config.

    Raises UserError, one line.
    """
    found = locate(source, **hub)
    with torch.device("meta"):
        model = DiT(found.config.model, ops)
    assign(model, load_weights(found.weights)[0], str(source), dtype, device)
    return model.eval(), found.config


def assign(model: DiT, tensors: dict[str, Tensor], source: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Make these tensors the parameters of a model on the meta device. Raises UserError unless they are exactly its own."""
    fit = fitting(model, tensors, source)
    model.load_state_dict({name: t.to(device, dtype) for name, t in fit.items()}, assign=True)


def fitting(model: DiT, tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors, and those that files may lack. Raises UserError unless they are exactly the model's own, and finite."""
    tensors = {**model.fixed(), **tensors}
    expected = {name: p.shape for name, p in model.named_parameters()}
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors or name not in expected or tensors[name].shape != expected[name]:
            here = tuple(tensors[name].shape) if name in tensors else "missing"
            there = tuple(expected[name]) if name in expected else "unknown"
            raise UserError(f"{source} does not fit its config: {name} is {here} in the file, {there} in the model")
        if not tensors[name].isfinite().all():
            raise UserError(f"{source} cannot be used: {name} holds numbers that are not finite")
    return tensors


def save_pretrained(model: DiT, folder: str | Path, run: Config) -> None:
    """Write the folder that `from_pretrained` and sample.py read; `run` is the config of the run. Raises UserError."""
    if run.model != model.config:
        raise UserError(
            "save_pretrained needs the config of the run that trained this model: save_pretrained(model, folder, run)"
        )
    save_folder(Path(folder), {name: p.detach().cpu() for name, p in model.named_parameters()}, run)
    if model.normaliser is not None:
        model.normaliser.write(Path(folder))


def push_to_hub(model: DiT, repo_id: str, run: Config, *, private: bool | None = None, **hub: Any) -> str:
    """Upload that folder as one commit of a hub repository, made if need be. Returns the commit's address.

    hub: token, revision, commit_message, create_pr … of huggingface_hub.HfApi.upload_folder.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, run)
        return upload(Path(folder), repo_id, private=private, **hub)


def load_model(weights: Path, config: Config, world: World) -> DiT:
    """The model on its weights, whole, in the precision it computes in."""
    dtype = compute_dtype(config.parallel.precision, world.device)
    with torch.device("meta"):
        model = DiT(config.model, choose_ops(config, world.device))
    assign(model, load_weights(weights)[0], str(weights), dtype, world.device)
    return model.eval().requires_grad_(False)


def save_folder(folder: Path, tensors: dict[str, Tensor], run: Config, metadata: dict[str, str] | None = None) -> None:
    """Write weights, on the CPU, and the config that says what they are. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_config(configs.replace(run, run={"checkpoints": None}), folder / CONFIG)
    except OSError as error:
        raise UserError(f"{folder} was not written: {error.strerror or error}") from None
    save_weights(folder / WEIGHTS, tensors, metadata)


def upload(folder: Path, repo_id: str, *, private: bool | None = None, token: str | None = None, **options: Any) -> str:
    """Upload a folder as one commit. Returns its address. Raises UserError, one line, for whatever the hub refuses."""
    from huggingface_hub import HfApi  # here: no other use of a model needs it

    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options).commit_url)
    except Exception as error:  # of the network, the login or the name: all are about what was asked for
        raise UserError(f"not uploaded to {repo_id}: {' '.join(str(error).split())[:300]}") from None


def _download(repo_id: str, options: dict[str, Any]) -> dict[str, Path]:
    """Config, weights, and names of the classes and the normaliser where the repository has them: files in the hub's cache.

    It keeps links where they are named and the files themselves elsewhere.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        found = {name: hf_hub_download(repo_id, name, **options) for name in (CONFIG, WEIGHTS)}
        for name in (classes.FILE, NORMALISER):
            with contextlib.suppress(EntryNotFoundError):  # a model without classes or names for them, or of pictures
                found[name] = hf_hub_download(repo_id, name, **options)
    except Exception as error:  # of the network, the hub, the cache or the name
        reason = plain(" ".join(str(error).split()))
        raise UserError(f"{repo_id}: no such folder, and not loaded from the hub: {reason}") from None
    return {name: Path(path).resolve() for name, path in found.items()}
