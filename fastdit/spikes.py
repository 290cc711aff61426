"""Spikes of the loss, found on the device, so that their steps can be skipped."""

import torch
import torch.distributed as dist
from torch import Tensor


class Spikes:
    """Finds losses more than `sigma` standard deviations above the mean of the last WINDOW losses, earlier spikes left out.

    `window`, fp64 [WINDOW + 1] and equal on all ranks: those losses in a ring buffer, and how many there have been. The
    decision is made on the device, without a host sync.
    """

    WINDOW, FEW = 128, 32  # nothing is a spike before the first FEW

    def __init__(self, sigma: float, device: torch.device):
        self.sigma = sigma
        self.window = torch.zeros(self.WINDOW + 1, dtype=torch.float64, device=device)
        self.places = torch.arange(self.WINDOW, device=device)

    @torch.no_grad()
    def find(self, loss: Tensor) -> Tensor:
        """Whether the step's loss, of which each rank gives its mean, is a spike: bool on the device. One all-reduce."""
        loss = loss.detach().double().clone()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        losses, count = self.window[:-1], self.window[-1]
        filled = (self.places < count).double()
        mean = (losses * filled).sum() / filled.sum()
        deviation = (((losses - mean).square() * filled).sum() / filled.sum()).sqrt()
        spike = (count >= self.FEW) & (loss > mean + self.sigma * deviation)
        counts = loss.isfinite() & ~spike
        losses.copy_(torch.where((self.places == count % self.WINDOW) & counts, loss, losses))
        count += counts
        return spike
