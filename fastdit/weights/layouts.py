"""Where other programs keep the tensors of a DiT: one table for each, which conversion and export read in either direction.

A row says where one of our tensors lies: in one of theirs, or in several, one below the other. {n} is the number of a block.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from fastdit_kernels.reference import REFERENCE
from torch import Tensor

from fastdit.config import ModelConfig, UserError
from fastdit.model import DiT

Table = dict[str, list[str]]

# facebookresearch/DiT (arXiv 2212.09748), and what keeps its names: SiT (arXiv 2401.08740), REPA, LightningDiT.
DIT: Table = {
    "x_embedder": ["x_embedder.proj"],
    "pos_embed": ["pos_embed"],
    "t_embedder.0": ["t_embedder.mlp.0"],
    "t_embedder.2": ["t_embedder.mlp.2"],
    "y_embedder": ["y_embedder.embedding_table"],
    "blocks.{n}.attn.qkv": ["blocks.{n}.attn.qkv"],
    "blocks.{n}.attn.proj": ["blocks.{n}.attn.proj"],
    "blocks.{n}.mlp.fc1": ["blocks.{n}.mlp.fc1"],
    "blocks.{n}.mlp.fc2": ["blocks.{n}.mlp.fc2"],
    # All of them read the same SiLU(c), so ours is one projection with their rows one below the other.
    "adaLN_modulation": ["blocks.{n}.adaLN_modulation.1", "final_layer.adaLN_modulation.1"],
    "final_layer.linear": ["final_layer.linear"],
}

# diffusers' DiTTransformer2DModel. Each block has embedders of its own, all equal: a DiT has one for all blocks.
_BLOCK = "transformer_blocks.{n}"
DIFFUSERS: Table = {
    "x_embedder": ["pos_embed.proj"],
    "t_embedder.0": [f"{_BLOCK}.norm1.emb.timestep_embedder.linear_1"],
    "t_embedder.2": [f"{_BLOCK}.norm1.emb.timestep_embedder.linear_2"],
    "y_embedder": [f"{_BLOCK}.norm1.emb.class_embedder.embedding_table"],
    "blocks.{n}.attn.qkv": [f"{_BLOCK}.attn1.to_{x}" for x in "qkv"],
    "blocks.{n}.attn.proj": [f"{_BLOCK}.attn1.to_out.0"],
    "blocks.{n}.mlp.fc1": [f"{_BLOCK}.ff.net.0.proj"],
    "blocks.{n}.mlp.fc2": [f"{_BLOCK}.ff.net.2"],
    "adaLN_modulation": [f"{_BLOCK}.norm1.linear", "proj_out_1"],
    "final_layer.linear": ["proj_out_2"],
}

# JulienRineau/diffusion-transformer
SEED: Table = {
    "x_embedder": ["first_layer.patchify.projection"],
    "pos_embed": ["first_layer.pos_embed"],
    "t_embedder.0": ["first_layer.t_embedder.1"],
    "t_embedder.2": ["first_layer.t_embedder.3"],
    "y_embedder": ["first_layer.y_embedder"],
    "blocks.{n}.attn.qkv": ["blocks.{n}.attn.c_attn"],
    "blocks.{n}.attn.proj": ["blocks.{n}.attn.c_proj"],
    "blocks.{n}.mlp.fc1": ["blocks.{n}.mlp.c_fc"],
    "blocks.{n}.mlp.conv": ["blocks.{n}.mlp.depthwise_conv"],
    "blocks.{n}.mlp.fc2": ["blocks.{n}.mlp.c_proj"],
    "adaLN_modulation": ["blocks.{n}.adaLN_modulation.1", "final_layer.adaLN_modulation.1"],
    "final_layer.linear": ["final_layer.linear"],
}

COPIED = ("t_embedder", "y_embedder")  # of ours, what several of theirs are copies of


class Place(NamedTuple):
    """Where one of our tensors lies in theirs."""

    theirs: list[str]  # by full name
    rows: list[int]  # of ours that each of theirs holds; where they are copies, all of them
    copied: bool
    shape: tuple[int, ...]  # of theirs, past the rows


def named_shapes(config: ModelConfig) -> Iterator[tuple[str, torch.Size]]:
    """Every parameter's name and full shape, without allocating any."""
    with torch.device("meta"):
        yield from ((name, p.shape) for name, p in DiT(config, REFERENCE).named_parameters())


