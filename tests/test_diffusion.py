"""The objective against fp64 restatements of the papers' formulas, and against diffusers where the claim is equality."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdit.config import Config, DiffusionConfig, ModelConfig
from fastdit.diffusion import choose_objective, schedule
from fastdit.given import Given
from fastdit.runtime import rng

PREDICTIONS = ("epsilon", "v", "x0")
SHAPE = (3, 4, 6)
FLOW = DiffusionConfig(kind="flow", prediction="velocity")
FLOW_X0 = DiffusionConfig(kind="flow", prediction="x0")
LOGIT_NORMAL = replace(FLOW, flow_t="logit_normal")


def objective_of(config, learn_sigma=False, class_dropout=0.0, num_classes=0):
    model = ModelConfig(num_classes=num_classes, class_dropout=class_dropout, learn_sigma=learn_sigma)
    return choose_objective(Config(diffusion=config, model=model), torch.device("cpu"))


def fp64_betas(config):
    T = config.timesteps
    if config.beta_schedule == "linear":
        return torch.tensor([1e-4 + (0.02 - 1e-4) * i / (T - 1) for i in range(T)], dtype=torch.float64)

    def bar(t):
        return math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2

    return torch.tensor([min(1 - bar(t + 1) / bar(t), 0.999) for t in range(T)], dtype=torch.float64)


def images(count, seed=0):
    return rng.uniform(SHAPE, seed, "test images", 0, count, torch.device("cpu")) * 2 - 1


def all_targets(objective, x0, seed, first):
    noise = rng.normal(SHAPE, seed, "noise", first, len(x0), torch.device("cpu"))
    return objective.corrupt(x0, noise, objective.timesteps(seed, first, len(x0)))[1]


@pytest.mark.parametrize("name", ["squaredcos_cap_v2", "linear"])
@pytest.mark.parametrize("timesteps", [1000, 37])
def test_schedule_is_the_formula(name, timesteps):
    config = DiffusionConfig(beta_schedule=name, timesteps=timesteps)
    betas, alphas_cumprod = schedule(config)
    want = fp64_betas(config)
    torch.testing.assert_close(betas.double(), want, rtol=2**-22, atol=2**-24)
    # Each 1 - β is off by the rounding of β and its own, each product by half a unit more.
    bound = (2**-23 / (1 - want) + 2**-23).cumsum(0)
    error = (alphas_cumprod.double() / (1 - want).cumprod(0) - 1).abs()
    assert (error <= bound).all()
    if name == "squaredcos_cap_v2":  # below the cap, the product telescopes into ᾱ(t)
        t = timesteps // 2
        bar = math.cos(((t + 1) / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2
        start = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        assert alphas_cumprod[t].item() == pytest.approx(bar / start, rel=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["squaredcos_cap_v2", "linear", "scaled_linear"])
def test_corrupt_is_bit_equal_to_diffusers(name, prediction):
    from diffusers import DDPMScheduler

    objective = objective_of(DiffusionConfig(beta_schedule=name, prediction=prediction))
    theirs = DDPMScheduler(num_train_timesteps=1000, beta_schedule=name)
    t = torch.arange(1000)
    x0, noise = torch.randn(2, 1000, *SHAPE, generator=torch.Generator().manual_seed(1))
    x_t, target = objective.corrupt(x0, noise, t)
    assert torch.equal(x_t, theirs.add_noise(x0, noise, t))
    want = {"epsilon": noise, "v": theirs.get_velocity(x0, noise, t), "x0": x0}[prediction]
    assert torch.equal(target, want)


def test_corrupt_against_the_formulas():
    config = DiffusionConfig(prediction="v")
    bar = (1 - fp64_betas(config)).cumprod(0)[:, None, None, None]
    x0, noise = torch.randn(2, 1000, *SHAPE, generator=torch.Generator().manual_seed(2))
    x_t, v = objective_of(config).corrupt(x0, noise, torch.arange(1000))
    # √ᾱ and √(1-ᾱ) carry the fp32 rounding of ᾱ: at most half of its 6e-8 over 1 - ᾱ₀ = 4e-5's root.
    torch.testing.assert_close(x_t.double(), bar.sqrt() * x0 + (1 - bar).sqrt() * noise, rtol=0, atol=3e-5)
    torch.testing.assert_close(v.double(), bar.sqrt() * noise - (1 - bar).sqrt() * x0, rtol=0, atol=3e-5)
    t = torch.tensor([0.0, 137.5, 999.9])
    x_t, velocity = objective_of(FLOW).corrupt(x0[:3], noise[:3], t)
    share = (t.double() / 1000)[:, None, None, None]
    torch.testing.assert_close(x_t.double(), (1 - share) * x0[:3] + share * noise[:3], rtol=0, atol=1e-6)
    assert torch.equal(velocity, noise[:3] - x0[:3])


@pytest.mark.parametrize(
    "config",
    [*(DiffusionConfig(prediction=p) for p in PREDICTIONS), FLOW],
    ids=["epsilon", "v", "x0", "flow"],
)
def test_loss_is_zero_for_the_perfect_predictor_and_the_mean_square_otherwise(config):
    objective = objective_of(config)
    x0 = images(40)
    target = all_targets(objective, x0, 3, 100)
    assert objective.loss(lambda x, t, y: target, x0, None, 3, 100).item() == 0
    error = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    losses = objective.losses(lambda x, t, y: target + error, x0, None, 3, 100)
    torch.testing.assert_close(losses.double(), error.double().square().flatten(1).mean(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(objective.loss(lambda x, t, y: target + error, x0, None, 3, 100), losses.mean())
    assert losses.dtype == torch.float32


class Mix(torch.nn.Module):
    """A network of nine weights, in the precision of its weights."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-0.8, 0.9, 9).view(3, 3))

    def forward(self, x, t, y):
        return torch.einsum("oc,bchw->bohw", self.weight, x.to(self.weight.dtype)) + (t / 1000).cos().view(-1, 1, 1, 1)


