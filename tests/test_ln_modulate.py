"""ln_modulate against fp64, on the GPU or in the interpreter: outputs, every gradient, what it reads and writes."""

import pytest
import torch
import triton
from fastdit_kernels import ln_modulate as module
from fastdit_kernels.ln_modulate import ln_modulate
from fastdit_kernels.reference import ln_modulate as reference

pytestmark = pytest.mark.gpu

SHAPES = [(2, 33, 768), (3, 5, 1152), (5, 33, 97), (1, 70, 40)]  # B, T, D


def inputs(shape, dtype, modulation, device):
    """x off zero mean, and shift and scale as views of a packed projection."""
    B, T, D = shape
    generator = torch.Generator().manual_seed(B * T + D)
    x = torch.randn(B, T, D, generator=generator) * 2 + torch.randn(B, T, 1, generator=generator)
    packed = torch.randn(B, 6, D, generator=generator).to(device, modulation)
    return {"x": x.to(device, dtype), "shift": packed[:, 3], "scale": packed[:, 4]}


@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_is_exact_to_a_millionth(errors, nan_filled, device, shape):
    found = errors(ln_modulate, reference, inputs(shape, torch.float32, torch.float32, device))
    assert found["out0"].kernel <= 1e-6, found
    assert max(e.kernel for name, e in found.items() if name != "out0") <= 1e-5, found


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize(
    ("dtype", "modulation"),
    [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)],
)
def test_16_bit_errs_no_more_than_eager(errors, nan_filled, device, dtype, modulation, shape):
    found = errors(ln_modulate, reference, inputs(shape, dtype, modulation, device))
    # A millionth is what fp32 may err by: only a gradient of an fp32 modulation comes under it, all else is rounded to 16 bits.
    assert all(e.kernel <= max(1.1 * e.reference, 1e-6) for e in found.values()), found


@pytest.mark.parametrize("D", [1, 8192])
def test_narrowest_and_widest(results, nan_filled, device, D):
    given = inputs((1, 2, D), torch.float32, torch.float32, device)
    ours, expected = results(ln_modulate, given), results(reference, given)
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-5, atol=1e-5)


def test_the_interpreter_truncates_bf16(device):
    """Why the device fixture rounds for it. Where this fails, the interpreter has learned to round and the fixture can go."""
    if device.type != "cpu":
        pytest.skip("a GPU rounds")
    from triton.runtime import interpreter

    value = torch.tensor([1 + 2**-7 - 2**-12])  # all but a bf16 step above 1
    stored = interpreter._convert_float(value.numpy(), triton.language.float32, triton.language.bfloat16, None)
    assert torch.from_numpy(stored.astype("int16")).view(torch.bfloat16).item() == 1
    assert value.bfloat16().item() == 1 + 2**-7


def test_nothing_outside_the_tensors_is_read(results, nan_filled, embedded, device):
    """Between NaNs, with NaN between the rows of shift and scale, the bits are those of plain tensors."""
    given = inputs((3, 21, 97), torch.bfloat16, torch.bfloat16, device)
    plain = results(ln_modulate, {name: tensor.contiguous() for name, tensor in given.items()})
    between = results(ln_modulate, {name: embedded(tensor) for name, tensor in given.items()})
    for name in plain:
        assert torch.equal(plain[name], between[name]), name


def test_two_runs_give_the_same_bits(results, device):
    given = inputs((2, 33, 768), torch.bfloat16, torch.float32, device)
    first, second = results(ln_modulate, given), results(ln_modulate, given)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(("B", "T"), [(0, 16), (2, 0)])
def test_no_rows(results, device, B, T):
    found = results(ln_modulate, inputs((B, T, 64), torch.bfloat16, torch.float32, device))
    assert found["out0"].shape == found["dx"].shape == (B, T, 64)
    for name in ("dshift", "dscale"):
        assert torch.equal(found[name], torch.zeros(B, 64, device=device))


def test_an_expanded_gradient(device):
    """What `.sum().backward()` hands over has zero strides."""
    given = {k: v.requires_grad_() for k, v in inputs((2, 9, 64), torch.float32, torch.float32, device).items()}
    ours = torch.autograd.grad(ln_modulate(**given).sum(), list(given.values()))
    expected = torch.autograd.grad(reference(**given).sum(), list(given.values()))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck looks at that of its own non-leaf copies
def test_opcheck(device):
    given = list(inputs((2, 5, 40), torch.float32, torch.float32, device).values())
    torch.library.opcheck(torch.ops.fastdit.ln_modulate.default, given)
    torch.library.opcheck(torch.ops.fastdit.ln_modulate.default, [t.clone().requires_grad_() for t in given])


