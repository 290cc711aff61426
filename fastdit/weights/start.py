"""Start a run from a trained model: what fits is taken, the rest is initialised, and one line says which is which."""

import dataclasses
from pathlib import Path

import torch
from fastdit_kernels.reference import REFERENCE
from torch import Tensor
from torch.nn import functional as F

from fastdit.config import Config, ModelConfig, UserError, replace, times
from fastdit.model import DiT, choose_ops
from fastdit.runtime import ranks, sharding
from fastdit.runtime.ranks import World
from fastdit.runtime.run import load_config
from fastdit.runtime.sharding import fill
from fastdit.runtime.tensors import load_weights
from fastdit.weights.folder import fitting, locate
from fastdit.weights.layouts import named_shapes

SHAPES = ("depth", "width", "patch", "conv_kernel", "qk_norm", "token_drop")  # what the blocks are: must be the same
HIDDEN = ("num_heads", "time_embedding", "position", "mlp_ratio")  # never typed, and they decide the outputs: are taken


def adopt(config: Config, theirs: ModelConfig, source: str) -> Config:
    """The config with what a starting model decides and no shape tells. Raises UserError where the blocks are not the same."""
    ours = config.model
    if wrong := [f"--model.{name} {getattr(theirs, name)}" for name in SHAPES if getattr(ours, name) != getattr(theirs, name)]:
        raise UserError(f"--train.init_from {source} holds another architecture; it starts a run with {' '.join(wrong)}")
    return dataclasses.replace(config, model=dataclasses.replace(ours, **{name: getattr(theirs, name) for name in HIDDEN}))


@torch.no_grad()
def start_from(model: DiT, source: str, config: Config) -> str:
    """Fill an initialised model, sharded or not, from whatever `locate` finds. Returns what was taken, in one line.

    Other classes: their rows of the table stay initialised. Another size: a learned position embedding is interpolated,
    an image's bicubically. Another number of channels: those that both have are taken. Raises UserError, before any parameter
    changes.
    """
    found = locate(source)
    theirs, sizes = found.config.model, (found.config.model.input_size, config.model.input_size)
    if len(sizes[0]) != len(sizes[1]):
        raise UserError(
            f"--train.init_from {source} sees {times(sizes[0])}, and this run {times(sizes[1])}: "
            f"sequences, images and videos do not start from each other"
        )
    if adopt(config, theirs, source).model != config.model:
        raise UserError(f"--train.init_from {source} has other {', '.join(HIDDEN)} than the run's config")
    with torch.device("meta"):
        given = fitting(DiT(theirs, REFERENCE), load_weights(found.weights)[0], source)
    taken, notes = 0, []
    for name, parameter in model.named_parameters():
        whole, note = _adapt(name, given, model.initial(name, parameter.shape, config.run.seed), config.model, theirs)
        fill(parameter, whole.float())
        taken += not note
        notes += [note] if note else []
    there, here = found.config.diffusion, config.diffusion
    if (there.kind, there.prediction) != (here.kind, here.prediction):
        notes.append(f"it predicted {there.prediction} under {there.kind} and learns {here.prediction} under {here.kind}")
    if found.config.data.vae != config.data.vae:
        notes.append(
            f"it saw latents of {found.config.data.vae or 'no autoencoder'}, this run's are of {config.data.vae or 'none'}"
        )
    elif found.config.data.latents != config.data.latents:
        said = {"scalar": "all channels by one scale", "channel": "each channel by its own"}
        notes.append(f"its latents have {said[found.config.data.latents]}, this run's {said[config.data.latents]}")
    if theirs.condition and not config.model.condition:
        notes.append(f"its condition of {theirs.condition} numbers is left out")
    total = len(list(named_shapes(config.model)))
    return "; ".join([f"started from {source}: {taken} of {total} tensors taken as they are", *dict.fromkeys(notes)])


