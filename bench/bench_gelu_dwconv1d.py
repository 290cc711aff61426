"""gelu_dwconv on a grid of one length against PyTorch's conv1d, which wants channels before tokens, and against a 1×K conv2d
of the channels-last tokens.

On a GPU: the kernels, forward and backward, each alone. On a CPU: forward and backward together, all in turns, and what stands
for the kernels is cpu.py, which a machine without a GPU trains on.
"""

import pytest
import torch
from fastdit_kernels.cpu import CPU
from fastdit_kernels.gelu_dwconv import gelu_dwconv
from fastdit_kernels.gelu_dwconv1d import traffic
from fastdit_kernels.reference import gelu_dwconv as reference
from torch.nn import functional

BASELINES = ["fastdit", "conv1d", "conv1d, torch.compile", "eager channels-last"]

# B, L, F, K
ON_GPU = [
    (32, 256, 3072, 3),
    (128, 256, 3072, 3),
    (256, 16, 3072, 3),
    (8, 4096, 3072, 3),
    (32, 256, 3072, 5),
    (32, 256, 3072, 7),
]
ON_CPU = [(8, 256, 3072, 3), (8, 256, 3072, 4), (8, 256, 3072, 5), (64, 16, 1024, 3)]

# PyTorch says of padding="same" with an even kernel that it copies the padded input: that is this baseline.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def conv1d(h, bias, weight, conv_bias, length):
    """To [B, F, L] and back: two transposing copies around the convolution."""
    a = functional.gelu(h + bias, approximate="tanh").transpose(1, 2).contiguous()
    return functional.conv1d(a, weight, conv_bias, padding="same", groups=h.shape[2]).transpose(1, 2).contiguous()


def channels_last(h, bias, weight, conv_bias, length):
    """The tokens are an image of one row: a view in, a view out."""
    a = functional.gelu(h + bias, approximate="tanh").unsqueeze(1).permute(0, 3, 1, 2)
    z = functional.conv2d(a, weight.unsqueeze(2), conv_bias, padding="same", groups=h.shape[2])
    return z.permute(0, 2, 3, 1).reshape(h.shape)


def implementation(baseline, device):
    if baseline == "fastdit":
        return gelu_dwconv if device.type == "cuda" else CPU.gelu_dwconv
    if baseline == "conv1d, torch.compile":
        return torch.compile(conv1d)
    return {"conv1d": conv1d, "eager channels-last": channels_last}[baseline]


def tensors(B, L, F, K, device, dtype=torch.bfloat16):
    torch.manual_seed(0)
    *leaves, dz = (torch.randn(shape, device=device, dtype=dtype) for shape in ((B, L, F), (F,), (F, 1, K), (F,), (B, L, F)))
    return [leaf.requires_grad_() for leaf in leaves], dz


@pytest.mark.parametrize(("B", "L", "F", "K"), ON_GPU)
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_gelu_dwconv1d(measure, gpu, direction, baseline, B, L, F, K):
    call = implementation(baseline, gpu)
    leaves, dz = tensors(B, L, F, K, gpu)
    moved = traffic(B, L, F, K, 2, 2)[direction] if baseline == "fastdit" else None
    # The graph is walked again each round, so its buffers must not be given away.
    with torch._functorch.config.patch(donated_buffer=False):
        z = call(*leaves, L)
        timed = {
            "forward": lambda: call(*leaves, L),
            "backward": lambda: torch.autograd.grad(z, leaves, dz, retain_graph=True),
        }[direction]
        shape = f"B={B} L={L} F={F} K={K} bf16"
        measure(timed, op=f"gelu_dwconv1d {direction}", baseline=baseline, shape=shape, bytes=moved)


@pytest.mark.parametrize(("B", "L", "F", "K"), ON_CPU)
def test_gelu_dwconv1d_on_a_cpu(side_by_side, device, world, dtype, numbers, B, L, F, K):
    # world: with memory kept as in training
    if device.type != "cpu":
        pytest.skip("the CPU's path")
    compiled = (L, K) == (256, 3)  # half a minute of compiling each
    calls = {name: implementation(name, device) for name in BASELINES if compiled or "compile" not in name}
    leaves, dz = tensors(B, L, F, K, device, dtype)

    def timed(call):
        return lambda: torch.autograd.grad(call(*leaves, L), leaves, dz)

    side_by_side(
        {name: timed(call) for name, call in (calls | {"reference, fp32 within": reference}).items()},
        op="gelu_dwconv1d forward + backward",
        shape=f"B={B} L={L} F={F} K={K} {numbers}",
        rounds=15,
        warmup=3,
    )
