"""gate_residual_ln_modulate against fp64, on the GPU or in the interpreter: outputs, gradients, what it reads and writes."""

import pytest
import torch
from fastdit_kernels import gate_residual_ln_modulate as module
from fastdit_kernels.gate_residual_ln_modulate import gate_residual_ln_modulate
from fastdit_kernels.ln_modulate import backward_split, forward_split, ln_modulate
from fastdit_kernels.reference import gate_residual_ln_modulate as reference

pytestmark = pytest.mark.gpu

SHAPES = [(2, 33, 768), (3, 5, 1152), (5, 33, 97)]  # B, T, D


def inputs(shape, dtype, modulation, device, bias=False):
    """x off zero mean, and gate, shift and scale as views of a packed projection; on request the bias of y, of their dtype."""
    B, T, D = shape
    generator = torch.Generator().manual_seed(B * T + D)
    x = torch.randn(B, T, D, generator=generator) * 2 + torch.randn(B, T, 1, generator=generator)
    y = torch.randn(B, T, D, generator=generator)
    packed = torch.randn(B, 6, D, generator=generator).to(device, modulation)
    given = {
        "x": x.to(device, dtype), "y": y.to(device, dtype), "gate": packed[:, 2], "shift": packed[:, 3], "scale": packed[:, 4]
    }  # fmt: skip
    return given | ({"bias": torch.randn(D, generator=generator).to(device, modulation)} if bias else {})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_is_exact_to_a_millionth(errors, nan_filled, device, shape, bias):
    found = errors(gate_residual_ln_modulate, reference, inputs(shape, torch.float32, torch.float32, device, bias))
    assert max(found["out0"].kernel, found["out1"].kernel) <= 1e-6, found
    assert max(e.kernel for e in found.values()) <= 1e-5, found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "modulation"),
    [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)],
)
def test_16_bit_errs_no_more_than_eager(errors, nan_filled, device, dtype, modulation, shape, bias):
    given = inputs(shape, dtype, modulation, device, bias)
    found = errors(gate_residual_ln_modulate, reference, given)
    # A millionth is what fp32 may err by: only a gradient of an fp32 modulation comes under it, all else is rounded to 16 bits.
    assert all(e.kernel <= max(1.1 * e.reference, 1e-6) for e in found.values()), found


def test_m_is_the_norm_of_the_residual_as_it_is_stored(device):
    """Rounded first, so that backward, which reads the stored residual, differentiates what forward computed."""
    given = inputs((2, 20, 768), torch.bfloat16, torch.bfloat16, device)
    r, m = gate_residual_ln_modulate(**given)
    assert torch.equal(m, ln_modulate(r, given["shift"], given["scale"]))


