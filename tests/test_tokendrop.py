"""Token drop: which tokens the middle blocks see, what they make of them, and a run that ends on all tokens."""

import dataclasses
from pathlib import Path

import pytest
import torch
from fastdit_kernels.attention import sdpa
from fastdit_kernels.cpu import CPU
from fastdit_kernels.reference import REFERENCE

from fastdit import config as C
from fastdit import train
from fastdit.config import Config, ModelConfig, UserError
from fastdit.diffusion import draw
from fastdit.model import DiT
from fastdit.planning import costs, memory
from fastdit.planning.flops import macs_per_image, mean_flops_per_image, train_flops_per_image
from fastdit.planning.gpus import GPUS
from fastdit.recipes import RECIPES, dit
from fastdit.runtime import saved
from fastdit.runtime.graph import WARM_UPS, Graphed
from fastdit.runtime.resuming import differences
from fastdit.runtime.tensors import load_weights
from fastdit.runtime.validation import validate
from fastdit.tokendrop import drops, ends, spread, thin
from fastdit.weights.folder import locate

SMALL = ModelConfig(input_size=(8, 12), patch=2, depth=4, width=32, num_heads=2, num_classes=3, token_drop=True)


def corners_of(B: int, grid: tuple[int, ...] = (2, 3)) -> torch.Tensor:
    return torch.randint(0, 4, (B, *grid), generator=torch.Generator().manual_seed(B))


def network(config: ModelConfig = SMALL, ops=REFERENCE) -> DiT:
    """With every parameter random, so that no gate is closed."""
    model = DiT(config, ops)
    rng = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = 0.2 * torch.randn(p.shape, generator=rng)
    return model


