"""The model against a straight-line restatement in fp64, the published counts, and what its users rely on."""

import dataclasses
import itertools
import math
from contextlib import nullcontext

import pytest
import torch
from fastdit_kernels.attention import sdpa
from fastdit_kernels.cpu import CPU
from fastdit_kernels.reference import REFERENCE
from torch.nn import functional as F

from fastdit.config import ModelConfig, ParallelConfig
from fastdit.embeddings import position_embedding
from fastdit.model import DiT
from fastdit.planning.flops import macs_per_image
from fastdit.recipes import RECIPES, SIZES, dit
from fastdit.runtime import sharding
from fastdit.weights.layouts import named_shapes

SMALL = ModelConfig(input_size=(8, 12), channels=4, num_classes=5, patch=2, depth=3, width=48, num_heads=3)


def random_model(config: ModelConfig, **options) -> DiT:
    """A model whose every parameter is random: adaLN-Zero's zeros would hide most of it."""
    model = DiT(config, REFERENCE, **options)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * 0.2)
    return model


def inputs(config: ModelConfig, B: int = 4):
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(B, config.channels, *config.input_size, generator=rng)
    t = torch.randint(0, 1000, (B,), generator=rng)
    y = torch.randint(0, config.num_classes, (B,), generator=rng) if config.num_classes else None
    return x, t, y


def straight_line(model: DiT, x, t, y):
    """DiT written out sample by sample, token by token where that is plainest, from the parameters alone."""
    c, w = model.config, {name: p.detach().double() for name, p in model.named_parameters()}
    D, H, n = c.width, c.num_heads, len(c.input_size)
    sides = (1, c.patch, c.patch) if n == 3 else (c.patch,) * n
    grid = tuple(whole // side for whole, side in zip(c.input_size, sides, strict=True))
    places = list(itertools.product(*map(range, grid)))
    plane = min(n, 2)  # axes that are convolved

    def window(place):
        return (slice(None), *(slice(i * side, (i + 1) * side) for i, side in zip(place, sides, strict=True)))

    def norm(v):
        return (v - v.mean(-1, keepdim=True)) / torch.sqrt(v.var(-1, unbiased=False, keepdim=True) + 1e-6)

    def gelu(v):
        return 0.5 * v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    def rms(v, weight):
        return v / torch.sqrt((v * v).mean(-1, keepdim=True) + 1e-6) * weight

    images = []
    for b in range(len(x)):
        tokens = [x[b][window(place)].double().flatten() for place in places]
        h = torch.stack(tokens) @ w["x_embedder.weight"].T + w["x_embedder.bias"] + w["pos_embed"]
        freqs = torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float64) / 128)
        sinusoids = torch.cat([torch.cos(t[b] * freqs), torch.sin(t[b] * freqs)])
        e = sinusoids @ w["t_embedder.0.weight"].T + w["t_embedder.0.bias"]
        e = (e * torch.sigmoid(e)) @ w["t_embedder.2.weight"].T + w["t_embedder.2.bias"]
        if y is not None:
            e = e + w["y_embedder.weight"][y[b]]
        mod = ((e * torch.sigmoid(e)) @ w["adaLN_modulation.weight"].T + w["adaLN_modulation.bias"]).view(-1, D)
        for n in range(c.depth):
            shift1, scale1, gate1, shift2, scale2, gate2 = mod[6 * n : 6 * n + 6]
            pre = f"blocks.{n}."
            m = norm(h) * (1 + scale1) + shift1
            qkv = (m @ w[pre + "attn.qkv.weight"].T + w[pre + "attn.qkv.bias"]).view(-1, 3, H, D // H)
            heads = []
            for head in range(H):
                q, k, v = qkv[:, 0, head], qkv[:, 1, head], qkv[:, 2, head]
                if c.qk_norm:
                    q, k = rms(q, w[pre + "attn.q_norm.weight"]), rms(k, w[pre + "attn.k_norm.weight"])
                heads.append(torch.softmax(q @ k.T / math.sqrt(D // H), dim=-1) @ v)
            h = h + gate1 * (torch.cat(heads, -1) @ w[pre + "attn.proj.weight"].T + w[pre + "attn.proj.bias"])
            m = norm(h) * (1 + scale2) + shift2
            a = gelu(m @ w[pre + "mlp.fc1.weight"].T + w[pre + "mlp.fc1.bias"])
            if c.conv_kernel:
                K, before = c.conv_kernel, (c.conv_kernel - 1) // 2
                a, kernel = a.view(*grid, -1), w[pre + "mlp.conv.weight"][:, 0]
                z = torch.zeros_like(a) + w[pre + "mlp.conv.bias"]
                for place, tap in itertools.product(places, itertools.product(range(K), repeat=plane)):
                    near = [i + u - before for i, u in zip(place[-plane:], tap, strict=True)]
                    if all(0 <= i < side for i, side in zip(near, grid[-plane:], strict=True)):
                        z[place] += kernel[(slice(None), *tap)] * a[(*place[:-plane], *near)]
                a = z.view(len(places), -1)
            h = h + gate2 * (a @ w[pre + "mlp.fc2.weight"].T + w[pre + "mlp.fc2.bias"])
        shift, scale = mod[-2:]
        out = (norm(h) * (1 + scale) + shift) @ w["final_layer.linear.weight"].T + w["final_layer.linear.bias"]
        channels = out.shape[1] // math.prod(sides)
        image = torch.zeros(channels, *c.input_size, dtype=torch.float64)
        for place, token in zip(places, out, strict=True):
            image[window(place)] = token.view(*sides, channels).movedim(-1, 0)
        images.append(image)
    return torch.stack(images)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"conv_kernel": 0},
        {"conv_kernel": 4},
        {"conv_kernel": 5},
        {"qk_norm": True},
        {"learn_sigma": True},
        {"num_classes": 0},
        {"class_dropout": 0.1},
        {"channels": 1, "patch": 4},
        {"input_size": (2, 2), "patch": 1, "mlp_ratio": 2},
        {"depth": 1},
        {"input_size": (9,), "patch": 1, "conv_kernel": 7},
        {"input_size": (20,), "patch": 4, "conv_kernel": 4, "learn_sigma": True},
        {"input_size": (3, 4, 6), "conv_kernel": 4},
        {"input_size": (3, 2, 2), "patch": 1, "channels": 1},
    ],
    ids=str,
)
def test_model_equals_a_straight_line_restatement_in_fp64(change):
    config = dataclasses.replace(SMALL, **change)
    model, (x, t, y) = random_model(config), inputs(config)
    truth = straight_line(model, x, t, y)
    # In fp64 the two agree to fp64's rounding; the model's own output is cast to fp32 at the very end.
    found = model.double()(x.double(), t.double(), y)
    assert found.dtype == torch.float32
    assert (found - truth).abs().max() <= 1e-5 * truth.abs().max()


def test_a_new_model_predicts_zeros():
    for conv_kernel in (0, 3):
        config = dataclasses.replace(SMALL, conv_kernel=conv_kernel)
        model = DiT(config, REFERENCE)
        model.init_weights(0)
        assert model(*inputs(config)).count_nonzero() == 0


def test_weights_are_a_function_of_the_seed():
    a, b, other = (DiT(SMALL, REFERENCE) for _ in range(3))
    a.init_weights(0), b.init_weights(0), other.init_weights(1)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.x_embedder.weight, other.x_embedder.weight)
    assert all(torch.isfinite(p).all() for p in a.parameters())


