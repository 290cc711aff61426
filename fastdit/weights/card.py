"""A model card: README.md of an exported folder. It says what is known of the weights, and nothing of what is not."""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fastdit.config import Config, ModelConfig, plain, times
from fastdit.data.normaliser import Normaliser
from fastdit.runtime.files import json_lines

OPEN = {
    "fastdit": """import fastdit

model = fastdit.load("{out}")  # model(x, t, y)
pictures = fastdit.sample(model, num=4)  # uint8 [4, 3, rows, columns]""",
    "diffusers": """from diffusers import DiTPipeline

pipe = DiTPipeline.from_pretrained("{out}")
# Its guidance takes the null class to be number 1,000; with another number of classes leave it off.
pipe({labels}, guidance_scale=1.0, num_inference_steps=20).images""",
    "pipeline": """from fastdit.weights.pipeline import FastDiTPipeline

pipe = FastDiTPipeline.from_pretrained("{out}")
pipe({labels}num_inference_steps=20).images""",
}
OPEN["release"] = OPEN["fastdit"]
ARRAYS = """import fastdit

model = fastdit.load("{out}")
samples = fastdit.sample(model, num=4{condition})  # fp32 {shape}, in the units of the data"""
FIGURES = {
    "loss": "loss",
    "img_per_s": "images per second",
    "mfu": "MFU",
    "watts": "watts",
    "j_per_img": "joules per image",
    "seconds": "seconds of training",
    "skipped": "steps skipped",
}


class Trained(NamedTuple):
    """A model's weights and what is known of how they came to be."""

    config: Config
    tensors: dict[str, Tensor]
    run: Path  # folder of the run, or of the file
    images_seen: int | None  # None where no run of ours is known
    class_names: Sequence[str] = ()
    converted_from: str = ""  # the file that convert.py read: its training is not known here
    latents_by: str = ""  # as weights.folder.Located has it
    normaliser: Normaliser | None = None  # of a model of arrays, or of latents normalised per channel


def write_card(trained: Trained, out: Path, format: str, name: str, weights: str, license: str, parameters: int) -> None:
    """README.md in the folder `out`, with the newest sample grid and the curve beside it.

    name: where it will be loaded from. weights: ema, live, or which average, in words. license: an identifier as the hub lists
    them; empty: not known.
    """
    config, seen, own = trained.config, trained.images_seen, not trained.converted_from
    m, d = config.model, config.data
    labels = "class_labels=[0, 1]" if m.num_classes > 1 else "class_labels=[0]"
    if format == "pipeline":
        labels = f"{labels}, " if m.num_classes else "num_images=4, "
    lines = ["---", f"library_name: {'diffusers' if format in ('diffusers', 'pipeline') else 'fastdit'}"]
    lines += [f"license: {license or ('unknown' if own else 'other')}"]
    lines += ["pipeline_tag: unconditional-image-generation"] if d.kind == "images" else []
    lines += ["tags: [diffusion-transformer, fastdit]", "---", "", f"# {config.run.name or out.name}", ""]
    kernel = times((m.conv_kernel,) * min(2, len(m.input_size)))
    mlp = f"MLP with a {kernel} depthwise convolution" if m.conv_kernel else "plain MLP"
    lines += [
        f"A Diffusion Transformer of {parameters / 1e6:,.1f} M parameters: {m.depth} block{'s'[: m.depth != 1]}, "
        f"width {m.width}, patch {m.patch}, {mlp}, {conditions(m)}. "
        + (f"Arrays of {times((m.channels, *m.input_size))}" if d.kind == "arrays" else f"{times(d.image_size)} pixels")
        + (f", as latents of `{d.vae}`" if d.vae else "")
        + (", each channel brought to mean 0 and deviation 1 by `normaliser.json`." if d.latents == "channel" else "."),
        "",
    ]
    grids = [p for p in sorted(trained.run.glob("samples/*.png")) if p.stem.isdigit() and int(p.stem) <= (seen or 0)]
    if grids and not grids[-1].is_symlink():
        shutil.copyfile(grids[-1], out / "samples.png")
        lines += [f"![Samples after {int(grids[-1].stem):,} images](samples.png)", ""]
    if (out / "curve.svg").is_file():
        lines += ["![Training, over images seen](curve.svg)", ""]
    lines += [
        "```python",
        ARRAYS.format(**arrays(m, name)) if d.kind == "arrays" else OPEN[format].format(out=name, labels=labels),
    ]
    lines += ["```", ""]
    if license:
        lines += [f"Licence: {license}.", ""]
    elif own:
        lines += ["Licence: not stated by whoever trained these weights.", ""]
    else:
        lines += [f"Licence: that of the original weights, `{plain(trained.converted_from, 100)}`, which were converted.", ""]
    lines += ["| | |", "| --- | --- |"]
    if own:
        rows = {
            "data": d.path or "drawn cats",
            "weights": {"ema": "averaged (EMA)", "live": "as trained"}.get(weights, weights),
        }
        names = plain(", ".join(trained.class_names), 1000).replace("|", r"\|")
        rows |= {"classes": names} if names else {}
        rows |= {} if seen is None else {"images seen": f"{seen:,}"}
        rows |= {title: f"{value:.4g}" for title, value in figures(trained).items()}
    else:
        rows = {"converted from": plain(trained.converted_from, 100), "predicts": config.diffusion.prediction}
    lines += [f"| {title} | {value} |" for title, value in rows.items()]
    lines += few_steps(trained) if m.jumps else []
    recipe = {group: getattr(config, group) for group in (("model", "diffusion", "train") if own else ("model", "diffusion"))}
    shown = json.dumps({name: dataclasses.asdict(value) for name, value in recipe.items()}, indent=1)
    lines += ["", "## Recipe" if own else "## Settings", "", "```json", shown, "```", ""]
    (out / "README.md").write_text("\n".join(lines), encoding="utf-8")


