"""How good a run's pictures are: what they are compared with, and the figures kept beside the run as lines and curves."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdit import config as configs
from fastdit import sampling
from fastdit.config import Config, DataConfig, UserError
from fastdit.data.images import ImageSource, open_images, origin
from fastdit.data.vae import VAE
from fastdit.model import DiT
from fastdit.quality import charts, scores
from fastdit.quality.scores import Scores
from fastdit.runtime import rng
from fastdit.runtime.ranks import World, gather

TRAINING = 20_000  # training images looked through for the nearest
LINES, CURVE = "evaluations.jsonl", "evaluations.svg"
LIMIT = 1 << 26  # bytes of evaluations.jsonl


def real_images(config: Config, num: int, reference: str = "") -> tuple[ImageSource, bool]:
    """About `num` images to compare with: a folder's that the user names, held-out cats, or else the training images.

    And whether they are held out: whether the training set has none of them. Raises UserError.
    """
    d, threads = config.data, torch.get_num_threads()
    if reference:
        return open_images(DataConfig(path=reference, image_size=d.image_size, crop=d.crop), threads=threads), True
    if origin(d).kind == "cats":
        return open_images(configs.replace(config, data={"num_images": num}).data, held_out=True, threads=threads), True
    return open_images(d, threads=threads), False


def references(config: Config, num: int, reference: str = "") -> tuple[ImageSource, Sequence[int]]:
    """What FID compares with, by custom: the folder that the user names, or else `num` of the training images, or all for 0."""
    source = real_images(config, 0, reference)[0] if reference else open_images(config.data)
    return source, subset(source, num or source.length)


def subset(source: ImageSource, count: int) -> Sequence[int]:
    """The numbers, ascending, of `count` images of a source, or of all: drawn at random, and the same each time."""
    if count >= source.length:
        return range(source.length)
    return sorted(rng.order(0, 2, source.length)[:count].tolist())


def read(source: ImageSource, numbers: Sequence[int]) -> Iterator[Tensor]:
    """Those images, uint8 [3, H, W]; those that cannot be decoded are left out."""
    runs = [numbers] if isinstance(numbers, range) else [range(n, n + 1) for n in numbers]
    for run in runs:
        for example in source.read(run[0], run[-1] + 1):
            if example.image is not None:
                yield torch.from_numpy(example.image).permute(2, 0, 1)


class Judge(scores.Judge):
    """A judge that knows what it compares with."""

    against: str


def open_judge(config: Config, num: int, device: torch.device, reference: str = "") -> Judge:
    """What scores pictures against `num` real images, or half of those there are. Raises UserError."""
    scores.require()
    source, held_out = real_images(config, 2 * num, reference)
    real = list(read(source, subset(source, 2 * num)))
    if len(real) <= 2 * scores.NEIGHBOURS + 1:
        raise UserError(f"{source.name}: {len(real)} images; a comparison needs at least {2 * scores.NEIGHBOURS + 2}")
    # A folder's come by class: shuffled, so that both halves have all of them.
    order = rng.order(0, 3, len(real)).tolist()
    half = len(real) // 2
    ours, others = (torch.stack([real[i] for i in part]) for part in (order[:half], order[half : 2 * half]))
    trained_on = open_images(config.data, threads=torch.get_num_threads())
    training = torch.stack([scores.shrink(image[None])[0] for image in read(trained_on, subset(trained_on, TRAINING))])
    if config.data.hflip:
        training = torch.cat([training, training.flip(-1)])
    judge = Judge(ours, others, training, held_out=held_out, device=device)
    judge.against = f"{half:,} {'' if held_out else 'training '}images of {source.name}"
    return judge


def make_pictures(model: DiT, config: Config, vae: VAE | None, world: World, num: int, batch: int = 64) -> Tensor:
    """Pictures 0 … num - 1 of the run's seed, made by all ranks together: uint8 [num, 3, H, W], on every rank.

    Every rank runs the network as often, for the sharded network gathers its weights at each run.
    """
    parts = []
    for start in range(0, num, batch * world.size):
        count = min(batch, -(-(num - start) // world.size))
        parts.append(
            sampling.make(model, config, vae, world, first=start + world.rank * count, count=count, seed=config.run.seed)
        )
    shares = gather(world, parts)
    return torch.cat([share[i] for i in range(len(parts)) for share in shares])[:num]


# --- what is kept ---


def line(config: Config, images_seen: int | None, judge: Judge, images: Tensor, seed: int | None = None) -> dict[str, Any]:
    """A line of evaluations.jsonl for pictures: the figures, real images' beside each, and how they came about."""
    num, figures = min(len(images), judge.num), dict[str, float | None]()
    for name, value, floor in zip(Scores._fields, judge.score(images), judge.floor, strict=True):
        figures |= {name: value, f"{name}_floor": floor}
    settings = how(config, images_seen, "offline", num, config.run.seed if seed is None else seed)
    return {**settings, "against": judge.against, **figures}