def test_bytes(recording, device):
    """Counted from the addresses: the streams once, statistics, modulation, and the stated partials, to the byte."""
    B, T, D = 2, 48, 768
    x, shift, scale = inputs((B, T, D), torch.bfloat16, torch.bfloat16, device).values()
    expected = module.traffic(B, T, D, 2, 2)
    with recording() as recorder:
        _, *kept = module.forward(x, shift, scale, module.run)
    splits, _ = module.forward_split(B, T, D)
    forward = recorder.traffic()
    assert forward.memory == expected["forward"]
    assert forward.programs == forward.memory + (splits - 1) * 2 * B * D * 2  # each program reads shift and scale
    with recording() as recorder:
        module.backward(x.clone(), x, scale, *kept, module.run)
    splits, _ = module.backward_split(B, T, D)
    backward = recorder.traffic()
    assert backward.memory == expected["backward"]
    assert backward.programs == backward.memory + (splits - 1) * B * D * 2


def test_bytes_are_the_floor_and_the_partials():
    B, T, D = 32, 256, 768
    moved, elements = module.traffic(B, T, D, 2, 2), B * T * D
    splits, _ = module.backward_split(B, T, D)
    assert moved["forward"] == pytest.approx(4 * elements, rel=0.01)
    assert moved["backward"] == pytest.approx(6 * elements + 2 * B * splits * 2 * D * 4, rel=0.01)


def test_offsets_beyond_32_bits(last_program, device):
    """The last sample of a stream of more than 2³¹ elements, computed as the last program of its launch computes it."""
    B, T, D = 2050, 128, 8192  # so many samples that one program owns all rows of one
    x = torch.empty(B, T, D, dtype=torch.bfloat16, device=device)  # on a CPU, only the pages touched become memory
    assert x[:-1].numel() > 2**31
    shift, scale = torch.zeros(2, B, D, dtype=torch.bfloat16, device=device)
    for t in (x, shift, scale):
        t[-1].normal_()
    end = [t[-1:].clone() for t in (x, shift, scale)]

    _, *kept = far = module.forward(x, shift, scale, last_program)
    near = module.forward(*end, module.run)
    for of_all, of_end in zip(far, near, strict=True):
        assert torch.equal(of_all[-1:], of_end)

    dx, _ = module.backward(x, x, scale, *kept, last_program)
    assert torch.equal(dx[-1:], module.backward(end[0], end[0], end[2], *near[1:], module.run)[0])


def test_batch_strides_beyond_32_bits(results, device):
    """shift and scale whose rows lie more than 2³¹ elements apart."""
    given = inputs((2, 3, 64), torch.float32, torch.bfloat16, device)
    far = torch.empty(2**31 + 1024, dtype=torch.bfloat16, device=device)
    apart = {name: far.as_strided((2, 64), (2**31 + 128, 1), offset) for name, offset in (("shift", 0), ("scale", 64))}
    for name, view in apart.items():
        view.copy_(given[name])
    near, distant = results(ln_modulate, given), results(ln_modulate, given | apart)
    for name in near:
        assert torch.equal(near[name], distant[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 8)}, r"x has shape \[4, 8\], expected \[B, T, D\]"),
        ({"x": torch.zeros(2, 3, 0)}, r"x has shape \[2, 3, 0\], expected \[B, T, D\] with D from 1 to 8192"),
        ({"x": torch.zeros(2, 3, 8193)}, r"x has shape \[2, 3, 8193\], expected \[B, T, D\] with D from 1 to 8192"),
        (
            {"x": torch.zeros(2, 3, 8, dtype=torch.float64)},
            r"x has shape \[2, 3, 8\].* float64 .*bfloat16 or float16 or float32",
        ),
        ({"x": torch.zeros(3, 2, 8).transpose(0, 1)}, r"x has shape \[2, 3, 8\], strides \[8, 16, 1\].*contiguous"),
        ({"shift": torch.zeros(2, 9)}, r"shift has shape \[2, 9\].*expected \[B, D\] = \[2, 8\]"),
        ({"shift": torch.zeros(2, 8, dtype=torch.int32)}, r"shift has shape \[2, 8\].* int32 .*bfloat16 or float16 or float32"),
        ({"shift": torch.zeros(8, 2).T}, r"shift has shape \[2, 8\], strides \[1, 2\].*unit last stride"),
        ({"scale": torch.zeros(1, 8)}, r"scale has shape \[1, 8\].*expected \[B, D\] = \[2, 8\]"),
        ({"scale": torch.zeros(2, 8, dtype=torch.bfloat16)}, r"scale has shape \[2, 8\].* bfloat16 .*float32"),
        ({"scale": torch.zeros(2, 8, device="meta")}, r"scale has shape \[2, 8\].* on meta; expected .* on cpu"),
    ],
)
def test_bad_input(change, message):
    good = {"x": torch.zeros(2, 3, 8), "shift": torch.zeros(2, 8), "scale": torch.zeros(2, 8)}
    with pytest.raises(ValueError, match=f"^ln_modulate: {message}"):
        ln_modulate(**(good | change))