def _adapt(name: str, given: dict[str, Tensor], initial: Tensor, ours: ModelConfig, theirs: ModelConfig) -> tuple[Tensor, str]:
    """A parameter's starting value, and a note where it is not simply theirs. initial: its value in a run from nothing."""
    old = given.get(name)
    if name == "pos_embed":
        return _positions(old, initial, ours, theirs)
    if name == "y_embedder.weight":
        return _classes(old, initial, ours, theirs)
    if name.startswith("c_embedder"):
        if old is not None and old.shape == initial.shape:
            return old, ""
        return initial, f"the condition of {ours.condition} numbers, or its null, is initialised"
    if name.startswith("jump_embedder") and old is None:
        return initial, "the length of a step is new: at 0 the network is as it was"
    assert old is not None, "SHAPES decides every other name"
    channels, same = f"{theirs.channels} channels there, {ours.channels} here", min(ours.channels, theirs.channels)
    if name == "x_embedder.weight" and ours.channels != theirs.channels:
        whole = initial.unflatten(1, (ours.channels, -1)).clone()
        whole[:, :same] = old.unflatten(1, (theirs.channels, -1))[:, :same]
        return whole.flatten(1), f"{channels}: {same} taken, the rest initialised"
    if name.startswith("final_layer.linear") and old.shape != initial.shape:
        # Rows are (row, column, channel) of a patch; with learn_sigma its channels are the prediction's, then the variance's.
        whole = initial.unflatten(0, (ours.patch_size, 1 + ours.learn_sigma, ours.channels)).clone()
        old = old.unflatten(0, (theirs.patch_size, 1 + theirs.learn_sigma, theirs.channels))
        parts = min(1 + ours.learn_sigma, 1 + theirs.learn_sigma)
        whole[:, :parts, :same] = old[:, :parts, :same]
        variance = {1: "the learned variance is initialised", 0: "", -1: "the learned variance is left out"}
        note = variance[ours.learn_sigma - theirs.learn_sigma]
        return whole.flatten(0, 2), note or f"{channels}: {same} taken, the rest initialised"
    if name == "t_embedder.2.bias" and theirs.num_classes and not ours.num_classes:
        table = given["y_embedder.weight"]
        label = table[-1] if theirs.class_dropout else table.mean(0)
        which = "the null class" if theirs.class_dropout else "their mean"
        return old + label, f"no classes here, {theirs.num_classes:,} there: {which} is what all pictures are of"
    return old, ""


def _positions(old: Tensor | None, initial: Tensor, ours: ModelConfig, theirs: ModelConfig) -> tuple[Tensor, str]:
    before, now = theirs.grid, ours.grid
    if old is None or (ours.position == "fixed" and before != now):
        return initial, "" if before == now else "the fixed position embedding is that of the new size"
    if before == now:
        return old, ""
    grid = old.T.reshape(1, -1, *before)
    mode = {1: "linear", 2: "bicubic", 3: "trilinear"}[len(now)]
    moved = F.interpolate(grid, size=now, mode=mode, align_corners=False).flatten(2)[0].T
    return moved, f"position embedding interpolated from {times(before)} to {times(now)} tokens"


def _classes(old: Tensor | None, initial: Tensor, ours: ModelConfig, theirs: ModelConfig) -> tuple[Tensor, str]:
    whole = initial.clone()
    if old is None:
        return whole, f"{ours.num_classes:,} classes initialised: there were none"
    if null := bool(ours.class_dropout and theirs.class_dropout):
        whole[-1] = old[-1]
    if ours.num_classes == theirs.num_classes:
        whole[: ours.num_classes] = old[: ours.num_classes]
        return whole, "" if null or not ours.class_dropout else "the null class is initialised"
    return (
        whole,
        f"{theirs.num_classes:,} classes there: {ours.num_classes:,} initialised{', the null class taken' if null else ''}",
    )


def adopted(config: Config, saved: Path) -> Config:
    """The config with what the model that it starts from decides: a new run's source says it, a begun run's config.json."""
    if saved.exists():
        run = load_config(saved)
        if run.train.init_from and config.train.init_from in (None, run.train.init_from):
            config = adopt(config, run.model, run.train.init_from)
            return replace(config, train={"init_from": run.train.init_from})
    elif config.train.init_from:
        return adopt(config, locate(config.train.init_from).config.model, config.train.init_from)
    return config


def build(config: Config, world: World, start: bool = True) -> DiT:
    """The model on its starting weights, compiled and sharded. start: read --train.init_from, since no checkpoint follows."""
    with torch.device("meta"):
        model = DiT(config.model, choose_ops(config, world.device))
    sharding.checkpoint(model, config.parallel)
    sharding.compile(model, config.parallel, world.device)
    sharding.shard(model, config.parallel, world)
    model.init_weights(config.run.seed)
    source = config.train.init_from
    if source and start:
        said = ranks.every(world, lambda: start_from(model, source, config))
        if world.rank == 0:
            print(said, flush=True)
    return model
