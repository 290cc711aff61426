"""What the network is trained on: DDPM over diffusers' schedules, or rectified flow. One class for each, and what they share.

The network is any callable model(x [B, C, *size] fp32, t [B] fp32, y [B] int64 or None) → [B, C, *size], or [B, 2C, *size]
where it learns the variance; condition= and length= go to it too where the data have them (given.py). The size is that of a
sequence, an image or a video: one to three numbers. t counts in training steps: 0 … timesteps - 1 under DDPM, 0 to timesteps
under flow. Everything but the network is fp32, and every random number is a function of (seed, image number), so no result
depends on how images are batched.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdit import consistency
from fastdit.bound import VariationalBound
from fastdit.config import Config, DiffusionConfig
from fastdit.consistency import Jump, per_image
from fastdit.embeddings import mean_square, mean_within
from fastdit.given import Given
from fastdit.runtime import rng

Network = Callable[..., Tensor]


def schedule(config: DiffusionConfig) -> tuple[Tensor, Tensor]:
    """The betas and ᾱ, fp32 [timesteps] on the CPU, bit-equal to those diffusers' schedulers use."""
    from diffusers import DDPMScheduler  # importing it takes two seconds, which --help need not pay

    scheduler: Any = DDPMScheduler(num_train_timesteps=config.timesteps, beta_schedule=config.beta_schedule)
    return scheduler.betas, scheduler.alphas_cumprod


# --- what both objectives share ---


@dataclass(frozen=True)
class Labels:
    """What training does to classes and conditions: some are dropped, and the network may learn to answer as if guided."""

    num_classes: int = 0
    dropout: float = 0.0  # share of samples whose class becomes num_classes, and whose condition null (arXiv 2207.12598)
    guidance: float = 0.0  # w of model guidance (arXiv 2502.12154); costs a second forward in training, none in sampling

    def drop(self, given: Given, seed: int, first: int) -> Given:
        """What is given of images first … first + B - 1 as the network gets it: class and condition are dropped together."""
        there = given.y if given.y is not None else given.condition
        if there is None or not self.dropout:
            return given
        u = rng.uniform((), seed, "class dropout", first, len(there), there.device)
        y, condition, length = given
        return Given(
            y if y is None else torch.where(u < self.dropout, self.num_classes, y),
            condition if condition is None else condition.masked_fill((u < self.dropout)[:, None], torch.nan),
            length,
        )

    @torch.no_grad()
    def unlabelled(self, model: Network, x_t: Tensor, t: Tensor, given: Given) -> Tensor | None:
        """What the network predicts for x_t [B, C, *size] without classes and conditions, fp32; None: no model guidance."""
        if not self.guidance:
            return None
        if given.told(self.num_classes) is None or not self.dropout:
            raise ValueError("model guidance needs labels or conditions, and a class_dropout above 0")
        null = given.null(self.num_classes)
        out = model(x_t, t.float(), null.y, **null.beside).float()
        return out[:, : x_t.shape[1]]

    def guide(self, target: Tensor, labelled: Tensor, unlabelled: Tensor | None, given: Given) -> Tensor:
        """The target under model guidance: target + w·(labelled - unlabelled) for images that keep their label, no gradient.

        A network that has learnt it satisfies labelled = truth + w·(labelled - unlabelled), that is labelled = unlabelled +
        (truth - unlabelled) / (1 - w): classifier-free guidance of scale 1 / (1 - w). The paper takes the moving average of
        the network for the right-hand side. We take the network itself: the average is sharded, and to swap it in would cost
        as much as a step.
        """
        told = given.told(self.num_classes)
        if unlabelled is None or told is None:
            return target
        w = per_image(told.float() * self.guidance, target)
        return target + w * (labelled.detach() - unlabelled)


class Drawn(NamedTuple):
    """A batch and its random numbers: all that a loss depends on, apart from the network."""

    x0: Tensor  # fp32 [B, C, *size]
    noise: Tensor  # fp32 [B, C, *size]
    t: Tensor  # [B], as the objective's `timesteps` returns it
    given: Given  # some of it dropped
    jump: Jump | None = None  # [n], of the images that learn jumps, where there are any
    corners: Tensor | None = None  # int64 [B, rows, columns], which token of each 2×2 cell the middle blocks see; None: all


def draw(
    objective: "Objective",
    x0: Tensor,
    given: Given | Tensor | None,
    seed: int,
    first: int,
    jumps: bool = False,
    cells: tuple[int, ...] | None = None,
) -> Drawn:
    """What images first … first + B - 1 of the run are trained on; x0 [B, C, *size] holds them, given their labels or more.

    jumps: whether some of them learn jumps, under flow. first and B are then multiples of consistency_every.
    cells: rows and columns of 2×2 cells of tokens, where some are dropped.
    """
    x0 = x0.float()
    noise = rng.normal(tuple(x0.shape[1:]), seed, "noise", first, len(x0), x0.device)
    given = objective.labels.drop(Given.of(given), seed, first)
    corners = (4 * rng.uniform(cells, seed, "token drop", first, len(x0), x0.device)).long() if cells else None
    drawn = Drawn(x0, noise, objective.timesteps(seed, first, len(x0)), given, corners=corners)
    if not jumps:
        return drawn
    assert isinstance(objective, Flow)
    jump = objective.jumps(seed, first, len(x0))
    return drawn._replace(t=objective.with_jumps(drawn.t, jump.start * objective.config.timesteps), jump=jump)


