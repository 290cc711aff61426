"""Sampling against the solvers' closed forms in fp64, and against data whose perfect predictor is known."""

import dataclasses
import functools
import itertools
import math

import pytest
import torch

from fastdit.config import DiffusionConfig
from fastdit.diffusion import schedule
from fastdit.runtime import rng
from fastdit.sampling import START_LOG_SNR, sample, sampling_times

DDPM = DiffusionConfig(clip_x0=False)
FLOW = DiffusionConfig(kind="flow", prediction="velocity", clip_x0=False)
FLOW_X0 = dataclasses.replace(FLOW, prediction="x0")
SAMPLERS = [(DDPM, "ddpm"), (DDPM, "ddim"), (DDPM, "dpm++"), (FLOW, "euler"), (FLOW_X0, "euler")]
names = functools.partial(pytest.mark.parametrize, ("config", "sampler"), ids=["ddpm", "ddim", "dpm++", "euler", "euler x0"])
PREDICTED = [(dataclasses.replace(c, prediction=p), s) for c, s in SAMPLERS[:3] for p in ("epsilon", "v", "x0")] + SAMPLERS[3:]
predicted = functools.partial(
    pytest.mark.parametrize, ("config", "sampler"), PREDICTED, ids=[f"{s} {c.prediction}" for c, s in PREDICTED]
)


@functools.cache
def abar(name="squaredcos_cap_v2"):
    return schedule(DiffusionConfig(beta_schedule=name))[1].double()


def coefficients(config, t):
    """signal and noise level at t, python floats."""
    if config.kind == "flow":
        return 1 - t / config.timesteps, t / config.timesteps
    bar = abar(config.beta_schedule)[int(t)].item()
    return math.sqrt(bar), math.sqrt(1 - bar)


def predict(config, x, x0, t):
    """What a network that believes in x0 returns at x."""
    a, s = coefficients(config, t[0].item())
    eps = (x.double() - a * x0) / s
    if config.prediction == "velocity":
        return (eps - x0).float()
    return {"epsilon": eps, "v": a * eps - s * x0, "x0": x0 + 0 * eps}[config.prediction].float()


@pytest.mark.parametrize("steps", [1, 7, 20])
@predicted()
def test_a_perfect_predictor_gives_back_x0(config, sampler, steps):
    truth = torch.linspace(-1.5, 1.5, 2 * 3 * 4 * 5).view(2, 3, 4, 5).double()
    got = sample(lambda x, t, y: predict(config, x, truth, t), config, (2, 3, 4, 5), sampler=sampler, steps=steps)
    # In one step from START_LOG_SNR x0 is a difference of numbers 90 times its size; from small t it is nearly x itself.
    torch.testing.assert_close(got.double(), truth, rtol=0, atol=5e-5 if steps == 1 else 2e-6)
    assert got.dtype == torch.float32


class Recorder:
    """A network that is wrong in a known way, and what it saw: to redo each step by hand."""

    def __init__(self, config, learn_sigma=False):
        self.config, self.learn_sigma = config, learn_sigma
        self.x, self.t, self.x0, self.variance, self.batch, self.y = [], [], [], [], [], []

    def __call__(self, x, t, y):
        assert x.dtype == t.dtype == torch.float32
        x0 = (0.4 * x.double().tanh() - 0.3 * (t.double() / 1000)[:, None, None, None]).cos() - 0.5
        variance = (3 * x.double()).sin()
        out = predict(self.config, x, x0, t)
        self.x.append(x.double())
        self.t.append(t)
        self.x0.append(x0)
        self.variance.append(variance)
        self.batch.append(len(x))
        self.y.append(y)
        return torch.cat([out, variance.float()], dim=1) if self.learn_sigma else out


SHAPE = (3, 2, 4, 6)


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("steps", [5, 40])
def test_ddpm_steps_are_the_posterior(steps, learn_sigma):
    net = Recorder(DDPM, learn_sigma)
    sample(net, DDPM, SHAPE, sampler="ddpm", steps=steps, seed=2, first=11, learn_sigma=learn_sigma)
    generators = [rng.generator("cpu", 2, "ancestral noise", 11 + n) for n in range(3)]
    for i in range(steps - 1):
        bar, previous = (abar()[int(t[0])].item() for t in net.t[i : i + 2])
        alpha = bar / previous  # arXiv 2006.11239, equations 6 and 7, between the timesteps visited
        posterior = (1 - previous) / (1 - bar) * (1 - alpha)
        mean = (
            math.sqrt(previous) * (1 - alpha) / (1 - bar) * net.x0[i] + math.sqrt(alpha) * (1 - previous) / (1 - bar) * net.x[i]
        )
        share = (net.variance[i] + 1) / 2 if learn_sigma else 0
        std = (torch.tensor(posterior).double().log() * (1 - share) + math.log(1 - alpha) * share).mul(0.5).exp()
        noise = torch.cat([torch.randn(1, *SHAPE[1:], generator=g) for g in generators]).double()
        # The scheduler's alpha is a rounded fp32 ratio: half a unit, as a share of 1 - ᾱ, in each coefficient.
        bound = 2e-5 + 2**-25 / (1 - bar) * (net.x0[i].abs() + net.x[i].abs() + noise.abs())
        assert ((net.x[i + 1] - mean - std * noise).abs() <= bound).all()


