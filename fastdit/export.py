"""Take weights out: a folder for fastdit.load, a release ready to upload, a DiTPipeline of diffusers, or a pipeline of our own.

fastdit     model.safetensors and config.json: what fastdit.load, sample.py and train.py --train.init_from open
release     the same with the curves of training, and SHA256SUMS that `sha256sum -c` checks
diffusers   diffusers' DiTPipeline, for models that its class can express to the bit
pipeline    fastdit.weights.pipeline.FastDiTPipeline, for any model, with diffusers' own scheduler and autoencoder

Each with a model card: what the weights are, images seen, the run's figures and its newest sample grid, the licence.
"""

import fastdit  # noqa: F401  # isort: skip  before torch
from fastdit import command  # isort: skip
from fastdit.options import Export as Options  # isort: skip

if command.is_program("export", __name__):
    command.at_once(lambda argv: command.parse_args(Options, argv, "fastdit/export.py", __doc__ or ""))  # before torch

import dataclasses
import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from fastdit_kernels.reference import REFERENCE
from torch import Tensor

from fastdit import config as configs
from fastdit.config import ModelConfig, UserError, plain
from fastdit.data import classes, vae
from fastdit.model import DiT
from fastdit.quality import charts, evaluation, history
from fastdit.runtime.files import read_sums, verify, write_sums
from fastdit.runtime.process import ignored
from fastdit.runtime.saved import ABOUT, FILES, SHARDS, WEIGHTS
from fastdit.runtime.tensors import contents, load_weights
from fastdit.runtime.validation import validate
from fastdit.weights import folder
from fastdit.weights.averages import at_length
from fastdit.weights.card import Trained, write_card
from fastdit.weights.foreign import sinusoids
from fastdit.weights.layouts import DIFFUSERS, to_theirs


def main() -> None:
    """python fastdit/export.py RUN [--field VALUE …]"""
    command.run(export, lambda argv: command.parse_args(Options, argv, "fastdit/export.py", __doc__ or ""))


def export(options: Options) -> Path:
    """Read, write, describe, upload. Returns the folder. Raises UserError, one line."""
    if options.format == "release":
        charts.require()
    trained = find(options.source, options.weights, options.ema)
    if options.vae:
        trained = trained._replace(config=configs.replace(trained.config, data={"vae": options.vae}), latents_by="")
        validate(trained.config)
    if options.license and not re.fullmatch(r"[A-Za-z0-9.+-]{1,60}", options.license):
        raise UserError(f"--license is {options.license!r}; give the hub's name for it: mit, apache-2.0, cc-by-4.0 …")
    if options.format == "release" and trained.images_seen is None:
        raise UserError(f"{options.source} is no run; a release has the curves of one")
    if options.format in ("diffusers", "pipeline") and trained.config.data.kind == "arrays":
        raise UserError(f"--format {options.format} makes pictures, and this model makes arrays; --format fastdit takes it")
    of_length = "" if options.ema is None else f"-ema{options.ema:g}"
    out = Path(options.out) if options.out else trained.run / f"export-{options.format}{of_length}"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; choose another --out")
    with torch.device("meta"):
        model = DiT(trained.config.model, REFERENCE)
    folder.assign(model, trained.tensors, str(trained.run), torch.float32)
    if options.format == "diffusers":
        save_diffusers(model, trained, out)
    elif options.format == "pipeline":
        save_pipeline(model, trained, out)
    else:
        metadata = {"converted_from": trained.converted_from} if trained.converted_from else None
        folder.save_folder(out, {name: p.detach() for name, p in model.named_parameters()}, trained.config, metadata)
    classes.write(out, trained.class_names)
    if trained.normaliser is not None:
        trained.normaliser.write(out)
    if options.format == "release":
        save_curve(trained, out)
    count = sum(p.numel() for p in model.parameters())
    weights = options.weights if options.ema is None else f"averaged (post-hoc EMA of length {options.ema:g})"
    write_card(trained, out, options.format, options.push or out.name, weights, options.license, count)
    if options.format == "release":
        names = sorted(path.name for path in out.iterdir())
        write_sums(out, {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names})
    print(plain(f"{options.format}: {out}", 4000))
    if options.push:
        print(f"uploaded: {folder.upload(out, options.push, private=options.private)}")
    return out


def save_curve(trained: Trained, out: Path) -> None:
    """curve.svg: the run's training and its quality over images seen. Raises UserError."""
    lines = [line for line in history.read(trained.run / "metrics.jsonl") if line["images"] <= trained.images_seen]
    curves = [*evaluation.curves(evaluation.evaluations(trained.run)), *history.curves(lines)]
    (out / "curve.svg").write_text(charts.svg(curves), encoding="utf-8")


# --- what is exported ---


