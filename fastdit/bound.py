"""The term of DDPM's variational bound, which trains a variance that the network learns."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastdit.config import DiffusionConfig


class VariationalBound:
    """The term of the variational bound at t, for a network that learns the variance (arXiv 2006.11239, equation 5)."""

    def __init__(self, config: DiffusionConfig, beta: Tensor, device: torch.device):
        """beta: fp64 [timesteps]."""
        alphas_cumprod = (1 - beta).cumprod(0)  # in fp64, for 1 - ᾱ at t = 0 keeps only three digits in fp32
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        posterior = beta * (1 - previous) / (1 - alphas_cumprod)
        posterior[0] = posterior[min(1, len(posterior) - 1)]  # it is 0 at t = 0; its logarithm is taken from t = 1
        # What an error in the prediction becomes in x0, then in the posterior's mean (arXiv 2006.11239, equation 7).
        error_in_x0 = {
            "epsilon": ((1 - alphas_cumprod) / alphas_cumprod).sqrt(),
            "v": (1 - alphas_cumprod).sqrt(),
            "x0": -torch.ones_like(beta),
        }[config.prediction]
        error_in_mean = error_in_x0 * previous.sqrt() * beta / (1 - alphas_cumprod)
        self.min_log_variance = posterior.clamp(min=1e-20).log().float().to(device)
        self.max_log_variance = beta.log().float().to(device)
        self.error_in_mean = error_in_mean.float().to(device)

    def __call__(
        self, x0: Tensor, error: Tensor, variance: Tensor, t: Tensor, mean: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """In bits per dimension [B]. error is prediction minus target [B, C, *size]; variance is the network's, -1 for the
        posterior's and 1 for beta.

        The means of both distributions are affine in the prediction, so their distance follows from the error alone. mean: of
        each sample's positions, [B, C, *size] → [B], where it is not of all of them.
        """
        low, high = _per_image(self.min_log_variance[t], x0), _per_image(self.max_log_variance[t], x0)
        log_variance = low + (variance + 1) / 2 * (high - low)
        distance = _per_image(self.error_in_mean[t], error) * error  # true mean minus predicted mean
        kl = 0.5 * (log_variance - low - 1 + (low - log_variance).exp() + distance.square() * (-log_variance).exp())

        # At t = 0: the likelihood of x0's bin among 256 between -1 and 1, the outer ones open. DiT does the same to latents.
        inverse_std = (-0.5 * log_variance).exp()
        half, z = inverse_std / 255, distance * inverse_std
        inside = _normal_cdf(half - z.abs()) - _normal_cdf(-half - z.abs())  # in the lower tail, where fp32 keeps its digits
        outer = _normal_cdf(half + torch.where(x0 < 0, z, -z))
        likelihood = torch.where(x0.abs() > 0.999, outer, inside)
        nll = -likelihood.clamp(min=1e-12).log()
        mean = mean or (lambda values: values.flatten(1).mean(1))
        return torch.where(t == 0, mean(nll), mean(kl)) / math.log(2)


def _per_image(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.ndim - 1))  # [B] → [B, 1, …], as many axes as x has


def _normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-math.sqrt(0.5) * z)  # torch.special.ndtr loses the lower tail in fp32
