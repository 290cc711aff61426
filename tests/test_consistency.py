"""Jumps: the target against an fp64 restatement, what has a gradient, when they are taught, and a known answer."""

import dataclasses
import math

import pytest
import torch
from fastdit_kernels.reference import REFERENCE
from torch import nn

from fastdit import config as C
from fastdit import consistency, sampling
from fastdit.config import DiffusionConfig, UserError
from fastdit.consistency import Jump
from fastdit.diffusion import choose_objective, draw
from fastdit.model import DiT
from fastdit.recipes import RECIPES, derive
from fastdit.runtime import rng
from fastdit.runtime.validation import validate

CPU = torch.device("cpu")
NULL = 5
EVERY = 4


def flow(prediction: str, **fields) -> DiffusionConfig:
    return DiffusionConfig(kind="flow", prediction=prediction, consistency=0.5, clip_x0=False, **fields)


def objective(config: DiffusionConfig, dropout: float = 0.0):
    model = C.ModelConfig(num_classes=NULL, class_dropout=dropout)
    return choose_objective(C.Config(diffusion=config, model=model), CPU)


class Net(nn.Module):
    """A network of a few parameters, in any precision, that remembers what it was asked."""

    def __init__(self, channels: int = 2):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, channels**2).view(channels, channels))
        self.embedding = nn.Parameter(torch.linspace(-0.5, 0.7, NULL + 1))
        self.length = nn.Parameter(torch.tensor(0.4))
        self.calls: list[tuple] = []

    def forward(self, x, t, y, jump=None):
        jump = torch.zeros_like(t) if jump is None else jump
        self.calls.append((len(x), torch.is_grad_enabled(), jump))
        t, jump = t.to(x.dtype) / 1000, jump.to(x.dtype) / 1000
        shift = self.embedding[y] * t.cos() + self.length * jump * (3 * t).sin()
        return torch.einsum("oc,bchw->bohw", self.weight, x.sin()) + shift.view(-1, 1, 1, 1)


