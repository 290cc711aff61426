"""Weights from elsewhere: outputs as diffusers' own class and as restatements of the other two, and files that attack."""

import argparse
import codecs
import contextlib
import io
import math
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from fastdit_kernels.reference import REFERENCE
from torch.nn import functional as F

from fastdit.config import UserError
from fastdit.convert import Options, convert
from fastdit.embeddings import position_embedding
from fastdit.model import DiT
from fastdit.recipes import SIZES, dit
from fastdit.runtime.run import load_config
from fastdit.runtime.tensors import save_weights
from fastdit.weights.folder import from_pretrained
from fastdit.weights.foreign import from_diffusers, from_facebook, from_seed
from fastdit.weights.pickles import check_pickle, load_pickled
from fastdit.weights.sources import read, read_diffusers

pytestmark = pytest.mark.usefixtures("one_thread")

D, L, H, T = 48, 2, 3, 16  # a width, blocks, heads and tokens that are no size of the paper's
ROOT = Path(__file__).parent.parent


def random(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=rng) * 0.2 for name, shape in shapes.items()}


def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def ours(weights) -> DiT:
    model = DiT(weights.config, REFERENCE)
    model.load_state_dict(weights.tensors)
    return model.eval()


def norm(x):
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-6)


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x * torch.sigmoid(x)


