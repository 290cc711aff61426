"""Partial sums that the last program adds: to the bit what a kernel of its own would make of them, any number of times."""

import importlib
from pathlib import Path

import pytest
import torch
from fastdit_kernels import gate_residual_ln_modulate, gelu_dwconv, gelu_dwconv1d, ln_modulate, partials
from fastdit_kernels.aot import record
from fastdit_kernels.aot_cases import cases
from fastdit_kernels.triton_ops import TRITON

with pytest.MonkeyPatch.context() as patch:  # files beside this one, which are no package
    patch.syspath_prepend(Path(__file__).parent)
    INPUTS = {op: importlib.import_module(f"test_{op}").inputs for op in ("ln_modulate", "gelu_dwconv", "gelu_dwconv1d")}
    gated = importlib.import_module("test_gate_residual_ln_modulate").inputs

pytestmark = pytest.mark.gpu
MODULES = (ln_modulate, gate_residual_ln_modulate, gelu_dwconv, gelu_dwconv1d)

CASES = {
    "ln_modulate": lambda *types: (TRITON.ln_modulate, INPUTS["ln_modulate"]((3, 33, 40), *types)),
    "gated": lambda *types: (TRITON.gate_residual_ln_modulate, gated((3, 33, 40), *types)),
    "gated with bias": lambda *types: (TRITON.gate_residual_ln_modulate, gated((3, 33, 40), *types, bias=True)),
    "K=3": lambda *types: (TRITON.gelu_dwconv, INPUTS["gelu_dwconv"]((3, 2, 9, 70, 3), *types)),
    "K=5": lambda *types: (TRITON.gelu_dwconv, INPUTS["gelu_dwconv"]((3, 2, 9, 33, 5), *types)),
    "along sequences": lambda *types: (TRITON.gelu_dwconv, INPUTS["gelu_dwconv1d"]((9, 12, 70, 3), *types)),
}


@pytest.fixture
def launches(monkeypatch):
    """The kernels launched, by name. Each sum is of several programs."""
    names: list[str] = []
    for module in (gelu_dwconv, gelu_dwconv1d):
        monkeypatch.setattr(module, "BACKWARD_TOKENS", 1)
    for module in MODULES:

        def launch(kernel, *options, run=module.run, **args) -> None:
            names.append(kernel.__name__)
            assert "backward" not in kernel.__name__ or options[0][1] > 1
            run(kernel, *options, **args)

        monkeypatch.setattr(module, "run", launch)
    return names


@pytest.mark.parametrize("parameter", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_both_ways_give_the_same_bits(results, nan_filled, monkeypatch, device, launches, case, parameter):
    op, given = CASES[case](torch.bfloat16, parameter, device)
    ours = results(op, given)
    assert len(launches) == 2, launches  # one forward, one backward
    monkeypatch.setattr(partials, "MOST", 0)
    expected = results(op, given)
    assert launches[2:].count("sum_partials_kernel") == 1 + (case == "gated with bias")  # and of samples' parts of a bias
    for name in expected:
        assert torch.equal(ours[name], expected[name]), name


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("case", CASES)
def test_a_backward_may_run_again(nan_filled, device, case):
    """Every counter is 0 again after it."""
    op, given = CASES[case](torch.bfloat16, torch.bfloat16, device)
    leaves = [t.detach().requires_grad_() for t in given.values() if isinstance(t, torch.Tensor)]
    out = op(*leaves, *given.get("grid", ()))
    loss = sum(o.float().square().sum() for o in (out if isinstance(out, tuple) else (out,)))
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert not a.isnan().any()
        assert torch.equal(a, b)


def test_at_the_batch_that_is_trained_each_direction_is_one_launch():
    """Of every width and kernel size: B = 32 and T = 256."""
    for case in cases(80):
        assert len(record(case.build)) == 1, case.name


def test_what_would_keep_one_program_busy_is_left_to_a_kernel(device):
    """256 KB are some 4 µs of what L2 hands one SM."""
    assert partials.by_the_last_program(16, 4 * 1024)
    assert not partials.by_the_last_program(17, 4 * 1024)
    x = torch.empty(1, 4096, 768, dtype=torch.bfloat16, device="meta")
    row, statistics = x[:, 0], torch.empty(1, 4096, device="meta")
    counters = torch.empty(1, dtype=torch.int32, device="meta")
    found = record(lambda launch: ln_modulate.backward(x, x, row, statistics, statistics, counters, launch))
    assert [launch.kernel.__name__ for launch in found] == ["ln_modulate_backward_kernel", "sum_partials_kernel"]
    assert found[0].args["p_counters"] is None
