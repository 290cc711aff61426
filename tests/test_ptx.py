"""The code a GPU would run, executed without one: every kernel as it is compiled for sm_80 and sm_90, by the machine in ptx.py.

Public ops, fp64 truth and bars are those of the kernels' own tests; only the launch differs. Each approximate instruction errs
as far as it may, upwards in one run and downwards in another, and both must meet the bar. `pytest tests -m ptx` runs the whole
set, some minutes, and keeps the worst errors in tests/results/ptx.json.
"""

import importlib
import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
from fastdit_kernels import partials, reference
from fastdit_kernels.adamw_ema import adamw_ema
from fastdit_kernels.triton_ops import TRITON

with pytest.MonkeyPatch.context() as patch:  # files beside this one, which are no package
    patch.syspath_prepend(Path(__file__).parent)
    OPS = ("ln_modulate", "gate_residual_ln_modulate", "gelu_dwconv", "gelu_dwconv1d")
    INPUTS = {op: importlib.import_module(f"test_{op}").inputs for op in OPS}
    adamw = importlib.import_module("test_adamw_ema")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHORT = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
ARCHS = (80, 90)

# (op, shape, unaligned): B > 1, programs with rows left over, D, F and the grid odd, strided modulation, K = 3, 4, 5.
SMALL = [
    ("ln_modulate", (5, 33, 97), False),
    ("gate_residual_ln_modulate", (5, 33, 97), False),
    ("gelu_dwconv", (3, 5, 7, 70, 3), False),
    ("gelu_dwconv", (2, 5, 8, 70, 4), False),
    ("gelu_dwconv", (1, 7, 5, 33, 5), False),
    ("gelu_dwconv1d", (3, 23, 70, 3), False),
    ("gelu_dwconv1d", (2, 66, 33, 4), False),
    ("gelu_dwconv1d", (3, 5, 33, 7), False),
]
ROWS = [(2, 33, 768), (3, 5, 1152), (5, 33, 97), (1, 70, 40), (2, 3, 3), (1, 2, 8192)]
GRIDS = [(2, 4, 16, 64), (3, 5, 7, 70), (1, 3, 37, 65), (2, 1, 2, 8)]
LENGTHS = [(3, 23, 70), (2, 131, 64), (9, 1, 8)]
WHOLE = [
    *((op, shape, False) for op in OPS[:2] for shape in ROWS),
    *((op, (3, 5, 768), True) for op in OPS[:2]),
    *(("gelu_dwconv", (*grid, K), False) for K in (3, 4, 5) for grid in GRIDS),
    *(("gelu_dwconv", (2, 4, 6, 64, K), True) for K in (3, 4, 5)),
    *(("gelu_dwconv1d", (*lengths, K), False) for K in (3, 4, 5, 7) for lengths in LENGTHS),
    *(("gelu_dwconv1d", (2, 9, 64, K), True) for K in (3, 4, 5, 7)),
]
SOME = [case for case in WHOLE if case[1][-1] in (768, 97) or GRIDS[1] == case[1][:4] or LENGTHS[0] == case[1][:3]]
CASES = [  # and the types of streams, and of modulations or parameters
    *((*case, dtype, dtype) for case in WHOLE for dtype in (BF16, FP32)),
    *((*case, *dtypes) for case in SOME for dtypes in [(BF16, FP32), (FP16, FP16)]),
]


def beside(tensor, numbers):
    """The same, that many numbers after an address that is a multiple of 16."""
    return torch.cat([tensor.new_zeros(numbers), tensor.flatten()])[numbers:].view(tensor.shape)


def bar(op, name, stream, parameter, e):
    """What an output or a gradient may err by: the bars of the op's own tests."""
    if stream == FP32:
        return 1e-6 if name.startswith("out") else 1e-5
    if op.startswith("gelu_dwconv"):
        return 1e-6 if parameter == FP32 and name in ("dbias", "dweight", "dconv_bias") else 1.1 * e.reference
    return max(1.1 * e.reference, 1e-6)


