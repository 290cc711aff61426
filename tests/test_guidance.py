"""Guidance by classes: at some steps of sampling only, and learnt in training so that sampling needs none."""

import functools

import pytest
import torch

from fastdit import config as C
from fastdit import sampling
from fastdit.config import DiffusionConfig, UserError
from fastdit.diffusion import choose_objective
from fastdit.given import Given
from fastdit.optim import Optimizer
from fastdit.recipes import RECIPES
from fastdit.runtime import ranks, rng, sharding
from fastdit.runtime.sharding import local
from fastdit.runtime.validation import validate
from fastdit.sampling import sample, sampling_times
from fastdit.weights import start

DDPM, FLOW = DiffusionConfig(clip_x0=False), DiffusionConfig(kind="flow", prediction="velocity", clip_x0=False)
FLOW_X0 = DiffusionConfig(kind="flow", prediction="x0", clip_x0=False)
CASES = [(DDPM, "ddpm"), (DDPM, "ddim"), (DDPM, "dpm++"), (FLOW, "euler")]
solvers = functools.partial(pytest.mark.parametrize, ("config", "sampler"), ids=[s for _, s in CASES])
SHAPE = (3, 2, 4, 6)
NULL = 5


def network(x, t, y):
    """A network whose answer depends on all it is given; bounded, so that no sampler blows up."""
    return 0.5 * x.sin() + 0.1 * (y - 2).view(-1, 1, 1, 1) * (1 + t.view(-1, 1, 1, 1) / 1000).cos()


@solvers(CASES)
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.6), (0.0, 0.3), (0.5, 1.0), (0.0, 1.0)])
def test_steps_outside_the_interval_are_the_labelled_ones_alone(config, sampler, low, high):
    y = torch.tensor([4, 0, 2])
    seen = []

    def counted(x, t, y):
        seen.append((len(x), t[0].item() / config.timesteps))
        return network(x, t, y)

    def guided_by_hand(x, t, y):
        labelled, unlabelled = network(x, t, y), network(x, t, torch.full_like(y, NULL))
        inside = low <= t[0].item() / config.timesteps <= high
        return unlabelled + 2.5 * (labelled - unlabelled) if inside else labelled

    args = {"sampler": sampler, "steps": 8}
    options = {"guidance": 2.5, "guidance_interval": (low, high), "null_class": NULL}
    got = sample(counted, config, SHAPE, y, **options, **args)
    torch.testing.assert_close(got, sample(guided_by_hand, config, SHAPE, y, **args), rtol=0, atol=2e-4)
    inside = [low <= t / config.timesteps <= high for t in sampling_times(config, 8)]
    assert [n for n, _ in seen] == [6 if i else 3 for i in inside]
    assert len(seen) == 8
    if (low, high) == (0.0, 1.0):
        assert torch.equal(got, sample(network, config, SHAPE, y, guidance=2.5, null_class=NULL, **args))
    else:
        assert 0 < sum(inside) < 8


def tiny(**groups) -> C.Config:
    config = C.replace(
        RECIPES["cats"],
        model={"patch": 8, "depth": 2, "width": 32, "num_heads": 2, "class_dropout": 0.25},
        train={"batch": 8},
        sample={"steps": 6},
        parallel={"precision": "fp32", "threads": 1},
    )
    return C.replace(config, **groups)


def made(config) -> tuple[torch.Tensor, int]:
    """Pictures of a network whose final layer is not zero, and the images its blocks were run on."""
    world = ranks.init(config.parallel)
    model = start.build(config, world)
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if name.startswith(("adaLN", "final_layer", "y_embedder")):
            local(p).copy_(0.3 * torch.randn(p.shape, generator=generator))
    ran = []
    model.blocks[0].register_forward_hook(lambda block, args, out: ran.append(len(args[0])))
    images = sampling.make(model, config, None, world, first=0, count=5, seed=1)
    ranks.shutdown()
    return images, sum(ran)


def test_pictures_are_guided_within_the_interval_at_its_cost_alone(run_ranks):
    def pictures_of(**fields):
        [(images, ran)] = run_ranks(1, made, tiny(sample=fields), init=False)
        return images, ran

    plain, plain_ran = pictures_of()
    whole, whole_ran = pictures_of(guidance=3.0)
    some, some_ran = pictures_of(guidance=3.0, guidance_interval=(0.05, 0.4))
    inside = sum(0.05 <= t / 1000 <= 0.4 for t in sampling_times(tiny().diffusion, 6))
    assert 0 < inside < 6
    assert (plain_ran, whole_ran, some_ran) == (5 * 6, 5 * 12, 5 * (6 + inside))
    assert not torch.equal(plain, some)
    assert not torch.equal(whole, some)


