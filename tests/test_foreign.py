"""Weights of DiT's names that are not DiT's: SiT's, REPA's and LightningDiT's predict velocity, here as there."""

import argparse
import math
import re

import pytest
import torch
from fastdit_kernels.reference import REFERENCE
from torch.nn import functional as F

from fastdit import config as C
from fastdit import sampling
from fastdit.config import UserError
from fastdit.convert import Options, convert
from fastdit.embeddings import position_embedding
from fastdit.model import DiT
from fastdit.runtime.run import load_config
from fastdit.runtime.tensors import load_weights, save_weights
from fastdit.weights.folder import from_pretrained
from fastdit.weights.foreign import from_facebook, from_sit

pytestmark = pytest.mark.usefixtures("one_thread")

D, L, H, SIDE, PATCH = 48, 2, 3, 8, 2
T = (SIDE // PATCH) ** 2


def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def weights(channels: int = 4, classes: int = 10, sigma: bool = True, hidden: int = 4 * D, **more) -> dict[str, torch.Tensor]:
    """A random network of DiT's names, with the sinusoids as its position embedding, as all of them have."""
    shapes = {
        "x_embedder.proj.weight": (D, channels, PATCH, PATCH),
        "x_embedder.proj.bias": (D,),
        **linear("t_embedder.mlp.0", D, 256),
        **linear("t_embedder.mlp.2", D, D),
        "y_embedder.embedding_table.weight": (classes + 1, D),
        **linear("final_layer.linear", PATCH**2 * channels * (1 + sigma), D),
        **linear("final_layer.adaLN_modulation.1", 2 * D, D),
        **more,
    }
    for n in range(L):
        shapes |= linear(f"blocks.{n}.attn.qkv", 3 * D, D) | linear(f"blocks.{n}.attn.proj", D, D)
        shapes |= linear(f"blocks.{n}.mlp.fc1", hidden, D) | linear(f"blocks.{n}.mlp.fc2", D, hidden)
        shapes |= linear(f"blocks.{n}.adaLN_modulation.1", 6 * D, D)
    rng = torch.Generator().manual_seed(4)
    w = {name: torch.randn(shape, generator=rng) * 0.2 for name, shape in shapes.items()}
    return w | {"pos_embed": position_embedding((SIDE // PATCH,) * 2, D)[None]}


def original(w, x, t, y):
    """SiT's network, written from its paper and DiT's (arXiv 2401.08740; 2212.09748, §3).

    t in [0, 1] goes into the sinusoids as it is, and where the network has outputs for a variance, they are not used.
    """

    def fc(name, v):
        return v @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(v):
        return F.layer_norm(v, v.shape[-1:], eps=1e-6)

    frequencies = 10_000.0 ** (-torch.arange(128, dtype=x.dtype) / 128)
    angles = t[:, None] * frequencies
    c = fc("t_embedder.mlp.2", F.silu(fc("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    c = F.silu(c + w["y_embedder.embedding_table.weight"][y])
    h = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=PATCH).flatten(2).mT + w["pos_embed"]
    for n in range(L):
        b = f"blocks.{n}"
        shift1, scale1, gate1, shift2, scale2, gate2 = fc(f"{b}.adaLN_modulation.1", c)[:, None].chunk(6, -1)
        q, k, v = fc(f"{b}.attn.qkv", norm(h) * (1 + scale1) + shift1).unflatten(-1, (3, H, D // H)).permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.mT) / math.sqrt(D // H)).softmax(-1) @ v
        h = h + gate1 * fc(f"{b}.attn.proj", mixed.transpose(1, 2).flatten(2))
        hidden = F.gelu(fc(f"{b}.mlp.fc1", norm(h) * (1 + scale2) + shift2), approximate="tanh")
        h = h + gate2 * fc(f"{b}.mlp.fc2", hidden)
    shift, scale = fc("final_layer.adaLN_modulation.1", c)[:, None].chunk(2, -1)
    out = fc("final_layer.linear", norm(h) * (1 + scale) + shift)
    grid = out.view(len(x), SIDE // PATCH, SIDE // PATCH, PATCH, PATCH, -1).permute(0, 5, 1, 3, 2, 4)
    return grid.reshape(len(x), -1, SIDE, SIDE)[:, : x.shape[1]]


def model_of(found) -> DiT:
    model = DiT(found.config, REFERENCE)
    model.load_state_dict(found.tensors)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize(("reverse", "sigma"), [(True, True), (True, False), (False, False)], ids=["SiT", "no sigma", "REPA"])
def test_velocity_is_the_originals(reverse, sigma):
    w = weights(sigma=sigma)
    found = from_sit(w, H, reverse=reverse)
    assert (found.config.time_embedding, found.config.position, found.config.learn_sigma) == ("sit", "fixed", False)
    model = model_of(found)
    rng = torch.Generator().manual_seed(1)
    x, y = torch.randn(5, 4, SIDE, SIDE, generator=rng), torch.tensor([0, 3, 9, 10, 1])
    t = torch.tensor([0.0, 0.25, 0.5, 0.875, 1.0])  # ours, in 1,000 steps: noise at 1
    theirs, sign = (1 - t, -1) if reverse else (t, 1)
    exact = sign * original({n: v.double() for n, v in w.items()}, x.double(), theirs.double(), y)
    single = sign * original(w, x, theirs, y)
    # In fp64 what is left is the rounding of the weights to fp32; in fp32 ours is no farther off than theirs, twice over.
    assert (model.double()(x.double(), t.double() * 1000, y) - exact).abs().max() <= 1e-6 * exact.abs().max()
    assert (model.float()(x, t * 1000, y) - exact).abs().max() <= 2 * (single - exact).abs().max()


@torch.no_grad()
def test_samples_are_the_originals():
    """Euler from SiT's own noise end, x ← x + v / steps, draws what our sampler draws."""
    w = weights()
    found = from_sit(w, H)
    diffusion = C.DiffusionConfig(kind="flow", prediction="velocity", clip_x0=False)
    y, seen = torch.tensor([3, 7]), []

    def network(x, t, y):
        seen.append(x)
        return model(x, t, y)

    model = model_of(found)
    ours = sampling.sample(network, diffusion, (2, 4, SIDE, SIDE), y, steps=10, seed=5)
    x = seen[0].double()
    for step in range(10):
        x = x + original({n: v.double() for n, v in w.items()}, x, torch.full((2,), step / 10).double(), y) / 10
    assert (ours - x).abs().max() <= 3e-6 * x.abs().max()


def checkpoint(path, w, **args):
    """As SiT's and REPA's train.py save it."""
    torch.save({"model": w, "ema": w, "opt": {"state": {}, "param_groups": []}, "args": argparse.Namespace(**args)}, path)
    return path


def test_a_checkpoints_args_say_what_it_is(tmp_path, capsys):
    w, projectors = weights(), {"projectors.0.0.weight": (D, D), "projectors.0.0.bias": (D,)}
    sit, velocity = from_sit(w, H), {"path_type": "Linear", "prediction": "velocity", "vae": "mse", "num_classes": 10}
    for name, file, options, wanted, said in (
        ("sit", checkpoint(tmp_path / "a.pt", w, **velocity), {}, sit, "SiT"),
        ("repa", checkpoint(tmp_path / "b.pt", weights(sigma=False, **projectors), path_type="linear", prediction="v", vae=1),
         {}, from_sit(weights(sigma=False, **projectors), H, reverse=False), "REPA"),
        ("asked", checkpoint(tmp_path / "c.pt", w, model="SiT-XL/2"), {"kind": "sit"}, sit, None),
        ("dit", checkpoint(tmp_path / "d.pt", w, model="DiT-XL/2", vae="ema"), {}, from_facebook(w, H), None),
        ("unsaid", checkpoint(tmp_path / "e.pt", w), {}, from_facebook(w, H), "assumed to be DiT's"),
    ):  # fmt: skip
        out = convert(Options(str(file), str(tmp_path / name), num_heads=H, **options))
        printed = capsys.readouterr().out
        assert (said is None and "note:" not in printed) or (said is not None and said in printed), name
        model, run = from_pretrained(out)
        assert all(torch.equal(p, wanted.tensors[n]) for n, p in model.named_parameters())
        assert model.config == wanted.config
        flow = wanted.config.time_embedding == "sit"
        assert (run.diffusion.kind, run.diffusion.timesteps, run.diffusion.clip_x0) == ("flow" if flow else "ddpm", 1000, False)
        assert run.data.vae == f"stabilityai/sd-vae-ft-{'mse' if name == 'sit' else 'ema'}"


@pytest.mark.parametrize(
    ("args", "change", "said"),
    [
        ({"path_type": "GVP", "prediction": "velocity"}, {}, "on the path 'GVP'"),
        ({"path_type": "cosine", "prediction": "v"}, {}, "on the path 'cosine'"),
        ({"path_type": "Linear", "prediction": "score"}, {}, "predict 'score'"),
        ({}, {"blocks.0.mlp.w12.weight": (8 * D, D)}, "SwiGLU"),
        ({}, {"feat_rope.freqs_cos": (T, 16)}, "rotary position embedding"),
        ({}, {"blocks.0.norm1.weight": (D,), "blocks.0.attn.q_norm.weight": (16,)}, "QK-norm and RMSNorm"),
        ({}, {"hidden": 120}, "the MLP is 2.5 times as wide"),
        ({}, {"channels": 32}, "has 32 channels and the latents of stabilityai/sd-vae-ft-ema have 4; name with --vae"),
    ],
    ids=str,
)  # fmt: skip
def test_what_this_network_has_not_is_refused_by_name(tmp_path, args, change, said):
    file = checkpoint(tmp_path / "x.pt", weights(**change), **args)
    with pytest.raises(UserError, match=rf"\A[^\n]*{re.escape(said)}[^\n]*\Z"):
        convert(Options(str(file), kind="auto" if args else "lightningdit", num_heads=H))
    assert not (tmp_path / "x-fastdit").exists()


def test_another_autoencoder_gives_the_size_of_the_pictures(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"latent_channels": 32, "block_out_channels": [8, 8, 8, 8, 8]}')
    file = checkpoint(tmp_path / "x.pt", weights(channels=32), path_type="Linear", prediction="velocity")
    run = load_config(convert(Options(str(file), num_heads=H, vae=str(tmp_path / "vae"))) / "config.json")
    assert (run.data.image_size, run.data.vae) == ((128, 128), str(tmp_path / "vae"))


def test_lightnings_prefix_is_read(tmp_path):
    w = weights()
    torch.save({"state_dict": {f"model.{n}": v for n, v in w.items()} | {"vae.x": torch.ones(2)}}, tmp_path / "x.ckpt")
    model, _ = from_pretrained(convert(Options(str(tmp_path / "x.ckpt"), num_heads=H)))
    wanted = from_facebook(w, H)
    assert all(torch.equal(p, wanted.tensors[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_keeps_the_position_fixed(tmp_path, dtype):
    save_weights(tmp_path / "x.safetensors", {n: v.to(dtype) for n, v in weights().items()})
    model, _ = from_pretrained(convert(Options(str(tmp_path / "x.safetensors"), num_heads=H)))
    assert (model.config.position, model.pos_embed.requires_grad) == ("fixed", False)
    moved = weights()
    moved["pos_embed"][0, 3, 5] += 0.02
    assert from_facebook({n: v.to(dtype) for n, v in moved.items()}, H).config.position == "learned"


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, number):
    w = weights()
    w["blocks.1.mlp.fc1.weight"][3, 4] = number
    save_weights(tmp_path / "x.safetensors", w)
    with pytest.raises(UserError, match=r"not finite, in what becomes blocks.1.mlp.fc1.weight"):
        convert(Options(str(tmp_path / "x.safetensors"), num_heads=H))
    out = convert(Options(str(checkpoint(tmp_path / "y.pt", weights())), num_heads=H))
    tensors, _ = load_weights(out / "model.safetensors")
    tensors["x_embedder.bias"][0] = number
    save_weights(out / "model.safetensors", tensors)
    with pytest.raises(UserError, match=r"x_embedder.bias holds numbers that are not finite"):
        from_pretrained(out)


def test_a_diffusers_variant_is_read(tmp_path):
    from diffusers import DiTTransformer2DModel

    from fastdit.weights.sources import read_diffusers, weight_files

    theirs = DiTTransformer2DModel(
        num_attention_heads=H, attention_head_dim=D // H, num_layers=1, sample_size=SIDE, num_embeds_ada_norm=3, norm_eps=1e-6
    )
    theirs.half().save_pretrained(tmp_path / "one", variant="fp16")
    theirs.save_pretrained(tmp_path / "parts", variant="fp16", max_shard_size="50KB")
    assert [p.name for p in weight_files(tmp_path / "one")] == ["diffusion_pytorch_model.fp16.safetensors"]
    assert len(weight_files(tmp_path / "parts")) > 1
    for folder in ("one", "parts"):
        found, _ = read_diffusers(tmp_path / folder)
        assert torch.equal(found.tensors["x_embedder.bias"], theirs.pos_embed.proj.bias.float())
    theirs.float().save_pretrained(tmp_path / "one")  # the whole model beside its variant comes first
    assert [p.name for p in weight_files(tmp_path / "one")] == ["diffusion_pytorch_model.safetensors"]
