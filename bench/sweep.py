"""Settings of the recipe cats, compared on a split of its training set: the held-out cats that a board scores on tune nothing.

    python bench/sweep.py small-batch train.batch=8 train.lr=3e-3 --images 12000

One look in eight of the training cats is kept for the scores, and the network trains on the others. A run has a name and any of
the recipe's settings, also those that no command line takes. By images and not by seconds, so that runs may go side by side on
a busy machine. Each run is kept in bench/results/sweep-DEVICE.json when it is done, and the table of all of them is printed.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import machine
import torch
import tyro
from board import read
from board_rows import Training

from fastdit import command
from fastdit.config import Config, UserError, nearest, replace
from fastdit.data.cats import Cats
from fastdit.data.pack import Batch, normalise
from fastdit.quality.scores import Judge
from fastdit.recipes import RECIPES
from fastdit.runtime import ranks, rng
from fastdit.runtime.files import write_text
from fastdit.runtime.validation import validate

KEPT = 8  # one look in so many is kept for the scores
ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Options:
    run: Annotated[tuple[str, ...], tyro.conf.Positional]  # a name, and settings as GROUP.NAME=VALUE
    images: int = 12_000  # seen
    seed: int = 0
    num: int = 500  # pictures scored, and kept cats they are compared with
    cats: int = 20_000  # of the training set, before some are kept
    results: str = str(ROOT / "results")  # folder of sweep-DEVICE.json


class Split:
    """Training cats in memory. `kept` are those whose look, all but the mouth, no cat that is trained on has."""

    def __init__(self, num: int, size: int, seed: int):
        cats = Cats(num, size)
        self.images = torch.from_numpy(cats.images(0, num)).permute(0, 3, 1, 2).contiguous()
        self.labels, self.seed = torch.tensor(cats.labels(0, num)), seed
        looks = torch.from_numpy(cats.cats[:, [0, 1, 2, 4]]) @ torch.tensor([1, 100, 10_000, 1_000_000])
        kept = looks * 2_654_435_761 % 2**32 // 2**20 % KEPT == 0  # Knuth's multiplicative hash
        self.kept, self.trained = kept.nonzero()[:, 0], (~kept).nonzero()[:, 0]

    def batch(self, first: int, count: int) -> Batch:
        """Images first … first + count - 1 of the run."""
        places = []
        for n in range(first, first + count):
            epoch, place = divmod(n, len(self.trained))
            if place == 0 or not places:
                order = rng.order(self.seed, 100 + epoch, len(self.trained))
            places.append(order[place])
        rows = self.trained[torch.stack(places)]
        return Batch(normalise(self.images[rows]), self.labels[rows], None, None)

    def judge(self, num: int) -> Judge:
        num = min(num, len(self.kept) // 2)
        ours, others = self.kept[:num], self.kept[num : 2 * num]
        return Judge(self.images[ours], self.images[others], self.images[self.trained], held_out=True)


def settings(words: Sequence[str], options: Options) -> Config:
    """The recipe with these settings laid over it. Raises UserError."""
    warmup = {"warmup_images": options.images // 12}
    config = replace(RECIPES["cats"], run={"seed": options.seed}, train={"images": options.images, **warmup})
    for word in words:
        name, equals, value = word.partition("=")
        group, _, field = name.partition(".")
        fields = getattr(getattr(config, group, None), "__dataclass_fields__", {})
        if not equals or field not in fields:
            raise UserError(f"{word!r} is not GROUP.NAME=VALUE of a setting{nearest(field, fields)}")
        try:
            found = json.loads(value)
        except ValueError:
            found = value
        config = replace(config, **{group: {field: tuple(found) if isinstance(found, list) else found}})
    validate(config)
    return config


def measure(config: Config, options: Options) -> dict[str, Any]:
    """Train on the split and score: the figures, and images a second."""
    world = ranks.init(config.parallel)
    split = Split(options.cats, config.data.image_size[0], options.seed)
    run, judge = Training(config, world, split), split.judge(options.num)
    began = time.perf_counter()
    losses = [run.train(seen) for seen in range(0, config.train.images - config.train.batch + 1, config.train.batch)]
    pace = len(losses) * config.train.batch / (time.perf_counter() - began)
    made = run.pictures(judge.num)
    about = {"commit": machine.commit(), "torch": torch.__version__, "device": machine.device(), "img_per_s": round(pace, 1)}
    ranks.shutdown()
    return {
        **about,
        "loss": torch.stack(losses[-50:]).mean().item(),
        "scores": judge.score(made)._asdict(),
        "floor": judge.floor,
    }


def sweep(options: Options) -> None:
    """Train and score one run; keep it and print all. Raises UserError."""
    if not options.run or "=" in options.run[0]:
        raise UserError("the run needs a name, before its settings")
    name, *words = options.run
    config = settings(words, options)
    path = Path(options.results) / f"sweep-{machine.slug()}.json"
    key = {"row": name, "seed": options.seed, "images": options.images, "num": options.num}
    found = measure(config, options)
    # Read only now: another run may have written its own while this one trained.
    kept = [e for e in read(path) if {k: e.get(k) for k in key} != key]
    kept.append({**key, "settings": words, "points": found})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(kept, indent=1) + "\n")
    print(table(kept))


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| run | settings | images | KID | SWD | coverage | nearest |", "|---|---|--:|--:|--:|--:|--:|"]
    for e in sorted(entries, key=lambda e: e["points"]["scores"]["kid"]):
        s = e["points"]["scores"]
        figures = f"{s['kid']:.3f} | {s['swd']:.3f} | {s['coverage']:.3f} | {s['nearest']:.1f}"
        lines.append(f"| {e['row']} | {' '.join(e['settings'])} | {e['images']:,} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    """python bench/sweep.py NAME [GROUP.NAME=VALUE …] [--images N]"""
    command.exit_cleanly(lambda: sweep(command.parse_args(Options, sys.argv[1:], "bench/sweep.py", __doc__ or "")))


if __name__ == "__main__":
    main()
