"""How an op's kernels are launched: for real, or written down.

Each direction of an op is two functions. One allocates its outputs, and is the op's fake implementation too, which therefore
cannot disagree with it about a shape or a dtype. The other calls it and hands its kernels to the `Launch` it is given. With
`run` it computes; `aot.py` passes a recorder, so that what it compiles and counts without a GPU is what a GPU would run.

A fake implementation must not see how the work is split: a compiler would guard on every comparison with a batch size, and
compile again for each range of sizes.
"""

from contextlib import nullcontext
from functools import lru_cache
from typing import Any, Protocol

import torch
import triton

__all__ = ["Launch", "architecture", "block_and_warps", "run"]


class Launch(Protocol):
    def __call__(
        self, kernel: Any, grid: tuple[int, ...], num_warps: int, max_registers: int | None = None, **args: Any
    ) -> None:
        """Launch `kernel`, a function under `triton.jit`, on `grid`; `args` are its arguments by name.

        `max_registers` caps the registers of a thread, where occupancy is worth more than the compiler's own choice.
        """


def run(kernel: Any, grid: tuple[int, ...], num_warps: int, max_registers: int | None = None, **args: Any) -> None:
    # Triton launches on the current device, which need not be the tensors'.
    device = next(a.device for a in args.values() if isinstance(a, torch.Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        # Products and sums that meet become one instruction. Triton 3.9 warns where that is left to its default.
        kernel[grid](**args, num_warps=num_warps, maxnreg=max_registers, enable_fp_fusion=True)


@lru_cache(maxsize=64)
def block_and_warps(width: int) -> tuple[int, int]:
    """The power of two that covers a row, and warps enough that a thread has eight of it: one 128-bit access in bf16."""
    block = triton.next_power_of_2(width)
    return block, min(16, max(1, block // 256))


def architecture(device: torch.device) -> int:
    """The number in sm_90, by which tiles are chosen; 80 where there is no GPU."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
