"""Take weights out: a folder for from_pretrained and sample.py, a DiTPipeline of diffusers, or a pipeline of our own.

fastdit     model.safetensors and config.json: also what train.py's runs and converted weights are sampled from
diffusers   diffusers' DiTPipeline, for models that its class can express to the bit
pipeline    fastdit.pipeline.FastDiTPipeline, for any model, with diffusers' own scheduler and autoencoder

Each with a model card: the recipe, images seen, the run's figures and its newest sample grid.
"""

import dataclasses
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro
from fastdit_kernels.reference import REFERENCE
from torch import Tensor

from fastdit import command
from fastdit import config as configs
from fastdit.config import Config, ModelConfig, UserError
from fastdit.data import vae
from fastdit.model import DiT
from fastdit.runtime.files import read_sums, verify
from fastdit.runtime.run import load_config
from fastdit.runtime.tensors import contents, load_weights
from fastdit.weights import folder
from fastdit.weights.foreign import sinusoids
from fastdit.weights.layouts import DIFFUSERS, to_theirs


@dataclass(frozen=True)
class Options:
    source: Annotated[str, tyro.conf.Positional]  # run folder, one of its checkpoints, or an exported or converted folder
    format: Literal["fastdit", "diffusers", "pipeline"] = "fastdit"  # what is to open it
    out: str = ""  # folder to write; empty: export-FORMAT in the run folder
    weights: Literal["ema", "live"] = "ema"  # averaged, or as the optimizer left them
    vae: str = ""  # folder or hub id of the autoencoder; empty: as the run's config says
    push: str = ""  # hub repository to upload the folder to; empty: none
    private: bool = False  # make that repository private if it is new


class Trained(NamedTuple):
    """A model's weights and what is known of how they came to be."""

    config: Config
    tensors: dict[str, Tensor]
    run: Path  # folder of the run, or the exported folder
    images_seen: int | None


def main() -> None:
    """python fastdit/export.py RUN [--field VALUE …]"""

    def verb() -> None:
        export(command.parse_args(Options, sys.argv[1:], "fastdit/export.py", __doc__ or ""))

    command.exit_cleanly(verb)


def export(options: Options) -> Path:
    """Read, write, describe, upload. Returns the folder. Raises UserError, one line."""
    trained = find(Path(options.source), options.weights)
    if options.vae:
        trained = trained._replace(config=configs.replace(trained.config, data={"vae": options.vae}))
        configs.validate(trained.config)
    out = Path(options.out) if options.out else trained.run / f"export-{options.format}"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; choose another --out")
    with torch.device("meta"):
        model = DiT(trained.config.model, REFERENCE)
    folder.assign(model, trained.tensors, str(trained.run), torch.float32)
    if options.format == "fastdit":
        folder.save_pretrained(model, out, trained.config)
    elif options.format == "diffusers":
        save_diffusers(model, trained.config, out)
    else:
        save_pipeline(model, trained.config, out)
    write_card(trained, options, out, sum(p.numel() for p in model.parameters()))
    print(f"{options.format}: {out}")
    if options.push:
        print(f"uploaded: {folder.upload(out, options.push, private=options.private)}")
    return out


# --- what is exported ---


