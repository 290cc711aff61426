"""Train one small network per variant on the drawn cats, at equal images seen, and write down what each comes to.

Variants of the objective, or with `--subject stability` of what is said to steady a training.

Each is a run of its own under --runs, by fastdit/train.py: a killed comparison goes on where it was.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from fastdit import command
from fastdit import config as configs
from fastdit.config import RECIPES, Config, UserError
from fastdit.quality import charts, evaluation
from fastdit.runtime.hardware import precision

# Name of the run, what it is called, and the options that set it apart.
OBJECTIVES = {
    "epsilon": ("epsilon, squaredcos (the recipe of cats-256)", "--diffusion.prediction epsilon"),
    "min-snr": ("epsilon, squaredcos, min-SNR 5", "--diffusion.prediction epsilon --diffusion.min_snr 5.0"),
    "v": ("v, squaredcos", "--diffusion.prediction v"),
    "x0": ("x0, squaredcos (the recipe of cats)", "--diffusion.prediction x0"),
    "flow": (
        "flow, logit-normal t",
        "--diffusion.kind flow --diffusion.prediction epsilon --diffusion.flow_t logit_normal",
    ),
}
STABILITY = {
    "bf16": ("bf16 (the recipe of cats)", "--parallel.precision bf16"),
    "fp32-stream": ("fp32 residual stream", "--parallel.precision bf16 --parallel.residual fp32"),
    "fp32": ("fp32 throughout", "--parallel.precision fp32"),
    "qk-norm": ("bf16, QK-norm", "--parallel.precision bf16 --model.qk_norm"),
}
SUBJECTS = {"objectives": OBJECTIVES, "stability": STABILITY}


@dataclass(frozen=True)
class Options:
    subject: Literal["objectives", "stability"] = "objectives"  # what is varied
    images: int = 24_000  # images each network sees
    num: int = 500  # pictures scored, and held-out cats they are compared with
    steps: int = 20  # network evaluations per picture
    seed: int = 0  # of weights, data order and noise, the same for all
    runs: str = ""  # folder of the runs; empty: runs/SUBJECT
    packs: str = "packs"  # folder of the encoded cats
    out: str = "docs"  # folder of SUBJECT.md and its pictures
    processes: int = 1  # torchrun's, on this machine
    threads: int = 0  # CPU threads of each; 0: its share of the cores


def main() -> None:
    """python fastdit/compare.py [--images N] …"""

    def run() -> None:
        print(compare(command.parse_args(Options, sys.argv[1:], "fastdit/compare.py", __doc__ or "")))

    command.exit_cleanly(run)


def compare(options: Options) -> Path:
    """Train and score each variant, then write the page. Returns its path. Raises UserError."""
    options = replace(options, runs=options.runs or f"runs/{options.subject}")
    base = RECIPES["cats"]
    warmup = min(base.train.warmup_images, options.images // 10)
    settings = {
        "--run.folder": options.runs,
        "--run.seed": options.seed,
        "--data.packs": options.packs,
        "--train.images": options.images,
        "--train.warmup_images": warmup,
        "--sample.steps": options.steps,
        "--eval.every_images": options.images,
        "--eval.num": options.num,
        "--parallel.threads": options.threads,
        "--log.save_every": options.images,
    }
    shared = [str(x) for pair in settings.items() for x in pair]
    for name, (_, changes) in SUBJECTS[options.subject].items():
        train([*shared, "--run.name", name, *changes.split()], options.processes)
    return write(options)


def train(arguments: list[str], processes: int) -> None:
    """One run of the recipe `cats`, in processes of its own. Raises UserError where it does not end well."""
    script = str(Path(__file__).with_name("train.py"))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    ended = subprocess.run([sys.executable, *launcher, script, "cats", *arguments], env=os.environ)
    if ended.returncode:
        raise UserError(
            f"train.py cats {' '.join(arguments)} ended with {ended.returncode}; the same command goes on from there"
        )


def write(options: Options) -> Path:
    """SUBJECT.md and a picture of each variant, from what the runs left. Raises UserError where a run is not there."""
    out, subject = Path(options.out), options.subject
    (out / subject).mkdir(parents=True, exist_ok=True)
    rows, config = [], None
    for name, (title, _) in SUBJECTS[subject].items():
        folder = Path(options.runs) / name
        config = configs.load(folder / "config.json")
        found = [e for e in evaluation.evaluations(folder) if e["metric"] == "offline" and e["num"] == options.num]
        if not found:
            raise UserError(f"{folder} holds no evaluation of {options.num} pictures")
        last = max(found, key=lambda e: e["images"])
        grid = max((folder / "samples").glob("[0-9]*.png"), key=lambda p: int(p.stem))
        shutil.copyfile(grid, out / subject / f"{name}.png")
        rows.append((name, title, last))
    assert config is not None
    path = out / f"{subject}.md"
    text = page(options, config, rows)
    if subject == "stability":  # losses of different objectives are of different things
        text += curves(Path(options.runs), out / subject / "curves.svg")
    evaluation.write(path, text)
    return path


def curves(runs: Path, picture: Path) -> str:
    """Draw the variants' losses and gradient norms; what the page says of them."""
    losses, norms, rows = [], [], []
    for name, (title, _) in STABILITY.items():
        lines = list(evaluation.json_lines((runs / name / "metrics.jsonl").read_text()))
        losses.append(charts.Line(title, [(line["images"], line["loss"]) for line in lines]))
        norms.append(charts.Line(title, [(line["images"], line["grad_norm"]) for line in lines]))
        tail = [line["loss"] for line in lines[-max(1, len(lines) // 10) :]]
        rows.append(f"| {title} | {sum(tail) / len(tail):.5f} | {lines[-1]['skipped']} |")
    drawn = [charts.Chart("loss", losses, logarithmic=True), charts.Chart("gradient norm", norms, logarithmic=True)]
    evaluation.write(picture, charts.svg(drawn))
    return "\n".join(
        [
            "",
            "| | loss, mean of the last tenth | steps skipped |",
            "| --- | --- | --- |",
            *rows,
            "",
            f"![loss and gradient norm](stability/{picture.name})",
            "",
            "A z-loss is not among them: it holds down the logits of a softmax over classes, and a DiT's output has none.",
            "",
        ]
    )


def page(options: Options, config: Config, rows: list[tuple[str, str, dict[str, Any]]]) -> str:
    m, t, floor = config.model, config.train, rows[0][2]
    in_what = precision(config.parallel.precision, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    lines = [
        f"# {options.subject.capitalize()} compared",
        "",
        f"Made by `python fastdit/compare.py --subject {options.subject} --images {options.images} --num {options.num} "
        f"--steps {options.steps} --seed {options.seed}`: one network for each variant, alike in all else.",
        "",
        f"- Data: {config.data.image_size[0]}×{config.data.image_size[1]} drawn cats, the layers of `robohash` by David Revoy "
        "(CC-BY-4.0), resized and recombined. They are not photographs, and no figure here is one of a published data set.",
        f"- Network: {m.depth} blocks of width {m.width}, patch {m.patch}, pixels, {m.num_classes} classes, no guidance.",
        f"- Training: {rows[0][2]['images']:,} images seen by each, batch {t.batch * t.grad_accum * options.processes}, "
        f"AdamW at {t.lr:g}, {t.lr_decay} after {t.warmup_images:,} images of warm-up, "
        f"{in_what if options.subject == 'objectives' else 'in the precision stated'}.",
        f"- Sampling: {options.steps} steps, EMA weights, {floor['num']:,} pictures against {floor['against']}. "
        "dpm++ samples the DDPM objectives, Euler the flow.",
        "- KID is of EfficientNet-Lite0's features, SWD of pixels: less is better; of coverage more is. Nearest: the median "
        "distance to the nearest training image, in 255ths; far below real images' would be copying. "
        "**None of it is comparable with a published FID or KID.**",
        "- One seed each: differences as small as real images' own mean nothing, and a short run says nothing of a long one.",
        "",
        f"| {'objective' if options.subject == 'objectives' else 'variant'} | KID | SWD | coverage | nearest | pictures |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    names = ("kid", "swd", "coverage", "nearest")
    for name, title, found in rows:
        cells = " | ".join(figure(found[key]) for key in names)
        lines.append(f"| {title} | {cells} | ![{title}]({options.subject}/{name}.png) |")
    lines.append(f"| real images, held out | {' | '.join(figure(floor[f'{key}_floor']) for key in names)} | |")
    return "\n".join(lines) + "\n"


def figure(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if abs(value) >= 5 else f"{value:.3f}"


if __name__ == "__main__":
    main()
