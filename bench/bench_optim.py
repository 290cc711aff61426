"""What follows a backward: clipping, AdamW and the averaged weights, on all parameters of a DiT. Bound by memory.

A parameter costs 40 bytes on a GPU, the norm 4 and our kernel 36. PyTorch's fused ops, which run elsewhere, cost 48: AdamW
reads four numbers and writes four, the scaled gradient too, and the average reads two and writes one.
"""

import pytest
import torch
from fastdit_kernels.reference import REFERENCE
from torch import Tensor, nn

from fastdit.config import TrainConfig
from fastdit.model import DiT
from fastdit.optim import Optimizer
from fastdit.recipes import dit

CONFIG = TrainConfig(batch=1)


def model_with_gradients(size: str, device: torch.device) -> tuple[nn.Module, dict[str, Tensor]]:
    with torch.device(device):
        model = DiT(dit(size, 2, channels=4, num_classes=0), REFERENCE)
    gradients = {name: torch.randn_like(p) * 1e-4 for name, p in model.named_parameters()}
    for p in model.parameters():
        nn.init.normal_(p, std=0.02)
    return model, gradients


def ours(size: str, device: torch.device, kernel: bool):
    model, gradients = model_with_gradients(size, device)
    optimizer = Optimizer(model, CONFIG, 1, kernel=kernel)

    def step() -> None:
        for name, p in model.named_parameters():
            p.grad = gradients[name]
        optimizer.step(optimizer.rates(1000))

    return step


def standard(size: str, device: torch.device, fused: bool = False, compiled: bool = False):
    """clip_grad_norm_, AdamW, and the DiT repository's loop over parameters; or the fused forms that PyTorch has of each."""
    model, gradients = model_with_gradients(size, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=CONFIG.lr, weight_decay=CONFIG.weight_decay, fused=fused or None)
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), CONFIG.grad_clip)
        optimizer.step()
        if fused:
            torch._foreach_lerp_(list(ema.values()), list(model.parameters()), 1 - CONFIG.ema)
        else:
            for name, p in model.named_parameters():
                ema[name].mul_(CONFIG.ema).add_(p, alpha=1 - CONFIG.ema)

    run = torch.compile(update) if compiled else update

    def step() -> None:
        for name, p in model.named_parameters():
            p.grad = gradients[name]
        run()
        optimizer.zero_grad()

    return step


@pytest.mark.headline
def test_optimizer_and_ema(side_by_side, device):
    gpu = device.type == "cuda"
    size = "B" if gpu else "S"  # S/2 is 33 M parameters, 1.6 GB a step
    calls = {
        "fastdit": ours(size, device, kernel=gpu),
        "AdamW, EMA by a loop": standard(size, device),
        "fused AdamW, foreach EMA": standard(size, device, fused=True),
    }
    if gpu:
        calls["fastdit, PyTorch's fused ops"] = ours(size, device, kernel=False)
        # A CPU takes a minute and a half to compile it.
        calls["AdamW, EMA by a loop, torch.compile"] = standard(size, device, compiled=True)
    with torch.device("meta"):
        count = sum(p.numel() for p in DiT(dit(size, 2, channels=4, num_classes=0), REFERENCE).parameters())
    bytes = {"fastdit": (40 if gpu else 48) * count, "fastdit, PyTorch's fused ops": 48 * count}
    side_by_side(calls, op="clip + AdamW + EMA", shape=f"{size}/2, {count / 1e6:.0f} M fp32", rounds=10, bytes=bytes)
