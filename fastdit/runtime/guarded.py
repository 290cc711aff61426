"""Updates of lists of tensors, each in one pass, that change nothing where `found_inf` is 1, without a host sync."""

import torch
from torch import Tensor


def descend(
    params: list[Tensor], grads: list[Tensor], lr: float | Tensor, decay: float = 0.0, found_inf: Tensor | None = None
) -> None:
    """p ← p - lr · (g + decay · p), by PyTorch's fused SGD."""
    _sgd(params, grads, lr, decay, found_inf, maximize=False)


def towards(averages: list[Tensor], values: list[Tensor], weight: float | Tensor, found_inf: Tensor | None = None) -> None:
    """a ← a - weight · (a - v): SGD with gradient -v and weight decay 1.

    Of the fused kernels that move one list of tensors towards another in one pass, this is the one that takes found_inf. A lerp
    by a weight of 0 takes as long (30 M numbers on two cores: 21 ms both), is a launch for each tensor on a GPU, and makes 0 of
    -0.
    """
    _sgd(averages, values, weight, 1.0, found_inf, maximize=True)


def _sgd(
    params: list[Tensor], grads: list[Tensor], lr: float | Tensor, decay: float, found_inf: Tensor | None, maximize: bool
) -> None:
    torch._fused_sgd_(
        params, grads, [], weight_decay=decay, momentum=0.0, lr=lr, dampening=0.0, nesterov=False,
        maximize=maximize, is_first_step=False, found_inf=found_inf,
    )  # fmt: skip