def attend(qkv):
    """[B, T, 3·D], q then k then v, each by head → [B, T, D]."""
    q, k, v = (x.unflatten(-1, (H, D // H)).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
    return ((q @ k.transpose(-1, -2) / math.sqrt(D // H)).softmax(-1) @ v).transpose(1, 2).flatten(2)


# --- facebookresearch/DiT ---


def facebook_shapes(p: int = 2, C: int = 4, classes: int = 1000, sigma: bool = True, width: int = D, depth: int = L, tokens=T):
    shapes = {
        "x_embedder.proj.weight": (width, C, p, p),
        "x_embedder.proj.bias": (width,),
        "pos_embed": (1, tokens, width),
        **linear("t_embedder.mlp.0", width, 256),
        **linear("t_embedder.mlp.2", width, width),
        "y_embedder.embedding_table.weight": (classes + 1, width),
        **linear("final_layer.linear", p * p * C * (1 + sigma), width),
        **linear("final_layer.adaLN_modulation.1", 2 * width, width),
    }
    for n in range(depth):
        shapes |= linear(f"blocks.{n}.attn.qkv", 3 * width, width) | linear(f"blocks.{n}.attn.proj", width, width)
        shapes |= linear(f"blocks.{n}.mlp.fc1", 4 * width, width) | linear(f"blocks.{n}.mlp.fc2", width, 4 * width)
        shapes |= linear(f"blocks.{n}.adaLN_modulation.1", 6 * width, width)
    return shapes


def facebook(w, x, t, y):
    """facebookresearch/DiT, written out from its parameters, in their dtype."""

    def fc(name, v):
        return v @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    p = w["x_embedder.proj.weight"].shape[-1]
    h = (
        F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=p).flatten(2).transpose(1, 2)
        + w["pos_embed"]
    )
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=x.dtype) / 128)
    c = fc("t_embedder.mlp.2", silu(fc("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    c = silu(c + w["y_embedder.embedding_table.weight"][y])
    for n in range(sum(name.endswith("attn.qkv.bias") for name in w)):
        b = f"blocks.{n}"
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = fc(f"{b}.adaLN_modulation.1", c)[:, None].chunk(6, -1)
        m = norm(h) * (1 + scale_msa) + shift_msa
        h = h + gate_msa * fc(f"{b}.attn.proj", attend(fc(f"{b}.attn.qkv", m)))
        m = norm(h) * (1 + scale_mlp) + shift_mlp
        h = h + gate_mlp * fc(f"{b}.mlp.fc2", gelu(fc(f"{b}.mlp.fc1", m)))
    shift, scale = fc("final_layer.adaLN_modulation.1", c)[:, None].chunk(2, -1)
    out = fc("final_layer.linear", norm(h) * (1 + scale) + shift)
    side = math.isqrt(h.shape[1])
    return torch.einsum("nhwpqc->nchpwq", out.view(len(x), side, side, p, p, -1)).reshape(len(x), -1, side * p, side * p)


@torch.no_grad()
def agree(model: DiT, truth, x, t, y, labels=None) -> None:
    """In fp64, to the rounding of the output to fp32; in fp32, no farther from the truth than the original is, twice over."""
    exact = truth(torch.float64, x.double(), t.double(), y)
    found = model.double()(x.double(), t.double(), y if labels is None else labels)
    assert (found - exact).abs().max() <= 1e-6 * exact.abs().max()
    found, theirs = model.float()(x, t, y if labels is None else labels), truth(torch.float32, x, t.float(), y)
    assert (found - exact).abs().max() <= 2 * (theirs - exact).abs().max()


@pytest.mark.parametrize(("p", "C", "classes", "sigma"), [(2, 4, 1000, True), (4, 4, 10, False), (8, 3, 7, True)])
def test_facebook_outputs_are_its_own(p, C, classes, sigma):
    w = random(facebook_shapes(p, C, classes, sigma))
    weights = from_facebook(w, num_heads=H)
    assert weights.config.num_classes == classes
    x, t, y = torch.randn(3, C, 4 * p, 4 * p), torch.tensor([0, 500, 999]), torch.tensor([0, classes, 2])  # the null class too
    agree(ours(weights), lambda d, *a: facebook({n: v.to(d) for n, v in w.items()}, *a), x, t, y)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("pixels", [256, 512])
def test_every_size_of_the_paper_is_read_off_the_shapes(size, patch, pixels):
    depth, width, _ = SIZES[size]
    shapes = facebook_shapes(patch, width=width, depth=depth, tokens=(pixels // 8 // patch) ** 2)
    with torch.device("meta"):
        w = {name: torch.empty(shape) for name, shape in shapes.items()}
    w["pos_embed"] = position_embedding((pixels // 8 // patch,) * 2, width)[None]
    found = from_facebook(w).config
    expected = dit(
        size, patch, input_size=(pixels // 8, pixels // 8), channels=4, num_classes=1000, conv_kernel=0, class_dropout=0.1,
        learn_sigma=True, position="fixed",
    )  # fmt: skip
    assert found == expected


# --- diffusers ---


def diffusers_model(**options):
    from diffusers import DiTTransformer2DModel

    given = {
        "num_attention_heads": H,
        "attention_head_dim": D // H,
        "num_layers": L,
        "sample_size": 8,
        "num_embeds_ada_norm": 10,
    }
    model = DiTTransformer2DModel(**{**given, "out_channels": 8, "norm_eps": 1e-6, **options})
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * 0.2)
        for block in model.transformer_blocks:
            block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model.eval()


@pytest.mark.parametrize("options", [{}, {"patch_size": 4, "out_channels": 4}, {"in_channels": 3, "out_channels": 3}], ids=str)
def test_diffusers_outputs_are_its_own(tmp_path, options):
    theirs = diffusers_model(**options)
    theirs.save_pretrained(tmp_path / "transformer")
    weights, notes = read_diffusers(tmp_path)
    assert notes == []
    assert weights.config.position == "fixed"
    x, t, y = torch.randn(3, theirs.config.in_channels, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 10, 2])
    with torch.no_grad():
        wanted = theirs(x, t, y).sample
        found = ours(weights)(x, t, y)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_diffusers_default_norm_is_taken_with_a_note(tmp_path):
    theirs = diffusers_model(norm_eps=1e-5)
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    weights, notes = read_diffusers(tmp_path)
    assert len(notes) == 1
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 10, 2])
    with torch.no_grad():
        wanted = theirs(x, t, y).sample
        found = ours(weights)(x, t, y)
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_a_diffusers_model_that_is_no_dit_is_refused():
    theirs = diffusers_model()
    about = dict(theirs.config)
    state = theirs.state_dict()
    for change, said in (
        ({"norm_eps": 1e-3}, "norm_eps"),
        ({"activation_fn": "geglu"}, "activation_fn"),
        ({"sample_size": 7}, "sample_size"),
    ):
        with pytest.raises(UserError, match=rf"\A[^\n]*{said}[^\n]*\Z"):
            from_diffusers(state, {**about, **change})
    state["transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"] += 1
    with pytest.raises(UserError, match=r"blocks.1.norm1.emb differs from the first block's"):
        from_diffusers(state, about)


# --- the seed repository ---


def seed_shapes(K: int, p: int = 2, C: int = 4, classes: int = 5):
    shapes = {
        **linear("first_layer.patchify.projection", D, p * p * C),
        "first_layer.pos_embed": (1, T, D),
        **linear("first_layer.t_embedder.1", D, D),
        **linear("first_layer.t_embedder.3", D, D),
        "first_layer.y_embedder.weight": (classes, D),
        **linear("final_layer.linear", p * p * C, D),
        **linear("final_layer.adaLN_modulation.1", 2 * D, D),
    }
    for n in range(L):
        shapes |= linear(f"blocks.{n}.attn.c_attn", 3 * D, D) | linear(f"blocks.{n}.attn.c_proj", D, D)
        shapes |= linear(f"blocks.{n}.mlp.c_fc", 4 * D, D) | linear(f"blocks.{n}.mlp.c_proj", D, 4 * D)
        shapes |= linear(f"blocks.{n}.adaLN_modulation.1", 6 * D, D)
        if K:
            shapes |= {
                f"blocks.{n}.mlp.depthwise_conv.weight": (4 * D, 1, K, K),
                f"blocks.{n}.mlp.depthwise_conv.bias": (4 * D,),
            }
    return shapes


def seed(w, x, t, y):
    """The seed's network, written out from its parameters; the last label conditions every image, as it does there."""

    def fc(name, v):
        return v @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    B, C, side, _ = x.shape
    p = math.isqrt(w["first_layer.patchify.projection.weight"].shape[1] // C)
    n = side // p
    patches = x.reshape(B, C, n, p, n, p).permute(0, 2, 4, 3, 5, 1).reshape(B, n * n, p * p * C)
    h = fc("first_layer.patchify.projection", patches) + w["first_layer.pos_embed"]
    half = D // 2
    angles = t[:, None] * torch.exp(torch.arange(half, dtype=x.dtype) * -(math.log(10000) / (half - 1)))
    c = fc("first_layer.t_embedder.3", gelu(fc("first_layer.t_embedder.1", torch.cat([angles.sin(), angles.cos()], 1))))
    c = silu(c[:, None] + w["first_layer.y_embedder.weight"][y])[:, -1]  # [B, 1, D] + [B, D], of which the last row is used
    for i in range(L):
        b = f"blocks.{i}"
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (
            fc(f"{b}.adaLN_modulation.1", c).view(B, 6, D).chunk(6, 1)
        )
        h = h + gate_msa * fc(f"{b}.attn.c_proj", attend(fc(f"{b}.attn.c_attn", norm(h) * (1 + scale_msa) + shift_msa)))
        m = gelu(fc(f"{b}.mlp.c_fc", norm(h) * (1 + scale_mlp) + shift_mlp))
        if f"{b}.mlp.depthwise_conv.weight" in w:
            taps, bias = w[f"{b}.mlp.depthwise_conv.weight"], w[f"{b}.mlp.depthwise_conv.bias"]
            K = taps.shape[-1]
            grid = F.pad(m.transpose(1, 2).reshape(B, 4 * D, n, n), [(K - 1) // 2, K // 2, (K - 1) // 2, K // 2])
            m = F.conv2d(grid, taps, bias, groups=4 * D).reshape(B, 4 * D, n * n).transpose(1, 2)
        h = h + gate_mlp * fc(f"{b}.mlp.c_proj", m)
    shift, scale = fc("final_layer.adaLN_modulation.1", c).view(B, 2, D).chunk(2, 1)
    out = fc("final_layer.linear", norm(h) * (1 + scale) + shift).view(B, n, n, p, p, C)
    return out.permute(0, 5, 1, 3, 2, 4).reshape(B, C, side, side)


@pytest.mark.parametrize(("K", "p", "C"), [(3, 2, 4), (4, 2, 4), (4, 4, 1), (0, 2, 4)])
def test_seed_outputs_are_its_own_for_one_class(K, p, C):
    w = random(seed_shapes(K, p, C))
    model = ours(from_seed(w, num_heads=H, patch=p))
    assert model.config.conv_kernel == K
    x, t = torch.randn(3, C, 4 * p, 4 * p), torch.tensor([0, 500, 999])
    agree(model, lambda d, *a: seed({n: v.to(d) for n, v in w.items()}, *a), x, t, torch.tensor([2, 2, 2]))
    if K != 4:
        return
    # With several classes each image goes by its own here, and all by the last one there.
    agree(
        model,
        lambda d, *a: seed({n: v.to(d) for n, v in w.items()}, *a),
        x,
        t,
        torch.tensor([0, 1, 3]),
        torch.tensor([3, 3, 3]),
    )


class DiTConfig:
    """As a Lightning checkpoint pickles the seed's configuration: an instance of a class that need not exist here."""

    def __init__(self):
        self.image_size, self.patch_size, self.in_channels, self.n_layer, self.n_head, self.n_embd = 8, 2, 4, L, H, D


def lightning(path: Path, w) -> None:
    state = {f"net.{n}": v for n, v in w.items()} | {"vae.vae.encoder.conv_in.weight": torch.randn(4, 3, 3, 3)}
    adam = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    # In the order and the types of pytorch_lightning 2.6.
    checkpoint = {"epoch": 3, "global_step": 7, "pytorch-lightning_version": "2.6.6", "state_dict": OrderedDict(state)}
    checkpoint |= {"loops": {"fit_loop": {"state_dict": {}, "epoch_loop.batch_progress": {"total": {"ready": 4}}}}}
    checkpoint |= {"callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": None, "dirpath": "/runs"}}}
    checkpoint |= {"optimizer_states": [adam.state_dict()], "lr_schedulers": [{"last_epoch": 1, "_last_lr": [1e-4]}]}
    checkpoint |= {"hparams_name": "kwargs", "hyper_parameters": {"dit_config": DiTConfig(), "out": Path("x")}}
    torch.save(checkpoint, path)


def test_a_lightning_checkpoint_becomes_a_folder_that_samples(tmp_path, monkeypatch):
    w = random(seed_shapes(4))
    lightning(tmp_path / "dit.ckpt", w)
    monkeypatch.delitem(sys.modules, DiTConfig.__module__)  # as where the seed's code is not installed
    out = convert(Options(str(tmp_path / "dit.ckpt")))
    model, _ = from_pretrained(out)
    expected = ours(from_seed(w, num_heads=H))
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 4])
    assert torch.equal(model(x, t, y), expected(x, t, y))
    assert load_config(out / "config.json").diffusion.beta_schedule == "squaredcos_cap_v2"
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
    with pytest.raises(UserError, match="exists and is not empty"):
        convert(Options(str(tmp_path / "dit.ckpt")))


def test_a_facebook_checkpoint_gives_its_ema_or_its_weights(tmp_path):
    a, b = random(facebook_shapes(classes=10), 0), random(facebook_shapes(classes=10), 1)
    saved = {"model": b, "ema": a, "opt": {"state": {}}, "args": argparse.Namespace(model="DiT-XL/2", global_batch_size=256)}
    torch.save(saved, tmp_path / "0400000.pt")
    torch.save(a, tmp_path / "plain.pt")
    save_weights(tmp_path / "plain.safetensors", a)
    for options, wanted in (
        (Options(str(tmp_path / "0400000.pt"), num_heads=H), a),
        (Options(str(tmp_path / "0400000.pt"), str(tmp_path / "live"), "model", num_heads=H), b),
        (Options(str(tmp_path / "plain.pt"), num_heads=H), a),
        (Options(str(tmp_path / "plain.safetensors"), str(tmp_path / "from safetensors"), num_heads=H), a),
    ):
        (model, run), expected = from_pretrained(convert(options)), ours(from_facebook(wanted, H))
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True))
    assert (run.diffusion.beta_schedule, run.data.vae) == ("linear", "stabilityai/sd-vae-ft-ema")


def test_a_pipeline_folder_says_how_it_was_trained(tmp_path):
    from diffusers import DDIMScheduler

    diffusers_model().save_pretrained(tmp_path / "transformer")
    DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", beta_start=1e-4).save_pretrained(
        tmp_path / "scheduler"
    )
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    run = load_config(convert(Options(str(tmp_path), str(tmp_path / "out"))) / "config.json")
    assert (run.diffusion.beta_schedule, run.diffusion.prediction, run.diffusion.clip_x0) == ("scaled_linear", "v", False)
    assert run.data.vae == str(tmp_path / "vae")
    assert run.data.image_size == (64, 64)


def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path):
    w = random(facebook_shapes(classes=10))
    save_weights(tmp_path / "other.safetensors", {"encoder.weight": torch.zeros(3)})
    for change, said in (
        (lambda w: w.pop("blocks.1.mlp.fc2.bias"), "lack blocks.1.mlp.fc2.bias"),
        (lambda w: w.update({"blocks.1.mlp.fc2.bias": torch.zeros(7)}), "blocks.1.mlp.fc2.bias is 7; expected 48"),
        (lambda w: w.update({"extra": torch.zeros(7)}), "hold extra"),
        (lambda w: w.update({"pos_embed": torch.zeros(1, 15, D)}), "no square"),
        (lambda w: w.pop("t_embedder.mlp.0.weight"), "lack t_embedder.mlp.0.weight"),
    ):
        changed = dict(w)
        change(changed)
        with pytest.raises(UserError, match=rf"\A[^\n]*{re.escape(said)}[^\n]*\Z"):
            from_facebook(changed, H)
    with pytest.raises(UserError, match="give --num_heads"):
        from_facebook(w)
    with pytest.raises(UserError, match="of no known kind"):
        convert(Options(str(tmp_path / "other.safetensors")))
    with pytest.raises(UserError, match="early version"):
        from_seed({"first_layer.t_embedder.0.weight": torch.zeros(D, 1)})


def test_the_verb_refuses_with_status_2(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"PK\x03\x04 not a zip")
    end = subprocess.run(
        [sys.executable, ROOT / "fastdit" / "convert.py", str(tmp_path / "x.pt")], capture_output=True, text=True, cwd=tmp_path
    )
    assert (end.returncode, end.stdout, end.stderr.count("\n")) == (2, "", 1)
    assert end.stderr.startswith("error: ")


# --- files that attack ---


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *args, state=None):
        self.function, self.args, self.state = function, args, state

    def __reduce__(self):
        return (self.function, self.args) if self.state is None else (self.function, self.args, self.state)


def attacks(mark: Path) -> dict[str, object]:
    touch = f"touch {mark}"
    code = f"open({str(mark)!r}, 'w').close()"
    return {
        "os.system": Call(os.system, touch),
        "builtins.eval": Call(eval, code),
        "builtins.exec": Call(exec, code),
        "nested in a list in a dict": {"a": [{"b": (Call(os.system, touch),)}]},
        "setstate": Call(argparse.Namespace, state=Call(os.system, touch)),
        "getattr gadget": Call(getattr, Call(__import__, "os"), "system"),
        "getattr gadget, called": Call(Call(getattr, Call(__import__, "os"), "system"), touch),
        "codecs": Call(codecs.decode, Call(eval, code), "rot13"),
        "subprocess": Call(subprocess.check_call, ["touch", str(mark)]),
        "open": Call(open, str(mark), "w"),
        "as a key": {1: Call(os.system, touch), "state_dict": Call(os.mkdir, str(mark))},
        "map": Call(list, Call(map, os.system, [touch])),
    }


def zipped(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", b"3\n")
        for name, data in entries.items():
            archive.writestr(f"archive/{name}", data)
    return path


def refuses(path: Path, said: str = "") -> None:
    with pytest.raises(UserError, match=rf"\A[^\n]*{said}[^\n]*\Z"):
        read(path)


@pytest.mark.parametrize("kind", attacks(Path("x")))
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_with_code_runs_none_of_it(tmp_path, kind, protocol):
    mark = tmp_path / "executed"
    value = attacks(mark)[kind]
    if kind == "getattr gadget, called":
        # The pickler wants a callable by name; the instructions themselves do not.
        value = b"cbuiltins\ngetattr\n(cos\nsystem\nVx\ntR(V" + f"touch {mark}".encode() + b"\ntR."
    pickled = value if isinstance(value, bytes) else pickle.dumps(value, protocol)
    # The attack is real: the standard reader would do it.
    if kind in ("os.system", "builtins.eval"):
        pickle.loads(pickled)
        assert mark.exists()
        mark.unlink()
    refuses(zipped(tmp_path / "x.pt", pickled), "holds no tensors by name|not a readable")
    (tmp_path / "legacy.ckpt").write_bytes(pickled)
    refuses(tmp_path / "legacy.ckpt")
    assert not mark.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_code_beside_good_tensors_is_not_run(tmp_path, protocol):
    mark = tmp_path / "executed"
    w = random(seed_shapes(3))
    code = Call(eval, f"open({str(mark)!r}, 'w').close()")
    torch.save({"state_dict": w, "hyper_parameters": {"dit_config": code}}, tmp_path / "x.ckpt", pickle_protocol=protocol)
    if protocol == 2:
        assert load_pickled(tmp_path / "x.ckpt")["hyper_parameters"] == {"dit_config": {}}
        tensors, _ = read(tmp_path / "x.ckpt")
        assert all(torch.equal(tensors[n], w[n]) for n in w)
    else:
        refuses(tmp_path / "x.ckpt", "not a readable")  # torch.load reads protocol 2, the one that torch.save writes
    assert not mark.exists()
    torch.save({"state_dict": w, "x": Call(os.system, f"touch {mark}")}, tmp_path / "os.ckpt")
    refuses(tmp_path / "os.ckpt", "is blocked")
    assert not mark.exists()


def test_what_torch_calls_by_itself_cannot_claim_memory(tmp_path):
    for number, call in enumerate((Call(bytearray, 10**13), Call(torch.Tensor, 10**13), Call(torch.UntypedStorage, 10**13))):
        pickled = pickle.dumps({"state_dict": {"w": torch.zeros(3).tolist()}, "x": call}, 2)
        refuses(zipped(tmp_path / f"{number}.pt", pickled), "which weights do not need")


def test_the_legacy_format_of_torch_is_refused_unread(tmp_path):
    mark = tmp_path / "executed"
    torch.save(
        {"state_dict": {"a": torch.zeros(3)}, "x": Call(os.system, f"touch {mark}")},
        tmp_path / "x.pt",
        _use_new_zipfile_serialization=False,
    )
    refuses(tmp_path / "x.pt", "before torch 1.6")
    assert not mark.exists()


def test_bombs_are_refused_by_size(tmp_path):
    big = zipped(tmp_path / "deflated.pt", pickle.dumps({}), zipfile.ZIP_DEFLATED, **{"data/0": bytes(10**8)})
    assert big.stat().st_size < 10**6
    refuses(big, "compressed")
    refuses(zipped(tmp_path / "long.pt", bytes(65 << 20)), "at most")

    # Two entries of the central directory over one run of bytes.
    plain = zipped(tmp_path / "plain.pt", pickle.dumps({}), **{"data/0": bytes(10**6)})
    data = plain.read_bytes()
    end = data.rindex(b"PK\x05\x06")
    start = struct.unpack("<I", data[end + 16 : end + 20])[0]
    directory = data[start:end]
    again = directory[directory.rindex(b"PK\x01\x02") :].replace(b"data/0", b"data/1")
    counts = struct.pack("<HHII", 4, 4, len(directory + again), start)
    (tmp_path / "overlap.pt").write_bytes(data[:start] + directory + again + data[end : end + 8] + counts + b"\0\0")
    refuses(tmp_path / "overlap.pt", "overlap")


def tensor_file(path: Path, numel: int, offset, shape, stride, key="0", data=bytes(16)) -> Path:
    """A file whose pickle claims what it likes of its only storage, 4 fp32 zeros."""

    class Claim:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Pid(), offset, shape, stride, False, {})

    class Pid:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, key, "cpu", numel) if isinstance(value, Pid) else None

    out = io.BytesIO()
    Pickler(out, 2).dump({"state_dict": {"w": Claim()}})
    return zipped(path, out.getvalue(), **{"data/0": data})


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        ((4, 0, (2**40,), (0,)), "leaves its storage"),  # one number repeated for ever
        ((4, 0, (8,), (1,)), "resize storage"),
        ((4, 2, (2, 2), (2, 1)), "resize storage"),
        ((4, 0, (2,), (7,)), "resize storage"),
        ((4, -1, (2,), (1,)), "invalid storage offset"),
        ((4, 0, (-2,), (1,)), "overflow"),
        ((4, 0, (2, 2), (1,)), "unequal size length"),
        ((4, 0, ("a",), (1,)), "invalid combination"),
        ((10**12, 0, (10**12,), (1,)), "resize storage"),
        ((4, 0, (4,), (1,), "../../../etc/passwd"), "failed locating file"),
        ((4, 0, (4,), (1,), "0", bytes(12)), "not what the file has"),
    ],
    ids=str,
)
def test_a_tensor_stays_in_its_storage(tmp_path, claim, said):
    refuses(tensor_file(tmp_path / "x.pt", *claim), said)