@pytest.mark.parametrize("clip", [False, True])
def test_ddim_steps_are_the_formula(clip):
    config = DiffusionConfig(clip_x0=clip)
    net = Recorder(config)
    sample(net, config, SHAPE, sampler="ddim", steps=17)
    for i in range(16):
        (a, s), (a2, s2) = (coefficients(config, t[0].item()) for t in net.t[i : i + 2])
        x0 = net.x0[i].clamp(-1, 1) if clip else net.x0[i]
        eps = (net.x[i] - a * x0) / s  # arXiv 2010.02502, equation 12 with no added noise
        torch.testing.assert_close(net.x[i + 1], a2 * x0 + s2 * eps, rtol=0, atol=2e-5)


def test_dpm_solver_steps_are_the_formula():
    net = Recorder(DDPM)
    sample(net, DDPM, SHAPE, sampler="dpm++", steps=9)
    for i in range(8):  # arXiv 2211.01095, algorithm 2
        (a, s), (a2, s2) = (coefficients(DDPM, t[0].item()) for t in net.t[i : i + 2])
        h = math.log(a2 / s2) - math.log(a / s)
        d = net.x0[i]
        if i:
            a1, s1 = coefficients(DDPM, net.t[i - 1][0].item())
            r = (math.log(a / s) - math.log(a1 / s1)) / h
            d = (1 + 0.5 / r) * net.x0[i] - 0.5 / r * net.x0[i - 1]
        torch.testing.assert_close(net.x[i + 1], s2 / s * net.x[i] - a2 * math.expm1(-h) * d, rtol=0, atol=2e-5)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("flow", [FLOW, FLOW_X0], ids=["velocity", "x0"])
def test_euler_steps_follow_the_velocity(flow, clip):
    config = dataclasses.replace(flow, clip_x0=clip)
    net = Recorder(config)
    sample(net, config, SHAPE, steps=7)
    assert [t[0].item() for t in net.t] == pytest.approx([1000 * (7 - i) / 7 for i in range(7)])
    for i in range(6):
        t, t2 = net.t[i][0].item() / 1000, net.t[i + 1][0].item() / 1000
        x0 = net.x0[i].clamp(-1, 1) if clip else net.x0[i]
        torch.testing.assert_close(net.x[i + 1], net.x[i] + (t2 - t) * (net.x[i] - x0) / t, rtol=0, atol=1e-6)


def test_euler_equals_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    def model(x, t, y):
        return x.sin() + (t / 1000)[:, None, None, None]

    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    theirs.set_timesteps(sigmas=[(9 - i) / 9 for i in range(9)])
    x = rng.normal(SHAPE[1:], 0, "sample noise", 0, 3, torch.device("cpu"))
    for t in theirs.timesteps:
        x = theirs.step(model(x, t.expand(3), None), t, x).prev_sample
    torch.testing.assert_close(sample(model, FLOW, SHAPE, steps=9), x, rtol=1e-5, atol=1e-5)


# --- data whose perfect predictor is known ---


def gaussian(config, mean, std):
    """The predictor of E[x0 | x_t] for x0 ~ N(mean, std²)."""

    def model(x, t, y):
        a, s = coefficients(config, t[0].item())
        gain = a * std**2 / (a**2 * std**2 + s**2)
        return predict(config, x, mean + gain * (x.double() - a * mean), t)

    return model