def restated(net, config, drawn, w: float = 0.0) -> torch.Tensor:
    """The losses by the formulas of consistency.py, an image at a time, in fp64."""
    losses = []
    for n in range(len(drawn.x0)):
        x0, noise, t, y = drawn.x0[n : n + 1], drawn.noise[n : n + 1], drawn.t[n].item() / 1000, drawn.given.y[n : n + 1]

        def u(x, s, length, y=y):
            out = net(x, torch.tensor([1000 * s], dtype=x.dtype), y, torch.tensor([1000 * length], dtype=x.dtype))
            return (x - out) / s if config.prediction == "x0" else out

        x_t = (1 - t) * x0 + t * noise
        weight = (t / max(t, config.flow_clamp)) ** 2 if config.prediction == "x0" else 1.0
        if n % EVERY < EVERY - 1:
            got = u(x_t, t, 0.0)
            goal = noise - x0
            if w and y.item() != NULL:
                goal = goal + w * (got - u(x_t, t, 0.0, torch.full_like(y, NULL))).detach()
        else:
            s, m, e = (part[n // EVERY].item() for part in drawn.jump)
            assert s == pytest.approx(t)
            shortest = 1 / 16

            def part(x, a, b, shortest=shortest, u=u):
                return u(x, a, a - b if a - b > shortest else 0.0)

            with torch.no_grad():
                first = part(x_t, s, m)
                second = part(x_t - (s - m) * first, m, e)
                goal = ((s - m) * first + (m - e) * second) / (s - e)
            got = u(x_t, s, s - e)
            weight = s - e
        losses.append(weight * (got - goal).square().mean())
    return torch.stack(losses)


def batch(count: int = 32, channels: int = 2):
    x0 = torch.linspace(-1, 1, count * channels * 15).view(count, channels, 3, 5)
    return x0, torch.arange(count) % NULL


@pytest.mark.parametrize("w", [0.0, 0.6])
@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_losses_and_gradients_are_the_formulas(prediction, w):
    config = flow(prediction, model_guidance=w)
    training = objective(config, 0.3 if w else 0.0)
    net, exact = Net(), Net().double()
    drawn = draw(training, *batch(), 7, 64, jumps=True)
    assert drawn.jump is not None
    losses = training.losses_of(net, drawn)
    losses.sum().backward()
    wanted = restated(exact, config, in_double(drawn), w)
    wanted.sum().backward()
    torch.testing.assert_close(losses.double(), wanted, rtol=2e-5, atol=2e-6)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad.double(), exact.get_parameter(name).grad, rtol=1e-4, atol=1e-5)
    assert net.length.grad.abs() > 0.01


def in_double(drawn):
    return drawn._replace(
        x0=drawn.x0.double(), noise=drawn.noise.double(), t=drawn.t.double(), jump=Jump(*(part.double() for part in drawn.jump))
    )


def test_two_forwards_of_a_quarter_without_gradient_and_one_of_all():
    net, training = Net(), objective(flow("x0"))
    drawn = draw(training, *batch(), 0, 0, jumps=True)
    training.losses_of(net, drawn).sum().backward()
    assert [(count, grad) for count, grad, _ in net.calls] == [(8, False), (8, False), (32, True)]
    lengths = net.calls[-1][2].view(-1, EVERY)
    assert (lengths[:, :-1] == 0).all()
    torch.testing.assert_close(lengths[:, -1], 1000 * (drawn.jump.start - drawn.jump.end))


def test_with_plain_images_nothing_but_the_jumps_changes():
    """The others keep their noise, their times and their losses, and a batch without jumps is the plain flow's."""
    training = objective(flow("x0", flow_t="logit_normal"))
    plain, taught = (draw(training, *batch(), 3, 128, jumps=jumps) for jumps in (False, True))
    others = torch.arange(32) % EVERY != EVERY - 1
    assert plain.jump is None
    assert torch.equal(plain.t[others], taught.t[others])
    assert torch.equal(plain.noise, taught.noise)
    net = Net()
    torch.testing.assert_close(training.losses_of(net, plain)[others], training.losses_of(net, taught)[others])


def test_a_jump_belongs_to_its_image_whatever_the_batch():
    training = objective(flow("x0"))
    net = Net()
    whole = training.losses_of(net, draw(training, *batch(), 3, 128, jumps=True))
    x0, y = batch()
    parts = [
        training.losses_of(net, draw(training, x0[i : i + 8], y[i : i + 8], 3, 128 + i, jumps=True)) for i in range(0, 32, 8)
    ]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_jumps_are_those_that_sampling_makes():
    u = rng.uniform((2,), 0, "test", 0, 4000, CPU)
    start, middle, end = consistency.jumps(u)
    length = start - end
    assert torch.equal(middle, (start + end) / 2)
    assert (end >= 0).all()
    assert (start <= 1).all()
    counts = {n: int((length == 1 / n).sum()) for n in (1, 2, 4, 8)}
    assert sum(counts.values()) == 4000
    assert all(abs(count - 1000) < 5 * math.sqrt(750) for count in counts.values())
    for steps in (1, 2, 4, 8):
        lengths = sampling.jump_lengths(sampling.sampling_times(flow("x0"), steps), True)
        taught = {(1000 * s.item(), 1000 * n.item()) for s, n in zip(start, length, strict=True)}
        assert set(lengths.items()) <= taught


def test_a_long_schedule_and_a_plain_network_make_no_jumps():
    for steps, jumps in ((20, True), (9, True), (4, False)):
        times = sampling.sampling_times(flow("x0"), steps)
        assert sampling.jump_lengths(times, jumps) == dict.fromkeys(times, 0.0)


# --- the network ---


def tiny(**groups) -> C.Config:
    config = C.replace(
        RECIPES["cats"],
        model={"patch": 8, "depth": 2, "width": 32, "num_heads": 2, "jumps": True},
        diffusion={"consistency": 0.5},
        train={"batch": 8, "images": 64, "warmup_images": 0},
        parallel={"precision": "fp32", "threads": 1},
    )
    return C.replace(config, **groups)


def randomised(config: C.Config) -> DiT:
    model = DiT(config.model, REFERENCE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def test_at_length_0_the_network_is_the_one_without_jumps_and_its_embedder_has_gradients_of_0():
    config = tiny()
    model = randomised(config)
    plain = DiT(dataclasses.replace(config.model, jumps=False), REFERENCE)
    plain.load_state_dict({n: p for n, p in model.state_dict().items() if not n.startswith("jump_embedder")})
    x, t, y = torch.randn(3, 3, 32, 32), torch.tensor([3.0, 500.0, 1000.0]), torch.tensor([1, 2, 3])
    assert torch.equal(model(x, t, y), plain(x, t, y))
    assert torch.equal(model(x, t, y, jump=torch.zeros(3)), plain(x, t, y))
    assert not torch.allclose(model(x, t, y, jump=torch.tensor([3.0, 250.0, 1000.0])), plain(x, t, y), atol=1e-2)
    model(x, t, y).square().sum().backward()
    assert all((p.grad == 0).all() for p in model.jump_embedder.parameters())


def test_a_new_embedder_changes_nothing_until_it_is_taught():
    model = DiT(tiny().model, REFERENCE)
    model.init_weights(0)
    with torch.no_grad():
        model.adaLN_modulation.weight.normal_()
    c = model.condition(torch.full((2,), 500.0), torch.tensor([0, 1]), torch.tensor([250.0, 1000.0]))
    assert torch.equal(c, model.condition(torch.full((2,), 500.0), torch.tensor([0, 1])))


# --- when ---


def test_the_share_is_of_the_images_at_the_end():
    config = tiny(train={"images": 1000, "batch": 8}, diffusion={"consistency": 0.25})
    assert [consistency.on(config, seen) for seen in (0, 749, 750, 992)] == [False, False, True, True]
    assert not consistency.on(C.replace(config, diffusion={"consistency": 0.0}), 999)
    assert consistency.on(C.replace(config, diffusion={"consistency": 1.0}), 0)


def test_the_network_knows_jumps_where_the_setting_is_on():
    cats = RECIPES["cats"]
    assert not derive(cats, cats).model.jumps
    assert derive(C.replace(cats, diffusion={"consistency": 0.2}), cats).model.jumps


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ({"diffusion": {"consistency": 1.5}}, "--diffusion.consistency is 1.5"),
        ({"diffusion": {"consistency": 0.1, "kind": "ddpm"}}, "needs --diffusion.kind flow"),
        ({"diffusion": {"consistency": 0.1}, "train": {"batch": 30}}, "--train.batch 30 is no multiple of 4"),
        ({"diffusion": {"consistency": 0.1, "consistency_every": 1}}, "at least 2"),
    ],
)
def test_what_cannot_work_is_one_line(groups, said):
    with pytest.raises(UserError, match=said):
        validate(C.replace(RECIPES["cats"], **groups))


