"""A function of tensors as one CUDA graph: one launch by the host in place of one for each kernel.

A graph replays the captured kernels with the addresses and numbers of the capture. So everything that changes from call to call
must be a tensor argument, and the function must neither read a tensor's value on the host nor draw random numbers.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastdit.config import ParallelConfig
from fastdit.runtime.ranks import World

WARM_UPS = 3  # calls before the capture: the compiler compiles in them, libraries set themselves up, tables are made


def graphs(config: ParallelConfig, world: World) -> bool:
    """Whether the step is a graph here. Collectives are not captured: several ranks launch kernel by kernel."""
    return config.graph == "on" or (config.graph == "auto" and world.device.type == "cuda" and world.size == 1)


def capturing() -> bool:
    """Whether kernels are being recorded now, and not run."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Graph(Protocol):
    """What torch.cuda.CUDAGraph offers, as far as it is used here."""

    def replay(self) -> None: ...


class Cuda:
    """How a GPU captures. A test has a stand-in of the same two methods that records ops on a CPU."""

    def warm_up(self) -> AbstractContextManager[Any]:
        """Kernels within run on a stream beside the default one, as a capture needs them to have done before."""
        return _Beside()

    def capture(self, call: Callable[[], None]) -> Graph:
        """Record the kernels that `call` launches; none of them runs."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a thread that reads data ahead may allocate
            call()
        return graph


class _Beside:
    def __enter__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        self.context = torch.cuda.stream(self.stream)
        self.context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)
        torch.cuda.current_stream().wait_stream(self.stream)


class Graphed:
    """`function` of a tree of tensors, called as it is for WARM_UPS calls, then captured once and replayed from there on.

    Each call does what the plain function would. What it returns is overwritten by the next call. Tensors of other shapes, or
    another tree of them, as where a run begins to learn jumps, are warmed up for and captured anew, in place of the former.
    Where the capture fails, `say` gets one line and the function is called plainly from there on.
    captured: told once whether the capture succeeded, to fill tables of the addresses it fixed, or to tidy up.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        say: Callable[[str], None] = print,
        captured: Callable[[bool], None] = lambda succeeded: None,
        backend: Any = None,
    ):
        self.function, self.say, self.captured, self.backend = function, say, captured, backend or Cuda()
        self.calls = 0  # of this form
        self.form: Any = None
        self.graph: Graph | None = None
        self.failed = False
        self.inputs: list[Any] = []
        self.result: Any = None

    def __call__(self, *args: Any) -> Any:
        leaves, tree = tree_flatten(args)
        form = tree, [leaf.shape if isinstance(leaf, Tensor) else None for leaf in leaves]
        if form != self.form:
            self.form, self.calls, self.graph, self.result = form, 0, None, None
        self.calls += 1
        if self.failed:
            return self.function(*args)
        if self.calls <= WARM_UPS:
            with self.backend.warm_up():
                return self.function(*args)
        if self.graph is None:
            self.inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            try:
                self._capture(tree_unflatten(self.inputs, tree))
            except RuntimeError as error:
                self.failed = True
                self.captured(False)
                reason = str(error).strip().partition("\n")[0][:200]
                self.say(f"the step could not be captured as a CUDA graph and runs without one: {reason}")
                return self.function(*args)
        for kept, given in zip(self.inputs, leaves, strict=True):
            if isinstance(given, Tensor):
                kept.copy_(given)
        assert self.graph is not None
        self.graph.replay()
        return self.result

    def _capture(self, args: Any) -> None:
        def call() -> None:
            self.result = self.function(*args)

        self.graph = self.backend.capture(call)
        self.captured(True)
