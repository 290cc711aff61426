"""A model as a folder, here or on the hub: model.safetensors, and config.json with the config of the run that trained it."""

import tempfile
from pathlib import Path
from typing import Any, Self

import torch
from fastdit_kernels import Ops
from fastdit_kernels.reference import REFERENCE
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fastdit import config as configs
from fastdit.config import Config, ModelConfig, UserError
from fastdit.weights import load_weights, save_weights

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class Pretrained(nn.Module):
    """A network made from (config, ops) that loads from, and saves to, such a folder."""

    config: ModelConfig
    run: Config | None = None  # of the run that trained the weights, once they come from a folder

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        ops: Ops = REFERENCE,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        **hub: Any,
    ) -> Self:
        """The model of a folder, or of a hub repository at a revision, in eval mode. Raises UserError, one line.

        hub: token, cache_dir, local_files_only … of huggingface_hub.hf_hub_download. No code of the repository is run.
        """
        paths = [Path(source, name) for name in (CONFIG, WEIGHTS)]
        if not Path(source).is_dir():
            paths = _download(str(source), revision, hub)
        run = configs.load(paths[0])
        with torch.device("meta"):
            model = cls(run.model, ops)
        model.assign(load_weights(paths[1])[0], str(source), dtype, device)
        model.run = run
        return model.eval()

    def assign(self, tensors: dict[str, Tensor], source: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        """Make these tensors the parameters of a model on the meta device. Raises UserError unless they are exactly its own."""
        fitting = self._fitting(tensors, source)
        self.load_state_dict({name: t.to(device, dtype) for name, t in fitting.items()}, assign=True)

    @torch.no_grad()
    def fill(self, tensors: dict[str, Tensor], source: str) -> None:
        """Copy these whole tensors into the parameters, sharded or not. Raises UserError unless they are exactly its own."""
        fitting = self._fitting(tensors, source)
        for name, parameter in self.named_parameters():
            fill(parameter, fitting[name])

    def _fitting(self, tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
        tensors = {**self.fixed(), **tensors}
        expected = {name: p.shape for name, p in self.named_parameters()}
        for name in sorted(expected.keys() | tensors.keys()):
            if name not in tensors or name not in expected or tensors[name].shape != expected[name]:
                here = tuple(tensors[name].shape) if name in tensors else "missing"
                there = tuple(expected[name]) if name in expected else "unknown"
                raise UserError(f"{source} does not fit its config: {name} is {here} in the file, {there} in the model")
        return tensors

    def fixed(self) -> dict[str, Tensor]:
        """Parameters that no training changes, and that a file of weights may therefore lack."""
        return {}

    def save_pretrained(self, folder: str | Path, run: Config | None = None) -> None:
        """Write the folder that `from_pretrained` and sample.py read; `run` is the config of the run. Raises UserError."""
        run = run or self.run
        if run is None or run.model != self.config:
            raise UserError(
                "save_pretrained needs the config of the run that trained this model: save_pretrained(folder, config)"
            )
        save_folder(Path(folder), {name: p.detach().cpu() for name, p in self.named_parameters()}, run)

    def push_to_hub(self, repo_id: str, run: Config | None = None, *, private: bool | None = None, **hub: Any) -> str:
        """Upload that folder as one commit of a hub repository, made if need be. Returns the commit's address.

        hub: token, revision, commit_message, create_pr … of huggingface_hub.HfApi.upload_folder.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, run)
            return upload(Path(folder), repo_id, private=private, **hub)


def fill(parameter: Tensor, full: Tensor) -> None:
    """Copy a whole tensor into a parameter. Of a sharded one each rank keeps its own part: no message passes."""
    if isinstance(parameter, DTensor):
        full = full.to(parameter.device_mesh.device_type)
        full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(full)


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