def evaluate(model: Network, x_t: Tensor, t: Tensor, given: Given, channels: int, **jump: Tensor) -> Tensor:
    """The network's answer, fp32 [B, channels, *size]. Raises ValueError for another number of channels."""
    out = model(x_t, t.float(), given.y, **given.beside, **jump).float()
    if out.shape[1] != channels:
        raise ValueError(f"the network returned {out.shape[1]} channels; expected {channels}")
    return out


# --- the objectives ---


class Flow:
    """Rectified flow (arXiv 2209.03003): x_t = (1 - s)·x0 + s·noise, where s = t / timesteps is the share of noise.

    The network predicts the velocity v = noise - x0, or x0 itself. The loss is the velocity's mean square in both cases: from
    v = (x_t - x0) / s follows ‖v̂ - v‖² = ‖x̂0 - x0‖² / s² (JiT, arXiv 2511.13720), where s is clamped from below.
    """

    def __init__(self, config: DiffusionConfig, labels: Labels | None = None, device: torch.device | str = "cpu"):
        self.config, self.labels, self.device = config, labels or Labels(), torch.device(device)

    def loss(self, model: Network, x0: Tensor, given: Given | Tensor | None, seed: int, first: int) -> Tensor:
        """The mean of losses(), a scalar."""
        return self.losses(model, x0, given, seed, first).mean()

    def losses(self, model: Network, x0: Tensor, given: Given | Tensor | None, seed: int, first: int) -> Tensor:
        """The loss of each image, fp32 [B]; x0 [B, C, *size] holds images first … first + B - 1 of the run."""
        return self.losses_of(model, draw(self, x0, given, seed, first))

    def losses_of(self, model: Network, drawn: Drawn) -> Tensor:
        """The loss of each image of what was drawn, fp32 [B]."""
        if drawn.jump is not None:
            return self._losses_with_jumps(model, drawn, drawn.jump)
        x0, noise, t, given, *_ = drawn
        x_t, target = self.corrupt(x0, noise, t)
        unlabelled = self.labels.unlabelled(model, x_t, t, given)  # before the forward that keeps activations
        prediction = evaluate(model, x_t, t, given, x0.shape[1])
        return self._weighted(prediction - self.labels.guide(target, prediction, unlabelled, given), t, given.length)

    def _weighted(self, error: Tensor, t: Tensor, length: Tensor | None) -> Tensor:
        loss = mean_square(error, length)
        if self.config.prediction == "x0":
            loss = loss / (t / self.config.timesteps).clamp(min=self.config.flow_clamp).square()
        return loss

    def _losses_with_jumps(self, model: Network, drawn: Drawn, jump: Jump) -> Tensor:
        """As `losses_of`, where each consistency_every-th image learns a jump (see consistency.py), in one forward with all.

        A jump's loss is that of its velocity times its length: where x0 is predicted, jumps of all lengths then count about
        alike, while the velocity's own is large near the data. Its target has the guidance that the network has learnt.
        """
        x0, noise, t, given, *_ = drawn
        every, timesteps, channels = self.config.consistency_every, self.config.timesteps, x0.shape[1]
        x_t, target = self.corrupt(x0, noise, t)
        (x, from_x), (start, _), (truth, _) = (consistency.split(whole, every) for whole in (x_t, t, target))
        plainly = given.each(lambda part: consistency.split(part, every)[0])
        of_jump = given.each(lambda part: consistency.split(part, every)[1])

        def as_velocity(out: Tensor, x: Tensor, share: Tensor) -> Tensor:
            return (x - out) / per_image(share, x) if self.config.prediction == "x0" else out

        def velocity(x: Tensor, share: Tensor, length: Tensor) -> Tensor:
            out = evaluate(model, x, share * timesteps, of_jump, channels, jump=length * timesteps)
            return as_velocity(out, x, share)

        with torch.no_grad():
            unlabelled = self.labels.unlabelled(model, x, start, plainly)
            goal = consistency.mean_velocity(velocity, from_x, jump)
        length = jump.start - jump.end
        lengths = self.with_jumps(torch.zeros_like(t), length * timesteps)
        out, of_jumps = consistency.split(evaluate(model, x_t, t, given, channels, jump=lengths), every)
        plain = self._weighted(out - self.labels.guide(truth, out, unlabelled, plainly), start, plainly.length)
        jumping = length * mean_square(as_velocity(of_jumps, from_x, jump.start) - goal, of_jump.length)
        return consistency.join(plain, jumping, every)

    def jumps(self, seed: int, first: int, count: int) -> Jump:
        """The jumps that some of images first … first + count - 1 learn."""
        u = rng.uniform((2,), seed, "jump", first, count, self.device)
        return consistency.jumps(consistency.split(u, self.config.consistency_every)[1])

    def with_jumps(self, plain: Tensor, jumping: Tensor) -> Tensor:
        """plain [B, …], but jumping [n, …] for the images that learn jumps."""
        every = self.config.consistency_every
        return consistency.join(consistency.split(plain, every)[0], jumping, every)

    def timesteps(self, seed: int, first: int, count: int) -> Tensor:
        """The t of images first … first + count - 1, fp32 from 0 to timesteps. [count]"""
        if self.config.flow_t == "uniform":
            return rng.uniform((), seed, "timestep", first, count, self.device) * self.config.timesteps
        mean, deviation = self.config.flow_t_logit  # arXiv 2403.03206, §3.1
        z = rng.normal((), seed, "timestep", first, count, self.device)
        return (mean + deviation * z).sigmoid() * self.config.timesteps

    def corrupt(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and what the network should return for it, fp32 [B, C, *size]."""
        s = per_image(t / self.config.timesteps, x0)
        x_t = (1 - s) * x0 + s * noise
        return x_t, x0 if self.config.prediction == "x0" else noise - x0


class DDPM:
    """Denoising diffusion in discrete steps (arXiv 2006.11239): the network predicts epsilon, v or x0 of x_t.

    learn_sigma: the network's second half of channels interpolates the log-variance between its bounds. The variational bound
    trains it (arXiv 2102.09672, equations 15 and 16) with the mean held still, as the DiT repository does.
    """

    def __init__(
        self,
        config: DiffusionConfig,
        labels: Labels | None = None,
        device: torch.device | str = "cpu",
        learn_sigma: bool = False,
    ):
        self.config, self.labels, self.device = config, labels or Labels(), torch.device(device)
        betas, alphas_cumprod = schedule(config)
        self.signal = (alphas_cumprod**0.5).to(self.device)  # x_t = signal·x0 + noise_level·noise
        self.noise_level = ((1 - alphas_cumprod) ** 0.5).to(self.device)
        self.bound = VariationalBound(config, betas.double(), self.device) if learn_sigma else None

    def loss(self, model: Network, x0: Tensor, given: Given | Tensor | None, seed: int, first: int) -> Tensor:
        """The mean of losses(), a scalar."""
        return self.losses(model, x0, given, seed, first).mean()

    def losses(self, model: Network, x0: Tensor, given: Given | Tensor | None, seed: int, first: int) -> Tensor:
        """The loss of each image, fp32 [B]; x0 [B, C, *size] holds images first … first + B - 1 of the run."""
        return self.losses_of(model, draw(self, x0, given, seed, first))

    def losses_of(self, model: Network, drawn: Drawn) -> Tensor:
        """The loss of each image of what was drawn, fp32 [B]."""
        x0, noise, t, given, *_ = drawn
        x_t, target = self.corrupt(x0, noise, t)
        unlabelled = self.labels.unlabelled(model, x_t, t, given)  # before the forward that keeps activations
        out = evaluate(model, x_t, t, given, x0.shape[1] * (2 if self.bound else 1))
        prediction, *variance = out.chunk(2, dim=1) if self.bound else (out,)
        error = prediction - self.labels.guide(target, prediction, unlabelled, given)
        loss = mean_square(error, given.length)
        if self.bound is not None:
            # L_simple + L_vlb / 1000. L_vlb is a sum over all timesteps, and t is one of them at random.
            bound = self.bound(x0, error.detach(), variance[0], t, lambda values: mean_within(values, given.length))
            loss = loss + bound * (self.config.timesteps / 1000)
        return loss

    def timesteps(self, seed: int, first: int, count: int) -> Tensor:
        """The t of images first … first + count - 1, int64 from 0 to timesteps - 1. [count]"""
        return (rng.uniform((), seed, "timestep", first, count, self.device) * self.config.timesteps).long()

    def corrupt(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and what the network should return for it, fp32; bit-equal to diffusers' add_noise and get_velocity."""
        signal, noise_level = per_image(self.signal[t], x0), per_image(self.noise_level[t], x0)
        x_t = signal * x0 + noise_level * noise
        if self.config.prediction == "epsilon":
            return x_t, noise
        return x_t, x0 if self.config.prediction == "x0" else signal * noise - noise_level * x0


Objective = DDPM | Flow


def choose_objective(config: Config, device: torch.device) -> Objective:
    """The objective that a run's config names."""
    d, m = config.diffusion, config.model
    labels = Labels(m.num_classes, m.class_dropout, d.model_guidance)
    return Flow(d, labels, device) if d.kind == "flow" else DDPM(d, labels, device, m.learn_sigma)
