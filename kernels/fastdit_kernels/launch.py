"""How an op's kernels are launched: for real, not at all, or written down.

Each direction of an op is one function that allocates its outputs and hands its kernels to the `Launch` it is given. With `run`
it computes; with `skip` it is the op's fake implementation, which therefore cannot disagree with it about a shape or a dtype;
and `aot.py` passes a recorder, so that what it compiles and counts without a GPU is what a GPU would run.
"""

from contextlib import nullcontext
from typing import Any, Protocol

import torch
import triton

__all__ = ["Launch", "run", "skip"]


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
        kernel[grid](**args, num_warps=num_warps, maxnreg=max_registers)


def skip(kernel: Any, grid: tuple[int, ...], num_warps: int, max_registers: int | None = None, **args: Any) -> None:
    pass


def block_and_warps(width: int) -> tuple[int, int]:
    """The power of two that covers a row, and warps enough that a thread has eight of it: one 128-bit access in bf16."""
    block = triton.next_power_of_2(width)
    return block, min(16, max(1, block // 256))