def places(table: Table, config: ModelConfig) -> dict[str, Place]:
    """The place of each of our tensors that the table knows, by our full name."""
    found = {}
    for ours, shape in named_shapes(config):
        stem, _, leaf = ours.rpartition(".")
        stem, leaf = (stem, f".{leaf}") if stem else (ours, "")
        number = re.match(r"blocks\.(\d+)\.", stem)
        n = number[1] if number else ""
        row = table.get(stem.replace(f"blocks.{n}.", "blocks.{n}.") if number else stem)
        if row is None:
            continue
        blocks = [n] if number else [str(block) for block in range(config.depth)]
        theirs = [name.format(n=block) + leaf for name in row for block in (blocks if "{n}" in name else [""])]
        copied = stem.startswith(COPIED)
        D, rows = config.width, [shape[0] // len(theirs)] * len(theirs)
        if copied:
            rows = [shape[0]] * len(theirs)
        elif stem == "adaLN_modulation":
            rows = [6 * D] * config.depth + [2 * D]
        rest = tuple(shape[1:])
        if ours == "x_embedder.weight" and table is not SEED:  # a convolution there
            rest = (config.channels, config.patch, config.patch)
        found[ours] = Place(theirs, rows, copied, rest)
    return found


class Taker:
    """Foreign tensors, each taken once by its name and the shape it must have."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.left = dict(tensors)

    def shape(self, name: str, ndim: int) -> tuple[int, ...]:
        if name not in self.left:
            raise UserError(f"the weights lack {name}")
        shape = tuple(self.left[name].shape)
        if len(shape) != ndim or 0 in shape:
            raise UserError(f"{name} is {'×'.join(map(str, shape))}; expected {ndim} dimensions")
        return shape

    def __call__(self, name: str, *shape: int) -> Tensor:
        if self.shape(name, len(shape)) != shape:
            raise UserError(f"{name} is {'×'.join(map(str, self.left[name].shape))}; expected {'×'.join(map(str, shape))}")
        return self.left.pop(name).float()

    def depth(self, prefix: str) -> int:
        """How many blocks there are, by their numbers."""
        return len({m[1] for n in self.left if (m := re.match(rf"{re.escape(prefix)}\.(\d+)\.", n))})

    def done(self) -> None:
        if self.left:
            raise UserError(f"the weights hold {sorted(self.left)[0]} (of {len(self.left)} left over), which has no place here")


def to_ours(table: Table, config: ModelConfig, take: Taker) -> dict[str, Tensor]:
    """Our tensors by name, fp32, as far as the table has them, out of theirs. Raises UserError, one line."""
    ours = {}
    for name, place in places(table, config).items():
        if name == "pos_embed":
            ours[name] = take(place.theirs[0], 1, place.rows[0], *place.shape)[0]
            continue
        parts = [take(theirs, rows, *place.shape) for theirs, rows in zip(place.theirs, place.rows, strict=True)]
        if place.copied:
            for theirs, part in zip(place.theirs[1:], parts[1:], strict=True):
                if not torch.equal(part, parts[0]):
                    block = theirs.partition(".emb.")[0]
                    raise UserError(f"{block}.emb differs from the first block's: a DiT has one embedder for all blocks")
        whole = parts[0] if place.copied else torch.cat(parts)
        ours[name] = whole.flatten(1) if name == "x_embedder.weight" else whole
    return ours


def to_theirs(table: Table, config: ModelConfig, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors by name, out of ours: what `to_ours` would read back."""
    state = {}
    for name, place in places(table, config).items():
        parts = [ours[name]] * len(place.theirs) if place.copied else ours[name].split(place.rows)
        for theirs, part in zip(place.theirs, parts, strict=True):
            state[theirs] = part[None] if name == "pos_embed" else part.reshape(len(part), *place.shape)
    return state
