"""Other repositories' DiT weights in our names: the same network, so the same outputs to fp32 rounding.

facebookresearch/DiT (the paper's code, arXiv 2212.09748), diffusers' DiTTransformer2DModel, JulienRineau/diffusion-transformer.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdit.config import SIZES, ModelConfig, UserError
from fastdit.model import named_shapes, position_embedding

Parts = dict[str, Tensor | dict[str, Tensor]]


class Weights(NamedTuple):
    """Tensors in our names, fp32, and the config of the model they make."""

    config: ModelConfig
    tensors: dict[str, Tensor]


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

    def linear(self, name: str, out: int, into: int) -> dict[str, Tensor]:
        return {"weight": self(f"{name}.weight", out, into), "bias": self(f"{name}.bias", out)}

    def depth(self, prefix: str) -> int:
        """How many blocks there are, by their numbers."""
        return len({m[1] for n in self.left if (m := re.match(rf"{re.escape(prefix)}\.(\d+)\.", n))})

    def done(self) -> None:
        if self.left:
            raise UserError(f"the weights hold {sorted(self.left)[0]} (of {len(self.left)} left over), which has no place here")


def finish(config: ModelConfig, parts: Parts, modulations: list[dict[str, Tensor]]) -> Weights:
    """Our names and shapes, checked. modulations: each block's [6·D, D] projection, then the final layer's [2·D, D].

    All of them read the same SiLU(c), so ours is one projection with their rows one below the other.
    """
    ours: dict[str, Tensor] = {}
    for name, part in parts.items():
        ours.update({f"{name}.{leaf}": t for leaf, t in part.items()} if isinstance(part, dict) else {name: part})
    for leaf in ("weight", "bias"):
        ours[f"adaLN_modulation.{leaf}"] = torch.cat([m[leaf] for m in modulations])
    expected = dict(named_shapes(config))
    assert {n: t.shape for n, t in ours.items()} == expected, "the mapping and the model differ"
    return Weights(config, {name: ours[name].contiguous() for name in expected})


def heads(width: int, depth: int, num_heads: int) -> int:
    """The number of attention heads, which no tensor's shape tells. Raises UserError."""
    known = {(D, L): H for L, D, H in SIZES.values()}
    num_heads = num_heads or known.get((width, depth), 0)
    if not num_heads or width % num_heads:
        raise UserError(f"{depth} blocks of width {width} are not in the paper's table of sizes; give --num_heads, a divisor")
    return num_heads


def square(tokens: int, patch: int) -> tuple[int, int]:
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise UserError(f"the position embedding has {tokens} places, which make no square")
    return side * patch, side * patch


