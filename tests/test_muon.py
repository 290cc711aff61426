"""Muon against the SVD, against a restatement on whole matrices, and on shards of awkward sizes."""

import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fastdit import muon
from fastdit.config import TrainConfig
from fastdit.optim import Optimizer
from fastdit.runtime import sharding

D, F, BATCH = 6, 10, 8
CONFIG = TrainConfig(
    images=80, lr=1e-2, warmup_images=12, weight_decay=0.1, beta2=0.95, ema=0.9, grad_clip=0.5, optimizer="muon"
)
ALL = {f"blocks.{n}.{name}" for n in range(2) for name in muon.MATRICES}


class Block(nn.Module):
    """The names of model.Block. Over 4 ranks no matrix is split evenly, and thirds of qkv lie across shards."""

    def __init__(self):
        super().__init__()
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(D, F), nn.Linear(F, D)

    def forward(self, h):
        q, k, v = self.attn.qkv(h).chunk(3, -1)
        h = h + self.attn.proj(q.sin() * k.cos() + v)
        return h + self.mlp.fc2(self.mlp.fc1(h).sin())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3, D)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.last = nn.Linear(D, 3)

    def forward(self, y):
        h = self.table(y)
        for block in self.blocks:
            h = block(h)
        return self.last(h)


def build(shard: int) -> Net:
    """Sharded over so many ranks, replicated over the rest; 0: whole."""
    torch.manual_seed(0)
    net = Net()
    if shard:
        copies = dist.get_world_size() // shard
        names = ("replicate", "shard")
        mesh = (
            init_device_mesh("cpu", (copies, shard), mesh_dim_names=names) if copies > 1 else init_device_mesh("cpu", (shard,))
        )
        for block in net.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=False)
        fully_shard(net, mesh=mesh, reshard_after_forward=False)
    return net


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32)


def train(shard: int, poison: int | None = None, kernel: bool = False, change=lambda net: None, steps: int = 4, ema=0.9):
    """The tensors after some steps, and those whose bits each step changed. At step `poison` a gradient has a NaN."""
    net = build(shard)
    optimizer = Optimizer(net, dataclasses.replace(CONFIG, ema=ema), BATCH, kernel=kernel)
    changed = []
    for step in range(steps):
        (net(torch.tensor([0, 1, 2, 1])) - step).square().mean().mul(10).backward()
        change(net)
        if step == poison and (not shard or dist.get_rank() == dist.get_world_size() - 1):
            sharding.local(net.blocks[0].attn.qkv.weight.grad)[0, 0] = math.nan
        before = {n: full(t) for n, t in optimizer.tensors().items()}
        optimizer.step(optimizer.rates(step * BATCH))
        assert all(p.grad is None for p in net.parameters())
        changed.append({n for n, t in optimizer.tensors().items() if not torch.equal(bits(full(t)), bits(before[n]))})
    return {n: full(t) for n, t in optimizer.tensors().items()}, changed


# --- one matrix ---


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (16, 64), (48, 12), (1, 5)])
def test_the_update_has_the_svds_directions_and_singular_values_near_one(rows, columns):
    torch.manual_seed(1)
    given = [torch.randn(rows, columns) * size for size in (1e-3, 1.0, 1e3)]
    for matrix, update in zip(given, muon.updates(given), strict=True):
        u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
        found = u.T @ (update.double() / (0.2 * math.sqrt(max(rows, columns)))) @ vt.T
        kept = s > 0.02 * s.norm()  # where the quintic, of slope 3.4445 at 0, has had the steps it needs
        assert found.diagonal()[kept].min() > 0.6
        assert found.diagonal().max() < 1.25
        assert (found - found.diagonal().diag()).abs().max() < 1e-4  # U and V are the matrix's own


def test_a_zero_matrix_has_no_update():
    assert not muon.updates([torch.zeros(3, 4)])[0].any()


def test_equal_matrices_are_one_product_and_none_knows_of_another():
    torch.manual_seed(2)
    given = [torch.randn(6, 4), torch.randn(4, 6), torch.randn(4, 4)]
    for alone, together in zip([muon.updates([m])[0] for m in given], muon.updates(given), strict=True):
        torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6)


# --- a step ---


def restated(steps: int) -> dict[str, torch.Tensor]:
    """Weights, momenta and averages of the matrices, one after the other, in fp64; AdamW for the rest."""
    net = build(0).double()
    weights = dict(net.named_parameters())
    found = {f"ema.{n}": p.detach().clone() for n, p in weights.items()}
    momenta = {n: torch.zeros_like(p) for n, p in weights.items() if n in ALL}
    rest = {n: p for n, p in weights.items() if n not in ALL}
    pulled = [p for n, p in rest.items() if n == "last.weight"]
    others = [p for n, p in rest.items() if n != "last.weight"]
    adamw = torch.optim.AdamW(
        [{"params": pulled}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95), weight_decay=0.1
    )
    for step in range(steps):
        net.zero_grad()
        (net(torch.tensor([0, 1, 2, 1])) - step).square().mean().mul(10).backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in weights.values()))
        lr = 1e-2 * min(1, 8 * (step + 1) / 12)
        for p in weights.values():
            p.grad /= max(1.0, (norm + 1e-6) / 0.5)
        for n, m in momenta.items():
            m.copy_(0.95 * m + 0.05 * weights[n].grad)
            update = 0.05 * weights[n].grad + 0.95 * m
            whole = []
            for x in update.chunk(3) if "qkv" in n else [update]:
                y = x / x.norm()
                for _ in range(5):
                    y = 3.4445 * y - 4.7750 * (y @ y.T @ y) + 2.0315 * (y @ y.T @ y @ y.T @ y)
                whole.append(0.2 * math.sqrt(max(x.shape)) * y)
            weights[n].data = weights[n].data * (1 - lr * 0.1) - lr * torch.cat(whole)
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
        kept = min(0.9, (1 + step) / (10 + step))
        for n, p in weights.items():
            found[f"ema.{n}"] = kept * found[f"ema.{n}"] + (1 - kept) * p.detach()
    found.update({f"model.{n}": p.detach() for n, p in weights.items()})
    return found | {f"momentum.{n}": m for n, m in momenta.items()}


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.usefixtures("device")
def test_steps_equal_the_restatement(kernel):
    found, _ = train(0, kernel=kernel)
    for name, t in restated(4).items():
        torch.testing.assert_close(found[name].double(), t, rtol=1e-4, atol=2e-5, msg=name)
    assert {n.partition(".")[2] for n in found if n.startswith("momentum.")} == ALL
    assert not {n.partition(".")[2] for n in found if n.startswith(("exp_avg", "step."))} & ALL


