"""Encode a recipe's images into the pack that training reads: `torchrun fastdit/encode.py [RECIPE]`, and check packs.

Training does so by itself where the pack is missing. Killed and run again, it goes on where it was, on any number of processes.

encode.py verify PACK    hash a pack against its manifest instead
"""

import fastdit  # noqa: F401  # isort: skip  before torch
import sys  # isort: skip
from fastdit import command  # isort: skip

if command.is_program("encode", __name__) and sys.argv[1:2] != ["verify"]:
    command.at_once(lambda argv: command.parse(argv, "encode.py", __doc__ or ""))  # before torch

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torchvision.utils import make_grid

from fastdit import pictures, sampling
from fastdit.config import Config, UserError, plain
from fastdit.data import encoding, images, vae
from fastdit.data import pack as packs
from fastdit.runtime import ranks
from fastdit.runtime.ranks import World


def encode(config: Config) -> None:
    """Encode on all ranks, with a progress bar on a terminal, and print the report."""
    start = time.perf_counter()
    world = ranks.init(config.parallel)
    with _bar(world.rank == 0) as progress:
        path = encoding.ensure(config, world, progress=progress)
    picture = path.with_name(f"{path.name}.round-trip.png")
    drawable = config.data.vae and images.origin(config.data).kind != "pack"  # a pack has no pictures
    if drawable and not ranks.once(world, picture.exists):  # a function of the pack, as its name is
        ranks.once(world, lambda: round_trip(config, packs.read_manifest(path), world, picture))
    if world.rank == 0:
        lines = report(path)
        if drawable:
            lines.append(f"round trip: {picture}, images above what the VAE makes of them")
        print("\n".join([*lines, f"{time.perf_counter() - start:.1f} s in all"]), flush=True)
    ranks.shutdown()


@contextlib.contextmanager
def _bar(shown: bool) -> Iterator[encoding.Progress | None]:
    """A progress bar on a terminal; elsewhere None, which leaves plain lines."""
    console = Console()
    if not (shown and console.is_terminal):
        yield None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("images, {task.fields[skipped]} skipped"), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=None, skipped=0)

        def progress(done: int, total: int, skipped: int) -> None:
            bar.update(task, completed=done, total=total, skipped=skipped)

        yield progress


def round_trip(config: Config, manifest: packs.Manifest, world: World, picture: Path, most: int = 8) -> None:
    """Draw the first images of a pack, and below each what comes back from its latents as they are packed.

    The difference between the two is lost to any model trained on the pack.
    """
    source = images.open_images(config.data)
    good = (example.image for example in source.read(0, source.length) if example.image is not None)
    seen = torch.from_numpy(np.stack(list(itertools.islice(good, most)))).permute(0, 3, 1, 2)
    autoencoder = vae.load(config.data, world.device, manifest.units)
    mean, _ = autoencoder.moments(packs.normalise(seen.to(world.device))).bfloat16().float().chunk(2, dim=1)
    back = sampling.to_uint8(autoencoder.decode(autoencoder.scaled(mean)))
    pictures.save_png(make_grid(torch.cat([seen, back]), nrow=len(seen), padding=2, pad_value=255), picture)


def report(path: Path) -> list[str]:
    """What a pack holds, in lines fit for a terminal."""
    m, data = packs.open_data(path)
    names = f" ({', '.join(m.class_names[:20])}{', …' if m.num_classes > 20 else ''})" if m.class_names else ""
    lines = [
        f"{path}: {m.count:,} {'samples' if m.arrays else 'images'} of {m.dataset}, {data.size / 2**20:,.1f} MiB",
        f"rows: {m.dtype} {m.shape}" + (f", moments of {m.vae} {m.vae_revision}".rstrip() if m.vae else ""),
        f"classes: {m.num_classes}{names}",
    ]
    if m.arrays and m.normaliser is not None:
        lengths = "lengths given" if m.lengths else "no padding"
        lines.append(f"condition: {m.condition or 'no'} numbers; {lengths}; normalised by {m.normaliser['kind']}")
    reasons = Counter(reason for _, reason in m.skipped)
    if reasons:
        lines.append(f"skipped: {len(m.skipped):,} ({'; '.join(f'{n} × {reason}' for reason, n in reasons.most_common(5))})")
    lines += [f"  {name!r}: {reason}" for name, reason in m.skipped[:10]]
    if m.vae and m.normaliser is not None:
        whose = "these images" if m.normaliser["x"]["offset"] == m.latents_mean else "the autoencoder's config"
        lines.append(f"latents: each channel by a mean and deviation of its own, those of {whose}")
    if m.latents_mean:  # a pack made before there were such fields has none
        mean, std = statistics(m)
        lines.append(f"scaled latents, per channel: mean {_numbers(mean)}; std {_numbers(std)}")
    return [plain(line, 2000) for line in lines]


def statistics(m: packs.Manifest) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents as the network sees them, per channel, fp64 [C]: of all images, exact."""
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (m.latents_mean, m.latents_std))
    scale, shift = (x.flatten() if isinstance(x, Tensor) else x for x in packs.scaling(m, mean.device))
    return (mean - shift) * scale, std * scale


def _numbers(values: Tensor) -> str:
    return " ".join(f"{x:.3f}" for x in values.tolist())


def _main(arguments: list[str]) -> None:
    if arguments[:1] == ["verify"]:
        if len(arguments) != 2:
            raise UserError("verify takes one argument, the folder of a pack")
        path = Path(arguments[1])
        manifest = packs.verify(path)
        print(f"{path}: {manifest.count:,} {'samples' if manifest.arrays else 'images'}, every checksum right")
        return
    encode(command.parse(arguments, "encode.py", __doc__ or ""))


def main() -> None:
    command.run(_main, list)


if __name__ == "__main__":
    main()