@predicted()
def test_gaussian_data_come_out_with_their_mean_and_deviation(config, sampler):
    mean, std = 0.3, 0.5
    steps = 150 if sampler == "ddpm" else 100
    x = sample(gaussian(config, mean, std), config, (64, 1, 16, 16), sampler=sampler, steps=steps, seed=1).double()
    if sampler == "ddpm":
        n = x.numel()
        # 3.3 standard errors, and what 150 steps themselves are short of, from the chain's own recursion in fp64.
        want_mean, want_std = gaussian_chain(config, mean, std, steps)
        assert abs(want_std / std - 1) < 0.02
        assert abs(want_mean - mean) < 0.01
        assert abs(x.mean().item() - want_mean) < 3.3 * std / math.sqrt(n)
        assert abs(x.std().item() / want_std - 1) < 3.3 / math.sqrt(2 * n)
    else:  # the map from noise to data is affine, so two moments of the noise that was used give it exactly
        z = rng.normal((1, 16, 16), 1, "sample noise", 0, 64, torch.device("cpu")).double()
        slope = x.std() / z.std()
        assert abs(slope.item() / std - 1) < (0.001 if sampler == "dpm++" else 0.02)
        assert abs((x.mean() - slope * z.mean()).item() - mean) < 0.01


def gaussian_chain(config, mean, std, steps):
    """Mean and deviation of ancestral sampling of N(mean, std²) in this many steps, exactly."""
    m, v = 0.0, 1.0
    times = sampling_times(config, steps)
    for i, t in enumerate(times):
        a, s = coefficients(config, t)
        gain = a * std**2 / (a**2 * std**2 + s**2)
        base = mean - gain * a * mean  # x0 = base + gain · x
        if i == steps - 1:
            return base + gain * m, gain * math.sqrt(v)
        a2, s2 = coefficients(config, times[i + 1])
        beta = 1 - (a / a2) ** 2
        on_x0, on_x = a2 * beta / s**2, a / a2 * s2**2 / s**2
        m = on_x0 * (base + gain * m) + on_x * m
        v = (on_x0 * gain + on_x) ** 2 * v + beta * s2**2 / s**2


@pytest.mark.parametrize("name", ["squaredcos_cap_v2", "linear"])
def test_twenty_steps_come_close_to_a_mixture(name):
    """The measured claim in sampling_times: 20 quadratic steps of dpm++ add little to the error of the noise itself."""
    config = DiffusionConfig(beta_schedule=name, clip_x0=False)
    mean = torch.tensor([-0.8, -0.2, 0.7], dtype=torch.float64)
    std = torch.tensor([0.05, 0.15, 0.08], dtype=torch.float64)
    share = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)

    def model(x, t, y):
        a, s = coefficients(config, t[0].item())
        variance = (a * std) ** 2 + s**2
        z = x.double().unsqueeze(-1)
        weight = (share.log() - 0.5 * variance.log() - 0.5 * (z - a * mean) ** 2 / variance).softmax(-1)
        x0 = (weight * (mean + a * std**2 / variance * (z - a * mean))).sum(-1)
        return predict(config, x, x0, t)

    x = sample(model, config, (64, 1, 16, 16), steps=20).double().flatten().sort().values
    grid = torch.linspace(-1.6, 1.6, 20_001, dtype=torch.float64)
    truth = (share * torch.special.ndtr((grid[:, None] - mean) / std)).sum(1)
    distance = (torch.searchsorted(x, grid).double() / len(x) - truth).abs().sum().item() * (grid[1] - grid[0]).item()
    # The expected distance of as many true samples is ∫ √(2/π · F(1-F)/n); three times it, and what the 20 steps cost.
    noise = ((2 / math.pi) * truth * (1 - truth) / len(x)).sqrt().sum().item() * (grid[1] - grid[0]).item()
    assert distance < 3 * noise + 0.006


# --- what the loop promises ---


