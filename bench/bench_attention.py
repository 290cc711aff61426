"""Attention by each backend on the layout the qkv projection writes, beside the usual transposes, eager and compiled.

Forward and backward together.
"""

import importlib.util

import pytest
import torch
from fastdit_kernels.attention import choose_attention
from torch.nn import functional as F

SHAPES = [
    (64, 12, 64),
    pytest.param(256, 12, 64, marks=pytest.mark.headline),
    (256, 16, 72),
    (1024, 12, 64),
]  # T, H, K: B/4, B/2, XL/2, B/2 at 512 pixels


def usual(qkv):
    """As the seed and most trainers write it: heads first, each of q, k and v copied into place, and the result copied back."""
    q, k, v = (t.transpose(1, 2).contiguous() for t in qkv.unbind(2))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous().flatten(2)


@pytest.mark.parametrize(("T", "H", "K"), SHAPES)
def test_attention(side_by_side, device, dtype, numbers, T, H, K):
    gpu = device.type == "cuda"
    B = 32 if gpu else 4
    backends = ["sdpa", "eager"]
    if gpu and (importlib.util.find_spec("flash_attn") or importlib.util.find_spec("flash_attn_interface")):
        backends.append("flash")
    functions = {name: choose_attention(name, device, dtype, K, T) for name in backends}
    auto = choose_attention("auto", device, dtype, K, T)
    chosen = next((n for n, f in functions.items() if f == auto), "flash")  # a partial equals no other
    functions = {f"fastdit: {chosen}": functions.pop(chosen), **functions, "usual layout": usual}
    if gpu or (T, K) == (256, 64):  # a CPU takes ten seconds to compile it
        functions["usual layout, torch.compile"] = torch.compile(usual, dynamic=False)
    qkv = torch.randn(B, T, 3, H, K, device=device, dtype=dtype, requires_grad=True)
    dout = torch.randn(B, T, H * K, device=device, dtype=dtype)
    shape = f"B={B} T={T} H={H} K={K} {numbers}"
    forward = 4 * B * H * T * T * K  # two products of T × T × K, and the backward has five
    side_by_side(
        {n: (lambda f=f: torch.autograd.grad(f(qkv), qkv, dout)) for n, f in functions.items()},
        op="attention forward + backward",
        shape=shape,
        rounds=30 if gpu else 7,
        flops=dict.fromkeys(functions, 7 * forward // 2),
    )