def find(source: Path, weights: str) -> Trained:
    """The newest checkpoint of a run, or a given one, with its bytes verified; or an exported folder. Raises UserError."""
    if not source.is_dir():
        raise UserError(f"{source} is not a folder; name a run, one of its checkpoints, or an exported folder")
    if (source / folder.WEIGHTS).is_file():
        if weights == "live":
            raise UserError(f"{source} holds one set of weights; --weights live needs a run")
        return Trained(load_config(source / folder.CONFIG), load_weights(source / folder.WEIGHTS)[0], source, None)
    found = sorted(source.glob("checkpoints/[0-9]*[0-9]"))
    checkpoint = found[-1] if found else source
    run = checkpoint.resolve().parents[1]
    if not (checkpoint / "checkpoint.json").is_file():
        raise UserError(f"{source} holds no checkpoint yet")
    try:
        sums = read_sums(checkpoint, r"checkpoint\.json|ema\.safetensors|shards/[0-9]{5}-of-[0-9]{5}\.safetensors")
        names = [n for n in sums if n.startswith("shards/")] if weights == "live" else ["ema.safetensors"]
        if not set(names) <= set(sums):
            raise ValueError("it holds no averaged weights")
        verify(checkpoint, sums, [*names, "checkpoint.json"])
        seen = json.loads((checkpoint / "checkpoint.json").read_text())["images_seen"]
        tensors = live(checkpoint / "shards") if weights == "live" else load_weights(checkpoint / "ema.safetensors")[0]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"checkpoint {checkpoint}: {error}") from None
    return Trained(load_config(run / "config.json"), tensors, run, int(seen))


def live(shards: Path) -> dict[str, Tensor]:
    """The weights that the optimizer steps on, put together from the ranks' shards. Raises ValueError."""
    import warnings

    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    whole = {n: torch.empty(w.shape, dtype=w.dtype) for n, w in contents(shards).items() if n.startswith("model.")}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(whole, storage_reader=HuggingFaceStorageReader(str(shards)), no_dist=True)
    return {name.removeprefix("model."): tensor for name, tensor in whole.items()}


# --- pipelines ---


def save_diffusers(model: DiT, config: Config, out: Path) -> None:
    """Write diffusers' own DiTPipeline. Raises UserError for a model that its classes cannot express."""
    about, state = to_diffusers(model.config, {name: p.detach() for name, p in model.named_parameters()})
    if config.diffusion.kind == "flow":
        raise UserError("DiTPipeline has no flow sampler; use --format pipeline")
    if not config.data.vae:
        raise UserError("DiTPipeline decodes with an autoencoder, and this model sees pixels; use --format pipeline")
    autoencoder = vae.load(config.data, torch.device("cpu"))
    if autoencoder.shift:
        raise UserError("DiTPipeline knows no shift of the latents, and this autoencoder has one; use --format pipeline")
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
    from diffusers.pipelines.dit.pipeline_dit import DiTPipeline

    from fastdit.weights.pipeline import scheduler_of

    transformer = DiTTransformer2DModel(**about)
    transformer.load_state_dict(state)
    pipe = DiTPipeline(transformer, autoencoder.autoencoder, scheduler_of(config.diffusion))  # type: ignore[arg-type]
    pipe.save_pretrained(out)


def save_pipeline(model: DiT, config: Config, out: Path) -> None:
    """Write a FastDiTPipeline."""
    from fastdit.weights.pipeline import FastDiTModel, FastDiTPipeline, scheduler_of

    autoencoder: Any = vae.load(config.data, torch.device("cpu")).autoencoder if config.data.vae else None
    transformer = FastDiTModel(dataclasses.asdict(config.model))
    transformer.dit.load_state_dict(model.state_dict())
    FastDiTPipeline(transformer, scheduler_of(config.diffusion), autoencoder).save_pretrained(out)