def test_a_label_changes_its_own_sample_alone():
    model, (x, t, y) = random_model(SMALL), inputs(SMALL)
    for b in range(len(y)):
        changed = y.clone()
        changed[b] = (y[b] + 1) % SMALL.num_classes
        moved = (model(x, t, y) != model(x, t, changed)).flatten(1).any(1)
        assert moved.tolist() == [i == b for i in range(len(y))]


def test_modulation_computed_beforehand_gives_the_same_output():
    model, (x, t, y) = random_model(SMALL), inputs(SMALL)
    assert torch.equal(model(x, t, y), model(x, t, modulation=model.condition(t, y)))


def test_recomputing_activations_changes_no_gradient():
    x, t, y = inputs(SMALL)
    gradients = []
    for recompute in (False, True):
        model = random_model(SMALL)
        sharding.checkpoint(model, ParallelConfig(checkpoint_activations=recompute))
        model(x, t, y).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_every_parameter_is_trained():
    model, (x, t, y) = random_model(dataclasses.replace(SMALL, qk_norm=True)), inputs(SMALL)
    model(x, t, y).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.count_nonzero() == 0] == []


def test_position_embedding_tells_the_places_of_any_grid_apart():
    for grid in ((37,), (5, 3, 4), (1, 1, 1)):
        e = position_embedding(grid, 64)
        assert e.shape == (math.prod(grid), 64)
        assert len({tuple(v.tolist()) for v in e}) == len(e)
        assert (e.square().sum(1) - 32).abs().max() < 1e-4  # a pair of sine and cosine for every two of the width
    frames = position_embedding((5, 3, 4), 64).view(5, 12, 64)
    assert torch.equal(frames[0, :, :40], frames[4, :, :40])  # columns, then rows; the rest is the frame's
    assert torch.equal(frames[:, 0, 40:], frames[:, 11, 40:])


