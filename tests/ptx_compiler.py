"""Compiles launches to PTX with the specialisation Triton's own launcher would choose for their arguments, without a GPU.

`Compiler` starts this file as a second process, because in the tests' own one the kernels are interpreted functions. There
Triton is told of a GPU of each architecture, and `warmup` does all that a launch does, from the arguments' types, addresses and
divisibility to the cubin, but the launch.
"""

import importlib
import os
import pickle
import subprocess
import sys
from typing import Any, NamedTuple


class Pointer:
    """A tensor as the launcher sees it."""

    def __init__(self, dtype: Any, address: int):
        self.dtype, self.address = dtype, address

    def data_ptr(self) -> int:
        return self.address


class Request(NamedTuple):
    module: str
    kernel: str
    arch: int
    num_warps: int
    max_registers: int | None
    args: dict[str, Any]


class Code(NamedTuple):
    ptx: str
    shared_bytes: int
    parameters: tuple[str, ...]  # the arguments that are no constants, in order


class Compiler:
    def __init__(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, "-P", __file__]  # -P: no file beside this one stands in for an installed module
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self.done: dict[Any, Code] = {}

    def __call__(self, request: Request) -> Code:
        key = repr(request)
        if key not in self.done:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            pickle.dump(tuple(request), self.process.stdin)
            self.process.stdin.flush()
            answer = pickle.load(self.process.stdout)
            if isinstance(answer, str):
                raise RuntimeError(answer)
            self.done[key] = Code(*answer)
        return self.done[key]

    def close(self) -> None:
        self.process.communicate()


def compile_launch(request: Request) -> Code:
    kernel = getattr(importlib.import_module(request.module), request.kernel)
    args = {name: Pointer(*value) if isinstance(value, tuple) else value for name, value in request.args.items()}
    DRIVER.arch = request.arch
    compiled = kernel.warmup(grid=(1,), **args, num_warps=request.num_warps, maxnreg=request.max_registers)
    signature = compiled.src.signature
    return Code(compiled.asm["ptx"], compiled.metadata.shared, tuple(k for k, v in signature.items() if v != "constexpr"))


class Driver:
    """A GPU of architecture `arch` that is only ever asked what it is."""

    arch = 80

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


DRIVER = Driver()


def main() -> None:
    from triton.runtime import driver

    driver.set_active(DRIVER)
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # what compilers print is no answer
    while True:
        try:
            request = Request(*pickle.load(sys.stdin.buffer))
        except EOFError:
            return
        try:
            answer: Any = tuple(compile_launch(request))
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