def find(source: str, weights: str, ema: float | None = None) -> Trained:
    """The newest checkpoint of a run, or a given one, with its bytes verified; or an exported folder. Raises UserError.

    ema: the averaged weights of this length, at the run's newest snapshot.
    """
    found = folder.locate(source)
    if ema is not None:
        if weights == "live":
            raise UserError("--ema says which averaged weights; leave out --weights live")
        found = at_length(found, ema)
        about = (found.home, found.images_seen, found.class_names)
        return Trained(found.config, load_weights(found.weights)[0], *about, "", found.latents_by, found.normaliser)
    if found.images_seen is None:
        if weights == "live":
            raise UserError(f"{source} holds one set of weights; --weights live needs a run")
        tensors, metadata = load_weights(found.weights)
        origin = metadata.get("converted_from", "")
        return Trained(found.config, tensors, found.home, None, found.class_names, origin, normaliser=found.normaliser)
    checkpoint = found.weights.parent
    try:
        sums = read_sums(checkpoint, FILES)
        names = [n for n in sums if n.startswith(f"{SHARDS}/")] if weights == "live" else [WEIGHTS]
        if not set(names) <= set(sums):
            raise ValueError("it holds no averaged weights")
        verify(checkpoint, sums, [*names, ABOUT])
        tensors = live(checkpoint / SHARDS) if weights == "live" else load_weights(checkpoint / WEIGHTS)[0]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"checkpoint {checkpoint}: {error}") from None
    return Trained(
        found.config,
        tensors,
        found.home,
        found.images_seen,
        found.class_names,
        latents_by=found.latents_by,
        normaliser=found.normaliser,
    )


def live(shards: Path) -> dict[str, Tensor]:
    """The weights that the optimizer steps on, put together from the ranks' shards. Raises ValueError."""

    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    whole = {n: torch.empty(w.shape, dtype=w.dtype) for n, w in contents(shards).items() if n.startswith("model.")}
    with ignored("torch.distributed is disabled"):
        dcp.load(whole, storage_reader=HuggingFaceStorageReader(str(shards)), no_dist=True)
    return {name.removeprefix("model."): tensor for name, tensor in whole.items()}


# --- pipelines ---


def save_diffusers(model: DiT, trained: Trained, out: Path) -> None:
    """Write diffusers' own DiTPipeline. Raises UserError for a model that its classes cannot express."""
    config = trained.config
    if trained.normaliser is not None:
        raise UserError(
            "DiTPipeline scales all channels of the latents alike, and these have each its own; use --format pipeline"
        )
    about, state = to_diffusers(model.config, {name: p.detach() for name, p in model.named_parameters()})
    if config.diffusion.kind == "flow":
        raise UserError("DiTPipeline has no flow sampler; use --format pipeline")
    if not config.data.vae:
        raise UserError("DiTPipeline decodes with an autoencoder, and this model sees pixels; use --format pipeline")
    autoencoder = vae.of(config, torch.device("cpu"), trained.latents_by)
    assert autoencoder is not None
    if autoencoder.shift:
        raise UserError("DiTPipeline knows no shift of the latents, and this autoencoder has one; use --format pipeline")
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
    from diffusers.pipelines.dit.pipeline_dit import DiTPipeline

    from fastdit.weights.pipeline import scheduler_of

    transformer = DiTTransformer2DModel(**about)
    transformer.load_state_dict(state)
    pipe = DiTPipeline(transformer, autoencoder.autoencoder, scheduler_of(config.diffusion))  # type: ignore[arg-type]
    pipe.save_pretrained(out)


def save_pipeline(model: DiT, trained: Trained, out: Path) -> None:
    """Write a FastDiTPipeline."""
    from fastdit.weights.pipeline import FastDiTModel, FastDiTPipeline, scheduler_of

    config = trained.config
    loaded = vae.of(config, torch.device("cpu"), trained.latents_by)
    autoencoder: Any = loaded.autoencoder if loaded else None
    transformer = FastDiTModel(dataclasses.asdict(config.model))
    transformer.dit.load_state_dict(model.state_dict())
    normaliser = trained.normaliser.to_dict() if trained.normaliser else None
    scheduler = scheduler_of(config.diffusion)
    FastDiTPipeline(transformer, scheduler, autoencoder, config.sample.steps, normaliser).save_pretrained(out)


def to_diffusers(config: ModelConfig, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments and weights of a DiTTransformer2DModel with the same outputs. Raises UserError where its class has none."""
    D = config.width
    moved = config.position != "fixed" and not torch.allclose(tensors["pos_embed"], sinusoids(config), rtol=0, atol=1e-6)
    for wrong, why in (
        (config.conv_kernel, "has no depthwise convolution"),
        (config.qk_norm, "has no QK-norm"),
        (config.jumps, "is not given the length of a step"),
        (config.token_drop, "has no skip past its middle blocks"),
        (config.mlp_ratio != 4, "has an MLP of four times the width"),
        (len(set(config.input_size)) > 1 or len(config.input_size) != 2, "sees squares"),
        (config.time_embedding != "diffusers", "embeds t otherwise; a model that started from diffusers' weights fits"),
        (moved, "has a fixed position embedding; a model that started from one fits"),
    ):
        if wrong:
            raise UserError(f"diffusers' DiT {why}; use --format pipeline")
    # Its table always ends with a null class, and it always has classes: one of zeros is none.
    theirs = dataclasses.replace(config, num_classes=max(config.num_classes, 1), class_dropout=config.class_dropout or 0.1)
    table = tensors.get("y_embedder.weight", torch.zeros(1, D))
    table = torch.cat([table, torch.zeros(theirs.num_classes + 1 - len(table), D)])
    state = to_theirs(DIFFUSERS, theirs, {**tensors, "y_embedder.weight": table})
    about = {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": D // config.num_heads,
        "in_channels": config.channels,
        "out_channels": config.channels * (1 + config.learn_sigma),
        "num_layers": config.depth,
        "sample_size": config.input_size[0],
        "patch_size": config.patch,
        "num_embeds_ada_norm": theirs.num_classes,
        "norm_eps": 1e-6,
    }
    return about, state


if __name__ == "__main__":
    main()
