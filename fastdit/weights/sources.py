"""Files and folders of other programs: their tensors, the program they come from, and the process they were trained for."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fastdit import config as configs
from fastdit.config import Config, UserError, plain
from fastdit.options import Kind
from fastdit.recipes import NEWER, RECIPES, family
from fastdit.runtime.tensors import load_weights
from fastdit.runtime.validation import validate
from fastdit.weights.foreign import Weights, from_diffusers, from_facebook, from_seed, from_sit
from fastdit.weights.pickles import fields, load_pickled


class Foreign(NamedTuple):
    """Weights in our names, the config of a run that would have trained them, and what a user should know, by line."""

    weights: Weights
    run: Config
    notes: list[str]


def open_foreign(
    source: Path, kind: Kind = "auto", *, which: str = "ema", num_heads: int = 0, num_classes: int = 0, patch: int = 0
) -> Foreign:
    """Weights of any kind that `foreign` knows. Raises UserError, one line.

    kind: whose process a file of DiT's names was trained for; auto: what the file says, else DiT's. which: "ema" or "model", of
    a checkpoint's two sets. num_heads, num_classes, patch: 0 for what the file says.
    """
    if source.is_dir():
        weights, notes = read_diffusers(source, num_classes)
        return Foreign(weights, process_of(source, RECIPES["imagenet-256-xl"]), notes)
    tensors, about = read(source, which)
    if "pos_embed.proj.weight" in tensors:
        raise UserError(f"{source} holds a diffusers model; name its folder, where its config.json is")
    if "first_layer.patchify.projection.weight" in tensors:
        H, p = (about.get(name) if type(about.get(name)) is int else 0 for name in ("n_head", "patch_size"))
        return Foreign(from_seed(tensors, num_heads or H or 0, patch or p or 0), RECIPES["cats-256"], [])
    if "x_embedder.proj.weight" not in tensors:
        raise UserError(f"{source} is of no known kind: neither DiT's names, nor diffusers', nor the seed repository's")
    run, notes = RECIPES["imagenet-256-xl"], []
    if kind == "auto":
        kind, notes = kind_of(tensors, about)
    if about.get("vae") in ("ema", "mse"):  # as DiT's and SiT's own training scripts name them
        run = configs.replace(run, data={"vae": f"stabilityai/sd-vae-ft-{about['vae']}"})
    if kind == "dit":
        return Foreign(from_facebook(tensors, num_heads, num_classes), run, notes)
    run = configs.replace(run, diffusion={"kind": "flow", "prediction": "velocity", "timesteps": 1000})
    return Foreign(from_sit(tensors, num_heads, num_classes, reverse=kind != "repa"), run, notes)


def kind_of(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> tuple[Kind, list[str]]:
    """Whose process a file of DiT's names was trained for, and a note of what was assumed. Raises UserError."""
    path, prediction = about.get("path_type"), about.get("prediction")
    if isinstance(path, str) and path.lower() != "linear":
        raise UserError(f"the weights were trained on the path {plain(path, 40)!r}; only the linear one can be converted")
    if isinstance(path, str) and prediction not in ("velocity", "v", None):
        raise UserError(f"the weights predict {plain(prediction, 40)!r}; of SiT's kinds only velocity can be converted")
    if "proj_coeff" in about or any(name.startswith("projectors.") for name in tensors):
        return "repa", ["it is REPA's: velocity, time from data to noise; the projectors are left out"]
    if isinstance(path, str):
        return "sit", ["it is SiT's or LightningDiT's: velocity, time from noise to data"]
    if isinstance(name := about.get("model"), str) and name.startswith("DiT"):
        return "dit", []
    return "dit", [
        "assumed to be DiT's, which predicts noise under DDPM; SiT and LightningDiT have the same names and shapes: "
        "for theirs give --kind sit, for REPA's --kind repa"
    ]


# --- reading ---


