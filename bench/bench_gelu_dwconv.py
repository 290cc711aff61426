"""gelu_dwconv against the seed repository's NCHW path and against PyTorch on channels-last tokens, eager and compiled.

On a GPU: the kernels, forward and backward, each alone. On a CPU: forward and backward together, all in turns, and what stands
for the kernels is cpu.py, which a machine without a GPU trains on.
"""

import pytest
import torch
from fastdit_kernels.cpu import CPU
from fastdit_kernels.gelu_dwconv import gelu_dwconv, traffic
from fastdit_kernels.reference import gelu_dwconv as reference
from torch.nn import functional

# Bytes per hidden element, forward and backward, of the code PyTorch runs and its compiler generates, K = 3.
BYTES = {"eager channels-last": (12, 18), "torch.compile": (12, 26), "torch.compile, layout": (12, 18)}
BASELINES = ["fastdit", "seed NCHW", *BYTES]

# B, side of the grid, F, K. At 32 samples of 16×16 tokens several tensors fit L2.
ON_GPU = [
    pytest.param(32, 16, 3072, 3, marks=pytest.mark.headline),
    (128, 16, 3072, 3),
    (32, 32, 3072, 3),
    (32, 16, 4608, 3),
    (32, 16, 3072, 4),
    (32, 16, 3072, 5),
]
ON_CPU = [(8, 16, 3072, 3), (8, 16, 3072, 4), (8, 16, 3072, 5)]

# PyTorch says of padding="same" with an even kernel that it copies the padded input: that is this baseline.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def seed_nchw(h, bias, weight, conv_bias, height, width):
    """To [B, F, H, W] and back: two transposing copies around the convolution."""
    B, _, F = h.shape
    a = functional.gelu(h + bias, approximate="tanh").transpose(1, 2).reshape(B, F, height, width).contiguous()
    z = functional.conv2d(a, weight, conv_bias, padding="same", groups=F)
    return z.flatten(2).transpose(1, 2).contiguous()


def channels_last(h, bias, weight, conv_bias, height, width):
    """The tokens are NHWC already: a view in, a view out."""
    B, T, F = h.shape
    a = functional.gelu(h + bias, approximate="tanh").view(B, height, width, F).permute(0, 3, 1, 2)
    z = functional.conv2d(a, weight, conv_bias, padding="same", groups=F)
    return z.permute(0, 2, 3, 1).reshape(B, T, F)


def implementation(baseline, device):
    if baseline == "fastdit":
        return gelu_dwconv if device.type == "cuda" else CPU.gelu_dwconv
    if baseline == "torch.compile":
        return torch.compile(channels_last)
    if baseline == "torch.compile, layout":
        return torch.compile(channels_last, options={"force_layout_optimization": True})
    return {"seed NCHW": seed_nchw, "eager channels-last": channels_last}[baseline]


def tensors(B, side, F, K, device, dtype=torch.bfloat16):
    torch.manual_seed(0)
    shapes = ((B, side * side, F), (F,), (F, 1, K, K), (F,), (B, side * side, F))
    *leaves, dz = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
    return [leaf.requires_grad_() for leaf in leaves], dz


@pytest.mark.parametrize(("B", "side", "F", "K"), ON_GPU)
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_gelu_dwconv(measure, gpu, direction, baseline, B, side, F, K):
    call = implementation(baseline, gpu)
    leaves, dz = tensors(B, side, F, K, gpu)
    moved = None
    if baseline == "fastdit":
        moved = traffic(B, side, side, F, K, 2, 2)[direction]
    elif baseline in BYTES and K == 3:
        moved = BYTES[baseline][("forward", "backward").index(direction)] * B * side * side * F

    # The graph is walked again each round, so its buffers must not be given away.
    with torch._functorch.config.patch(donated_buffer=False):
        z = call(*leaves, side, side)
        timed = {
            "forward": lambda: call(*leaves, side, side),
            "backward": lambda: torch.autograd.grad(z, leaves, dz, retain_graph=True),
        }[direction]
        shape = f"B={B} {side}×{side} F={F} K={K} bf16"
        measure(timed, op=f"gelu_dwconv {direction}", baseline=baseline, shape=shape, bytes=moved)


@pytest.mark.parametrize(("B", "side", "F", "K"), ON_CPU)
def test_gelu_dwconv_on_a_cpu(
    side_by_side, device, world, dtype, numbers, B, side, F, K
):  # world: with memory kept as in training
    if device.type != "cpu":
        pytest.skip("the CPU's path")
    compiled = K == 3  # half a minute of compiling each
    calls = {name: implementation(name, device) for name in BASELINES if compiled or "compile" not in name}
    leaves, dz = tensors(B, side, F, K, device, dtype)

    def timed(call):
        return lambda: torch.autograd.grad(call(*leaves, side, side), leaves, dz)

    side_by_side(
        {name: timed(call) for name, call in (calls | {"reference, fp32 within": reference}).items()},
        op="gelu_dwconv forward + backward",
        shape=f"B={B} {side}×{side} F={F} K={K} {numbers}",
        rounds=15,
        warmup=3,
    )
