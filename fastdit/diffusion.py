"""What the network is trained on and how it is sampled: DDPM over diffusers' schedules and solvers, and rectified flow.

The network is any callable model(x [B, C, H, W] fp32, t [B] fp32, y [B] int64 or None) → [B, C, H, W], or [B, 2C, H, W] where
it learns the variance. t counts in training steps: 0 … timesteps - 1 under DDPM, 0 to timesteps under flow. Everything but the
network is fp32, and every random number is a function of (seed, image number), so no result depends on how images are batched.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdit.config import DiffusionConfig
from fastdit.runtime import rng

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def schedule(config: DiffusionConfig) -> tuple[Tensor, Tensor]:
    """The betas and ᾱ, fp32 [timesteps] on the CPU, bit-equal to those diffusers' schedulers use."""
    from diffusers import DDPMScheduler  # two seconds, which --help need not pay

    scheduler: Any = DDPMScheduler(num_train_timesteps=config.timesteps, beta_schedule=config.beta_schedule)
    return scheduler.betas, scheduler.alphas_cumprod


class Objective:
    """The training loss of a batch of images, under DDPM or rectified flow (arXiv 2209.03003).

    learn_sigma: the network's second half of channels interpolates the log-variance between its bounds, trained by the
    variational bound (arXiv 2102.09672, equations 15 and 16), the mean held still, as the DiT repository does.
    class_dropout: the share of images whose label becomes the null class, num_classes (arXiv 2207.12598).
    config.model_guidance: how much of its own classifier-free guidance the network learns (arXiv 2502.12154), at the price of
    a second forward, without gradients, in training and none in sampling.
    """

    def __init__(
        self,
        config: DiffusionConfig,
        *,
        learn_sigma: bool = False,
        class_dropout: float = 0.0,
        num_classes: int = 0,
        device: torch.device | str = "cpu",
    ):
        self.config = config
        self.learn_sigma = learn_sigma
        self.class_dropout = class_dropout
        self.num_classes = num_classes
        self.device = torch.device(device)
        if config.kind == "flow":
            return

        betas, alphas_cumprod = schedule(config)
        exact = (1 - betas.double()).cumprod(0)  # 1 - ᾱ at t = 0 keeps but three digits in fp32
        self.signal = (alphas_cumprod**0.5).to(self.device)  # x_t = signal·x0 + noise_level·noise
        self.noise_level = ((1 - alphas_cumprod) ** 0.5).to(self.device)

        # Min-SNR weighting, arXiv 2303.09556 §3.4: min(SNR, γ) on the error in x0, restated for what is predicted.
        snr = exact / (1 - exact)
        error_in_x0 = {"epsilon": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[config.prediction]
        weight = snr.clamp(max=config.min_snr) / error_in_x0 if config.min_snr else torch.ones_like(snr)
        self.weight = weight.float().to(self.device)
        if learn_sigma:
            self._variance_tables(betas.double(), exact)

    def _variance_tables(self, beta: Tensor, alphas_cumprod: Tensor) -> None:
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        posterior = beta * (1 - previous) / (1 - alphas_cumprod)
        posterior[0] = posterior[
            min(1, len(posterior) - 1)
        ]  # it is 0 at t = 0, where its logarithm stands in for the next one's
        # What an error in the prediction becomes in x0, then in the posterior's mean (arXiv 2006.11239, equation 7).
        error_in_x0 = {
            "epsilon": ((1 - alphas_cumprod) / alphas_cumprod).sqrt(),
            "v": (1 - alphas_cumprod).sqrt(),
            "x0": -torch.ones_like(beta),
        }[self.config.prediction]
        error_in_mean = error_in_x0 * previous.sqrt() * beta / (1 - alphas_cumprod)
        self.min_log_variance = posterior.clamp(min=1e-20).log().float().to(self.device)
        self.max_log_variance = beta.log().float().to(self.device)
        self.error_in_mean = error_in_mean.float().to(self.device)

    def loss(self, model: Network, x0: Tensor, y: Tensor | None, seed: int, first: int) -> Tensor:
        """The mean of losses(), a scalar."""
        return self.losses(model, x0, y, seed, first).mean()

    def losses(self, model: Network, x0: Tensor, y: Tensor | None, seed: int, first: int) -> Tensor:
        """The loss of each image, fp32 [B]; x0 [B, C, H, W] holds images first … first + B - 1 of the run, y their labels."""
        x0 = x0.float()
        noise = rng.normal(tuple(x0.shape[1:]), seed, "noise", first, len(x0), self.device)
        t = self.timesteps(seed, first, len(x0))
        x_t, target = self.corrupt(x0, noise, t)
        y = self.drop_labels(y, seed, first)
        # Before the forward that keeps activations, which it would otherwise stand on top of.
        unlabelled = self.unlabelled(model, x_t, t, y) if self.config.model_guidance else None
        out = model(x_t, t.float(), y).float()
        channels = x0.shape[1] * (2 if self.learn_sigma else 1)
        if out.shape[1] != channels:
            raise ValueError(f"the network returned {out.shape[1]} channels; expected {channels}")
        prediction, *variance = out.chunk(2, dim=1) if self.learn_sigma else (out,)
        if unlabelled is not None and y is not None:
            target = target + self.model_guidance(prediction.detach(), unlabelled, y)
        if self.config.kind == "flow":
            return (prediction - target).square().flatten(1).mean(1)
        loss = self.weight[t] * (prediction - target).square().flatten(1).mean(1)
        if self.learn_sigma:
            # L_simple + L_vlb / 1000; L_vlb sums over all timesteps, of which this is one drawn at random.
            bound = self.variational_bound(x0, prediction.detach() - target, variance[0], t)
            loss = loss + bound * (self.config.timesteps / 1000)
        return loss

    def timesteps(self, seed: int, first: int, count: int) -> Tensor:
        """The t of images first … first + count - 1: int64 under DDPM, fp32 in units of training steps under flow. [count]"""
        if self.config.kind == "flow" and self.config.flow_t == "logit_normal":  # arXiv 2403.03206, §3.1
            return rng.normal((), seed, "timestep", first, count, self.device).sigmoid() * self.config.timesteps
        t = rng.uniform((), seed, "timestep", first, count, self.device) * self.config.timesteps
        return t if self.config.kind == "flow" else t.long()

    def corrupt(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and what the network should return for it, fp32; bit-equal to diffusers' add_noise and get_velocity."""
        if self.config.kind == "flow":
            share = _per_image(t / self.config.timesteps)
            return (1 - share) * x0 + share * noise, noise - x0
        signal, noise_level = _per_image(self.signal[t]), _per_image(self.noise_level[t])
        x_t = signal * x0 + noise_level * noise
        if self.config.prediction == "epsilon":
            return x_t, noise
        return x_t, x0 if self.config.prediction == "x0" else signal * noise - noise_level * x0

    def drop_labels(self, y: Tensor | None, seed: int, first: int) -> Tensor | None:
        if y is None or not self.class_dropout:
            return y
        u = rng.uniform((), seed, "class dropout", first, len(y), self.device)
        return torch.where(u < self.class_dropout, self.num_classes, y)

    @torch.no_grad()
    def unlabelled(self, model: Network, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """What the network predicts for x_t [B, C, H, W] without labels, fp32."""
        if y is None or not self.class_dropout:
            raise ValueError("model guidance needs labels, some of them dropped: a class_dropout above 0")
        out = model(x_t, t.float(), torch.full_like(y, self.num_classes)).float()
        return out[:, : x_t.shape[1]]

    def model_guidance(self, labelled: Tensor, unlabelled: Tensor, y: Tensor) -> Tensor:
        """What model guidance adds to the target of images that keep their label: w·(labelled - unlabelled), no gradient.

        A network that has learnt it satisfies labelled = truth + w·(labelled - unlabelled), that is labelled = unlabelled +
        (truth - unlabelled) / (1 - w): classifier-free guidance of scale 1 / (1 - w). The network itself stands for its own
        moving average, which the paper takes: the average is sharded, and swapping it in would cost as much as a step.
        """
        guided = _per_image((y != self.num_classes).float() * self.config.model_guidance)
        return guided * (labelled - unlabelled)

    def variational_bound(self, x0: Tensor, error: Tensor, variance: Tensor, t: Tensor) -> Tensor:
        """The term of the variational bound at t, in bits per dimension [B] (arXiv 2006.11239, equation 5).

        error is prediction minus target; variance is the network's, -1 for the posterior's and 1 for beta. Both distributions'
        means are affine in the prediction, so their distance follows from the error without either mean, nor its rounding.
        """
        low, high = _per_image(self.min_log_variance[t]), _per_image(self.max_log_variance[t])
        log_variance = low + (variance + 1) / 2 * (high - low)
        distance = _per_image(self.error_in_mean[t]) * error  # true mean minus predicted mean
        kl = 0.5 * (log_variance - low - 1 + (low - log_variance).exp() + distance.square() * (-log_variance).exp())

        # At t = 0: the likelihood of x0's bin among 256 between -1 and 1, the outer ones open. DiT does the same to latents.
        inverse_std = (-0.5 * log_variance).exp()
        half, z = inverse_std / 255, distance * inverse_std
        inside = _normal_cdf(half - z.abs()) - _normal_cdf(-half - z.abs())  # in the lower tail, where fp32 keeps its digits
        outer = _normal_cdf(half + torch.where(x0 < 0, z, -z))
        likelihood = torch.where(x0.abs() > 0.999, outer, inside)
        nll = -likelihood.clamp(min=1e-12).log()
        return torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2)


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]  # [B] → [B, 1, 1, 1]


def _normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-math.sqrt(0.5) * z)  # torch.special.ndtr loses the lower tail in fp32
