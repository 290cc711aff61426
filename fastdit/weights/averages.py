"""Averaged weights of a length chosen after the run, from the snapshots that a run with --train.ema posthoc keeps."""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from fastdit.config import UserError, plain
from fastdit.posthoc import LENGTHS, WORST, Profile, exponent, mix
from fastdit.runtime import saved
from fastdit.runtime.files import read_sums
from fastdit.runtime.process import ignored
from fastdit.runtime.run import checkpoints_of
from fastdit.runtime.tensors import contents, save_weights
from fastdit.weights.located import Located


class Snapshot(NamedTuple):
    """Both averages as they stood once so many images had been averaged."""

    folder: Path
    images: int


def at_length(found: Located, length: float) -> Located:
    """The same model on averaged weights of this σ_rel, at its newest snapshot; they are written to averages/ in its folder.

    Raises UserError for a run that kept no snapshots, and for a length that they do not give.
    """
    if not 0 < length <= 0.28:
        raise UserError(f"--ema is {length:g}; a length is a share of the run, above 0 and at most 0.28")
    kept = snapshots(found)
    end = kept[-1].images
    profiles = [Profile(s.images, exponent(sigma)) for s in kept for sigma in LENGTHS.values()]
    weights, error = mix(profiles, Profile(end, exponent(length)))
    if error > WORST:
        shown = [sigma / 100 for sigma in range(1, 29) if mix(profiles, Profile(end, exponent(sigma / 100)))[1] <= WORST]
        few = f"{len(kept)} snapshot{'s'[: len(kept) - 1]}"
        raise UserError(f"--ema {length:g} does not follow from the run's {few}; lengths from {shown[0]:g} to {shown[-1]:g} do")
    path = found.home / "averages" / f"{kept[-1].folder.name}-{length:g}.safetensors"
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as failure:
        raise UserError(f"{path.parent}: {failure.strerror or failure}") from None
    save_weights(path, total(kept, weights.view(len(kept), len(LENGTHS))))
    return found._replace(weights=path, images_seen=int(kept[-1].folder.name))


def snapshots(found: Located) -> list[Snapshot]:
    """A run's snapshots up to a checkpoint, oldest first, every byte verified. Raises UserError."""
    if found.images_seen is None or found.config.train.ema != "posthoc":
        raise UserError(f"--ema needs a run that was trained with --train.ema posthoc, and {found.home} is none")
    root = checkpoints_of(found.home, found.config) / saved.AVERAGES
    kept = []
    for name in saved.complete(root):
        if int(name) <= found.images_seen:
            if said := saved.damage(root / name, 0, 1):
                raise UserError(f"{root / name}: {said}")
            state = saved.read_about(root / name, read_sums(root / name, saved.FILES))["state"]
            kept.append(Snapshot(root / name, int(state["averaged_images"])))
    if not kept:
        raise UserError(f"{root} holds no snapshot up to {found.images_seen:,} images")
    return kept


def total(kept: list[Snapshot], weights: Tensor) -> dict[str, Tensor]:
    """The sum of the snapshots' averages times weights [snapshot, average], added in fp64: fp32, by parameter."""
    sums: dict[str, Tensor] = {}
    for snapshot, shares in zip(kept, weights.tolist(), strict=True):
        shards = snapshot.folder / saved.SHARDS
        try:
            held = {name: torch.empty(whole.shape, dtype=whole.dtype) for name, whole in contents(shards).items()}
        except ValueError as error:
            raise UserError(f"{snapshot.folder}: {plain(error)}") from None
        with ignored("torch.distributed is disabled"):
            dcp.load(dict(held), storage_reader=HuggingFaceStorageReader(str(shards)), no_dist=True)
        for kind, share in zip(LENGTHS, shares, strict=True):
            for name in (n for n in held if n.startswith(f"{kind}.")):
                plain_name = name.removeprefix(f"{kind}.")
                if plain_name not in sums:
                    sums[plain_name] = torch.zeros(held[name].shape, dtype=torch.float64)
                sums[plain_name].add_(held[name], alpha=share)
    return {name: value.float() for name, value in sums.items()}
