"""TRITON: every op by its fused kernel. A module of its own, so that `REFERENCE` can be had where triton cannot be imported."""

from fastdit_kernels import Ops
from fastdit_kernels.attention import attention
from fastdit_kernels.gate_residual_ln_modulate import gate_residual_ln_modulate
from fastdit_kernels.gelu_dwconv import gelu_dwconv
from fastdit_kernels.ln_modulate import ln_modulate

TRITON = Ops(ln_modulate, gate_residual_ln_modulate, gelu_dwconv, attention)
