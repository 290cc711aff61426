"""Bring weights in: from facebookresearch/DiT, from diffusers' DiTTransformer2DModel, from the seed repository.

The result is a folder that sample.py and from_pretrained open; its outputs are the original's, to fp32 rounding. Only
tensors are read from a file, never code: safetensors, or torch.save's files through `pickles`.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch import Tensor

from fastdit import command
from fastdit import config as configs
from fastdit.config import RECIPES, Config, ModelConfig, UserError
from fastdit.runtime.tensors import load_weights
from fastdit.weights import folder
from fastdit.weights.foreign import Weights, from_diffusers, from_facebook, from_seed
from fastdit.weights.pickles import fields, load_pickled


@dataclass(frozen=True)
class Options:
    source: Annotated[str, tyro.conf.Positional]  # .pt, .ckpt, .bin or .safetensors file, or a folder of diffusers
    out: str = ""  # folder to write; empty: beside the source, its name and -fastdit
    weights: str = "ema"  # of a training checkpoint of facebookresearch/DiT: ema or model
    num_heads: int = 0  # 0: as the file or the paper's table of sizes says
    num_classes: int = 0  # 0: as many as the file has, less the null class where its kind has one
    patch: int = 0  # of the seed repository's files, which may not say; 0: as they say, or for 4 channels
    vae: str = ""  # folder or hub id of the autoencoder; empty: the kind's usual one; none: the model sees pixels


def main() -> None:
    """python fastdit/convert.py SOURCE [--field VALUE …]"""

    def verb() -> None:
        convert(command.parse_args(Options, sys.argv[1:], "fastdit/convert.py", __doc__ or ""))

    command.exit_cleanly(verb)


def convert(options: Options) -> Path:
    """Read, rename, write. Returns the folder. Raises UserError, one line."""
    source = Path(options.source)
    if options.weights not in ("ema", "model"):
        raise UserError(f"--weights is {options.weights!r}; valid are ema and model")
    if not source.exists():
        raise UserError(f"{source} does not exist; name a file of weights, or a diffusers folder")
    out = Path(options.out) if options.out else source.with_name(f"{source.name if source.is_dir() else source.stem}-fastdit")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; choose another --out")
    notes: list[str] = []
    if source.is_dir():
        weights, notes = read_diffusers(source, options.num_classes)
        run = process_of(source, RECIPES["imagenet-256-xl"])
    else:
        tensors, said = read(source, options.weights)
        kind = kind_of(tensors, str(source))
        if kind == "diffusers":
            raise UserError(f"{source} holds a diffusers model; name its folder, where its config.json is")
        if kind == "facebook":
            weights, run = from_facebook(tensors, options.num_heads, options.num_classes), RECIPES["imagenet-256-xl"]
        else:
            weights = from_seed(tensors, options.num_heads or said.get("n_head", 0), options.patch or said.get("patch_size", 0))
            run = RECIPES["cats-256"]
    run = _configured(run, weights.config, options.vae, out)
    folder.save_folder(out, weights.tensors, run, {"converted_from": source.name})
    count = sum(t.numel() for t in weights.tensors.values())
    for note in notes:
        print(f"note: {note}")
    print(f"{out}: {count:,} parameters, {run.model.depth} blocks of width {run.model.width}, {run.model.num_classes} classes")
    return out


def _configured(run: Config, model: ModelConfig, vae: str, out: Path) -> Config:
    """A whole config round the model: the usual dataset and autoencoder of its kind, where nothing else is known."""
    vae = "" if vae == "none" or (not vae and model.channels == 3) else vae or run.data.vae
    size = (model.input_size[0] * 8, model.input_size[1] * 8) if vae else model.input_size
    name = re.sub(r"[^A-Za-z0-9._-]", "-", out.resolve().name).lstrip("._-")[:100] or "converted"
    run = configs.replace(run, run={"name": name}, data={"vae": vae, "image_size": size}, diffusion={"clip_x0": not vae})
    run = dataclasses.replace(run, model=model)
    configs.validate(run)
    return run


# --- reading ---


def read(path: Path, weights: str = "ema") -> tuple[dict[str, Tensor], dict[str, int]]:
    """The model's tensors by name, and the numbers that a pickled configuration beside them gives. Raises UserError.

    weights: which of a checkpoint's two sets, "ema" or "model"; a file that holds one set gives that.
    """
    with path.open("rb") as f:
        start = f.read(2)
    if start[:1] == b"\x80":
        raise UserError(f"{path} is of torch.save before torch 1.6; load it with the torch that wrote it and save it again")
    if start != b"PK":
        return _plain(load_weights(path)[0]), {}
    root = load_pickled(path)
    places = [root.get(key) for key in (weights, "state_dict", "model", "ema")] if isinstance(root, dict) else []
    for place in [*places, root]:
        items = place.items() if isinstance(place, dict) else ()
        found = {n: t for n, t in items if isinstance(n, str) and isinstance(t, Tensor)}
        if found:
            lightning = any(n.startswith("net.") for n in found)  # beside it lies the autoencoder, vae.…
            chosen = {n: t for n, t in found.items() if n.startswith("net.") or not lightning}
            return _plain(chosen), _hyperparameters(root)
    raise UserError(f"{path} holds no tensors by name where a checkpoint has them: ema, state_dict, model, or at its top")


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what Lightning, DDP and torch.compile put before them."""
    return {re.sub(r"^(net|module|_orig_mod)\.", "", re.sub(r"^(module|_orig_mod)\.", "", n)): t for n, t in tensors.items()}


