"""One DiT block, forward and backward: how long it takes, and what it does, op by op.

Ours also makes its share of the model's one modulation projection, so that it does the work of the seed's block. Parameters are
in the dtype computed in: autocast's casts, which the seed's way adds, are in no figure here.
"""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdit.model import Block, choose_ops
from fastdit.recipes import RECIPES, SIZES, dit

SEED = "the seed's way"
COMPILED = ", torch.compile"
T = 256

# PyTorch says of padding="same" with an even kernel that it copies the padded input: that is the seed's way.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

# Bytes per bf16 element of [B, T, D] of a seed's block compiled for a GPU, forward and backward, read from the code that
# Inductor generates: the first norm 4 + 10, the gated residual and its norm 8 + 18, the last gated residual 6 + 6, GELU and
# convolution between transposes 13 + 26 for each of 4 hidden elements, and a pass for every Linear's bias gradient, 18.
COMPILED_BYTES_ON_A_GPU = 14 + 26 + 12 + 4 * 39 + 18


class Modulated(nn.Module):
    """Our block behind the projection of its own six vectors, with the ops that `options` of a config choose."""

    def __init__(self, size: str, device: torch.device, **options: str):
        super().__init__()
        model = dit(size, 2, channels=4, num_classes=0)
        config = dataclasses.replace(RECIPES["cats-256"], model=model, **options)
        self.block = Block(model, choose_ops(config, device))
        self.adaLN_modulation = nn.Linear(model.width, 6 * model.width)

    def forward(self, x: Tensor, m: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return self.block(x, m, self.adaLN_modulation(F.silu(c)).view(len(c), 6, -1))


def both_ways(block: nn.Module, inputs: tuple[Tensor, ...], compiled: bool):
    """A call that runs the block forward and backward, to every input and parameter."""
    run = torch.compile(block) if compiled else block
    leaves, upstream = [*inputs, *block.parameters()], torch.randn_like(inputs[0])

    def call() -> tuple[Tensor, ...]:
        outputs = run(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad(outputs, leaves, [upstream] * len(outputs))

    return call


def calls(size: str, B: int, device: torch.device, dtype: torch.dtype, baselines, **options: str):
    """Ours and the seed's, eager and compiled, by name."""
    _, D, num_heads = SIZES[size]
    with torch.device(device):
        x, m = (torch.randn(B, T, D, dtype=dtype, requires_grad=True) for _ in range(2))
        c = torch.randn(B, D, dtype=dtype, requires_grad=True)
        ours = Modulated(size, device, **options).to(dtype)
        seed = baselines.PlainBlock(D, num_heads, (16, 16), conv=True).to(dtype)
    named = (("fastdit", ours, (x, m, c)), (SEED, seed, (x, c)))
    return {name + how: both_ways(block, given, bool(how)) for name, block, given in named for how in ("", COMPILED)}


@pytest.mark.timeout(0)
@pytest.mark.parametrize(
    ("size", "B"),
    [
        pytest.param("B", 8, marks=pytest.mark.headline),
        pytest.param("B", 32, marks=pytest.mark.headline),
        ("B", 128),
        ("XL", 32),
    ],
)
def test_block(side_by_side, device, world, dtype, numbers, baselines, size, B):  # world: with memory kept as in training
    if (device.type == "cpu") != (B == 8):
        pytest.skip("a batch of 8 is a CPU's, larger ones are a GPU's")
    D = SIZES[size][1]
    products = 6 * B * (12 * T * D * D + 2 * T * T * D + 6 * D * D)  # FLOPs, forward and backward, by multiply-adds
    named = calls(size, B, device, dtype, baselines)
    side_by_side(
        named,
        op="block forward + backward",
        shape=f"{size}/2, B={B} T={T} D={D} {numbers}",
        rounds=5 if device.type == "cpu" else 30,
        warmup=2,
        flops=dict.fromkeys(named, products),
    )
    torch._dynamo.reset()


@pytest.mark.timeout(0)
def test_what_a_block_does(tally, counting, device, dtype, numbers, baselines):
    """Ours is counted on its kernels, wherever it is. At most half of the bytes of the seed's block under torch.compile."""
    B, D = 2, 768
    found = {
        name: counting.count(call)
        for name, call in calls("B", B, device, dtype, baselines, kernels="triton", attention="sdpa").items()
    }
    torch._dynamo.reset()
    elements, bf16 = B * T * D, 2 / dtype.itemsize
    for name, count in found.items():
        tally(count, of="a block", baseline=name, shape=f"B/2, B={B} T={T} D={D} {numbers}", elements=elements, each=True)
    per_element = {name: count.bytes / elements * bf16 for name, count in found.items()}
    assert per_element["fastdit"] < per_element[SEED] / 2
    assert per_element["fastdit"] < min(per_element[SEED + COMPILED], COMPILED_BYTES_ON_A_GPU) / 2
