"""Fixtures every kernel test shares: the device, fp64 truth, and what a kernel reads and writes.

From one test source, a kernel runs on the GPU where there is one, and in Triton's interpreter on CPU tensors where not.
"""

import fastdit  # noqa: F401  # isort: skip  before torch

import importlib
import importlib.util
import json
import os
import platform
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and a run leaves it so; the tests mean a terminal's

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when `triton.jit` decorates: before any kernel module is imported

Op = Callable[..., Tensor | tuple[Tensor, ...]]


@pytest.fixture(scope="session")
def device() -> Iterator[torch.device]:
    """Where kernels run. Without a GPU it is the CPU, with the interpreter's bf16 stores rounded as a GPU rounds them."""
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    truncating = InterpreterBuilder.cast_impl

    def rounding(self, source, to):  # to the nearest, ties to even
        if source.dtype.scalar == float32 and to.scalar == bfloat16:
            values = torch.from_numpy(np.ascontiguousarray(source.data, np.float32))
            return TensorHandle(values.bfloat16().view(torch.int16).numpy().view(np.uint16), bfloat16)
        return truncating(self, source, to)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "cast_impl", rounding)
        yield torch.device("cpu")


@pytest.fixture
def nan_filled() -> Iterator[None]:
    """Every tensor allocated without a value holds NaN, so that an element a kernel did not write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(3)).isnan().all()
    assert torch.zeros(3).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def results() -> Callable[[Op, Mapping[str, Tensor]], dict[str, Tensor]]:
    """results(op, inputs): outputs "out0", "out1" … and gradients "dx", "dscale" … of an op, by name.

    Floating inputs become leaves with the strides they have, and are handed over in their order; behind them the lengths of
    "grid", where there is one. The gradients that arrive are random, a function of their shape, and rounded to bf16, so that
    every dtype is given the same numbers.
    """

    def results(op: Op, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        wanted = {k: v.detach().requires_grad_() for k, v in inputs.items() if isinstance(v, Tensor)}
        outputs = op(*wanted.values(), *inputs.get("grid", ()))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator = torch.Generator().manual_seed(7)
        upstream = [torch.randn(o.shape, generator=generator).bfloat16().to(o) for o in outputs]
        gradients = torch.autograd.grad(outputs, list(wanted.values()), upstream)
        return {f"out{i}": o.detach() for i, o in enumerate(outputs)} | {
            f"d{k}": g for k, g in zip(wanted, gradients, strict=True)
        }

    return results


class Errors(NamedTuple):
    """Relative errors to fp64, ‖a - truth‖ / ‖truth‖, of an output or a gradient: the kernel's and the eager reference's."""

    kernel: float
    reference: float


@pytest.fixture(scope="session")
def errors(results) -> Callable[[Op, Op, Mapping[str, Tensor]], dict[str, Errors]]:
    """errors(kernel, reference, inputs): for each output and gradient, both relative to the reference run in fp64."""

    def relative(actual: Tensor, truth: Tensor) -> float:
        return ((actual.double() - truth).norm() / truth.norm()).item()

    def errors(kernel: Op, reference: Op, inputs: Mapping[str, Tensor]) -> dict[str, Errors]:
        truth = results(reference, {k: v.double() if isinstance(v, Tensor) else v for k, v in inputs.items()})
        ours, eager = results(kernel, inputs), results(reference, inputs)
        assert ours.keys() == truth.keys()
        for name in truth:
            assert ours[name].dtype == eager[name].dtype, name
            assert ours[name].shape == eager[name].shape, name
        return {name: Errors(relative(ours[name], t), relative(eager[name], t)) for name, t in truth.items()}

    return errors


class Traffic(NamedTuple):
    """Bytes a launch loads and stores. `memory` counts an address once; `programs` once for each program that touches it."""

    memory: int
    programs: int


class Recorder:
    """Collects the addresses each program of each launch loads and stores."""

    def __init__(self) -> None:
        self.launches: list[dict[tuple[str, tuple[int, ...]], list[np.ndarray]]] = []

    def launch(self) -> None:
        self.launches.append({})

    def add(self, kind: str, program: tuple[int, ...], addresses: np.ndarray, size: int) -> None:
        self.launches[-1].setdefault((f"{kind}{size}", program), []).append(addresses)

    def traffic(self) -> Traffic:
        memory = programs = 0
        for accesses in self.launches:
            by_kind: dict[str, list[np.ndarray]] = {}
            for (kind, _), addresses in accesses.items():
                distinct = np.unique(np.concatenate(addresses))
                programs += distinct.size * int(kind[-1])
                by_kind.setdefault(kind, []).append(distinct)
            memory += sum(np.unique(np.concatenate(a)).size * int(kind[-1]) for kind, a in by_kind.items())
        return Traffic(memory, programs)


@pytest.fixture(scope="session")
def recording(device) -> Callable[[], AbstractContextManager[Recorder]]:
    """`with recording() as recorder:` records what every kernel launched inside loads and stores. Interpreter only."""
    if device.type != "cpu":
        pytest.skip("addresses are recorded in the interpreter")
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    @contextmanager
    def recording() -> Iterator[Recorder]:
        recorder = Recorder()
        load, store, call = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store, GridExecutor.__call__

        def note(kind: str, builder, pointers, mask) -> None:
            size = pointers.get_element_ty().primitive_bitwidth // 8
            recorder.add(kind, tuple(builder.grid_idx), pointers.data[mask.data.astype(bool)].ravel(), size)

        def create_masked_load(self, pointers, mask, *rest):
            note("load", self, pointers, mask)
            return load(self, pointers, mask, *rest)

        def create_masked_store(self, pointers, value, mask, *rest):
            note("store", self, pointers, mask)
            return store(self, pointers, value, mask, *rest)

        def launched(self, *args, **kwargs):
            recorder.launch()
            return call(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(InterpreterBuilder, "create_masked_load", create_masked_load)
            patch.setattr(InterpreterBuilder, "create_masked_store", create_masked_store)
            patch.setattr(GridExecutor, "__call__", launched)
            yield recorder

    return recording


@pytest.fixture(scope="session")
def embedded() -> Callable[[Tensor], Tensor]:
    """embedded(tensor): the same values in the middle of a longer allocation whose every other element is NaN."""

    def embedded(tensor: Tensor) -> Tensor:
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        around = torch.full((span + 2 * 4096,), torch.nan, dtype=tensor.dtype, device=tensor.device)
        inside = around.as_strided(tensor.shape, tensor.stride(), 4096)
        inside.copy_(tensor)
        return inside

    return embedded


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory):
    """run_ranks(world, fn, *args): each rank's return value; fn is a function of a test file. The class Ranks says the rest."""
    spec = importlib.util.spec_from_file_location("ranks", Path(__file__).with_name("ranks.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ranks = module.Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One CPU thread: for networks too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def soaked(request) -> Callable[..., None]:
    """soaked(figure, passed=200, …): keep what a test marked `soak` counted in tests/results/soak.json; else do nothing."""

    def soaked(figure: str, **counts: int | float | str) -> None:
        if request.node.get_closest_marker("soak") is None:
            return
        path = Path(__file__).with_name("results") / "soak.json"
        path.parent.mkdir(exist_ok=True)
        found = json.loads(path.read_text()) if path.exists() else {}
        versions = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        found[figure] = {**counts, "test": request.node.name, "date": now, **versions}
        path.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")

    return soaked


@pytest.fixture(scope="session")
def ptx_table(request):
    """What runs of compiled code erred by at most; with `-m ptx`, kept in tests/results/ptx.json."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        table = importlib.import_module("ptx_launch").Table()
    yield table
    if (request.config.option.markexpr, request.config.option.keyword) == ("ptx", ""):
        table.save(Path(__file__).with_name("results") / "ptx.json")


@pytest.fixture(scope="session")
def ptx_compiler(ptx_table):
    compiler = importlib.import_module("ptx_compiler").Compiler()
    yield compiler
    compiler.close()


@pytest.fixture
def compiled(ptx_compiler, ptx_table, nan_filled, monkeypatch) -> Callable[..., Any]:
    """compiled(arch, sign, …): from here on ops run their compiled code, by the Launch it returns (ptx_launch.Compiled)."""
    module = importlib.import_module("ptx_launch")

    def compiled(arch: int, sign: int = 1, **options):
        launched = module.Compiled(ptx_compiler, ptx_table, arch, sign, **options)
        module.put_in_place(monkeypatch, launched)
        return launched

    return compiled


@pytest.fixture
def last_program(device, monkeypatch) -> Callable[..., None]:
    """A launch that runs only the last program of its grid, as the one it is; on a GPU, the whole grid."""
    from fastdit_kernels.launch import run

    if device.type != "cpu":
        return run
    from triton.runtime.interpreter import interpreter_builder

    set_dim, set_idx = interpreter_builder.set_grid_dim, interpreter_builder.set_grid_idx

    def launch(kernel, grid, num_warps, max_registers=None, **args) -> None:
        whole = grid + (1,) * (3 - len(grid))
        with monkeypatch.context() as patch:
            patch.setattr(interpreter_builder, "set_grid_dim", lambda *_: set_dim(*whole))
            patch.setattr(interpreter_builder, "set_grid_idx", lambda *_: set_idx(*(n - 1 for n in whole)))
            kernel[(1,)](**args)

    return launch
