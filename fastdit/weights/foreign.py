"""Other repositories' DiT weights in our names: the same network, so the same outputs to fp32 rounding.

facebookresearch/DiT and SiT, REPA, plain LightningDiT, diffusers' DiTTransformer2DModel, JulienRineau/diffusion-transformer.
`layouts` knows where their tensors lie; here is what else differs.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdit.config import ModelConfig, UserError
from fastdit.embeddings import frequencies, position_embedding
from fastdit.recipes import SIZES
from fastdit.weights.layouts import DIFFUSERS, DIT, SEED, Taker, named_shapes, to_ours


class Weights(NamedTuple):
    """Tensors in our names, fp32, and the config of the model they make."""

    config: ModelConfig
    tensors: dict[str, Tensor]


def from_facebook(tensors: Mapping[str, Tensor], num_heads: int = 0, num_classes: int = 0) -> Weights:
    """facebookresearch/DiT: S, B, L or XL at any patch and size. Its last class is the null one, unless num_classes says."""
    dtype = tensors["pos_embed"].dtype if "pos_embed" in tensors else torch.float32
    take = Taker(tensors)
    D, C, p, _ = take.shape("x_embedder.proj.weight", 4)
    _, T, _ = take.shape("pos_embed", 3)
    refuse_variants(tensors)
    L, rows = take.depth("blocks"), take.shape("y_embedder.embedding_table.weight", 2)[0]
    config = ModelConfig(
        input_size=square(T, p),
        channels=C,
        num_classes=num_classes or rows - 1,
        patch=p,
        depth=L,
        width=D,
        num_heads=heads(D, L, num_heads),
        mlp_ratio=mlp_ratio(take, "blocks.0.mlp.fc1.weight", D),
        conv_kernel=0,
        class_dropout=0.0 if num_classes == rows else 0.1,
        learn_sigma=take.shape("final_layer.linear.weight", 2)[0] == 2 * p * p * C,
    )
    ours = to_ours(DIT, config, take)
    take.done()
    return finish(keep_fixed(config, ours["pos_embed"], dtype), ours)


def from_sit(tensors: Mapping[str, Tensor], num_heads: int = 0, num_classes: int = 0, *, reverse: bool = True) -> Weights:
    """SiT (arXiv 2401.08740) on its linear path, which predicts velocity, as a flow of ours of 1,000 timesteps.

    reverse: in SiT and LightningDiT time runs from noise at 0 to data at 1, and the network predicts data - noise. False: time
    runs as ours does, which it does in REPA. REPA's projectors, which only its training reads, are left out.
    """
    config, ours = from_facebook({n: t for n, t in tensors.items() if not n.startswith("projectors.")}, num_heads, num_classes)
    if config.learn_sigma:  # half of the outputs, which SiT throws away
        C = config.channels
        config = dataclasses.replace(config, learn_sigma=False)
        for leaf in ("weight", "bias"):
            whole = ours[f"final_layer.linear.{leaf}"]
            ours[f"final_layer.linear.{leaf}"] = whole.unflatten(0, (-1, 2 * C))[:, :C].flatten(0, 1).contiguous()
    config = dataclasses.replace(config, time_embedding="sit")
    if reverse:
        for leaf in ("weight", "bias"):
            ours[f"final_layer.linear.{leaf}"] = -ours[f"final_layer.linear.{leaf}"]
        # There the embedding reads w·(1 - t), and cos(w - wt) = cos w cos wt + sin w sin wt, sin(w - wt) = sin w cos wt - cos w
        # sin wt: the projection turned by w reads our time.
        into = ours["t_embedder.0.weight"].double()
        w = frequencies(into.shape[1] // 2, False, torch.float64, into.device)
        of_cos, of_sin = into.chunk(2, dim=1)
        turned = torch.cat([of_cos * w.cos() + of_sin * w.sin(), of_cos * w.sin() - of_sin * w.cos()], dim=1)
        ours["t_embedder.0.weight"] = turned.float()
    return finish(config, ours)


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
    rows = take.shape("transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight", 2)[0]
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
        mlp_ratio=mlp_ratio(take, "transformer_blocks.0.ff.net.0.proj.weight", D),
        conv_kernel=0,
        class_dropout=0.0 if num_classes == rows else 0.1,
        learn_sigma=take.shape("proj_out_2.weight", 2)[0] == 2 * p * p * C,
        time_embedding="diffusers",
    )
    kept, place, dtype = "pos_embed.pos_embed", sinusoids(config), torch.float32
    if kept in take.left:  # a buffer that only early versions of diffusers wrote
        dtype = take.left[kept].dtype
        place = take(kept, 1, (size // p) ** 2, D)[0]
    ours = {**to_ours(DIFFUSERS, config, take), "pos_embed": place}
    take.done()
    return finish(keep_fixed(config, place, dtype), ours)


def from_seed(tensors: Mapping[str, Tensor], num_heads: int = 0, patch: int = 0) -> Weights:
    """JulienRineau/diffusion-transformer, with its depthwise convolution of any K, or its plain MLP.

    That code conditions a whole batch on its last image's label; here each image has its own. Outputs agree where all labels
    are equal. patch: needed where C is not 4, since the file holds only p·p·C.
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
    L = take.depth("blocks")
    config = ModelConfig(
        input_size=square(T, p),
        channels=C,
        num_classes=take.shape("first_layer.y_embedder.weight", 2)[0],
        patch=p,
        depth=L,
        width=D,
        num_heads=heads(D, L, num_heads),
        mlp_ratio=mlp_ratio(take, "blocks.0.mlp.c_fc.weight", D),
        conv_kernel=take.shape("blocks.0.mlp.depthwise_conv.weight", 4)[-1] if conv else 0,
        time_embedding="seed",
    )
    ours = to_ours(SEED, config, take)
    take.done()
    patches = ours["x_embedder.weight"].view(D, p, p, C)  # there within a patch: row, column, channel
    ours["x_embedder.weight"] = patches.permute(0, 3, 1, 2).flatten(1)
    ours["t_embedder.0.weight"] = ours["t_embedder.0.weight"].roll(D // 2, dims=1)  # there sines first, here last
    return finish(config, ours)


# --- what they share ---


def finish(config: ModelConfig, ours: Mapping[str, Tensor]) -> Weights:
    """The tensors in the model's order, checked."""
    expected = dict(named_shapes(config))
    assert {n: t.shape for n, t in ours.items()} == expected, "the table and the model differ"
    for name, t in ours.items():
        if not t.is_meta and not t.isfinite().all():
            raise UserError(f"the weights hold numbers that are not finite, in what becomes {name}")
    return Weights(config, {name: ours[name].contiguous() for name in expected})


def refuse_variants(tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError, by name, for what LightningDiT and others of DiT's names can have and this network has not."""
    variants = {
        r"mlp.w12": "SwiGLU",
        r"mlp.w1.": "SwiGLU",
        r"rope": "rotary position embedding (RoPE)",
        r"attn.q_norm": "QK-norm",
        r"norm1.weight": "RMSNorm or affine norms",
        r"norm_final.weight": "RMSNorm or affine norms",
    }
    found = sorted({what for name in tensors for mark, what in variants.items() if mark in name})
    if found:
        raise UserError(f"the weights are of a DiT with {' and '.join(found)}, which this network has not")


def heads(width: int, depth: int, num_heads: int) -> int:
    """The number of attention heads, which no tensor's shape tells. Raises UserError."""
    known = {(D, L): H for L, D, H in SIZES.values()}
    num_heads = num_heads or known.get((width, depth), 0)
    if not num_heads or width % num_heads:
        raise UserError(f"{depth} blocks of width {width} are not in the paper's table of sizes; give --num_heads, a divisor")
    return num_heads


def mlp_ratio(take: Taker, name: str, width: int) -> int:
    """The MLP's hidden width over the model's. Raises UserError."""
    hidden = take.shape(name, 2)[0]
    if hidden % width:
        raise UserError(f"the MLP is {hidden / width:g} times as wide as the model; only whole multiples can be converted")
    return hidden // width


def square(tokens: int, patch: int) -> tuple[int, int]:
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise UserError(f"the position embedding has {tokens} places, which make no square")
    return side * patch, side * patch


def sinusoids(config: ModelConfig) -> Tensor:
    """The position embedding that every DiT starts from, [T, D]."""
    return position_embedding(config.grid, config.width)


def keep_fixed(config: ModelConfig, pos_embed: Tensor, dtype: torch.dtype) -> ModelConfig:
    """The config of a model whose position embedding is the sinusoids' still: there it was fixed, so here it is.

    dtype: of the file, whose rounding the embedding may be off by.
    """
    tolerance = max(1e-6, torch.finfo(dtype).eps) if dtype.is_floating_point else 0.0
    same = torch.allclose(pos_embed, sinusoids(config), rtol=0, atol=tolerance)
    return dataclasses.replace(config, position="fixed") if same else config