def _hyperparameters(root: Any) -> dict[str, int]:
    """The whole numbers of the configuration object in a Lightning checkpoint."""
    found: dict[str, int] = {}
    for value in fields(fields(root).get("hyper_parameters")).values():
        found.update({k: v for k, v in fields(value).items() if type(v) is int and 0 < v < 1 << 20})
    return found


def kind_of(tensors: Mapping[str, Tensor], source: str) -> str:
    """facebook, diffusers or seed, by the names of the tensors. Raises UserError."""
    marks = {
        "x_embedder.proj.weight": "facebook",
        "pos_embed.proj.weight": "diffusers",
        "first_layer.patchify.projection.weight": "seed",
    }
    for name, kind in marks.items():
        if name in tensors:
            return kind
    raise UserError(f"{source} is of no known kind: it has none of {', '.join(marks)}")


# --- a folder of diffusers ---

PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}


def read_diffusers(folder: Path, num_classes: int = 0) -> tuple[Weights, list[str]]:
    """A DiTTransformer2DModel's folder, or a pipeline's with one in transformer/; and what a user should know of it."""
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    about = _json(folder / "config.json")
    if about.get("_class_name") not in ("DiTTransformer2DModel", "Transformer2DModel"):
        raise UserError(f"{folder / 'config.json'} is of {about.get('_class_name')!r}; expected a DiTTransformer2DModel")
    stem = "diffusion_pytorch_model"
    for pattern in (f"{stem}.safetensors", f"{stem}-?????-of-?????.safetensors", f"{stem}.bin"):
        if files := sorted(folder.glob(pattern)):
            break
    else:
        raise UserError(f"{folder} holds no {stem}.safetensors")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read(file)[0]
    notes = []
    if about.get("norm_eps", 1e-5) != 1e-6:
        notes.append("its second norm of each block adds 1e-05 to the variance, ours 1e-06, as DiT's own code does")
    return from_diffusers(tensors, about, num_classes), notes


def process_of(folder: Path, run: Config) -> Config:
    """`run` with the diffusion and the autoencoder that a pipeline's folder, or the one above the model's, says."""
    root = folder if (folder / "transformer").is_dir() else folder.parent
    if (root / "vae" / "config.json").is_file():
        run = configs.replace(run, data={"vae": str((root / "vae").resolve())})
    if not (root / "scheduler" / "scheduler_config.json").is_file():
        return run
    about = _json(root / "scheduler" / "scheduler_config.json")
    schedule, prediction = about.get("beta_schedule", "linear"), about.get("prediction_type", "epsilon")
    known = ("squaredcos_cap_v2", "linear", "scaled_linear")
    steps = about.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 0 < steps <= 10**6:
        raise UserError(f"{root / 'scheduler'}: num_train_timesteps is {steps!r}")
    if "FlowMatch" in str(about.get("_class_name")):
        return configs.replace(run, diffusion={"kind": "flow", "prediction": "velocity", "timesteps": steps})
    usual = about.get("trained_betas") is None and about.get("beta_start", 1e-4) == 1e-4 and about.get("beta_end", 0.02) == 0.02
    if schedule not in known or prediction not in PREDICTIONS or not (usual or schedule == known[0]):
        raise UserError(f"{root / 'scheduler'}: a {schedule} schedule of its own betas, predicting {prediction}, is not ours")
    fields = {"beta_schedule": schedule, "prediction": PREDICTIONS[prediction], "timesteps": steps}
    return configs.replace(run, diffusion=fields)


def _json(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable ({str(error)[:200]})") from None
    if not isinstance(about, dict):
        raise UserError(f"{path}: expected settings, found {type(about).__name__}")
    return about


if __name__ == "__main__":
    main()
