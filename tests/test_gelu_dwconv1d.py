"""gelu_dwconv on a grid of one length against fp64, on the GPU or in the interpreter: outputs, every gradient, bytes."""

import pytest
import torch
import triton
from fastdit_kernels import gelu_dwconv1d as module
from fastdit_kernels.gelu_dwconv import gelu_dwconv
from fastdit_kernels.reference import gelu_dwconv as reference
from torch.nn import functional

pytestmark = pytest.mark.gpu

# B, L, F, K: one token, fewer than K, than are read at a time, a whole segment and a part of one, several; F over, under and at
# a block.
SHAPES = [
    (2, 16, 64, 3),
    (3, 23, 70, 3),
    (9, 1, 8, 3),
    (1, 64, 65, 3),
    (2, 131, 8, 3),
    (3, 23, 70, 4),
    (5, 2, 33, 4),
    (2, 70, 64, 5),
    (1, 3, 33, 5),
    (2, 71, 40, 7),
    (3, 5, 33, 7),
]


def inputs(shape, dtype, parameters, device):
    B, L, F, K = shape
    generator = torch.Generator().manual_seed(B * L + F + K)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    parameter = {"bias": normal(F), "weight": normal(F, 1, K) / K**0.5, "conv_bias": normal(F)}
    return {
        "h": (2 * normal(B, L, F)).to(device, dtype),
        **{name: value.to(device, parameters) for name, value in parameter.items()},
        "grid": (L,),
    }


def call(op, given):
    h, bias, weight, conv_bias, grid = given.values()
    return op(h, bias, weight, conv_bias, *grid)


@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_is_exact_to_a_millionth(errors, nan_filled, device, shape):
    found = errors(gelu_dwconv, reference, inputs(shape, torch.float32, torch.float32, device))
    assert found["out0"].kernel <= 1e-6, found
    assert max(e.kernel for name, e in found.items() if name != "out0") <= 1e-5, found