# --- model guidance: the target, its gradient, its fixed point ---


class Linear(torch.nn.Module):
    """A network of a few parameters that counts its forwards and remembers what they were given."""

    def __init__(self, channels=2, out=2):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, channels * out).view(out, channels))
        self.embedding = torch.nn.Parameter(torch.linspace(-0.5, 0.7, NULL + 1))
        self.calls = []

    def forward(self, x, t, y):
        self.calls.append((y, torch.is_grad_enabled()))
        shift = (self.embedding[y] * (t / 1000).cos().to(self.weight.dtype)).view(-1, 1, 1, 1)
        return torch.einsum("oc,bchw->bohw", self.weight, x.to(self.weight.dtype)) + shift


def objective(config, w, dropout=0.3, learn_sigma=False):
    guided = DiffusionConfig(kind=config.kind, prediction=config.prediction, model_guidance=w)
    model = C.ModelConfig(num_classes=NULL, class_dropout=dropout, learn_sigma=learn_sigma)
    return choose_objective(C.Config(diffusion=guided, model=model), torch.device("cpu"))


@pytest.mark.parametrize(
    "config",
    [DDPM, DiffusionConfig(prediction="v"), DiffusionConfig(prediction="x0"), FLOW, FLOW_X0],
    ids=["epsilon", "v", "x0", "flow", "flow x0"],
)
def test_the_target_and_the_gradient_are_the_formula(config):
    B, w = 40, 0.6
    x0 = torch.linspace(-1, 1, B * 2 * 3 * 5).view(B, 2, 3, 5)
    y = torch.arange(B) % NULL
    net = Linear()
    training = objective(config, w)
    got = training.losses(net, x0, y, 7, 100)
    kept, plain = training.labels.drop(Given(y), 7, 100).y, objective(config, 0.0)
    assert 0 < (kept == NULL).sum() < B
    [(null, null_grad), (given, given_grad)] = net.calls
    assert (null == NULL).all()
    assert (null_grad, given_grad) == (False, True)
    assert torch.equal(given, kept)

    # arXiv 2502.12154: target + w·sg(labelled - unlabelled), for images that keep their label; restated in fp64.
    noise = rng.normal((2, 3, 5), 7, "noise", 100, B, torch.device("cpu"))
    t = plain.timesteps(7, 100, B)
    x_t, target = plain.corrupt(x0, noise, t)
    exact = Linear().double()
    labelled = exact(x_t.double(), t.double(), kept)
    with torch.no_grad():
        unlabelled = exact(x_t.double(), t.double(), torch.full_like(y, NULL))
        scale = torch.where(kept == NULL, 0.0, w).view(-1, 1, 1, 1)
        wanted_target = target.double() + scale * (labelled - unlabelled)
    wanted = (labelled - wanted_target).square().flatten(1).mean(1)
    if config == FLOW_X0:
        wanted = wanted / (t.double() / 1000).clamp(min=config.flow_clamp).square()
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
    got.mean().backward()
    wanted.mean().backward()
    for ours, theirs in zip(net.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-6)


def test_what_is_learnt_is_classifier_free_guidance_of_one_over_one_minus_w():
    """Two equally likely classes with one constant image each, the optimal answer known: the labelled answer settles at
    unlabelled + (truth - unlabelled) / (1 - w)."""
    w, truth, unlabelled = 0.6, torch.tensor([1.0, -0.4]), torch.tensor(0.3)
    training = objective(DDPM, w)
    labelled = torch.zeros(2)
    for _ in range(100):
        added = training.labels.guide(
            torch.zeros(2, 1, 1, 1), labelled.view(2, 1, 1, 1), unlabelled.expand(2, 1, 1, 1), Given(torch.tensor([0, 1]))
        )  # each step answers with the target of the step before
        labelled = truth + added.view(2)
    torch.testing.assert_close(labelled, unlabelled + (truth - unlabelled) / (1 - w), rtol=1e-5, atol=1e-6)
    zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    assert (training.labels.guide(zero, one, zero, Given(torch.tensor([NULL]))) == 0).all()