def test_position_embedding_tells_rows_from_columns():
    e = position_embedding((3, 5), 16).view(3, 5, 16)
    assert torch.equal(e[0, 2, :8], e[2, 2, :8])  # first half: the column
    assert torch.equal(e[1, 0, 8:], e[1, 4, 8:])  # second half: the row
    assert len({tuple(v.tolist()) for v in e.flatten(0, 1)}) == 15


# arXiv 2212.09748, tables 1, 4 and 5: multiply-adds at 256×256 (latents 4×32×32), parameters in millions.
PUBLISHED_GMACS = {
    ("S", 8): 0.36, ("S", 4): 1.41, ("S", 2): 6.06, ("B", 8): 1.42, ("B", 4): 5.56, ("B", 2): 23.01,
    ("L", 8): 5.01, ("L", 4): 19.70, ("L", 2): 80.71, ("XL", 8): 7.39, ("XL", 4): 29.05, ("XL", 2): 118.64,
}  # fmt: skip
PUBLISHED_PARAMETERS = {"S": 33, "B": 130, "L": 458, "XL": 675}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_counts_agree_with_the_published_table(size, patch):
    config = dit(size, patch, channels=4, num_classes=1000, class_dropout=0.1, learn_sigma=True, conv_kernel=0)
    assert sum(macs_per_image(config).values()) / 1e9 == pytest.approx(PUBLISHED_GMACS[size, patch], rel=0.003, abs=0.01)
    if patch == 2:
        millions = sum(shape.numel() for _, shape in named_shapes(config)) / 1e6
        assert abs(millions - PUBLISHED_PARAMETERS[size]) < 1  # the table rounds to whole millions


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_its_model_on_the_meta_device(name):
    config = RECIPES[name]
    with torch.device("meta"):
        model = DiT(config.model, REFERENCE)
        x = torch.empty(2, config.model.channels, *config.model.input_size)
        t = torch.empty(2, dtype=torch.int64)
        given = {"condition": torch.empty(2, config.model.condition)} if config.model.condition else {}
        out = model(x, t, t if config.model.num_classes else None, **given)
    assert out.shape == (2, config.model.channels * (1 + config.model.learn_sigma), *config.model.input_size)


@pytest.mark.parametrize("grid", [(8, 12), (36,), (3, 4, 6)])
def test_flops_counted_by_torch_agree_with_ours(grid):
    from torch.utils.flop_counter import FlopCounterMode

    def matmul_attention(qkv):  # torch counts matrix products, but not the CPU's own flash attention
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2)

    config = dataclasses.replace(SMALL, input_size=grid)
    model, (x, t, y) = DiT(config, REFERENCE._replace(attention=matmul_attention)), inputs(config, B=1)
    model.init_weights(0)
    with FlopCounterMode(display=False) as counter:
        model(x, t, y)
    assert counter.get_total_flops() == 2 * sum(macs_per_image(config).values())


def test_gelu_of_the_plain_mlp_is_the_tanh_form():
    config = dataclasses.replace(SMALL, conv_kernel=0)
    model = random_model(config)
    h = torch.randn(2, 24, 48)
    mlp = model.blocks[0].mlp
    assert torch.equal(mlp(h), F.linear(F.gelu(mlp.fc1(h), approximate="tanh"), mlp.fc2.weight))  # its bias comes after it


# Whether it trains, and the batch.
SIZES_MET = [(1, 2), (0, 3), (0, 5), (1, 2), (0, 5), (0, 7), (0, 8), (1, 6), (1, 2), (0, 10), (0, 4), (1, 9), (1, 3), (0, 11)]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at that of each tensor it is given
@pytest.mark.parametrize("name", ["REFERENCE", "CPU", "TRITON"])
def test_a_compiled_run_survives_grids_and_batches_of_any_size(name, device):
    """A graph for the first size of a grad mode and one for all others, whatever the block."""
    from fastdit_kernels.triton_ops import TRITON  # here: after the interpreter has been chosen, where there is no GPU

    ops = {"REFERENCE": REFERENCE, "CPU": CPU, "TRITON": TRITON}[name]
    graphs = []

    def backend(graph, inputs):
        graphs.append(torch.is_grad_enabled())
        return graph

    config = ModelConfig(input_size=(4, 4), channels=3, num_classes=5, patch=2, depth=3, width=16, num_heads=2)
    torch._dynamo.reset()
    model = DiT(config, ops._replace(attention=sdpa)).to(device)
    model.init_weights(0)
    for block in model.blocks:
        block.compile(fullgraph=True, backend=backend)
    for training, batch in SIZES_MET:
        with nullcontext() if training else torch.inference_mode():
            given = torch.zeros(batch, 3, 4, 4), torch.zeros(batch), torch.zeros(batch, dtype=torch.int64)
            out = model(*(t.to(device) for t in given))
        if training:
            out.sum().backward()
    torch._dynamo.reset()
    assert max(graphs.count(True), graphs.count(False)) <= 2