def inputs(B: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(B, 3, 8, 12, generator=rng), torch.rand(B, generator=rng) * 1000, torch.arange(B) % 3


def test_one_token_of_each_cell_is_kept_and_goes_back_to_its_place():
    B, R, C, D = 2, 2, 3, 5
    x = torch.randn(B, 4 * R * C, D, dtype=torch.float64, requires_grad=True)
    corners = corners_of(B)
    kept = thin(x, corners)
    back = spread(kept, corners)
    for b in range(B):
        for r in range(R):
            for c in range(C):
                corner = int(corners[b, r, c])
                token = (2 * r + corner // 2) * 2 * C + 2 * c + corner % 2
                assert torch.equal(kept[b, r * C + c], x[b, token])
                assert torch.equal(back[b, token], x[b, token])
    assert int((back != 0).sum()) == B * R * C * D
    assert torch.autograd.gradcheck(lambda x: spread(thin(x, corners).sin(), corners), (x,))


def restated(model: DiT, x, t, y, corners) -> torch.Tensor:
    """The forward in words: outer blocks on all tokens; middle ones on those kept, by index; the sum of two projections."""
    config, ops = model.config, model.ops
    B, (rows, columns) = len(x), config.grid
    patches = torch.nn.functional.pixel_unshuffle(x, config.patch).flatten(2).transpose(1, 2)
    h = model.x_embedder(patches) + model.pos_embed
    modulation = model.condition(t, y)
    first, *vectors = modulation.split([2] + [6] * config.depth, dim=1)
    m = ops.ln_modulate(h, *first.unbind(1))
    h, m = model.blocks[0](h, m, vectors[0])
    before = h
    if corners is None:
        index = torch.arange(rows * columns).expand(B, -1)
    else:
        r, c = torch.meshgrid(torch.arange(rows // 2), torch.arange(columns // 2), indexing="ij")
        index = ((2 * r + corners // 2) * columns + 2 * c + corners % 2).flatten(1)
    index = index[..., None].expand(-1, -1, config.width)
    h, m = h.gather(1, index), m.gather(1, index)
    for n in range(1, config.depth - 1):
        h, m = model.blocks[n](h, m, vectors[n])
    placed = torch.zeros_like(before).scatter(1, index, h)
    h = model.fusion.before(before) + placed @ model.fusion.after.weight.T
    m = ops.ln_modulate(h, vectors[-2][:, 4], vectors[-2][:, 5])
    _, m = model.blocks[-1](h, m, vectors[-1])
    out = model.final_layer(m)
    out = out.view(B, rows, columns, config.patch, config.patch, -1).permute(0, 5, 1, 3, 2, 4)
    return out.reshape(B, -1, *config.input_size)


@pytest.mark.parametrize("kernel", [3, 0])
@pytest.mark.parametrize("dropped", [True, False])
def test_the_network_is_its_restatement_with_every_gradient(dropped, kernel):
    config = dataclasses.replace(SMALL, conv_kernel=kernel)
    model, (x, t, y) = network(config).double(), inputs()
    corners = corners_of(3) if dropped else None
    x = x.double()
    found, expected = model(x, t.double(), y, corners=corners), restated(model, x, t.double(), y, corners)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    names = [n for n, _ in model.named_parameters()]
    for name, a, b in zip(
        names,
        torch.autograd.grad(found, list(model.parameters()), upstream.float()),
        torch.autograd.grad(expected, list(model.parameters()), upstream),
        strict=True,
    ):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9, name


def test_dropped_tokens_reach_the_outcome_past_the_middle_blocks_alone():
    model, (x, t, y) = network(), inputs(1)
    corners = torch.zeros(1, 2, 3, dtype=torch.long)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, out: seen.append(args[0].shape[1]))
    model(x, t, y, corners=corners)
    model(x, t, y)
    assert seen == [24, 6, 6, 24, 24, 24, 24, 24]
    assert [ends(depth) for depth in (3, 6, 11, 12, 28)] == [1, 1, 1, 2, 2]


@pytest.mark.parametrize("corners", [True, False])
def test_the_start_leaves_kept_tokens_as_they_are(corners):
    model, (x, t, y) = DiT(SMALL, REFERENCE), inputs()
    model.init_weights(0)
    before = torch.randn(3, 24, 32)
    chosen = corners_of(3) if corners else None
    after = thin(before, chosen) if corners else before
    fused = model.fusion(before, after, chosen)
    expected = before / 2 + (spread(after, chosen) if corners else after) / 2
    torch.testing.assert_close(fused, expected)
    assert model(x, t, y, corners=chosen).shape == x.shape


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at that of each tensor it is given
@pytest.mark.parametrize("name", ["REFERENCE", "CPU", "TRITON"])
def test_compiled_blocks_do_both_grids_on_all_ops(name, device):
    from fastdit_kernels.triton_ops import TRITON  # here: after the interpreter has been chosen, where there is no GPU

    ops = {"REFERENCE": REFERENCE, "CPU": CPU, "TRITON": TRITON}[name]
    model, (x, t, y) = network(SMALL, ops._replace(attention=sdpa)), inputs()
    torch._dynamo.reset()
    expected = [model(x, t, y, corners=c) for c in (corners_of(3), None)]
    for block in model.blocks:
        block.compile(fullgraph=True, backend="eager")
    for c, before in zip((corners_of(3), None), expected, strict=True):
        torch.testing.assert_close(model(x, t, y, corners=c), before, rtol=1e-5, atol=1e-5)
        reference = network()(x, t, y, corners=c)
        torch.testing.assert_close(before, reference, rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()


def test_which_tokens_are_kept_follows_from_seed_and_image_alone():
    objective = train.choose_objective(RECIPES["cats"], torch.device("cpu"))
    x0 = torch.zeros(40, 3, 8, 8)
    whole = draw(objective, x0, None, 7, 100, cells=(3, 2)).corners
    assert whole.shape == (40, 3, 2)
    assert whole.dtype == torch.int64
    assert torch.equal(draw(objective, x0[:7], None, 7, 115, cells=(3, 2)).corners, whole[15:22])
    assert not torch.equal(draw(objective, x0, None, 8, 100, cells=(3, 2)).corners, whole)
    counts = draw(objective, torch.zeros(4000, 1, 1, 1), None, 0, 0, cells=(1, 1)).corners.flatten().bincount(minlength=4)
    assert ((counts - 1000).abs() < 120).all()
    assert draw(objective, x0, None, 7, 100).corners is None


# --- a run ---


def tiny(folder: Path, **groups) -> Config:
    config = C.replace(
        RECIPES["cats"],
        run={"name": "tiny", "folder": str(folder / "runs")},
        data={"num_images": 64, "packs": str(folder / "packs")},
        model={"patch": 8, "depth": 3, "width": 16, "num_heads": 1, "token_drop": True},
        train={"images": 80, "batch": 4, "warmup_images": 8, "whole_share": 0.3},
        sample={"num": 2, "steps": 1},
        log={"save_every": 20, "sample_every": 80, "print_every": 4},
        parallel={"precision": "fp32", "threads": 1},
    )
    return C.replace(config, **groups)


def run(config: Config, per_rank: int, stop: int = 0) -> list[bool]:
    """Train; which steps dropped tokens. stop: end as a killed process does, before this step."""
    seen, losses = [], train.update

    def noted(model, objective, optimizer, drawn, rates):
        if stop and len(seen) == stop:
            raise SystemExit(0)
        seen.append(drawn[0].corners is not None)
        return losses(model, objective, optimizer, drawn, rates)

    train.update = noted
    assert train.train(C.replace(config, train={"batch": per_rank})) == 0
    return seen


def test_a_run_ends_on_all_tokens_and_resumes_to_the_bit_on_any_ranks(run_ranks, tmp_path):
    (tmp_path / "a").mkdir()
    [seen] = run_ranks(1, run, tiny(tmp_path / "a"), 4, init=False)
    assert seen == [True] * 14 + [False] * 6
    weights = load_weights(locate(tmp_path / "a" / "runs" / "tiny").weights)[0]
    for world, stop in ((1, 12), (2, 17)):
        folder = tmp_path / f"{world}"
        folder.mkdir()
        assert [o.code for o in run_ranks.outcomes(1, run, tiny(folder), 4, stop, init=False)] == [0]
        assert saved.complete(folder / "runs" / "tiny" / "checkpoints")
        run_ranks(world, run, tiny(folder), 4 // world, init=False)
        resumed = load_weights(locate(folder / "runs" / "tiny").weights)[0]
        for name, t in weights.items():
            if world == 1:
                assert torch.equal(resumed[name], t), name
            else:
                torch.testing.assert_close(resumed[name], t, rtol=1e-3, atol=1e-4)


class Recorded:
    """A stand-in for a GPU's graphs that counts captures."""

    def __init__(self):
        self.captures = 0

    def warm_up(self):
        return torch.enable_grad()

    def capture(self, call):
        self.captures += 1
        call()
        return self

    def replay(self):
        pass


def test_a_captured_step_is_captured_anew_on_all_tokens():
    backend, calls = Recorded(), []
    graphed = Graphed(lambda drawn: calls.append(drawn[1] is None) or drawn[0], backend=backend)
    for _ in range(WARM_UPS + 2):
        graphed((torch.ones(2), torch.zeros(2)))
    assert backend.captures == 1
    for _ in range(WARM_UPS + 2):
        graphed((torch.ones(2), None))
    assert backend.captures == 2
    assert calls == [False] * (WARM_UPS + 1) + [True] * (WARM_UPS + 1)


def test_flops_and_parameters_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    def matmul_attention(qkv):
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2)

    model, (x, t, y) = network(SMALL, REFERENCE._replace(attention=matmul_attention)), inputs(1)
    for corners in (corners_of(1), None):
        with FlopCounterMode(display=False) as counter:
            model(x, t, y, corners=corners)
        assert counter.get_total_flops() == 2 * sum(macs_per_image(SMALL, corners is not None).values())
    assert memory.num_parameters(SMALL) == sum(p.numel() for p in model.parameters())
    # B/2 and XL/2 at 256 tokens, of whole forwards: as the paper's share of tokens has it, with the fusion's own.
    for size, share in (("B", 0.51), ("XL", 0.36)):
        plain, sparse = dit(size, 2, channels=4), dit(size, 2, channels=4, token_drop=True)
        assert train_flops_per_image(sparse, True) / train_flops_per_image(plain) == pytest.approx(share, abs=0.02)


def test_the_plan_says_the_mean_over_the_run():
    plain = RECIPES["cats-256"]
    config = C.replace(plain, model={"token_drop": True})
    cluster = costs.Cluster(GPUS["a100-80gb"], 8, 1, 25.0)
    whole, dropped = (sum(p.flops for p in costs.parts(config, cluster, d)) for d in (False, True))
    assert whole == pytest.approx(32 * train_flops_per_image(config.model))
    assert dropped == pytest.approx(32 * train_flops_per_image(config.model, True))
    assert costs.bound(config, cluster).compute_s == pytest.approx((0.1 * whole + 0.9 * dropped) / cluster.gpu.flops)
    assert mean_flops_per_image(config) == pytest.approx((0.1 * whole + 0.9 * dropped) / 32)
    assert costs.bound(config, cluster).step_s < costs.bound(plain, cluster).step_s / 1.6


def test_the_last_tenth_is_on_all_tokens():
    config = C.replace(RECIPES["cats"], model={"token_drop": True}, train={"images": 1000})
    assert [drops(config, n) for n in (0, 899, 900, 999)] == [True, True, False, False]
    assert not drops(RECIPES["cats"], 0)


@pytest.mark.parametrize("groups", [{"model": {"patch": 32}}, {"model": {"depth": 2}}], ids=str)
def test_what_cannot_be_thinned_is_refused(groups):
    config = C.replace(C.replace(RECIPES["cats"], model={"token_drop": True}), **groups)
    with pytest.raises(UserError, match="needs pictures of even rows and columns of tokens"):
        validate(config)


def test_cats_256_fast_is_cats_256_but_for_what_the_page_says():
    plain, fast = RECIPES["cats-256"], RECIPES["cats-256-fast"]
    changed = {d.partition(":")[0] for d in differences(fast, plain)}
    assert changed == {*(f"diffusion.{n}" for n in ("kind", "prediction", "flow_t")), "model.token_drop", "train.ema"}
    cluster = costs.Cluster(GPUS["a100-80gb"], 8, 1, 25.0)
    bounds = [costs.bound(config, cluster) for config in (plain, fast)]
    page = (Path(__file__).parent.parent / "docs" / "quality.md").read_text()
    for bound, minutes in zip(bounds, (25, 15), strict=True):
        assert f"{bound.images / bound.step_s:,.0f}" in page
        assert plain.train.images / (bound.images / bound.step_s / 2) / 60 == pytest.approx(minutes, abs=0.5)