def read(path: Path, which: str = "ema") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The model's tensors by name, and the numbers and words of the settings pickled beside them. Raises UserError.

    which: of a checkpoint's two sets, "ema" or "model"; a file that holds one set gives that.
    """
    with path.open("rb") as f:
        start = f.read(2)
    if start[:1] == b"\x80":
        raise UserError(f"{path} is of torch.save before torch 1.6; load it with the torch that wrote it and save it again")
    if start != b"PK":
        return _plain(load_weights(path)[0]), {}
    root = load_pickled(path)
    places = [root.get(key) for key in (which, "state_dict", "model", "ema")] if isinstance(root, dict) else []
    for place in [*places, root]:
        items = place.items() if isinstance(place, dict) else ()
        if found := {n: t for n, t in items if isinstance(n, str) and isinstance(t, Tensor)}:
            return _plain(found), _settings(root)
    raise UserError(f"{path} holds no tensors by name where a checkpoint has them: ema, state_dict, model, or at its top")


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's tensors, without what Lightning, DDP and torch.compile put before their names."""
    tensors = {re.sub(r"^((module|_orig_mod)\.)+", "", name): t for name, t in tensors.items()}
    # In a Lightning checkpoint the network is one of several modules; beside it may lie an autoencoder.
    for prefix in ("net.", "model.", "ema.", "dit."):
        if f"{prefix}x_embedder.proj.weight" in tensors or f"{prefix}first_layer.patchify.projection.weight" in tensors:
            tensors = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return {re.sub(r"^((module|_orig_mod)\.)+", "", name): t for name, t in tensors.items()}


def _settings(root: Any) -> dict[str, Any]:
    """Numbers and words of what a training script keeps in a checkpoint: Lightning's hyper_parameters, DiT's and SiT's args."""
    found: dict[str, Any] = {}
    top = fields(root)
    groups = [*fields(top.get("hyper_parameters")).values(), top.get("args"), fields(top.get("config")).get("transport")]
    for group in groups:
        found.update({name: value for name, value in fields(group).items() if type(value) in (int, float, str)})
    return {name: value for name, value in found.items() if type(value) is not int or 0 < value < 1 << 20}


# --- a folder of diffusers ---

PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}


def read_diffusers(folder: Path, num_classes: int = 0) -> tuple[Weights, list[str]]:
    """A DiTTransformer2DModel's folder, or a pipeline's with one in transformer/; and what a user should know of it."""
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    about = _json(folder / "config.json")
    if about.get("_class_name") not in ("DiTTransformer2DModel", "Transformer2DModel"):
        raise UserError(f"{folder / 'config.json'} is of {about.get('_class_name')!r}; expected a DiTTransformer2DModel")
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        tensors |= read(file)[0]
    notes = []
    if about.get("norm_eps", 1e-5) != 1e-6:
        notes.append("its second norm of each block adds 1e-05 to the variance, ours 1e-06, as DiT's own code does")
    return from_diffusers(tensors, about, num_classes), notes


def weight_files(folder: Path) -> list[Path]:
    """The files of a diffusers model: whole or in parts, else of one variant (`diffusion_pytorch_model.fp16.safetensors`)."""
    stem, part = "diffusion_pytorch_model", r"(?:-\d{5}-of-\d{5})"
    names = sorted(path.name for path in folder.iterdir())
    for kind in (rf"{stem}()\.safetensors", rf"{stem}(){part}\.safetensors", rf"{stem}{part}?\.(\w+){part}?\.safetensors"):
        found = [(m[1], name) for name in names if (m := re.fullmatch(kind, name))]
        if found:  # of several variants the first
            return [folder / name for variant, name in found if variant == min(found)[0]]
    if (folder / f"{stem}.bin").is_file():
        return [folder / f"{stem}.bin"]
    raise UserError(f"{folder} holds no diffusion_pytorch_model.safetensors")


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
    return configs.replace(
        run, diffusion={"beta_schedule": schedule, "prediction": PREDICTIONS[prediction], "timesteps": steps}
    )


def configured(run: Config, weights: Weights, vae: str, name: str) -> Config:
    """A whole config round the model: the usual autoencoder of its kind, where nothing else is known. Raises UserError.

    vae: a folder or hub id; empty for the usual one; "none" for a model of pixels.
    """
    model = weights.config
    vae = "" if vae == "none" or (not vae and model.channels == 3) else vae or run.data.vae or ""
    known = family(vae)
    channels = known.channels if known is not NEWER else model.channels
    if vae and channels != model.channels:
        raise UserError(
            f"the model has {model.channels} channels and the latents of {vae} have {channels}; name with --vae the one "
            f"it was trained on (a folder or hub id of a diffusers AutoencoderKL)"
        )
    size = tuple(side * known.factor for side in model.input_size) if vae else model.input_size
    name = re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("._-")[:100] or "converted"
    run = configs.replace(
        run, run={"name": name}, data={"vae": vae or None, "image_size": size}, diffusion={"clip_x0": not vae}
    )
    run = dataclasses.replace(run, model=model)
    validate(run)
    return run


def _json(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable ({plain(error, 200)})") from None
    if not isinstance(about, dict):
        raise UserError(f"{path}: expected settings, found {type(about).__name__}")
    return about
