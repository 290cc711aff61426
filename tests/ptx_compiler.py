"""Compiles launches to PTX as a GPU's own launch would: with the options of `launch.run`, and specialised for the arguments'
types, addresses and divisibility by Triton itself.

`Compiler` starts this file as a second process, for in the tests' own the kernels are interpreted functions. There `launch.run`
is called with a stand-in for the kernel, which compiles and does not launch (Triton's `warmup`), and Triton is told of a GPU.
"""

import importlib
import os
import pickle
import subprocess
import sys
from typing import Any, NamedTuple

import torch


class Request(NamedTuple):
    module: str
    kernel: str
    arch: int
    settings: tuple[Any, ...]  # of the launch, behind its grid
    args: dict[str, Any]  # of a tensor: (its dtype, its address modulo 16)


class Code(NamedTuple):
    ptx: str
    shared_bytes: int
    parameters: tuple[str, ...]  # the arguments that are no constants, in order


class Compiler:
    def __init__(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, "-P", __file__]  # -P: no file beside this one stands in for an installed module
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self.known: dict[str, Code] = {}

    def __call__(self, request: Request) -> Code:
        key = repr(request)
        if key not in self.known:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            pickle.dump(tuple(request), self.process.stdin)
            self.process.stdin.flush()
            answer = pickle.load(self.process.stdout)
            if isinstance(answer, str):
                raise RuntimeError(answer)
            self.known[key] = Code(*answer)
        return self.known[key]

    def close(self) -> None:
        self.process.communicate()


class Device:
    """A GPU, as Triton asks for it before a launch."""

    arch = 80

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


class Unlaunched:
    """What `launch.run` is given for a kernel: `self[grid](**args)` compiles it as that would, and keeps the result."""

    def __init__(self, kernel: Any):
        self.kernel, self.compiled = kernel, None

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(**args: Any) -> None:
            self.compiled = self.kernel.warmup(grid=grid, **args)

        return launch


def tensor(dtype: torch.dtype, address: int) -> torch.Tensor:
    """One of this type, that many bytes after a multiple of 16."""
    whole = torch.empty(64, dtype=dtype)
    return whole[(address - whole.data_ptr()) % 16 // whole.itemsize :]


def compile_launch(request: Request, device: Device) -> Code:
    device.arch = request.arch
    kernel = Unlaunched(getattr(importlib.import_module(request.module), request.kernel))
    args = {name: tensor(*value) if isinstance(value, tuple) else value for name, value in request.args.items()}
    importlib.import_module("fastdit_kernels.launch").run(kernel, (1,), *request.settings, **args)
    signature = kernel.compiled.src.signature
    parameters = tuple(name for name, kind in signature.items() if kind != "constexpr")
    return Code(kernel.compiled.asm["ptx"], kernel.compiled.metadata.shared, parameters)


def main() -> None:
    from triton.runtime import driver

    device = Device()
    driver.set_active(device)
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # what a compiler prints is no answer
    while True:
        try:
            request = Request(*pickle.load(sys.stdin.buffer))
        except EOFError:
            return
        try:
            answer: Any = tuple(compile_launch(request, device))
        except Exception as error:
            answer = f"{request.kernel}: {type(error).__name__}: {error}"
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