@pytest.mark.parametrize(("world", "shard"), [(1, 1), (4, 4), (4, 2)])
@pytest.mark.parametrize("kernel", [False, True])
def test_ranks_equal_a_single_process(run_ranks, world, shard, kernel):
    expected, _ = train(0)
    ranks = run_ranks(world, train, shard, None, kernel)
    for found, _ in ranks:
        assert set(found) == set(expected)
        for name, t in expected.items():
            torch.testing.assert_close(found[name], t, rtol=1e-4, atol=2e-5, msg=name)
            assert torch.equal(found[name], ranks[0][0][name]), name  # copies of the weights agree to the bit


@pytest.mark.parametrize("kernel", [False, True])
def test_a_non_finite_gradient_changes_nothing_to_the_bit(run_ranks, kernel):
    for tensors, changed in [train(0, 2, kernel), *run_ranks(4, train, 4, 2, kernel)]:
        assert changed[2] == {"skips"}
        for n in (1, 3):
            assert {f"{kind}.{name}" for kind in ("model", "momentum", "ema") for name in ALL} <= changed[n]
        assert all(t.isfinite().all() for t in tensors.values())


def test_q_k_and_v_are_matrices_of_their_own():
    """The gradient of k alone is turned round: q's and v's rows move as before, to the bit."""

    def turn(net):
        net.blocks[0].attn.qkv.weight.grad[D : 2 * D].neg_()

    (plain, _), (turned, _) = train(0, steps=1), train(0, steps=1, change=turn)
    name = "model.blocks.0.attn.qkv.weight"
    same = (plain[name] == turned[name]).view(3, -1).all(1)
    assert same.tolist() == [True, False, True]


def on_copies(micro_steps: int) -> None:
    net = build(0)
    sharding.compute_in(net, torch.bfloat16)
    sharding.refresh(net)
    optimizer = Optimizer(net, CONFIG, BATCH, kernel=True)
    before = {n: p.clone() for n, p in optimizer.named.items()}
    for micro in range(micro_steps):
        sharding.communicate(net, last=micro == micro_steps - 1)
        net(torch.tensor([0, 1, 2, 1])).float().square().mean().mul(10).backward()
    optimizer.step(optimizer.rates(0))
    for name, p in sharding.named_parameters(net).items():
        assert p.grad is None
        assert sharding.main_param(p).grad is None
        assert torch.equal(p, sharding.main_param(p).bfloat16()), name
        assert not torch.equal(before[name], sharding.main_param(p)), name


@pytest.mark.parametrize("micro_steps", [1, 2])
@pytest.mark.usefixtures("device")
def test_the_networks_copies_follow(micro_steps):
    on_copies(micro_steps)


def test_posthoc_averages_follow():
    net = build(0)
    optimizer = Optimizer(net, dataclasses.replace(CONFIG, ema="posthoc"), BATCH)
    net(torch.tensor([0, 1])).square().mean().backward()
    optimizer.step(optimizer.rates(0))
    optimizer.follow(BATCH)
    tensors = optimizer.tensors()
    for name in ALL:
        torch.testing.assert_close(tensors[f"ema.{name}"], tensors[f"model.{name}"])
        torch.testing.assert_close(tensors[f"narrow.{name}"], tensors[f"model.{name}"])


# --- the work ---


def test_the_work_is_spread():
    D, L = 768, 12
    shapes = [
        (f"blocks.{n}.{name}", *shape)
        for n in range(L)
        for name, shape in zip(muon.MATRICES, [(3 * D, D), (D, D), (4 * D, D), (D, 4 * D)], strict=True)
    ]
    parts = muon.spread(shapes, 8)
    assert len(parts) == 6 * L
    load = [sum(muon.flops(p.rows, p.columns) for p in parts if p.owner == rank) for rank in range(8)]
    assert max(load) <= 1.05 * sum(load) / 8
    covered = [sum(p.rows for p in parts if p.parameter == n) for n in range(len(shapes))]
    assert covered == [rows for _, rows, _ in shapes]


def test_the_adaln_matrix_embeddings_and_convolutions_are_not_muons():
    names = ["blocks.0.mlp.conv.weight", "blocks.0.attn.qkv.bias", "adaLN_modulation.weight", "x_embedder.weight"]
    assert not any(muon.orthogonalised(n) for n in [*names, "blocks.0.attn.q_norm.weight", "final_layer.linear.weight"])
    assert all(map(muon.orthogonalised, ALL))