def test_with_a_learned_variance_only_the_prediction_is_guided():
    x0, y = torch.linspace(-1, 1, 6 * 2 * 3 * 5).view(6, 2, 3, 5), torch.arange(6) % NULL
    net = Linear(out=4)
    training = objective(DDPM, 0.5, learn_sigma=True)
    assert training.losses(net, x0, y, 1, 0).shape == (6,)
    assert training.labels.unlabelled(net, x0, torch.ones(6), Given(y)).shape == x0.shape


def test_off_is_one_forward_and_the_same_loss():
    x0, y = torch.linspace(-1, 1, 6 * 2 * 3 * 5).view(6, 2, 3, 5), torch.arange(6) % NULL
    net = Linear()
    off = objective(DDPM, 0.0).losses(net, x0, y, 1, 0)
    assert len(net.calls) == 1
    on = objective(DDPM, 0.5, dropout=0.999).losses(Linear(), x0, y, 1, 0)  # every label dropped: nothing to guide
    dropped = objective(DDPM, 0.0, dropout=0.999).losses(Linear(), x0, y, 1, 0)
    assert torch.equal(on, dropped)
    assert not torch.equal(off, on)
    with pytest.raises(ValueError, match="model guidance needs labels or conditions, and a class_dropout"):
        objective(DDPM, 0.5, dropout=0.0).losses(net, x0, y, 1, 0)
    with pytest.raises(ValueError, match="model guidance needs labels or conditions, and a class_dropout"):
        objective(DDPM, 0.5).losses(net, x0, None, 1, 0)


def trained(config, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of a few steps on made-up images, sharded over the ranks, and the weights after them."""
    world = ranks.init(config.parallel)
    model = start.build(config, world)
    optimizer = Optimizer(model, config.train, config.train.batch * world.size)
    m, training = config.model, choose_objective(config, world.device)
    losses = []
    for step in range(steps):
        first = (step * world.size + world.rank) * config.train.batch
        numbers = torch.arange(first, first + config.train.batch)
        x0 = (numbers.view(-1, 1, 1, 1) * 0.7 + torch.arange(3 * 32 * 32).view(3, 32, 32) / 100).sin()
        sharding.communicate(model, last=True)
        loss = training.loss(model, x0, numbers % m.num_classes, 0, first)
        loss.backward()
        optimizer.step(optimizer.rates(step * config.train.batch * world.size), loss.detach())
        losses.append(sum(ranks.gather(world, loss.item())) / world.size)
    weights = {name: (p.full_tensor() if world.size > 1 else p).detach() for name, p in model.named_parameters()}
    ranks.shutdown()
    return losses, weights


@pytest.mark.parametrize("recompute", [False, True], ids=["", "activations recomputed"])
def test_sharded_training_with_model_guidance_is_that_of_one_rank(run_ranks, recompute):
    def config(batch, w=0.5):
        return tiny(
            train={"batch": batch, "lr": 1e-2, "warmup_images": 0},
            diffusion={"model_guidance": w},
            parallel={"precision": "fp32", "threads": 1, "checkpoint_activations": recompute, "reshard_after_forward": True},
        )

    [(alone, weights)] = run_ranks(1, trained, config(16), 3, init=False)
    (sharded, parts), _ = run_ranks(2, trained, config(8), 3, init=False)
    assert sharded == pytest.approx(alone, rel=1e-5)
    for name, whole in weights.items():
        torch.testing.assert_close(parts[name], whole, rtol=0, atol=2e-5)
    [(unguided, _)] = run_ranks(1, trained, config(16, w=0.0), 3, init=False)
    assert unguided[0] == alone[0]  # a new network answers zero, with or without a label
    assert abs(unguided[2] - alone[2]) > 1e-6


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"sample": {"guidance_interval": (0.5, 0.5)}}, "0 ≤ low < high ≤ 1"),
        ({"sample": {"guidance_interval": (0.0, 1.5)}}, "0 ≤ low < high ≤ 1"),
        ({"diffusion": {"model_guidance": 1.0}}, "--diffusion.model_guidance is 1; it must be below 1"),
        ({"diffusion": {"model_guidance": 0.5}, "model": {"class_dropout": 0.0}}, "needs a --model.class_dropout above 0"),
    ],
)
def test_what_cannot_work_is_said(groups, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        validate(C.replace(tiny(), **groups))