@pytest.mark.parametrize("clamp", [0.05, 0.3])
@pytest.mark.parametrize("flow_t", ["uniform", "logit_normal"])
def test_flow_that_predicts_x0_has_the_velocitys_loss_and_gradients(flow_t, clamp):
    """arXiv 2511.13720: the velocities (x_t - x) / s of the predicted x0 and of the true one, their mean square; in fp64."""
    objective = objective_of(replace(FLOW_X0, flow_t=flow_t, flow_clamp=clamp))
    x0, net, exact = images(50), Mix(), Mix().double()
    got = objective.losses(net, x0, None, 3, 20)
    noise = rng.normal(SHAPE, 3, "noise", 20, 50, torch.device("cpu")).double()
    t = objective.timesteps(3, 20, 50).double()
    s = (t / 1000).view(-1, 1, 1, 1)
    x_t = (1 - s) * x0 + s * noise
    guess = exact(x_t, t, None)
    v, v_hat = ((x_t - x) / s.clamp(min=clamp) for x in (x0, guess))
    want = (v_hat - v).square().flatten(1).mean(1)
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-6)
    above = (s >= clamp).flatten()
    torch.testing.assert_close(v[above], (noise - x0)[above], rtol=1e-9, atol=1e-9)  # there it is the velocity itself
    assert clamp < 0.1 or 0 < above.sum() < 50
    got.mean().backward()
    want.mean().backward()
    torch.testing.assert_close(net.weight.grad.double(), exact.weight.grad, rtol=2e-5, atol=1e-6)


# Losses of the code before the objectives were classes of their own: bit-equal where they were recorded.
RECORDED = {
    "epsilon": (DiffusionConfig(), False, 0.7693436741828918),
    "x0": (DiffusionConfig(prediction="x0"), False, 0.34686553478240967),
    "guided v": (DiffusionConfig(prediction="v", beta_schedule="linear", model_guidance=0.5), False, 0.6791501641273499),
    "learned sigma": (DiffusionConfig(beta_schedule="linear"), True, 0.7167019248008728),
    "flow": (FLOW, False, 1.2931755781173706),
    "guided flow": (replace(LOGIT_NORMAL, flow_t_logit=(0.0, 1.0), model_guidance=0.5), False, 1.2625921964645386),
}


