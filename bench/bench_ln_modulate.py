"""ln_modulate against eager and compiled PyTorch, forward and backward.

The forward is no win over the compiler, which fuses it into one kernel too; the backward is.
"""

import pytest
import torch
from fastdit_kernels.ln_modulate import ln_modulate, traffic
from fastdit_kernels.reference import ln_modulate as reference

# Bytes per element, forward and backward, of the code PyTorch runs and its compiler generates for the reference.
BYTES = {"eager": (12, 20), "torch.compile": (4, 10)}
SHAPES = [
    pytest.param(32, 256, 768, marks=pytest.mark.headline),
    (128, 256, 768),
    (32, 256, 1152),
    (128, 256, 1152),
]  # at 32 samples several tensors fit L2


@pytest.mark.parametrize(("B", "T", "D"), SHAPES)
@pytest.mark.parametrize("baseline", ["fastdit", "eager", "torch.compile"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_ln_modulate(measure, gpu, direction, baseline, B, T, D):
    x = torch.randn(B, T, D, device=gpu, dtype=torch.bfloat16, requires_grad=True)
    packed = torch.randn(B, 6, D, device=gpu, dtype=torch.bfloat16)
    shift, scale = (packed[:, i].requires_grad_() for i in (0, 1))  # leaves, with the strides of a packed projection
    call = {"fastdit": ln_modulate, "eager": reference, "torch.compile": torch.compile(reference, dynamic=False)}[baseline]
    index = ("forward", "backward").index(direction)
    moved = traffic(B, T, D, 2, 2)[direction] if baseline == "fastdit" else BYTES[baseline][index] * B * T * D

    # The graph is walked again each round, so its buffers must not be given away.
    with torch._functorch.config.patch(donated_buffer=False):
        out = call(x, shift, scale)
        dout = torch.randn_like(out)
        timed = {
            "forward": lambda: call(x, shift, scale),
            "backward": lambda: torch.autograd.grad(out, (x, shift, scale), dout, retain_graph=True),
        }[direction]
        measure(timed, op=f"ln_modulate {direction}", baseline=baseline, shape=f"B={B} T={T} D={D} bf16", bytes=moved)