def few_steps(trained: Trained) -> list[str]:
    """What few evaluations cost in quality, of a model that has learnt jumps, as far as the run was evaluated."""
    found: dict[int, str] = {}
    for line in _lines(trained.run / "evaluations.jsonl"):
        steps, kid, coverage = line.get("steps"), line.get("kid"), line.get("coverage")
        plainly = line.get("metric") == "offline" and line.get("guidance") == 1 and line.get("images") == trained.images_seen
        if plainly and isinstance(steps, int) and isinstance(kid, float) and isinstance(coverage, float):
            found[steps] = f"| {steps} | {kid:.4f} | {coverage:.3f} |"
    default = trained.config.sample.steps
    said = f"This model has learnt to jump: 1, 2, 4 or 8 evaluations make a picture. Its own default is {default}."
    if not found:
        return ["", "## Steps", "", f"{said} What fewer cost in quality has not been measured."]
    said += " Less KID is better, more coverage; no published figure compares."
    rows = ["| evaluations | KID | coverage |", "| --- | --- | --- |", *(found[n] for n in sorted(found))]
    return ["", "## Steps", "", said, "", *rows]


def conditions(m: ModelConfig) -> str:
    """What a sample is conditioned on, in words."""
    found = [f"{m.num_classes} classes"] if m.num_classes else []
    found += [f"a vector of {m.condition} numbers"] if m.condition else []
    return " and ".join(found) or "unconditional"


def arrays(m: ModelConfig, name: str) -> dict[str, str]:
    """What ARRAYS says of a model of arrays."""
    condition = f", condition={[0.0] * m.condition if m.condition <= 4 else f'[0.0] * {m.condition}'}" if m.condition else ""
    return {"out": name, "condition": condition, "shape": str([4, m.channels, *m.input_size])}


def figures(trained: Trained) -> dict[str, float]:
    """The last line of the run's metrics that the weights had seen, as far as it is known."""
    last: dict[str, Any] = {}
    for line in _lines(trained.run / "metrics.jsonl") if trained.images_seen is not None else ():
        images = line.get("images")
        if type(images) is int and images <= (trained.images_seen or 0) and line.get("loss") is not None:
            last = line
    return {title: float(last[name]) for name, title in FIGURES.items() if isinstance(last.get(name), int | float)}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of lines; none where there is no file. A line cut short by a kill is skipped."""
    return json_lines(path.read_text(errors="replace", encoding="utf-8")) if path.is_file() else iter(())