# --- a mixture of two Gaussians, whose distribution is known ---


class Toy(nn.Module):
    """An MLP of x, t and the length of the step."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(9, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 1))

    def forward(self, x, t, y=None, jump=None):
        t, jump = t / 1000, torch.zeros_like(t) if jump is None else jump / 1000
        given = [x.flatten(), t, jump, *(f(2 * k * v) for v in (t, jump) for k in (1, 2) for f in (torch.sin,))]
        given += [(t * 3).cos(), (jump * 3).cos()]
        return self.layers(torch.stack(given, 1)).view(-1, 1, 1, 1)


def mixture(count: int, first: int) -> torch.Tensor:
    z = rng.normal((2,), 5, "mixture", first, count, CPU)
    return (torch.where(z[:, 0] > 0.43, 1.2, -0.8) + 0.2 * z[:, 1]).view(-1, 1, 1, 1)


def learnt(config: DiffusionConfig, steps: int, taught: bool) -> Toy:
    net, training = Toy(), choose_objective(C.Config(diffusion=config, model=C.ModelConfig(num_classes=0)), CPU)
    optimizer = torch.optim.Adam(net.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for number in range(steps):
        drawn = draw(training, mixture(256, 256 * number), None, 0, 256 * number, jumps=taught and number > steps // 3)
        optimizer.zero_grad()
        training.losses_of(net, drawn).mean().backward()
        optimizer.step()
        schedule.step()
    return net


def distance(net: Toy, config: DiffusionConfig, steps: int) -> float:
    """Wasserstein-1 of 4,000 samples from as many of the mixture."""
    made = sampling.sample(net, config, (4000, 1, 1, 1), steps=steps, jumps=True)
    return (made.flatten().sort().values - mixture(4000, 10**6).flatten().sort().values).abs().mean().item()


@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_a_mixture_in_1_2_and_4_steps(prediction):
    config = flow(prediction)
    taught, plain = (learnt(config, 1500, with_jumps) for with_jumps in (True, False))
    few, without = ({steps: distance(net, config, steps) for steps in (1, 2, 4)} for net in (taught, plain))
    assert few[1] < 0.4 * without[1], (few, without)
    assert few[2] < 0.6 * without[2], (few, without)
    assert few[4] < 0.8 * without[4], (few, without)
    assert distance(taught, config, 20) < 1.25 * distance(plain, config, 20)  # plain flow is not given up for them