def how(config: Config, images_seen: int | None, metric: str, num: int, seed: int) -> dict[str, Any]:
    """What a line's figures follow from; a line that agrees in all of it is replaced."""
    s = config.sample
    guided = {"guidance_low": s.guidance_low, "guidance_high": s.guidance_high} if s.guidance != 1 else {}
    settings = {"sampler": s.sampler, "steps": s.steps, "guidance": s.guidance, **guided}
    return {"images": images_seen, "metric": metric, "num": num, "seed": seed, **settings}


def record(folder: Path, found: Mapping[str, Any]) -> None:
    """Keep a line in the folder, in place of the one that was made the same way, and draw the curve anew."""
    same = how_of(found)
    lines = [old for old in evaluations(folder) if how_of(old) != same]
    lines.append({**found, "time": datetime.now(UTC).isoformat(timespec="seconds")})
    lines.sort(key=lambda x: (x["metric"], x["images"] or 0))
    write(folder / LINES, "".join(json.dumps(x, allow_nan=False) + "\n" for x in lines))
    write(folder / CURVE, charts.svg(curves(lines)))


def how_of(found: Mapping[str, Any]) -> dict[str, Any]:
    names = ("images", "metric", "num", "seed", "sampler", "steps", "guidance", "guidance_low", "guidance_high", "against")
    return {name: found.get(name) for name in names}


def write(path: Path, text: str) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_text(text)
    aside.replace(path)


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """The lines kept in a run's folder; none where there are none. What is no line of ours is skipped."""
    path = folder / LINES
    try:
        text = path.read_text(errors="replace") if path.is_file() and path.stat().st_size <= LIMIT else ""
    except OSError:
        return []
    return [
        value
        for value in json_lines(text)
        if isinstance(value.get("metric"), str) and type(value.get("images")) in (int, type(None))
    ]


def json_lines(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in the lines of a text; a line that is none, torn by a kill say, is skipped."""
    for row in text.splitlines():
        try:
            value = json.loads(row)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value


TITLES = {
    "kid": "KID, EfficientNet-Lite0 features",
    "swd": "sliced-Wasserstein distance of pixels",
    "coverage": "coverage",
    "nearest": "distance to the nearest training image",
    "fid": "FID",
    "inception_kid": "KID, Inception features",
    "precision": "precision",
    "recall": "recall",
}


def curves(lines: Iterable[Mapping[str, Any]]) -> list[charts.Chart]:
    """A chart of each figure over images seen, with its floor."""
    placed = [x for x in lines if x["images"] is not None]
    found = []
    for metric in sorted({x["metric"] for x in placed}, reverse=True):
        for name, title in TITLES.items():
            of_metric = [x for x in placed if x["metric"] == metric]
            pairs = [
                charts.Line(label, points(of_metric, key), dashed)
                for label, key, dashed in (("pictures", name, False), ("real images", f"{name}_floor", True))
            ]
            found.append(charts.Chart(title, [p for p in pairs if p.points]))
    return [chart for chart in found if chart.lines]


def points(lines: Iterable[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(images, value) of the lines that have a number there."""
    return [
        (float(x["images"]), float(x[key]))
        for x in lines
        if isinstance(x.get(key), int | float) and isinstance(x.get("images"), int | float)
    ]


def scalars(found: Mapping[str, Any]) -> dict[str, float]:
    """A line's figures under the names that trackers show."""
    return {f"eval/{name}": value for name, value in found.items() if name in TITLES and isinstance(value, float)}


def say(found: Mapping[str, Any]) -> str:
    """A line of figures as a person reads it, the floor always beside the figure."""
    told = []
    for name, show in (("kid", "{:.4f}"), ("swd", "{:.4f}"), ("coverage", "{:.3f}"), ("nearest", "{:.1f}")):
        floor = found.get(f"{name}_floor")
        beside = f" (real images {show.format(floor)})" if floor is not None else ""
        told.append(f"{name.upper() if len(name) == 3 else name} {show.format(found[name])}{beside}")
    return f"{'  '.join(told)}  on {found['num']:,} pictures against {found['against']}"
