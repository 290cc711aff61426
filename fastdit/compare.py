"""Train one small network per objective on the drawn cats, at equal images seen, and write down what each comes to.

Each is a run of its own under --runs, by fastdit/train.py: a killed comparison goes on where it was.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdit import config as configs
from fastdit import quality
from fastdit.config import RECIPES, Config, UserError

# Name of the run, what it is called, and how its diffusion differs.
OBJECTIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "epsilon": ("epsilon, squaredcos (the recipe of cats-256)", {"prediction": "epsilon"}),
    "min-snr": ("epsilon, squaredcos, min-SNR 5", {"prediction": "epsilon", "min_snr": 5.0}),
    "v": ("v, squaredcos", {"prediction": "v"}),
    "x0": ("x0, squaredcos (the recipe of cats)", {"prediction": "x0"}),
    "flow": ("flow, logit-normal t", {"kind": "flow", "prediction": "epsilon", "flow_t": "logit_normal"}),
}


@dataclass(frozen=True)
class Options:
    images: int = 24_000  # images each network sees
    num: int = 500  # pictures scored, and held-out cats they are compared with
    steps: int = 20  # network evaluations per picture
    seed: int = 0  # of weights, data order and noise, the same for all
    runs: str = "runs/objectives"  # folder of the runs
    packs: str = "packs"  # folder of the encoded cats
    out: str = "docs"  # folder of objectives.md and its pictures
    processes: int = 1  # torchrun's, on this machine
    threads: int = 0  # CPU threads of each; 0: its share of the cores


def main() -> None:
    """python fastdit/compare.py [--images N] …"""

    def run() -> None:
        print(compare(configs.parse_args(Options, sys.argv[1:], "fastdit/compare.py", __doc__ or "")))

    configs.exit_cleanly(run)


def compare(options: Options) -> Path:
    """Train and score each objective, then write the page. Returns its path. Raises UserError."""
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
    for name, (_, diffusion) in OBJECTIVES.items():
        fields = {"--run.name": name, **{f"--diffusion.{key}": value for key, value in diffusion.items()}}
        arguments = [str(x) for pair in {**settings, **fields}.items() for x in pair]
        train(arguments, options.processes)
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
    """objectives.md and a picture for each objective, from what the runs left. Raises UserError where a run is not there."""
    out = Path(options.out)
    (out / "objectives").mkdir(parents=True, exist_ok=True)
    rows, config = [], None
    for name, (title, _) in OBJECTIVES.items():
        folder = Path(options.runs) / name
        config = configs.load(folder / "config.json")
        found = [e for e in quality.evaluations(folder) if e["metric"] == "offline" and e["num"] == options.num]
        if not found:
            raise UserError(f"{folder} holds no evaluation of {options.num} pictures")
        last = max(found, key=lambda e: e["images"])
        grid = max((folder / "samples").glob("[0-9]*.png"), key=lambda p: int(p.stem))
        shutil.copyfile(grid, out / "objectives" / f"{name}.png")
        rows.append((name, title, last))
    assert config is not None
    path = out / "objectives.md"
    quality.write(path, page(options, config, rows))
    return path


def page(options: Options, config: Config, rows: list[tuple[str, str, dict[str, Any]]]) -> str:
    m, t, floor = config.model, config.train, rows[0][2]
    lines = [
        "# Objectives compared",
        "",
        f"Made by `python fastdit/compare.py --images {options.images} --num {options.num} --steps {options.steps} "
        f"--seed {options.seed}`: one network for each objective, alike in all else.",
        "",
        f"- Data: {config.data.image_size[0]}×{config.data.image_size[1]} drawn cats, the layers of `robohash` by David Revoy "
        "(CC-BY-4.0), resized and recombined. They are not photographs, and no figure here is one of a published data set.",
        f"- Network: {m.depth} blocks of width {m.width}, patch {m.patch}, pixels, {m.num_classes} classes, no guidance.",
        f"- Training: {rows[0][2]['images']:,} images seen by each, batch {t.batch * t.grad_accum * options.processes}, "
        f"AdamW at {t.lr:g}, {t.lr_decay} after {t.warmup_images:,} images of warm-up, {config.parallel.precision}.",
        f"- Sampling: {options.steps} steps, EMA weights, {floor['num']:,} pictures against {floor['against']}. "
        "dpm++ samples the DDPM objectives, Euler the flow.",
        "- KID is of EfficientNet-Lite0's features, SWD of pixels: less is better; of coverage more is. Nearest: the median "
        "distance to the nearest training image, in 255ths; far below real images' would be copying. "
        "**None of it is comparable with a published FID or KID.**",
        "- One seed each: differences as small as real images' own mean nothing, and a short run says nothing of a long one.",
        "",
        "| objective | KID | SWD | coverage | nearest | pictures |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    names = ("kid", "swd", "coverage", "nearest")
    for name, title, found in rows:
        cells = " | ".join(figure(found[key]) for key in names)
        lines.append(f"| {title} | {cells} | ![{title}](objectives/{name}.png) |")
    lines.append(f"| real images, held out | {' | '.join(figure(floor[f'{key}_floor']) for key in names)} | |")
    return "\n".join(lines) + "\n"


def figure(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if abs(value) >= 5 else f"{value:.3f}"


if __name__ == "__main__":
    main()