def sinusoids(config: ModelConfig) -> Tensor:
    """The position embedding that every DiT starts from, [T, D]."""
    rows, columns = (side // config.patch for side in config.input_size)
    return position_embedding(rows, columns, config.width)


def keep_fixed(config: ModelConfig, pos_embed: Tensor) -> ModelConfig:
    """The config of a model whose position embedding is the sinusoids' still: there it was fixed, so here it is."""
    same = torch.allclose(pos_embed, sinusoids(config), rtol=0, atol=1e-6)
    return dataclasses.replace(config, position="fixed") if same else config


# --- the three kinds ---


def from_facebook(tensors: Mapping[str, Tensor], num_heads: int = 0, num_classes: int = 0) -> Weights:
    """facebookresearch/DiT: S, B, L or XL at any patch and size. Its last class is the null one, unless num_classes says."""
    take = Taker(tensors)
    D, C, p, _ = take.shape("x_embedder.proj.weight", 4)
    _, T, _ = take.shape("pos_embed", 3)
    L, rows = take.depth("blocks"), take.shape("y_embedder.embedding_table.weight", 2)[0]
    F, out = take.shape("blocks.0.mlp.fc1.weight", 2)[0], take.shape("final_layer.linear.weight", 2)[0]
    config = ModelConfig(
        input_size=square(T, p),
        channels=C,
        num_classes=num_classes or rows - 1,
        patch=p,
        depth=L,
        width=D,
        num_heads=heads(D, L, num_heads),
        mlp_ratio=F // D,
        conv_kernel=0,
        class_dropout=0.0 if num_classes == rows else 0.1,
        learn_sigma=out == 2 * p * p * C,
    )
    place = take("pos_embed", 1, T, D)[0]
    parts: Parts = {
        "x_embedder": {
            "weight": take("x_embedder.proj.weight", D, C, p, p).flatten(1),
            "bias": take("x_embedder.proj.bias", D),
        },
        "pos_embed": place,
        "t_embedder.0": take.linear("t_embedder.mlp.0", D, 256),
        "t_embedder.2": take.linear("t_embedder.mlp.2", D, D),
        "y_embedder.weight": take("y_embedder.embedding_table.weight", config.num_classes + (config.class_dropout > 0), D),
        "final_layer.linear": take.linear("final_layer.linear", p * p * C * (1 + config.learn_sigma), D),
    }
    modulations = []
    for n in range(L):
        b = f"blocks.{n}"
        parts[f"{b}.attn.qkv"] = take.linear(f"{b}.attn.qkv", 3 * D, D)
        parts[f"{b}.attn.proj"] = take.linear(f"{b}.attn.proj", D, D)
        parts[f"{b}.mlp.fc1"] = take.linear(f"{b}.mlp.fc1", F, D)
        parts[f"{b}.mlp.fc2"] = take.linear(f"{b}.mlp.fc2", D, F)
        modulations.append(take.linear(f"{b}.adaLN_modulation.1", 6 * D, D))
    modulations.append(take.linear("final_layer.adaLN_modulation.1", 2 * D, D))
    take.done()
    return finish(keep_fixed(config, place), parts, modulations)


def from_diffusers(tensors: Mapping[str, Tensor], about: Mapping[str, Any], num_classes: int = 0) -> Weights:
    """diffusers' DiTTransformer2DModel; `about` is its config.json. Raises UserError for what it can express and we cannot.

    Outputs are those of diffusers' class, also for the paper's weights, whose own code spaces the timestep's frequencies in 128
    steps where diffusers does in 127.
    """
    given = {"activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero", "attention_bias": True}
    given |= {"norm_elementwise_affine": False, "upcast_attention": False}
    for name, wanted in given.items():
        if about.get(name, wanted) != wanted:
            raise UserError(f"the diffusers model has {name} {about[name]!r}; only {wanted!r} can be converted")
    if about.get("norm_eps", 1e-5) not in (1e-5, 1e-6):
        raise UserError(f"the diffusers model has norm_eps {about['norm_eps']!r}; only 1e-06 and 1e-05 can be converted")
    take = Taker(tensors)
    D, C, p, _ = take.shape("pos_embed.proj.weight", 4)
    L, H, size = take.depth("transformer_blocks"), about.get("num_attention_heads", 16), about.get("sample_size", 32)
    out = take.shape("proj_out_2.weight", 2)[0]
    first = "transformer_blocks.0.norm1.emb"
    rows = take.shape(f"{first}.class_embedder.embedding_table.weight", 2)[0]
    F = take.shape("transformer_blocks.0.ff.net.0.proj.weight", 2)[0]
    if type(H) is not int or type(size) is not int or H < 1 or D % H or size < p or size % p:
        raise UserError(f"the diffusers model's config has {H!r} heads and sample_size {size!r}, which do not fit its weights")
    config = ModelConfig(
        input_size=(size, size),
        channels=C,
        num_classes=num_classes or rows - 1,
        patch=p,
        depth=L,
        width=D,
        num_heads=H,
        mlp_ratio=F // D,
        conv_kernel=0,
        class_dropout=0.0 if num_classes == rows else 0.1,
        learn_sigma=out == 2 * p * p * C,
        time_embedding="diffusers",
    )
    T = (size // p) ** 2
    kept = "pos_embed.pos_embed"  # a buffer that only early versions of diffusers wrote
    place = take(kept, 1, T, D)[0] if kept in take.left else sinusoids(config)
    parts: Parts = {
        "x_embedder": {"weight": take("pos_embed.proj.weight", D, C, p, p).flatten(1), "bias": take("pos_embed.proj.bias", D)},
        "pos_embed": place,
        "final_layer.linear": take.linear("proj_out_2", p * p * C * (1 + config.learn_sigma), D),
    }
    modulations = []
    for n in range(L):
        b, theirs = f"blocks.{n}", f"transformer_blocks.{n}"
        # Each block has embedders of its own, all equal in a model that was one DiT; the final layer reads the first's.
        shared: Parts = {
            "t_embedder.0": take.linear(f"{theirs}.norm1.emb.timestep_embedder.linear_1", D, 256),
            "t_embedder.2": take.linear(f"{theirs}.norm1.emb.timestep_embedder.linear_2", D, D),
            "y_embedder": {"weight": take(f"{theirs}.norm1.emb.class_embedder.embedding_table.weight", rows, D)},
        }
        for name, part in shared.items():
            ours = parts.setdefault(name, part)
            assert isinstance(part, dict)
            assert isinstance(ours, dict)
            if not all(torch.equal(ours[leaf], part[leaf]) for leaf in part):
                raise UserError(f"{theirs}.norm1.emb differs from the first block's: a DiT has one embedder for all blocks")
        qkv = [take.linear(f"{theirs}.attn1.to_{x}", D, D) for x in "qkv"]
        parts[f"{b}.attn.qkv"] = {leaf: torch.cat([x[leaf] for x in qkv]) for leaf in ("weight", "bias")}
        parts[f"{b}.attn.proj"] = take.linear(f"{theirs}.attn1.to_out.0", D, D)
        parts[f"{b}.mlp.fc1"] = take.linear(f"{theirs}.ff.net.0.proj", F, D)
        parts[f"{b}.mlp.fc2"] = take.linear(f"{theirs}.ff.net.2", D, F)
        modulations.append(take.linear(f"{theirs}.norm1.linear", 6 * D, D))
    modulations.append(take.linear("proj_out_1", 2 * D, D))
    take.done()
    return finish(keep_fixed(config, place), parts, modulations)


def from_seed(tensors: Mapping[str, Tensor], num_heads: int = 0, patch: int = 0) -> Weights:
    """JulienRineau/diffusion-transformer, with its depthwise convolution of any K, or its plain MLP.

    There the label of a batch's last image conditions all of the batch; here each image's own does. Outputs agree where all
    labels are the same. patch tells p·p·C apart where C is not 4.
    """
    take = Taker(tensors)
    if "first_layer.t_embedder.0.weight" in take.left:
        raise UserError("the weights are of an early version, which embeds t without sinusoids; it cannot be converted")
    D, columns = take.shape("first_layer.patchify.projection.weight", 2)
    _, T, _ = take.shape("first_layer.pos_embed", 3)
    p = patch or math.isqrt(columns // 4)
    C = columns // p**2
    if C < 1 or C * p**2 != columns:
        raise UserError(f"a patch of {columns} numbers is not {p}×{p} of whole channels; give --patch")
    conv = "blocks.0.mlp.depthwise_conv.weight" in take.left
    K = take.shape("blocks.0.mlp.depthwise_conv.weight", 4)[-1] if conv else 0
    L, num_classes = take.depth("blocks"), take.shape("first_layer.y_embedder.weight", 2)[0]
    F = take.shape("blocks.0.mlp.c_fc.weight", 2)[0]
    config = ModelConfig(
        input_size=square(T, p),
        channels=C,
        num_classes=num_classes,
        patch=p,
        depth=L,
        width=D,
        num_heads=heads(D, L, num_heads),
        mlp_ratio=F // D,
        conv_kernel=K,
        time_embedding="seed",
    )
    patches = take("first_layer.patchify.projection.weight", D, columns).view(
        D, p, p, C
    )  # within a patch: row, column, channel
    t_in = take.linear("first_layer.t_embedder.1", D, D)
    t_in["weight"] = torch.cat(
        [t_in["weight"][:, D // 2 :], t_in["weight"][:, : D // 2]], dim=1
    )  # sines first there, here last
    parts: Parts = {
        "x_embedder": {
            "weight": patches.permute(0, 3, 1, 2).flatten(1),
            "bias": take("first_layer.patchify.projection.bias", D),
        },
        "pos_embed": take("first_layer.pos_embed", 1, T, D)[0],
        "t_embedder.0": t_in,
        "t_embedder.2": take.linear("first_layer.t_embedder.3", D, D),
        "y_embedder.weight": take("first_layer.y_embedder.weight", num_classes, D),
        "final_layer.linear": take.linear("final_layer.linear", p * p * C, D),
    }
    modulations = []
    for n in range(L):
        b = f"blocks.{n}"
        parts[f"{b}.attn.qkv"] = take.linear(f"{b}.attn.c_attn", 3 * D, D)
        parts[f"{b}.attn.proj"] = take.linear(f"{b}.attn.c_proj", D, D)
        parts[f"{b}.mlp.fc1"] = take.linear(f"{b}.mlp.c_fc", F, D)
        parts[f"{b}.mlp.fc2"] = take.linear(f"{b}.mlp.c_proj", D, F)
        if conv:
            weight, bias = take(f"{b}.mlp.depthwise_conv.weight", F, 1, K, K), take(f"{b}.mlp.depthwise_conv.bias", F)
            parts[f"{b}.mlp.conv"] = {"weight": weight, "bias": bias}
        modulations.append(take.linear(f"{b}.adaLN_modulation.1", 6 * D, D))
    modulations.append(take.linear("final_layer.adaLN_modulation.1", 2 * D, D))
    take.done()
    return finish(config, parts, modulations)
