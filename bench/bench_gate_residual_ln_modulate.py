"""gate_residual_ln_modulate against eager and compiled PyTorch, forward and backward.

The forward is no win over the compiler, which fuses it into one kernel too; the backward is.
"""

import pytest
import torch
from fastdit_kernels.gate_residual_ln_modulate import gate_residual_ln_modulate, traffic
from fastdit_kernels.reference import gate_residual_ln_modulate as reference

# Bytes per element, forward and backward, of the code PyTorch runs and its compiler generates for the reference.
BYTES = {"eager": (22, 38), "torch.compile": (8, 18)}
SHAPES = [
    pytest.param(32, 256, 768, marks=pytest.mark.headline),
    (128, 256, 768),
    (32, 256, 1152),
    (128, 256, 1152),
]  # at 32 samples several tensors fit L2


@pytest.mark.parametrize(("B", "T", "D"), SHAPES)
@pytest.mark.parametrize("baseline", ["fastdit", "eager", "torch.compile"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_gate_residual_ln_modulate(measure, gpu, direction, baseline, B, T, D):
    x, y = (torch.randn(B, T, D, device=gpu, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    packed = torch.randn(B, 6, D, device=gpu, dtype=torch.bfloat16)
    gate, shift, scale = (packed[:, i].requires_grad_() for i in (2, 3, 4))  # leaves, with the strides of a packed projection
    inputs = x, y, gate, shift, scale
    call = {"fastdit": gate_residual_ln_modulate, "eager": reference, "torch.compile": torch.compile(reference, dynamic=False)}[
        baseline
    ]
    index = ("forward", "backward").index(direction)
    moved = traffic(B, T, D, 2, 2)[direction] if baseline == "fastdit" else BYTES[baseline][index] * B * T * D

    # The graph is walked again each round, so its buffers must not be given away.
    with torch._functorch.config.patch(donated_buffer=False):
        outs = call(*inputs)
        upstream = [torch.randn_like(out) for out in outs]
        timed = {
            "forward": lambda: call(*inputs),
            "backward": lambda: torch.autograd.grad(outs, inputs, upstream, retain_graph=True),
        }[direction]
        measure(
            timed, op=f"gate_residual_ln_modulate {direction}", baseline=baseline, shape=f"B={B} T={T} D={D} bf16", bytes=moved
        )