@pytest.mark.parametrize("name", RECORDED)
def test_losses_are_those_recorded(name):
    config, learn_sigma, recorded = RECORDED[name]

    def network(x, t, y):
        out = 0.5 * x.sin() + 0.1 * (t / 1000).cos().view(-1, 1, 1, 1) + 0.05 * y.view(-1, 1, 1, 1)
        return torch.cat([out, 0.3 * x.cos()], 1) if learn_sigma else out

    x0 = torch.rand(48, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1
    loss = objective_of(config, learn_sigma, 0.2, 7).loss(network, x0, torch.arange(48) % 7, 5, 37)
    assert loss.item() == pytest.approx(recorded, rel=1e-6)  # another processor may sum in another order


# --- the learned variance ---


def restated_bound(config, x0, noise, prediction, variance, t):
    """L_t of arXiv 2102.09672 in bits per dimension, fp64, from the two Gaussians written out."""
    beta = schedule(config)[0].double()
    bar = (1 - beta).cumprod(0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), bar])[:-1]
    at = [v[t][:, None, None, None] for v in (beta, bar, previous)]
    b, a, p = at
    x0, noise = x0.double(), noise.double()
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
    guess = {
        "epsilon": (x_t - (1 - a).sqrt() * prediction) / a.sqrt(),
        "v": a.sqrt() * x_t - (1 - a).sqrt() * prediction,
        "x0": prediction,
    }[config.prediction]

    def mean(x):
        return p.sqrt() * b / (1 - a) * x + (1 - b).sqrt() * (1 - p) / (1 - a) * x_t

    floor = (beta * (1 - previous) / (1 - bar))[t.clamp(min=1)][:, None, None, None]
    log_variance = (variance.double() + 1) / 2 * b.log() + (1 - (variance.double() + 1) / 2) * floor.log()
    normal = torch.distributions.Normal(mean(guess), (0.5 * log_variance).exp())
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean(x0), floor.sqrt().expand_as(x0)), normal)
    high = torch.where(x0 > 0.999, 1.0, normal.cdf(x0 + 1 / 255))
    low = torch.where(x0 < -0.999, 0.0, normal.cdf(x0 - 1 / 255))
    nll = -(high - low).clamp(min=1e-12).log()
    return torch.where((t == 0)[:, None, None, None], nll, kl).flatten(1).mean(1) / math.log(2)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["squaredcos_cap_v2", "linear"])
def test_variational_bound(name, prediction):
    config = DiffusionConfig(beta_schedule=name, prediction=prediction)
    objective = objective_of(config, learn_sigma=True)
    t = torch.tensor([0, 0, 0, 1, 2, 10, 500, 990, 998, 999])
    gen = torch.Generator().manual_seed(4)
    x0 = torch.rand(10, *SHAPE, generator=gen).mul(255).round() / 127.5 - 1  # true pixels, both ends among them
    x0[:, 0, 0, 0], x0[:, 0, 0, 1] = -1, 1
    noise = torch.randn(x0.shape, generator=gen)
    variance = torch.rand(x0.shape, generator=gen) * 2.4 - 1.2  # the network's output is not bounded to ±1
    # An error that leaves x0 known to about a pixel, as after training: larger ones only meet the likelihood's floor.
    error = 0.01 * torch.randn(x0.shape, generator=gen)
    got = objective.bound(x0, error, variance, t)
    beta = schedule(config)[0].double()
    bar = (1 - beta).cumprod(0)[t][:, None, None, None]
    exact = {"epsilon": noise, "v": bar.sqrt() * noise - (1 - bar).sqrt() * x0.double(), "x0": x0}[prediction].double()
    want = restated_bound(config, x0, noise, exact + error.double(), variance, t)
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-6)
    # No error and the posterior's own variance: nothing left to pay but the last step's likelihood.
    free = objective.bound(x0, torch.zeros_like(x0), torch.full_like(x0, -1.0), t)
    assert torch.equal(free[3:], torch.zeros(7))


@pytest.mark.parametrize("timesteps", [1000, 50])
def test_hybrid_loss_and_its_gradients(timesteps):
    config = DiffusionConfig(timesteps=timesteps)
    objective = objective_of(config, learn_sigma=True)
    x0 = images(60)
    target, t = all_targets(objective, x0, 5, 0), objective.timesteps(5, 0, 60)
    noise = rng.normal(SHAPE, 5, "noise", 0, 60, torch.device("cpu"))
    out = torch.randn(60, 6, 4, 6, generator=torch.Generator().manual_seed(1)).mul(0.1) + torch.cat([target, target * 0], 1)
    out.requires_grad_()
    losses = objective.losses(lambda x, t, y: out, x0, None, 5, 0)
    prediction, variance = out.detach()[:, :3], out.detach()[:, 3:]
    simple = (prediction - target).double().square().flatten(1).mean(1)
    bound = restated_bound(config, x0, noise, prediction.double(), variance, t)
    torch.testing.assert_close(losses.double(), simple + bound * timesteps / 1000, rtol=1e-4, atol=1e-5)
    losses.sum().backward()
    # The bound moves the variance only: the mean's gradient is the squared error's.
    torch.testing.assert_close(out.grad[:, :3], 2 * (prediction - target) / math.prod(SHAPE))
    assert out.grad[:, 3:].isfinite().all()
    assert (out.grad[:, 3:].flatten(1).abs().sum(1) > 0).all()


