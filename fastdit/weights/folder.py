"""A model as a folder, here or on the hub: model.safetensors, and config.json with the config of the run that trained it."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from fastdit_kernels import Ops
from fastdit_kernels.reference import REFERENCE
from torch import Tensor

from fastdit import config as configs
from fastdit.config import Config, UserError
from fastdit.model import DiT, choose_ops, residual_dtype
from fastdit.runtime.hardware import compute_dtype
from fastdit.runtime.ranks import World
from fastdit.runtime.sharding import fill
from fastdit.runtime.tensors import load_weights, save_weights

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def from_pretrained(
    source: str | Path,
    *,
    ops: Ops = REFERENCE,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    **hub: Any,
) -> tuple[DiT, Config]:
    """The model of a folder, or of a hub repository at a revision, in eval mode; and the config of the run that trained it.

    hub: token, cache_dir, local_files_only … of huggingface_hub.hf_hub_download. No code of the repository is run.
    Raises UserError, one line.
    """
    paths = [Path(source, name) for name in (CONFIG, WEIGHTS)]
    if not Path(source).is_dir():
        paths = _download(str(source), revision, hub)
    run = configs.load(paths[0])
    with torch.device("meta"):
        model = DiT(run.model, ops)
    assign(model, load_weights(paths[1])[0], str(source), dtype, device)
    return model.eval(), run


def assign(model: DiT, tensors: dict[str, Tensor], source: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Make these tensors the parameters of a model on the meta device. Raises UserError unless they are exactly its own."""
    fitting = _fitting(model, tensors, source)
    model.load_state_dict({name: t.to(device, dtype) for name, t in fitting.items()}, assign=True)


@torch.no_grad()
def copy_into(model: DiT, tensors: dict[str, Tensor], source: str) -> None:
    """Copy these whole tensors into the parameters, sharded or not. Raises UserError unless they are exactly its own."""
    fitting = _fitting(model, tensors, source)
    for name, parameter in model.named_parameters():
        fill(parameter, fitting[name])


def _fitting(model: DiT, tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    tensors = {**model.fixed(), **tensors}
    expected = {name: p.shape for name, p in model.named_parameters()}
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors or name not in expected or tensors[name].shape != expected[name]:
            here = tuple(tensors[name].shape) if name in tensors else "missing"
            there = tuple(expected[name]) if name in expected else "unknown"
            raise UserError(f"{source} does not fit its config: {name} is {here} in the file, {there} in the model")
    return tensors


def save_pretrained(model: DiT, folder: str | Path, run: Config) -> None:
    """Write the folder that `from_pretrained` and sample.py read; `run` is the config of the run. Raises UserError."""
    if run.model != model.config:
        raise UserError(
            "save_pretrained needs the config of the run that trained this model: save_pretrained(model, folder, run)"
        )
    save_folder(Path(folder), {name: p.detach().cpu() for name, p in model.named_parameters()}, run)


def push_to_hub(model: DiT, repo_id: str, run: Config, *, private: bool | None = None, **hub: Any) -> str:
    """Upload that folder as one commit of a hub repository, made if need be. Returns the commit's address.

    hub: token, revision, commit_message, create_pr … of huggingface_hub.HfApi.upload_folder.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, run)
        return upload(Path(folder), repo_id, private=private, **hub)


def find_weights(source: Path) -> tuple[Path, Config]:
    """The weights file that `source` means, and the config of the run that made it. Raises UserError."""
    if not source.exists():
        raise UserError(f"{source} does not exist; name a run folder or a safetensors file")
    weights = source
    if source.is_dir():
        names = (WEIGHTS, "ema.safetensors", "checkpoints/[0-9]*[0-9]/ema.safetensors")
        found = sorted(path for name in names for path in source.glob(name))
        if not found:
            raise UserError(f"{source} holds no checkpoint yet")
        weights = found[-1]
    # weights → checkpoint → checkpoints → run folder
    for place in list(weights.resolve().parents)[:3]:
        if (place / "config.json").is_file():
            return weights, configs.load(place / "config.json")
    raise UserError(f"{weights}: there is no config.json beside it that says what model it holds")


def load_model(weights: Path, config: Config, world: World) -> DiT:
    """The model on its weights, whole, in the precision it computes in."""
    dtype = compute_dtype(config.parallel.precision, world.device)
    with torch.device("meta"):
        model = DiT(config.model, choose_ops(config, world.device), residual=residual_dtype(config))
    assign(model, load_weights(weights)[0], str(weights), dtype, world.device)
    return model.eval().requires_grad_(False)


def home_of(weights: Path) -> Path:
    """Where what is made of weights goes: the run folder of a checkpoint, or the folder of a lone file."""
    parents = weights.parents
    return parents[2] if weights.name == "ema.safetensors" and parents[1].name == "checkpoints" else parents[0]


def save_folder(folder: Path, tensors: dict[str, Tensor], run: Config, metadata: dict[str, str] | None = None) -> None:
    """Write weights, on the CPU, and the config that says what they are. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        configs.save(run, folder / CONFIG)
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


def _download(repo_id: str, revision: str | None, options: dict[str, Any]) -> list[Path]:
    """The two files in the hub's cache, which keeps links where they are named and the files themselves elsewhere."""
    from huggingface_hub import hf_hub_download

    try:
        return [Path(hf_hub_download(repo_id, name, revision=revision, **options)).resolve() for name in (CONFIG, WEIGHTS)]
    except Exception as error:  # of the network, the hub, the cache or the name
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{repo_id}: no such folder, and not loaded from the hub: {reason}") from None