def to_diffusers(config: ModelConfig, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments and weights of a DiTTransformer2DModel with the same outputs. Raises UserError where its class has none."""
    D = config.width
    moved = config.position != "fixed" and not torch.allclose(tensors["pos_embed"], sinusoids(config), rtol=0, atol=1e-6)
    for wrong, why in (
        (config.conv_kernel, "has no depthwise convolution"),
        (config.qk_norm, "has no QK-norm"),
        (config.mlp_ratio != 4, "has an MLP of four times the width"),
        (config.input_size[0] != config.input_size[1], "sees squares"),
        (config.time_embedding != "diffusers", "embeds t otherwise; one trained with --model.time_embedding diffusers fits"),
        (moved, "has a fixed position embedding; a model trained with --model.position fixed fits"),
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


# --- the card ---

OPEN = {
    "fastdit": """from fastdit.weights.folder import from_pretrained

model, config = from_pretrained("{out}")  # model(x, t, y)""",
    "diffusers": """from diffusers import DiTPipeline

pipe = DiTPipeline.from_pretrained("{out}")
# Its guidance takes the null class to be number 1,000; with another number of classes leave it off.
pipe({labels}, guidance_scale=1.0, num_inference_steps=20).images""",
    "pipeline": """from fastdit.weights.pipeline import FastDiTPipeline

pipe = FastDiTPipeline.from_pretrained("{out}")
pipe({labels}num_inference_steps=20).images""",
}
FIGURES = {
    "loss": "loss",
    "img_per_s": "images per second",
    "mfu": "MFU",
    "watts": "watts",
    "j_per_img": "joules per image",
    "seconds": "seconds of training",
    "skipped": "steps skipped",
}


def write_card(trained: Trained, options: Options, out: Path, parameters: int) -> None:
    """README.md, with the newest sample grid beside it."""
    config, seen = trained.config, trained.images_seen
    m, d = config.model, config.data
    grids = [p for p in sorted(trained.run.glob("samples/*.png")) if p.stem.isdigit() and int(p.stem) <= (seen or 0)]
    labels = "class_labels=[0, 1]" if m.num_classes > 1 else "class_labels=[0]"
    if options.format == "pipeline":
        labels = f"{labels}, " if m.num_classes else "num_images=4, "
    code = OPEN[options.format].format(out=options.push or out.name, labels=labels)
    lines = ["---", f"library_name: {'fastdit' if options.format == 'fastdit' else 'diffusers'}"]
    lines += ["pipeline_tag: unconditional-image-generation", "tags: [diffusion-transformer, fastdit]", "---", ""]
    lines += [f"# {config.run.name or out.name}", ""]
    mlp = f"MLP with a {m.conv_kernel}×{m.conv_kernel} depthwise convolution" if m.conv_kernel else "plain MLP"
    lines += [
        f"A Diffusion Transformer of {parameters / 1e6:,.1f} M parameters: {m.depth} blocks, width {m.width}, patch {m.patch}, "
        f"{mlp}, {f'{m.num_classes} classes' if m.num_classes else 'unconditional'}. {d.image_size[0]}×{d.image_size[1]} pixels"
        + (f", as latents of `{d.vae}`." if d.vae else "."),
        "",
    ]
    if grids:
        shutil.copyfile(grids[-1], out / "samples.png")
        lines += [f"![Samples after {int(grids[-1].stem):,} images](samples.png)", ""]
    lines += ["```python", code, "```", "", "| | |", "| --- | --- |"]
    rows = {"data": d.path or d.source, "weights": "averaged (EMA)" if options.weights == "ema" else "as trained"}
    rows |= {} if seen is None else {"images seen": f"{seen:,}"}
    rows |= {title: f"{value:.4g}" for title, value in figures(trained).items()}
    lines += [f"| {title} | {value} |" for title, value in rows.items()]
    recipe = {group: getattr(config, group) for group in ("model", "diffusion", "train")}
    shown = json.dumps({name: dataclasses.asdict(value) for name, value in recipe.items()}, indent=1)
    lines += ["", "## Recipe", "", "```json", shown, "```", ""]
    (out / "README.md").write_text("\n".join(lines))


def figures(trained: Trained) -> dict[str, float]:
    """The last line of the run's metrics that the weights had seen, as far as it is known."""
    path, last = trained.run / "metrics.jsonl", {}
    if trained.images_seen is not None and path.is_file():
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # cut short by a kill
                continue
            if isinstance(line, dict) and line.get("images", 0) <= trained.images_seen and line.get("loss") is not None:
                last = line
    return {title: float(last[name]) for name, title in FIGURES.items() if isinstance(last.get(name), int | float)}


if __name__ == "__main__":
    main()
