"""The ops for a CPU against fp64 and against eager PyTorch in their own dtype: outputs, gradients, eager and compiled."""

import inspect
import math

import pytest
import torch
from fastdit_kernels import Ops, cpu
from fastdit_kernels.cpu import CPU
from fastdit_kernels.reference import REFERENCE
from torch.nn import functional as F

from fastdit.config import ModelConfig
from fastdit.model import DiT


def eager_ln_modulate(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def eager_gate_residual_ln_modulate(x, y, gate, shift, scale, bias=None):
    r = x + gate[:, None] * (y if bias is None else y + bias)
    return r, eager_ln_modulate(r, shift, scale)


def eager_gelu_dwconv(h, bias, weight, conv_bias, *grid):
    a = F.gelu(h + bias, approximate="tanh").view(-1, *grid[-2:], h.shape[2]).movedim(-1, 1)
    before, after = (weight.shape[-1] - 1) // 2, weight.shape[-1] // 2
    convolve = F.conv1d if len(grid) == 1 else F.conv2d
    z = convolve(F.pad(a, (before, after) * (weight.ndim - 2)), weight, conv_bias, groups=h.shape[2])
    return z.movedim(1, -1).reshape(h.shape)


# Every op as one would write it, all of it in the dtype of its inputs.
EAGER = {
    "ln_modulate": eager_ln_modulate,
    "gate_residual_ln_modulate": eager_gate_residual_ln_modulate,
    "gelu_dwconv": eager_gelu_dwconv,
}
CASES = [
    ("ln_modulate", (3, 33, 97)),
    ("gate_residual_ln_modulate", (3, 33, 97)),
    ("gate_residual_ln_modulate", (3, 33, 97, "bias")),
    ("gelu_dwconv", (3, 5, 7, 70, 3)),
    ("gelu_dwconv", (2, 4, 16, 64, 4)),
    ("gelu_dwconv", (2, 1, 2, 33, 4)),
    ("gelu_dwconv", (2, 8, 5, 33, 5)),
    # Grids of one length and of three.
    *(("gelu_dwconv", (3, 23, 70, K)) for K in (3, 4, 5, 7)),
    ("gelu_dwconv", (5, 2, 65, 4)),
    ("gelu_dwconv", (1, 1, 9, 7)),
    ("gelu_dwconv", (2, 3, 5, 7, 33, 4)),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(op, shape, dtype, parameters=None):
    generator = torch.Generator().manual_seed(sum(n for n in shape if n != "bias"))

    def normal(*size, dtype=parameters or dtype):
        return torch.randn(*size, generator=generator).to(dtype)

    if op == "gelu_dwconv":
        B, *grid, F_, K = shape
        sides = (K,) if len(grid) == 1 else (K, K)
        return {
            "h": normal(B, math.prod(grid), F_, dtype=dtype) * 2, "bias": normal(F_), "weight": normal(F_, 1, *sides) / K,
            "conv_bias": normal(F_), "grid": tuple(grid),
        }  # fmt: skip
    B, T, D, *bias = shape
    # Strided, as views of a packed projection are.
    given = dict(zip(("gate", "shift", "scale"), normal(B, 6, D)[:, 2:5].unbind(1), strict=True))
    streams = {"x": normal(B, T, D, dtype=dtype) * 2 + normal(B, T, 1, dtype=dtype), "y": normal(B, T, D, dtype=dtype)}
    if op == "ln_modulate":
        return {"x": streams["x"], "shift": given["shift"], "scale": given["scale"]}
    return streams | given | ({"bias": normal(D)} if bias else {})


@pytest.fixture(params=["one chunk", "chunks"])
def chunked(request, monkeypatch):
    """Tensors this small are one chunk; each is also cut into several, the last of which is shorter."""
    if request.param == "chunks":
        monkeypatch.setattr(cpu, "CHUNK", 700)


@pytest.mark.usefixtures("chunked", "nan_filled")
@pytest.mark.parametrize(("op", "shape"), CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_errs_no_more_than_eager(errors, op, shape, dtype):
    given = inputs(op, shape, dtype)
    found = errors(getattr(CPU, op), getattr(REFERENCE, op), given)
    eager = errors(EAGER[op], getattr(REFERENCE, op), given)
    # fp32's own rounding differs by the order of sums: a millionth, and 16 bits' by a tenth.
    assert all(e.kernel <= max(1.1 * eager[name].kernel, 1e-6) for name, e in found.items()), (found, eager)


@pytest.mark.parametrize(("op", "shape"), CASES)
def test_fp64_is_the_reference(results, op, shape):
    given = inputs(op, shape, torch.float64)
    ours, expected = results(getattr(CPU, op), given), results(getattr(REFERENCE, op), given)
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("op", "shape"), CASES)
def test_parameters_of_another_dtype_get_gradients_of_theirs(errors, op, shape):
    """fp32 parameters and a bf16 stream; `errors` compares the dtypes with the reference's."""
    given = inputs(op, shape, torch.bfloat16, parameters=torch.float32)
    found = errors(getattr(CPU, op), getattr(REFERENCE, op), given)
    assert all(e.kernel <= 4e-3 for e in found.values()), found  # bf16's half unit in the last place


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_16_bit_instructions_the_convolution_is_fp32(errors, monkeypatch, dtype):
    monkeypatch.setattr(cpu, "FAST", dict.fromkeys(cpu.FAST, False))
    given = inputs("gelu_dwconv", (3, 5, 7, 70, 3), dtype)
    found = errors(CPU.gelu_dwconv, REFERENCE.gelu_dwconv, given)
    assert all(e.kernel <= 1.5 * e.reference for e in found.values()), found


@pytest.mark.parametrize(("op", "shape"), CASES)
def test_compiled_it_is_one_graph_with_the_same_results(results, op, shape):
    given = inputs(op, shape, torch.bfloat16)
    torch._dynamo.reset()
    ours = results(torch.compile(getattr(CPU, op), fullgraph=True), given)
    expected = results(getattr(CPU, op), given)
    for name in ours:
        error = (ours[name].double() - expected[name].double()).norm() / expected[name].double().norm()
        assert error <= 4e-3, (name, error)


@pytest.mark.parametrize("bias", [20.0, -0.75, 1000.0])
def test_the_border_is_zero_after_gelu(errors, bias):
    given = inputs("gelu_dwconv", (2, 4, 6, 16, 5), torch.float32) | {"bias": torch.full((16,), bias)}
    found = errors(CPU.gelu_dwconv, REFERENCE.gelu_dwconv, given)
    assert all(e.kernel <= max(1e-5, 1.1 * e.reference) for e in found.values()), found


def test_gelu_and_its_slope_over_all_of_bf16():
    """Every value of magnitude under 2⁶⁰. In its tail GELU is 1e-16 and less, which PyTorch's own form in fp64 loses."""
    u = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    u = u[u.isfinite() & (u.abs() < 2.0**60)].view(1, 1, -1)
    a, slope = cpu._gelu(u.float(), torch.zeros(u.numel()), slope=True)
    exact = u.double().requires_grad_()
    gelu = exact * torch.sigmoid(math.sqrt(8 / math.pi) * (exact + 0.044715 * exact**3))
    gelu.sum().backward()
    torch.testing.assert_close(gelu, F.gelu(exact, approximate="tanh"), rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(a.double(), gelu.detach(), rtol=1e-5, atol=1e-36)
    torch.testing.assert_close(slope.view(u.shape).double(), exact.grad, rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("op", Ops._fields)
def test_it_has_the_references_signature(op):
    def signature(ops):
        return [(p.name, p.annotation) for p in inspect.signature(getattr(ops, op)).parameters.values()]

    assert signature(CPU) == signature(REFERENCE)


@pytest.mark.parametrize("K", [0, 3, 4])
def test_a_whole_model_has_the_references_loss_and_gradients(K):
    config = ModelConfig(input_size=(8, 12), patch=2, channels=3, width=32, depth=2, num_heads=2, conv_kernel=K)
    found = []
    for ops in (CPU, REFERENCE):
        model = DiT(config, ops)
        model.init_weights(0)
        with torch.no_grad():  # a new model predicts zeros, whatever its blocks do
            for name, p in model.named_parameters():
                if name.startswith(("adaLN", "final")):
                    p.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        x = torch.randn(3, 3, 8, 12, generator=torch.Generator().manual_seed(2))
        loss = model(x, torch.tensor([1, 500, 999]), torch.tensor([0, 1, 0]) if config.num_classes else None).square().mean()
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (ours, gradients), (expected, truth) = found
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    for name, gradient in truth.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