# --- timesteps and labels ---


def test_timesteps_are_uniform():
    t = objective_of(DiffusionConfig(timesteps=10)).timesteps(0, 0, 20_000)
    assert t.dtype == torch.int64
    counts = t.bincount(minlength=10).double()
    assert len(counts) == 10
    assert ((counts - 2000).square() / 2000).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001


@pytest.mark.parametrize("logit", [None, (0.0, 1.0), (0.8, 0.8)])
def test_flow_times_have_their_distribution(logit):
    config = FLOW if logit is None else replace(LOGIT_NORMAL, flow_t_logit=logit)
    t = objective_of(config).timesteps(0, 0, 20_000).double() / 1000
    assert t.min() >= 0
    assert t.max() <= 1
    u = t.sort().values
    if logit is not None:
        z = (t.logit() - logit[0]) / logit[1]
        assert abs(z.mean().item()) < 3.3 / math.sqrt(20_000)
        assert abs(z.var().item() - 1) < 3.3 * math.sqrt(2 / 20_000)
        u = torch.special.ndtr((u.logit() - logit[0]) / logit[1])
    gap = (u - (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000).abs().max()
    assert gap < 1.95 / math.sqrt(20_000)  # Kolmogorov-Smirnov, p = 0.001


@pytest.mark.parametrize("config", [DiffusionConfig(), LOGIT_NORMAL, FLOW_X0], ids=["ddpm", "flow", "flow x0"])
def test_a_loss_belongs_to_its_image_whatever_the_batch(config):
    objective = objective_of(config, class_dropout=0.3, num_classes=9)

    def model(x, t, y):
        return x * 0.5 + (t / 1000 + y)[:, None, None, None]

    x0, y = images(70), torch.arange(70) % 9
    whole = objective.losses(model, x0, y, 7, 45)
    parts = [objective.losses(model, x0[a:b], y[a:b], 7, 45 + a) for a, b in ((0, 1), (1, 20), (20, 70))]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, objective.losses(model, x0, y, 8, 45))
    assert whole.unique().numel() == 70


def test_class_dropout():
    objective = objective_of(DiffusionConfig(), class_dropout=0.25, num_classes=15)
    y = torch.arange(8000) % 15
    kept = objective.labels.drop(Given(y), 0, 0).y
    dropped = kept == 15
    assert torch.equal(kept[~dropped], y[~dropped])
    assert abs(dropped.double().mean().item() - 0.25) < 3.3 * math.sqrt(0.25 * 0.75 / 8000)
    assert torch.equal(objective.labels.drop(Given(y[100:]), 0, 100).y, kept[100:])
    seen = []

    def model(x, t, y):
        seen.append(y)
        return x

    objective.losses(model, images(50), y[:50], 0, 0)
    assert torch.equal(seen[0], kept[:50])
    assert objective.labels.drop(Given(), 0, 0) == Given()
    assert objective_of(DiffusionConfig()).labels.drop(Given(y), 0, 0).y is y


def test_what_the_network_is_given():
    seen = []

    def model(x, t, y):
        seen.append((x.dtype, t.dtype, t))
        return x.bfloat16()

    x0 = images(33).bfloat16()
    for config in (DiffusionConfig(), FLOW, FLOW_X0):
        objective = objective_of(config)
        assert objective.loss(model, x0, None, 0, 64).dtype == torch.float32
        assert seen[-1][:2] == (torch.float32, torch.float32)
        assert torch.equal(seen[-1][2], objective.timesteps(0, 64, 33).float())


def test_wrong_number_of_channels():
    with pytest.raises(ValueError, match="returned 3 channels; expected 6"):
        objective_of(DiffusionConfig(), learn_sigma=True).loss(lambda x, t, y: x, images(2), None, 0, 0)
    with pytest.raises(ValueError, match="returned 6 channels; expected 3"):
        objective_of(DiffusionConfig()).loss(lambda x, t, y: torch.cat([x, x], 1), images(2), None, 0, 0)


def test_the_loss_never_waits_for_the_device():
    class NoSync(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
            return func(*args, **(kwargs or {}))

    objective = objective_of(DiffusionConfig(), learn_sigma=True, class_dropout=0.1, num_classes=3)
    x0, y = images(5), torch.zeros(5, dtype=torch.int64)
    with NoSync():
        objective.loss(lambda x, t, y: torch.cat([x, x], 1), x0, y, 0, 0)
    with NoSync(), pytest.raises(AssertionError):
        x0.sum().item()