@pytest.mark.parametrize("timesteps", [1, 2, 10, 1000])
def test_sampling_times(timesteps):
    config = DiffusionConfig(timesteps=timesteps)
    for steps in range(1, timesteps + 1, max(timesteps // 29, 1)):
        times = sampling_times(config, steps)
        assert len(times) == steps
        assert all(a > b for a, b in itertools.pairwise(times))
        assert times[-1] >= 0
        assert times[0] < timesteps
        assert all(t == int(t) for t in times)
    assert sampling_times(config, timesteps) == list(range(timesteps))[::-1]
    with pytest.raises(ValueError, match="steps are more than"):
        sampling_times(config, timesteps + 1)


@pytest.mark.parametrize("name", ["squaredcos_cap_v2", "linear", "scaled_linear"])
def test_sampling_starts_at_the_stated_signal_to_noise_ratio(name):
    log_snr = 0.5 * (abar(name) / (1 - abar(name))).log()
    start = int(sampling_times(DiffusionConfig(beta_schedule=name), 20)[0])
    assert log_snr[start] >= START_LOG_SNR
    assert start == 999 or log_snr[start + 1] < START_LOG_SNR


@names(SAMPLERS)
def test_clipping(config, sampler):
    def model(x, t, y):
        return predict(config, x, 3 * x.double().sin(), t)

    for clip in (True, False):
        config = dataclasses.replace(config, clip_x0=clip)
        seen = []
        x = sample(model, config, SHAPE, sampler=sampler, steps=6, on_step=lambda i, x0, seen=seen: seen.append((i, x0)))
        assert [i for i, _ in seen] == [1, 2, 3, 4, 5, 6]
        assert torch.equal(seen[-1][1], x)
        assert all((x0.abs().max() <= 1) == clip for _, x0 in seen)


@names(SAMPLERS)
def test_one_forward_per_step_and_both_halves_in_one(config, sampler):
    y = torch.tensor([4, 0, 2])
    net = Recorder(config)
    sample(net, config, SHAPE, y, sampler=sampler, steps=6)
    assert net.batch == [3] * 6
    assert all(seen is y for seen in net.y)
    net = Recorder(config)
    sample(net, config, SHAPE, y, sampler=sampler, steps=6, guidance=2.5, null_class=9)
    assert net.batch == [6] * 6
    assert all(torch.equal(seen, torch.tensor([4, 0, 2, 9, 9, 9])) for seen in net.y)
    assert all(torch.equal(x[:3], x[3:]) for x in net.x)


@names(SAMPLERS)
def test_guidance_extrapolates_from_the_null_class(config, sampler):
    learn_sigma = sampler == "ddpm"

    def model(x, t, y, guidance=None):
        shift = y.double() if guidance is None else 5 + guidance * (y.double() - 5)
        x0 = 0.1 * shift[:, None, None, None] + 0.2 * x.double().sin()
        variance = (y / 5 - 0.5).float()[:, None, None, None].expand_as(x)
        return torch.cat([predict(config, x, x0, t), variance], 1) if learn_sigma else predict(config, x, x0, t)

    y = torch.tensor([4, 0, 2])
    args = {"sampler": sampler, "steps": 6, "learn_sigma": learn_sigma}
    got = sample(model, config, SHAPE, y, guidance=2.5, null_class=5, **args)
    want = sample(functools.partial(model, guidance=2.5), config, SHAPE, y, **args)
    torch.testing.assert_close(got, want, rtol=0, atol=3e-4)  # epsilon at the start is 90 times as large in x0
    assert (got - sample(model, config, SHAPE, y, **args)).abs().min() > 0.01


@names(SAMPLERS)
def test_an_image_is_the_same_in_any_batch(config, sampler):
    learn_sigma = sampler == "ddpm"

    def images(first, count):
        net = Recorder(config, learn_sigma)
        return sample(net, config, (count, 2, 4, 6), sampler=sampler, steps=8, seed=3, first=first, learn_sigma=learn_sigma)

    whole = images(25, 40)
    assert torch.equal(whole, torch.cat([images(25, 1), images(26, 19), images(45, 20)]))
    assert len({x.numpy().tobytes() for x in whole}) == 40


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_learned_variance_is_dropped_by_the_deterministic_samplers(sampler):
    plain, learned = Recorder(DDPM), Recorder(DDPM, learn_sigma=True)
    a = sample(plain, DDPM, SHAPE, sampler=sampler, steps=5)
    assert torch.equal(a, sample(learned, DDPM, SHAPE, sampler=sampler, steps=5, learn_sigma=True))


def test_auto_and_no_gradients():
    weight = torch.ones(1, requires_grad=True)

    def model(x, t, y):
        return x.cos() * weight

    for config, name in ((DDPM, "dpm++"), (FLOW, "euler")):
        x = sample(model, config, SHAPE, steps=4)
        assert torch.equal(x, sample(model, config, SHAPE, sampler=name, steps=4))
        assert not x.requires_grad


def test_what_does_not_go_together():
    def model(x, t, y):
        return x

    y = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="'euler' does not sample ddpm"):
        sample(model, DDPM, SHAPE, sampler="euler")
    with pytest.raises(ValueError, match="'ddim' does not sample flow"):
        sample(model, FLOW, SHAPE, sampler="ddim")
    with pytest.raises(ValueError, match="guidance 2 needs labels or conditions, and a null class"):
        sample(model, DDPM, SHAPE, y, guidance=2.0)
    with pytest.raises(ValueError, match="guidance 2 needs labels or conditions, and a null class"):
        sample(model, DDPM, SHAPE, guidance=2.0, null_class=3)
    with pytest.raises(ValueError, match="returned 2 channels; expected 4"):
        sample(model, DDPM, SHAPE, learn_sigma=True)