@pytest.mark.parametrize("shape", [(3, 23, 70, 3), (3, 23, 70, 4), (2, 70, 70, 5), (2, 71, 40, 7)])
@pytest.mark.parametrize("parameters", ["same", torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_errs_no_more_than_eager(errors, nan_filled, device, dtype, parameters, shape):
    """And the gradients of fp32 parameters, which no 16-bit rounding touches, no more than in fp32."""
    found = errors(gelu_dwconv, reference, inputs(shape, dtype, dtype if parameters == "same" else parameters, device))
    fp32 = {"dbias", "dweight", "dconv_bias"} if parameters == torch.float32 else set()
    assert all(e.kernel <= 1.1 * e.reference for name, e in found.items() if name not in fp32), found
    assert all(found[name].kernel <= 1e-6 for name in fp32), found


@pytest.mark.parametrize("K", [3, 4, 5, 7])
@pytest.mark.parametrize("bias", [20.0, -0.75, 1000.0])
def test_the_border_is_zero_after_gelu(errors, results, nan_filled, device, bias, K):
    """GELU(0 + bias) is 20, -0.17 (its minimum), 1000: outside the sequence it must count as 0 all the same."""
    given = inputs((2, 6, 16, K), torch.float32, torch.float32, device)
    given["bias"] = torch.full_like(given["bias"], bias)
    found = errors(gelu_dwconv, reference, given)
    assert found["out0"].kernel <= 1e-6, found
    assert all(e.kernel <= max(1e-5, 1.1 * e.reference) for e in found.values()), found


@pytest.mark.parametrize("K", [3, 4, 5, 7])
def test_the_reference_is_a_convolution_of_gelu(device, K):
    """The truth everything here is measured against, written with the padding PyTorch documents for 'same'."""
    given = inputs((2, 9, 6, K), torch.float64, torch.float64, device)
    a = functional.gelu(given["h"] + given["bias"], approximate="tanh").transpose(1, 2)
    z = functional.conv1d(functional.pad(a, ((K - 1) // 2, K // 2)), given["weight"], given["conv_bias"], groups=6)
    torch.testing.assert_close(call(reference, given), z.transpose(1, 2))


@pytest.mark.parametrize("shape", [(3, 23, 70, 3), (5, 9, 40, 4), (2, 66, 24, 7)])
def test_nothing_outside_the_tensors_is_read(results, nan_filled, embedded, device, shape):
    given = inputs(shape, torch.bfloat16, torch.bfloat16, device)
    plain = results(gelu_dwconv, given)
    between = results(gelu_dwconv, {k: embedded(v) if isinstance(v, torch.Tensor) else v for k, v in given.items()})
    for name in plain:
        assert torch.equal(plain[name], between[name]), name


@pytest.mark.parametrize("shape", [(3, 23, 70, 3), (3, 9, 40, 4), (3, 66, 24, 7)])
def test_a_sequence_of_nan_stays_in_its_sequence(results, nan_filled, device, shape):
    """Sequences share programs; a neighbour in memory is no neighbour in time."""
    given = inputs(shape, torch.bfloat16, torch.bfloat16, device)
    clean = results(gelu_dwconv, given)
    given["h"][1] = torch.nan
    poisoned = results(gelu_dwconv, given)
    for name in ("out0", "dh"):
        assert torch.equal(clean[name][::2], poisoned[name][::2]), name
        assert poisoned[name][1].isnan().all()


@pytest.mark.parametrize("K", [3, 4, 7])
def test_a_token_reaches_its_neighbours_alone(results, device, K):
    """(K-1)//2 tokens after it and K//2 before it, across the end of a segment of 64 and of a program's share."""
    given = inputs((1, 300, 8, K), torch.float32, torch.float32, device)
    clean = results(gelu_dwconv, given)["out0"]
    for t in (0, 63, 64, 255, 299):
        moved = given | {"h": given["h"].clone()}
        moved["h"][:, t] += 1
        changed = (call(gelu_dwconv, moved) != clean).any(2)[0].nonzero().flatten().tolist()
        assert changed == [n for n in range(t - K // 2, t + (K - 1) // 2 + 1) if 0 <= n < 300]


def test_a_channel_of_nan_stays_in_its_channel(results, nan_filled, device):
    given = inputs((2, 16, 70, 3), torch.float32, torch.float32, device)
    clean = results(gelu_dwconv, given)
    given["h"][..., 64] = torch.nan
    poisoned = results(gelu_dwconv, given)
    others = torch.arange(70, device=device) != 64
    for name in ("out0", "dh"):
        assert torch.equal(clean[name][..., others], poisoned[name][..., others]), name
    for name in ("dbias", "dweight", "dconv_bias"):
        assert torch.equal(clean[name][others], poisoned[name][others]), name


@pytest.mark.parametrize("K", [3, 4, 5, 7])
def test_two_runs_give_the_same_bits(results, device, K):
    given = inputs((9, 20, 33, K), torch.bfloat16, torch.float32, device)
    first, second = results(gelu_dwconv, given), results(gelu_dwconv, given)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_no_sequences(results, device):
    found = results(gelu_dwconv, inputs((0, 16, 64, 3), torch.bfloat16, torch.float32, device))
    assert found["out0"].shape == found["dh"].shape == (0, 16, 64)
    for name, shape in {"dbias": (64,), "dweight": (64, 1, 3), "dconv_bias": (64,)}.items():
        assert torch.equal(found[name], torch.zeros(shape, device=device)), name


def test_an_expanded_gradient(device):
    """What `.sum().backward()` hands over has zero strides."""
    given = inputs((2, 20, 24, 3), torch.float32, torch.float32, device)
    leaves = [v.requires_grad_() for v in given.values() if isinstance(v, torch.Tensor)]
    ours = torch.autograd.grad(call(gelu_dwconv, given).sum(), leaves)
    expected = torch.autograd.grad(call(reference, given).sum(), leaves)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck looks at that of its own non-leaf copies
def test_opcheck(device):
    given = inputs((2, 9, 24, 4), torch.float32, torch.float32, device)
    tensors = [given["h"], given["bias"], given["weight"], given["conv_bias"]]
    torch.library.opcheck(torch.ops.fastdit.gelu_dwconv1d.default, (*tensors, True))
    torch.library.opcheck(torch.ops.fastdit.gelu_dwconv1d.default, (*(t.clone().requires_grad_() for t in tensors), True))


def test_compiles_without_a_break(results, device):
    given = inputs((2, 20, 24, 3), torch.bfloat16, torch.float32, device)
    compiled = torch.compile(gelu_dwconv, fullgraph=True, backend="aot_eager")
    eager, ours = results(gelu_dwconv, given), results(compiled, given)
    for name in eager:
        assert torch.equal(eager[name], ours[name]), name


@pytest.mark.parametrize("shape", [(3, 16, 64, 3), (2, 130, 70, 4), (1, 300, 33, 5), (9, 7, 64, 7)])
def test_bytes(recording, device, shape):
    """Counted from the addresses each program touches: what `traffic` states, to the byte."""
    B, L, F, K = shape
    h, bias, weight, conv_bias, _ = inputs(shape, torch.bfloat16, torch.bfloat16, device).values()
    taps = weight.flatten(1).t().float().contiguous()
    stated = module.traffic(B, L, F, K, 2, 2)
    with recording() as recorder:
        _, counters = module.forward(h, bias, taps, conv_bias, True, module.run)
    assert recorder.traffic().programs == stated["forward"]
    with recording() as recorder:
        module.backward(h.clone(), h, bias, taps, counters, module.run)
    assert recorder.traffic().programs == stated["backward"]


@pytest.mark.parametrize("K", [3, 4, 5, 7])
@pytest.mark.parametrize("B", [32, 128, 1000])
@pytest.mark.parametrize("L", [16, 100, 256, 1024, 4096])
def test_bytes_at_the_batch_that_is_trained(L, B, K):
    moved, elements = module.traffic(B, L, 3072, K, 2, 2), B * L * 3072
    assert moved["forward"] <= 1.05 * 4 * elements
    assert moved["backward"] <= 1.05 * 6 * elements


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("exact", [True, False])
def test_which_tanh(device, monkeypatch, dtype, exact):
    """tanh.approx only for bf16 streams, unless asked otherwise: fp16 rounds as finely as the instruction errs."""
    seen = []
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    h, parameter = torch.zeros(1, 16, 8, dtype=dtype, device=device), torch.zeros(8, device=device)
    taps = torch.zeros(3, 8, device=device)
    module.forward(h, parameter, taps, parameter, exact, lambda *_, **args: seen.append(args["EXACT"]))
    assert seen == [exact or dtype != torch.bfloat16]


def test_offsets_beyond_32_bits(last_program, device):
    """The last sequence of a stream of more than 2³¹ elements, as the last program of its launch computes it."""
    B, L, F, K = 1026, 256, 8192, 3
    last = slice(F - module.BLOCK, F)
    h = torch.empty(B, L, F, dtype=torch.bfloat16, device=device)  # on a CPU, only the pages touched become memory
    assert h.numel() > 2**31
    h[-1, :, last] = torch.randn(L, module.BLOCK).to(h)
    bias, conv_bias, taps = (torch.randn(*shape, F, device=device) for shape in ((), (), (K,)))

    def launch(kernel, *options, **args):
        if "p_h" in args:  # the partials' sum would meet those of programs that did not run
            last_program(kernel, *options, **args)

    z, counters = module.forward(h, bias, taps, conv_bias, True, launch)
    dh, _ = module.backward(h, h, bias, taps, counters, launch)

    sequence = h[-1:, :, last].contiguous()
    bias, conv_bias, taps = bias[last], conv_bias[last], taps[:, last].contiguous()
    near, counters = module.forward(sequence, bias, taps, conv_bias, True, module.run)
    assert torch.equal(z[-1:, :, last], near)
    assert torch.equal(dh[-1:, :, last], module.backward(sequence, sequence, bias, taps, counters, module.run)[0])


def good():
    return {
        "h": torch.zeros(2, 12, 8),
        "bias": torch.zeros(8),
        "weight": torch.zeros(8, 1, 3),
        "conv_bias": torch.zeros(8),
        "grid": (12,),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (11,)}, r"h has 12 tokens; .* and is \(11,\)"),
        ({"grid": (3, 4)}, r"weight has shape \[8, 1, 3\]; expected \[F, 1, K, K\] with K in \(3, 4, 5\) for a grid of 2"),
        ({"grid": (2, 2, 3)}, r"weight has shape \[8, 1, 3\]; expected \[F, 1, K, K\] with K in \(3, 4, 5\) for a grid of 3"),
        (
            {"weight": torch.zeros(8, 1, 3, 3)},
            r"weight has shape \[8, 1, 3, 3\]; expected \[F, 1, K\] with K in \(3, 4, 5, 7\)",
        ),
        ({"weight": torch.zeros(8, 1, 6)}, r"weight has shape \[8, 1, 6\]; expected \[F, 1, K\] with K in \(3, 4, 5, 7"),
        ({"weight": torch.zeros(())}, r"weight has shape \[\]; expected \[F, 1, K\]"),
        ({"weight": torch.zeros(9, 1, 3)}, r"weight has shape \[9, 1, 3\].* = \[8, 1, 3\]"),
        ({"weight": torch.zeros(8, 1, 3, dtype=torch.bfloat16)}, r"weight has shape .* bfloat16 .*float32"),
        ({"weight": torch.zeros(8, 1, 6)[..., ::2]}, r"weight has shape .*contiguous"),
        ({"bias": torch.zeros(7)}, r"bias has shape \[7\].*expected \[F\] = \[8\]"),
        ({"conv_bias": torch.zeros(8, 1)}, r"conv_bias has shape \[8, 1\].*expected \[F\] = \[8\]"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=f"^gelu_dwconv: {message}"):
        call(gelu_dwconv, good() | change)