@pytest.mark.parametrize("D", [1, 8192])
def test_narrowest_and_widest(results, nan_filled, device, D):
    given = inputs((1, 2, D), torch.float32, torch.float32, device)
    ours, expected = results(gate_residual_ln_modulate, given), results(reference, given)
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_unused(nan_filled, device, used):
    """After the last block nothing reads r; a gradient that reaches only r reaches x and y and not the LayerNorm."""
    given = {k: v.requires_grad_() for k, v in inputs((2, 9, 768), torch.float32, torch.float32, device).items()}
    weight = torch.randn(2, 9, 768, device=device)
    gradients = [
        torch.autograd.grad(op(**given)[used], list(given.values()), weight, materialize_grads=True)
        for op in (gate_residual_ln_modulate, reference)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_nothing_outside_the_tensors_is_read(results, nan_filled, embedded, device):
    """Between NaNs, with NaN between the rows of gate, shift and scale, the bits are those of plain tensors."""
    given = inputs((3, 21, 97), torch.bfloat16, torch.bfloat16, device)
    plain = results(gate_residual_ln_modulate, {name: tensor.contiguous() for name, tensor in given.items()})
    between = results(gate_residual_ln_modulate, {name: embedded(tensor) for name, tensor in given.items()})
    for name in plain:
        assert torch.equal(plain[name], between[name]), name


def test_two_runs_give_the_same_bits(results, device):
    given = inputs((2, 33, 768), torch.bfloat16, torch.float32, device)
    first, second = results(gate_residual_ln_modulate, given), results(gate_residual_ln_modulate, given)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(("B", "T"), [(0, 16), (2, 0)])
def test_no_rows(results, device, B, T):
    found = results(gate_residual_ln_modulate, inputs((B, T, 64), torch.bfloat16, torch.float32, device, bias=True))
    assert torch.equal(found["dbias"], torch.zeros(64, device=device))
    for name in ("out0", "out1", "dx", "dy"):
        assert found[name].shape == (B, T, 64)
    for name in ("dgate", "dshift", "dscale"):
        assert torch.equal(found[name], torch.zeros(B, 64, device=device))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck looks at that of its own non-leaf copies
def test_opcheck(device):
    for bias in (False, True):
        given = list(inputs((2, 5, 40), torch.float32, torch.float32, device, bias).values())
        torch.library.opcheck(torch.ops.fastdit.gate_residual_ln_modulate.default, given)
        torch.library.opcheck(torch.ops.fastdit.gate_residual_ln_modulate.default, [t.clone().requires_grad_() for t in given])


def test_bytes(recording, device):
    """Counted from the addresses: the streams once, statistics, modulation, and the stated partials, to the byte."""
    B, T, D = 2, 48, 768
    x, y, gate, shift, scale = inputs((B, T, D), torch.bfloat16, torch.bfloat16, device).values()
    expected = module.traffic(B, T, D, 2, 2)
    with recording() as recorder:
        r, m, *kept = module.forward(x, y, gate, shift, scale, module.run)
    splits, _ = forward_split(B, T, D)
    forward = recorder.traffic()
    assert forward.memory == expected["forward"]
    assert forward.programs == forward.memory + (splits - 1) * 3 * B * D * 2  # each program reads gate, shift and scale
    with recording() as recorder:
        module.backward(x, m, r, y, gate, scale, *kept, module.run)
    splits, _ = backward_split(B, T, D)
    backward = recorder.traffic()
    assert backward.memory == expected["backward"]
    assert backward.programs == backward.memory + (splits - 1) * 2 * B * D * 2


def test_bytes_with_a_bias(recording, device):
    """The bias itself, a fourth partial, and sums in fp32: less than a pass over dy."""
    B, T, D = 2, 48, 768
    x, y, gate, shift, scale, bias = inputs((B, T, D), torch.bfloat16, torch.bfloat16, device, bias=True).values()
    expected = module.traffic(B, T, D, 2, 2, bias=True)
    with recording() as recorder:
        r, m, *kept = module.forward(x, y, gate, shift, scale, module.run, bias)
    assert recorder.traffic().memory == expected["forward"]
    with recording() as recorder:
        module.backward(x, m, r, y, gate, scale, *kept, module.run, bias)
    assert recorder.traffic().memory == expected["backward"]
    B, T = 32, 256
    without, with_bias = (module.traffic(B, T, D, 2, 2, bias)["backward"] for bias in (False, True))
    assert with_bias - without < 0.5 * (2 * B * T * D)


def test_bytes_are_the_floor_and_the_partials():
    B, T, D = 32, 256, 768
    moved, elements = module.traffic(B, T, D, 2, 2), B * T * D
    splits, _ = backward_split(B, T, D)
    assert moved["forward"] == pytest.approx(8 * elements, rel=0.01)
    assert moved["backward"] == pytest.approx(12 * elements + 2 * B * splits * 3 * D * 4, rel=0.01)


def test_offsets_beyond_32_bits(last_program, device):
    """The last sample of streams of more than 2³¹ elements, computed as the last program of their launch computes it."""
    B, T, D = 2050, 128, 8192  # so many samples that one program owns all rows of one
    x = torch.empty(B, T, D, dtype=torch.bfloat16, device=device)  # on a CPU, only the pages touched become memory
    assert x[:-1].numel() > 2**31
    gate, shift, scale = torch.zeros(3, B, D, dtype=torch.bfloat16, device=device)
    for t in (x, gate, shift, scale):
        t[-1].normal_()
    end, g, a, s = (t[-1:].clone() for t in (x, gate, shift, scale))

    far, near = module.forward(x, x, gate, shift, scale, last_program), module.forward(end, end, g, a, s, module.run)
    for of_all, of_end in zip(far[:4], near[:4], strict=True):
        assert torch.equal(of_all[-1:], of_end)

    far = module.backward(x, x, x, x, gate, scale, *far[2:], last_program)
    near = module.backward(end, end, end, end, g, s, *near[2:], module.run)
    for of_all, of_end in zip(far[:2], near[:2], strict=True):
        assert torch.equal(of_all[-1:], of_end)


def test_batch_strides_beyond_32_bits(results, device):
    """gate, shift and scale whose rows lie more than 2³¹ elements apart."""
    given = inputs((2, 3, 64), torch.float32, torch.bfloat16, device)
    far = torch.empty(2**31 + 1024, dtype=torch.bfloat16, device=device)
    apart = {name: far.as_strided((2, 64), (2**31 + 128, 1), 64 * i) for i, name in enumerate(("gate", "shift", "scale"))}
    for name, view in apart.items():
        view.copy_(given[name])
    near, distant = results(gate_residual_ln_modulate, given), results(gate_residual_ln_modulate, given | apart)
    for name in near:
        assert torch.equal(near[name], distant[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 8)}, r"x has shape \[4, 8\], expected \[B, T, D\]"),
        ({"x": torch.zeros(3, 2, 8).transpose(0, 1)}, r"x has shape \[2, 3, 8\], strides \[8, 16, 1\].*contiguous"),
        ({"y": torch.zeros(2, 4, 8)}, r"y has shape \[2, 4, 8\].*expected \[B, T, D\] = \[2, 3, 8\]"),
        ({"y": torch.zeros(2, 3, 8, dtype=torch.float16)}, r"y has shape \[2, 3, 8\].* float16 .*float32"),
        ({"y": torch.zeros(2, 8, 3).transpose(1, 2)}, r"y has shape \[2, 3, 8\], strides \[24, 1, 3\].*contiguous"),
        ({"gate": torch.zeros(2, 1, 8)}, r"gate has shape \[2, 1, 8\].*expected \[B, D\] = \[2, 8\]"),
        (
            {"gate": torch.zeros(2, 8, dtype=torch.float64)},
            r"gate has shape \[2, 8\].* float64 .*bfloat16 or float16 or float32",
        ),
        ({"shift": torch.zeros(2, 8, dtype=torch.float16)}, r"shift has shape \[2, 8\].* float16 .*float32"),
        ({"scale": torch.zeros(8, 2).T}, r"scale has shape \[2, 8\], strides \[1, 2\].*unit last stride"),
        ({"scale": torch.zeros(2, 8, device="meta")}, r"scale has shape \[2, 8\].* on meta; expected .* on cpu"),
        ({"bias": torch.zeros(2, 8)}, r"bias has shape \[2, 8\].*expected \[D\] = \[8\]"),
    ],
)
def test_bad_input(change, message):
    good = {name: torch.zeros(2, 3, 8) for name in ("x", "y")} | {
        name: torch.zeros(2, 8) for name in ("gate", "shift", "scale")
    }
    with pytest.raises(ValueError, match=f"^gate_residual_ln_modulate: {message}"):
        gate_residual_ln_modulate(**(good | change))