VARIANTS = {  # of an op: the kernel's and the reference's
    "": lambda op: (getattr(TRITON, op.removesuffix("1d")), getattr(reference, op.removesuffix("1d"))),
    "m alone": lambda op: [lambda *given, f=f: f(*given)[1] for f in (getattr(TRITON, op), getattr(reference, op))],
    "exact": lambda op: (partial(getattr(TRITON, op), exact=True), getattr(reference, op)),
}


def meets_its_bar(errors, compiled, table, op, shape, unaligned, arch, stream, parameter, variant="", **options):
    inputs = INPUTS[op](shape, stream, parameter, torch.device("cpu"), **options)
    if unaligned:
        inputs = {k: beside(v, 1) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    before = {k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    kernel = f"{op} K={shape[-1]}" if op.startswith("gelu_dwconv") else op
    over = []
    for sign in (1, -1):
        launched = compiled(arch, sign)
        found = errors(*VARIANTS[variant](op), inputs)
        assert len(launched.launches) >= 2, launched.launches
        for name, e in found.items():
            limit = bar(op, name, stream, parameter, e)
            direction = "forward" if name.startswith("out") else "backward"
            table.add(f"{kernel} {direction}, sm_{arch}, {SHORT[stream]} and {SHORT[parameter]}", e.kernel, limit)
            over += [(name, sign, e)] if e.kernel > limit else []
    assert not over
    for name, value in before.items():
        assert torch.equal(inputs[name], value), f"{name} was written"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("op", "shape", "unaligned"), SMALL)
def test_compiled_code_meets_the_bar(errors, compiled, ptx_table, op, shape, unaligned, arch):
    meets_its_bar(errors, compiled, ptx_table, op, shape, unaligned, arch, BF16, BF16)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("op", "variant", "shape"), [(OPS[1], "m alone", (2, 9, 97)), (OPS[2], "exact", (1, 3, 5, 70, 3))])
def test_what_an_op_may_leave_out_or_ask_for(errors, compiled, ptx_table, op, variant, shape, arch):
    """After the last block nothing reads r, and no gradient arrives there; a GELU may be asked to be exact."""
    meets_its_bar(errors, compiled, ptx_table, op, shape, False, arch, BF16, BF16, variant)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("op", "shape"), [(OPS[2], (2, 5, 8, 70, 4)), (OPS[3], (3, 23, 70, 3))])
def test_gradients_of_fp32_parameters_are_fp32(errors, compiled, ptx_table, op, shape, arch):
    """Under a 16-bit stream: a sum of slopes, where 1 - σ must not be all cancellation, shows every rounding of fp32's."""
    meets_its_bar(errors, compiled, ptx_table, op, shape, False, arch, BF16, FP32)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("parameter", [BF16, FP32])
def test_the_bias_of_a_gated_residual(errors, compiled, ptx_table, parameter, arch):
    meets_its_bar(errors, compiled, ptx_table, OPS[1], (5, 33, 97), False, arch, BF16, parameter, bias=True)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("op", "shape"), [(OPS[1], (3, 33, 97)), (OPS[2], (2, 2, 16, 33, 3))])
def test_partials_that_a_kernel_of_its_own_adds(errors, compiled, ptx_table, monkeypatch, op, shape, arch):
    """Where they are too many for the last program; above, it adds them."""
    monkeypatch.setattr(partials, "MOST", 0)
    options = {"bias": True} if op == OPS[1] else {}
    meets_its_bar(errors, compiled, ptx_table, op, shape, False, arch, BF16, BF16, **options)


@pytest.mark.ptx
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("op", "shape", "unaligned", "stream", "parameter"), CASES)
def test_compiled_code_meets_the_bar_everywhere(errors, compiled, ptx_table, op, shape, unaligned, stream, parameter, arch):
    meets_its_bar(errors, compiled, ptx_table, op, shape, unaligned, arch, stream, parameter)


