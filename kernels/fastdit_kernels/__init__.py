"""The seam between the model and its kernels: one field per op the model calls.

`DiT(config, REFERENCE)` runs on plain PyTorch, `DiT(config, TRITON)` on the fused kernels; both sides of every field have the
same signature, and `REFERENCE._replace(gelu_dwconv=...)` switches one op for bisection and ablation.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

__all__ = ["Ops"]


class Ops(NamedTuple):
    """The four ops of a DiT block. Shapes and formulas are in `reference.py`, which is their specification."""

    ln_modulate: Callable[[Tensor, Tensor, Tensor], Tensor]
    gate_residual_ln_modulate: Callable[..., tuple[Tensor, Tensor]]  # x, y, gate, shift, scale and, if there is one, bias
    gelu_dwconv: Callable[..., Tensor]  # h, bias, weight, conv_bias and the lengths of the token grid: one, two or three
    attention: Callable[[Tensor | tuple[Tensor, Tensor, Tensor]], Tensor]
