"""The optimizer, guard and EMA against straight-line restatements in fp64, on shards of awkward sizes."""

import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdit.config import TrainConfig
from fastdit.ema import EMA
from fastdit.optim import Optimizer, ShardAdamW, clip_and_check, lr_at
from fastdit.runtime import sharding

CONFIG = TrainConfig(images=80, lr=1e-2, lr_decay="cosine", warmup_images=12, weight_decay=0.1, beta2=0.95, ema=0.9)
BATCH = 8  # images per step


class Block(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, h):
        return self.linear(h).sin()


class Net(nn.Module):
    """Rows of 7, 5, 3 and 1: over 4 ranks some hold nothing of a tensor, and no split is even."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3, 7)
        self.offset = nn.Parameter(torch.randn(5, 7))
        self.blocks = nn.ModuleList([Block(7, 5), Block(5, 3), Block(3, 1)])

    def forward(self, y):
        h = (self.table(y)[:, None] + self.offset).tanh()
        for block in self.blocks:
            h = block(h)
        return h


def build(sharded: bool, policy: MixedPrecisionPolicy | None = None) -> Net:
    torch.manual_seed(0)
    net = Net()
    if sharded:
        for block in net.blocks:
            fully_shard(block, reshard_after_forward=False, mp_policy=policy or MixedPrecisionPolicy())
        fully_shard(net, reshard_after_forward=False, mp_policy=policy or MixedPrecisionPolicy())
    return net


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def train(sharded: bool, steps: int, max_norm: float, poison: dict[int, int] | None = None, kernel: bool = False):
    """Tensors and norms after some steps; poison[step] is the rank whose gradient then gets a NaN or an infinity."""
    net = build(sharded)
    optimizer = Optimizer(net, dataclasses.replace(CONFIG, grad_clip=max_norm), BATCH, kernel=kernel)
    norms, unchanged = [], []
    for step in range(steps):
        (net(torch.tensor([0, 1, 2, 1])) - step).square().mean().mul(10).backward()
        before = {n: full(t) for n, t in optimizer.tensors().items() if n != "skips"} if poison else {}
        if poison and poison.get(step) == (dist.get_rank() if sharded else 0):
            grad = net.blocks[0].linear.weight.grad
            (grad.to_local() if sharded else grad)[0, 0] = [math.nan, math.inf][step % 2]
        norms.append(float(optimizer.step(optimizer.rates(step * BATCH))))
        after = optimizer.tensors()
        unchanged.append(all(torch.equal(bits(t), bits(full(after[n]))) for n, t in before.items()))
    return {n: full(t) for n, t in optimizer.tensors().items()}, norms, unchanged


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32)


def restated(steps: int, max_norm: float) -> tuple[dict[str, torch.Tensor], list[float]]:
    """AdamW (arXiv 1711.05101, algorithm 2), clipping and EMA, one parameter after the other, in fp64."""
    net = build(False).double()
    weights = dict(net.named_parameters())
    m = {n: torch.zeros_like(p) for n, p in weights.items()}
    v = {n: torch.zeros_like(p) for n, p in weights.items()}
    ema = {n: p.detach().clone() for n, p in weights.items()}
    norms = []
    for step in range(steps):
        net.zero_grad()
        (net(torch.tensor([0, 1, 2, 1])) - step).square().mean().mul(10).backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in weights.values()))
        norms.append(norm)
        lr = [1e-2 * 8 / 12, *(5e-3 * (1 + math.cos(math.pi * (8 * k - 12) / 68)) for k in range(2, 9))][step]
        for n, p in weights.items():
            g = p.grad * min(1.0, max_norm / (norm + 1e-6)) if max_norm else p.grad
            decay = CONFIG.weight_decay if n.startswith("blocks") and n.endswith("weight") else 0.0
            m[n] = 0.9 * m[n] + 0.1 * g
            v[n] = 0.95 * v[n] + 0.05 * g * g
            corrected = m[n] / (1 - 0.9 ** (step + 1)) / ((v[n] / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
            p.data = p.data * (1 - lr * decay) - lr * corrected
            kept = min(0.9, (1 + step) / (10 + step))
            ema[n] = kept * ema[n] + (1 - kept) * p.data
    found = {f"model.{n}": p.detach() for n, p in weights.items()}
    for kind, tensors in (("exp_avg", m), ("exp_avg_sq", v), ("ema", ema)):
        found.update({f"{kind}.{n}": t for n, t in tensors.items()})
    return found, norms


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_steps_equal_the_restatement(max_norm, kernel):
    found, norms, _ = train(False, 6, max_norm, kernel=kernel)
    expected, expected_norms = restated(6, max_norm)
    assert set(found) == {"skips"} | set(expected) | {n.replace("model.", "step.") for n in expected if n.startswith("model.")}
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(expected_norms), rtol=1e-5, atol=0)
    for name, t in expected.items():
        torch.testing.assert_close(found[name].double(), t, rtol=1e-5, atol=1e-6, msg=name)
    assert all(float(t) == 6 for n, t in found.items() if n.startswith("step."))
    assert found["skips"].tolist() == [0, 0]


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_shards_equal_a_single_process(run_ranks, world, kernel):
    """Every rank's gradient is the same, so their mean is exact; PyTorch's op rounds differently in the tail of a shard."""
    for max_norm in (0.0, 0.5):
        expected, norms, _ = train(False, 5, max_norm)
        for found, found_norms, _ in run_ranks(world, train, True, 5, max_norm, None, kernel):
            torch.testing.assert_close(torch.tensor(found_norms), torch.tensor(norms), rtol=1e-6, atol=0)
            for name, t in expected.items():
                torch.testing.assert_close(found[name], t, rtol=2e-6, atol=1e-7, msg=name)


def average(sharded: bool) -> dict[str, torch.Tensor]:
    """The EMA over weights that jump about: what it makes of given weights, whoever computed them."""
    net = build(sharded)
    ema = EMA(net, 0.97)
    for step in range(12):
        for p in net.parameters():
            p.detach().mul_(1.5 - step / 10)
        ema.update(ema.weight(step))
    return {n: full(e) for n, e in ema.tensors.items()}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_sharded_ema_equals_a_single_process_to_the_bit(run_ranks, world):
    single, expected = average(False), {n: p.detach().double() for n, p in build(False).named_parameters()}
    weights = dict(expected)
    for step in range(12):
        for n in expected:
            weights[n] = weights[n] * (1.5 - step / 10)
            expected[n] = torch.lerp(expected[n], weights[n], 1 - min(0.97, (1 + step) / (10 + step)))
    for found in [single, *run_ranks(world, average, True)]:
        for n, e in expected.items():
            assert torch.equal(bits(found[n]), bits(single[n])), n
            torch.testing.assert_close(found[n].double(), e, rtol=1e-6, atol=1e-7, msg=n)


@pytest.mark.parametrize("kernel", [False, True])
def test_a_non_finite_gradient_changes_nothing_on_any_rank(run_ranks, kernel):
    """A NaN on rank 1, then an infinity on rank 0: both keep parameters, moments, counts and EMA to the bit, and go on."""
    single = train(False, 6, 1.0, {2: 0, 3: 0}, kernel)
    for tensors, norms, unchanged in [single, *run_ranks(2, train, True, 6, 1.0, {2: 1, 3: 0}, kernel)]:
        assert unchanged == [False, False, True, True, False, False]
        assert [math.isfinite(n) for n in norms] == [True, True, False, False, True, True]
        assert tensors["skips"].tolist() == [2, 0]
        assert all(t.isfinite().all() for t in tensors.values())
        assert all(float(t) == 4 for n, t in tensors.items() if n.startswith("step."))


class Ops(TorchDispatchMode):
    """Writes down each op, and how many numbers it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        numbers = sum(t.numel() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
        self.seen.append((func.__name__.partition(".")[0], numbers))
        return func(*args, **(kwargs or {}))


def on_copies(summed: bool, micro_steps: int) -> tuple[dict[str, torch.Tensor], list[torch.Tensor], set[str]]:
    """Tensors and norms after three steps of a network that computes in bf16, and the large ops of the last one.

    summed: gradients are made fp32 first, though there is nothing to sum.
    """
    net = build(False)
    sharding.compute_in(net, torch.bfloat16)
    sharding.refresh(net)
    optimizer = Optimizer(net, dataclasses.replace(CONFIG, grad_clip=1.0), BATCH, kernel=True)
    norms = []
    for step in range(3):
        for micro in range(micro_steps):
            sharding.communicate(net, last=micro == micro_steps - 1)
            (net(torch.tensor([0, 1, 2, 1])).float() - step - micro).square().mean().mul(10).backward()
        if summed:
            sharding.collect_gradients(net)
        if step == 1:
            net.blocks[0].linear.weight.grad = torch.full_like(net.blocks[0].linear.weight, math.nan)
        with Ops() as ops:
            norms.append(optimizer.step(optimizer.rates(step * BATCH)))
        assert all(p.grad is None and sharding.main_param(p).grad is None for p in net.parameters())
        for p in net.parameters():
            assert torch.equal(p, sharding.main_param(p).bfloat16())
    return optimizer.tensors(), norms, {name for name, numbers in ops.seen if numbers > 100}


@pytest.mark.usefixtures("device")
def test_on_one_rank_no_pass_casts_gradients_or_weights():
    """In bf16, by the kernel: the bits are those of gradients made fp32 first, a step that is skipped among them."""
    tensors, norms, ops = on_copies(summed=False, micro_steps=1)
    expected, theirs, _ = on_copies(summed=True, micro_steps=1)
    assert [n for n, t in tensors.items() if not torch.equal(bits(t), bits(expected[n]))] == []
    assert torch.stack(norms).nan_to_num(-1).equal(torch.stack(theirs).nan_to_num(-1))
    assert tensors["skips"].tolist() == [1, 0]
    assert ops == {"_foreach_norm", "adamw_ema"}


@pytest.mark.usefixtures("device")
def test_over_micro_steps_gradients_are_summed_in_fp32():
    tensors, norms, ops = on_copies(summed=False, micro_steps=2)
    expected, theirs, _ = on_copies(summed=True, micro_steps=2)
    assert [n for n, t in tensors.items() if not torch.equal(bits(t), bits(expected[n]))] == []
    assert torch.stack(norms).nan_to_num(-1).equal(torch.stack(theirs).nan_to_num(-1))
    assert "_foreach_copy_" not in ops


def test_skips_in_a_row_are_counted():
    net = build(False)
    optimizer = ShardAdamW(net, CONFIG)
    counts = []
    for value in (1.0, math.nan, math.nan, 1.0, -math.inf, 1e30):
        for p in net.parameters():
            p.grad = torch.full_like(p, value)
        clip_and_check(optimizer, [p.grad for p in net.parameters()], 1.0)
        counts.append(optimizer.skips.tolist())
    # 1e30 squared is beyond fp32: what cannot be measured is skipped too.
    assert counts == [[0, 0], [1, 1], [2, 2], [2, 0], [3, 1], [4, 2]]
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        clip_and_check(optimizer, [], 1.0)


def test_a_skip_keeps_the_sign_of_zero():
    net = build(False)
    ema = EMA(net, 0.9)
    for e in ema.tensors.values():
        e.fill_(-0.0)
    ema.update(ema.weight(0), torch.ones(()))
    assert all((bits(e) == -(2**31)).all() for e in ema.tensors.values())


def apply_ema(sharded: bool):
    """Outputs with the averaged weights applied, after a forward that left gathered weights behind, and what is restored."""
    net = build(sharded)
    optimizer = Optimizer(net, CONFIG, BATCH)
    ema = optimizer.ema
    y = torch.tensor([2, 0])
    for step in range(2):
        net(y).square().mean().backward()
        optimizer.step(optimizer.rates(step * BATCH))
    with torch.no_grad():
        before = net(y)
        weights = {n: full(p) for n, p in optimizer.tensors().items()}
        with ema.applied(net):
            averaged = net(y)
        after = net(y)
    # The gathered tensors that no_grad left behind must be gone too: a training forward sees the restored weights.
    trained = net(y).detach()
    restored = {n: full(p) for n, p in optimizer.tensors().items()}
    same = all(torch.equal(bits(t), bits(restored[n])) for n, t in weights.items())
    single = build(False)
    single.load_state_dict({n.removeprefix("ema."): t for n, t in weights.items() if n.startswith("ema.")})
    with torch.no_grad():
        expected = single(y)
    with pytest.raises(KeyError), ema.applied(net):
        raise KeyError("inside")
    back = {n: full(p) for n, p in optimizer.tensors().items()}
    whole = ema.full_tensors()
    return {
        "averaged is the EMA's output": torch.equal(averaged, expected),
        "averaged differs": not torch.equal(averaged, before),
        "output restored": torch.equal(before, after) and torch.equal(before, trained),
        "tensors restored": same and all(torch.equal(bits(t), bits(back[n])) for n, t in weights.items()),
        "full on rank 0 alone": set(whole)
        == ({n for n, _ in single.named_parameters()} if not dist.is_initialized() or dist.get_rank() == 0 else set()),
        "full equals": all(torch.equal(t, weights[f"ema.{n}"]) for n, t in whole.items()),
    }


@pytest.mark.parametrize("world", [0, 1, 2, 4])
def test_averaged_weights_are_applied_and_taken_back_exactly(run_ranks, world):
    for checks in [apply_ema(False)] if world == 0 else run_ranks(world, apply_ema, True):
        assert [name for name, ok in checks.items() if not ok] == []


def test_decay_is_on_matrices_only():
    net = build(False)
    net.conv = nn.Conv2d(4, 4, 3, groups=4)
    net.norm = nn.LayerNorm(7)
    optimizer = ShardAdamW(net, CONFIG)
    decayed = {n for n, p in optimizer.named.items() if any(p is q for q in optimizer.param_groups[0]["params"])}
    assert decayed == {"blocks.0.linear.weight", "blocks.1.linear.weight", "blocks.2.linear.weight", "conv.weight"}
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    assert len(optimizer.named) == sum(len(g["params"]) for g in optimizer.param_groups)


def test_names_are_plain_under_compile():
    net = build(False)
    plain = set(EMA(net, 0.9).tensors)
    net.blocks[1] = torch.compile(net.blocks[1], backend="eager")
    assert set(EMA(net, 0.9).tensors) == plain
    assert set(ShardAdamW(net, CONFIG).named) == plain


@pytest.mark.parametrize("kernel", [False, True])
def test_state_exists_before_the_first_step_and_reading_it_changes_nothing(kernel):
    """Reading and writing what a checkpoint holds, before and between steps, leaves the trajectory as it is."""
    expected, _, _ = train(False, 3, 1.0, kernel=kernel)
    net = build(False)
    optimizer = Optimizer(net, CONFIG, BATCH, kernel=kernel)
    assert all(float(s["step"]) == 0 and not s["exp_avg"].any() for s in optimizer.adamw.state.values())
    for step in range(3):
        copies = {n: t.clone() for n, t in optimizer.tensors().items()}
        for n, t in optimizer.tensors().items():  # as a load does, in place
            t.zero_()
            t.copy_(copies[n])
        (net(torch.tensor([0, 1, 2, 1])) - step).square().mean().mul(10).backward()
        optimizer.step(optimizer.rates(step * BATCH))
    found = optimizer.tensors()
    assert all(torch.equal(bits(t), bits(found[n])) for n, t in expected.items())


def test_learning_rate():
    config = TrainConfig(images=1000, lr=2.0, warmup_images=100)
    assert [lr_at(n, config) for n in (0, 25, 99, 100, 500, 1000)] == [0, 0.5, 1.98, 2, 2, 2]
    cosine = dataclasses.replace(config, lr_decay="cosine")
    assert [lr_at(n, cosine) for n in (50, 100)] == [1.0, 2.0]
    assert lr_at(550, cosine) == pytest.approx(1.0, abs=1e-15)
    assert lr_at(325, cosine) == pytest.approx(1 + math.cos(math.pi / 4), abs=1e-15)
    assert lr_at(1000, cosine) == lr_at(2000, cosine) == 0
    assert lr_at(0, dataclasses.replace(config, warmup_images=0)) == 2.0
    for images in (0, 50, 100):  # a run that is all warm-up
        assert math.isfinite(lr_at(images, dataclasses.replace(cosine, images=100)))


def bf16_train():
    """Under bf16 gathers the shards, the moments and the EMA stay fp32."""
    net = build(True, MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    optimizer = Optimizer(net, CONFIG, BATCH)
    net(torch.tensor([0, 1])).float().square().mean().backward()
    optimizer.step(optimizer.rates(0))
    with optimizer.ema.applied(net), torch.no_grad():
        dtype = net(torch.tensor([0])).dtype
    return dtype, {t.dtype for t in optimizer.tensors().values()}


def test_bf16_keeps_fp32_state(run_ranks):
    assert run_ranks(2, bf16_train) == [(torch.bfloat16, {torch.float32})] * 2