def test_any_flipped_byte_of_a_tensor_is_noticed(tmp_path):
    path = tensor_file(tmp_path / "x.pt", 4, 0, (2, 2), (1, 2), data=bytes(range(16)))
    assert read(path)[0]["w"].shape == (2, 2)
    data = path.read_bytes()
    at = data.index(bytes(range(16)))
    path.write_bytes(data[: at + 5] + b"\xff" + data[at + 6 :])
    refuses(path, "'archive/data/0' does not have its checksum")


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_pickle_is_refused_or_read(tmp_path, seed):
    """Whatever the bytes, nothing but a value or a UserError comes out."""
    good = pickle.dumps({"state_dict": {"a": [1, (2.5, "x")]}, "b": Call(argparse.Namespace, state={"c": None})}, 2)
    rng = torch.Generator().manual_seed(seed)
    for _ in range(100):
        at, value = torch.randint(len(good), (1,), generator=rng).item(), torch.randint(256, (1,), generator=rng).item()
        data = bytearray(good)
        data[at] = value
        path = zipped(tmp_path / "x.pt", bytes(data))
        with contextlib.suppress(UserError):
            load_pickled(path)


def test_nesting_that_would_take_for_ever_to_hash_is_refused(tmp_path):
    deep = b"\x80\x02}(K\x01tq\x01" + b"(h\x01h\x01tq\x01" * 200 + b"K\x01s."  # t = (t, t), 200 times, as a key
    with pytest.raises(ValueError, match="most of them the same"):
        check_pickle(deep)
    refuses(zipped(tmp_path / "x.pt", deep), "most of them the same")
    dup = b"\x80\x02})" + b"2\x86" * 200 + b"K\x01s."  # the same by an instruction that torch does not know
    refuses(zipped(tmp_path / "y.pt", dup))


def test_a_list_that_holds_itself_ends(tmp_path):
    rows = b"".join(b"]q%c(h%ch%ce" % (n, n - 1, n - 1) for n in range(2, 60))
    path = zipped(tmp_path / "x.pt", b"\x80\x02]q\x01" + rows + b".")
    assert isinstance(load_pickled(path), list)


def test_objects_of_other_programs_give_their_fields(tmp_path):
    import collections
    import enum

    import numpy as np

    values = {
        "namespace": argparse.Namespace(n_head=3),
        "defaultdict": collections.defaultdict(list, a=[1]),
        "path": Path("x"),
        "numpy": np.float64(3.5),
        "array": np.arange(3),
        "function": math.sqrt,
        "flag": re.RegexFlag.IGNORECASE,
    }
    assert issubclass(re.RegexFlag, enum.Enum)
    torch.save({"hyper_parameters": values, "state_dict": {"w": torch.ones(2)}}, tmp_path / "x.ckpt")
    root = load_pickled(tmp_path / "x.ckpt")
    assert vars(root["hyper_parameters"]["namespace"]) == {"n_head": 3}
    assert root["hyper_parameters"]["defaultdict"] == {"a": [1]}
    assert root["state_dict"]["w"].tolist() == [1, 1]