WRITTEN = ("params", "exp_avgs", "exp_avg_sqs", "averages")


def reachable(given: dict) -> dict[str, torch.Tensor]:
    """What adamw_ema finds by its table of addresses."""
    return {f"{name}[{i}]": t for name in (*adamw.LISTS, "copies") for i, t in enumerate(given.get(name, []))}


def adamw_meets_its_bar(compiled, table, arch, step, offset, shift, beta2, grad=FP32, copy=None):
    """offset: where gradients begin, in numbers; shift: where all else does. Bars are those of test_adamw_ema.py.

    grad and copy: the dtypes of gradients and copies.
    """
    given = adamw.tensors(torch.device("cpu"), offset=offset, step=step, grad=grad, copy=copy)
    settings, kinds = adamw.SETTINGS | {"beta2": beta2}, SHORT[grad] + (f" and copies in {SHORT[copy]}" if copy else "")
    truth, eager = adamw.cast(given, torch.float64), adamw.cast(given, torch.float32)
    reference.adamw_ema(**truth, **settings)
    adamw.pytorch(eager, **settings)
    for sign in (1, -1):
        ours = given | {name: [beside(t, shift) for t in given[name]] for name in (*WRITTEN, "copies") if name in given}
        launched = compiled(arch, sign)
        launched.reachable = reachable(ours)
        adamw_ema(**ours, **settings)
        assert launched.launches
        for name in WRITTEN:
            for mine, theirs, exact in adamw.compared(ours[name], eager[name], truth[name]):
                error, other = (float((t.double() - exact).norm() / exact.norm()) for t in (mine, theirs))
                limit = max(1.1 * other, 1e-7)
                table.add(f"adamw_ema, sm_{arch}, {kinds}", error, limit)
                assert error <= limit, (name, tuple(exact.shape), sign, error, other)
        for written, p in zip(ours.get("copies", []), ours["params"], strict=copy is not None):
            assert torch.equal(written, p.to(copy))


@pytest.mark.parametrize("arch", ARCHS)
def test_adamw_ema_on_unaligned_shards(compiled, ptx_table, arch):
    adamw_meets_its_bar(compiled, ptx_table, arch, step=200, offset=1, shift=0, beta2=0.999)


@pytest.mark.parametrize("arch", ARCHS)
def test_adamw_ema_on_a_network_of_16_bits(compiled, ptx_table, arch):
    adamw_meets_its_bar(compiled, ptx_table, arch, step=200, offset=0, shift=0, beta2=0.999, grad=BF16, copy=BF16)


@pytest.mark.ptx
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("step", "offset", "shift", "beta2"),
    [*itertools.product([1, 5, 105, 100_000], [0, 1, 4], [0, 3], [0.999]), (1, 0, 0, 0.0), (7, 0, 0, 0.95)],
)
@pytest.mark.parametrize(("grad", "copy"), adamw.KINDS)
def test_adamw_ema_everywhere(compiled, ptx_table, arch, step, offset, shift, beta2, grad, copy):
    adamw_meets_its_bar(compiled, ptx_table, arch, step, offset, shift, beta2, grad, copy)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("grad", "copy"), adamw.KINDS[:2])
def test_found_inf_changes_no_bit(compiled, arch, grad, copy):
    given = adamw.tensors(torch.device("cpu"), grad=grad, copy=copy)
    given["found_inf"].fill_(1)
    before = adamw.bits(given)
    launched = compiled(arch)
    launched.reachable = reachable(given)
    adamw_ema(**given, **adamw.SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(before, adamw.bits(given), strict=True))


@pytest.mark.parametrize(("op", "shape"), [("ln_modulate", (0, 16, 64)), ("gelu_dwconv", (0, 4, 4, 64, 3))])
def test_nothing_is_launched_for_an_empty_batch(results, compiled, op, shape):
    launched = compiled(80)
    results(getattr(TRITON, op), INPUTS[op](shape, BF16, BF16, torch.device("cpu")))
    assert launched.launches == []
