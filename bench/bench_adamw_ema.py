"""adamw_ema against PyTorch's fused AdamW with a fused average behind it, and one by one, on a model's own tensors."""

import pytest
import torch
from fastdit_kernels import reference
from fastdit_kernels.adamw_ema import adamw_ema, traffic

from fastdit.model import named_shapes
from fastdit.recipes import dit

SETTINGS = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight": 1e-4}
FUSED, LOOP, COMPILED = "PyTorch, fused", "PyTorch, one by one", "PyTorch, one by one, torch.compile"


def fused(params, grads, exp_avgs, exp_avg_sqs, averages, decays, steps, grad_scale, found_inf, *, weight, **settings):
    """As our Optimizer has it without the kernel, but that one decay serves all."""
    torch._fused_adamw_(
        params, grads, exp_avgs, exp_avg_sqs, [], list(steps), weight_decay=0.01, amsgrad=False, maximize=False,
        grad_scale=grad_scale, found_inf=found_inf, **settings,
    )  # fmt: skip
    torch._foreach_lerp_(averages, params, weight)


def one_by_one(params, grads, exp_avgs, exp_avg_sqs, averages, decays, steps, grad_scale, found_inf, **settings):
    """The reference, spared its test of found_inf, which waits for the device."""
    reference.adamw_ema(params, grads, exp_avgs, exp_avg_sqs, averages, decays, steps, grad_scale, False, **settings)


@pytest.mark.timeout(0)
@pytest.mark.parametrize("size", ["B", "XL"])
@pytest.mark.parametrize(
    "baseline", [*(pytest.param(name, marks=pytest.mark.headline) for name in ("fastdit", FUSED)), LOOP, COMPILED]
)
def test_adamw_ema(measure, gpu, baseline, size):
    if baseline == COMPILED and size == "XL":
        pytest.skip("to compile the updates of 250 tensors takes minutes")
    call = {"fastdit": adamw_ema, FUSED: fused, LOOP: one_by_one}.get(baseline) or torch.compile(one_by_one)
    shapes = [shape for _, shape in named_shapes(dit(size, 2, channels=4, num_classes=0))]
    lists = [[torch.rand(shape, device=gpu) * 0.01 for shape in shapes] for _ in range(5)]
    decays, steps = torch.full((len(shapes),), 0.01, device=gpu), torch.full((len(shapes),), 100.0, device=gpu)
    grad_scale, found_inf = torch.ones((), device=gpu), torch.zeros((), device=gpu)
    sizes = [shape.numel() for shape in shapes]
    measure(
        lambda: call(*lists, decays, steps, grad_scale, found_inf, **SETTINGS),
        op="adamw_ema",
        baseline=baseline,
        shape=f"{size}/2, {sum(sizes) / 1e6:.0f} M fp32",
        bytes={"fastdit": traffic(sizes), FUSED: 44 * sum(sizes)}.get(baseline),
        rounds=20,
    )
