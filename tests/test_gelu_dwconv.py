"""gelu_dwconv against fp64, on the GPU or in the interpreter: outputs, every gradient, the border, what it reads and writes."""

import math

import pytest
import torch
import triton
from fastdit_kernels import gelu_dwconv as module
from fastdit_kernels.gelu_dwconv import gelu_dwconv
from fastdit_kernels.reference import REFERENCE
from fastdit_kernels.reference import gelu_dwconv as reference
from fastdit_kernels.triton_ops import TRITON
from torch.nn import functional

from fastdit.config import ModelConfig
from fastdit.model import DiT

pytestmark = pytest.mark.gpu

# B, height, width, F, K: square and not, wider and narrower than a strip, F over, under and at a block. Few rows, for the
# interpreter takes 5 to 30 ms for each.
SHAPES = [
    (2, 4, 16, 64, 3),
    (3, 5, 7, 70, 3),
    (5, 4, 4, 8, 3),
    (1, 3, 37, 65, 3),
    (2, 5, 8, 70, 4),
    (1, 7, 5, 33, 4),
    (2, 5, 8, 64, 5),
    (1, 7, 5, 33, 5),
    (2, 1, 2, 8, 5),
]


def inputs(shape, dtype, parameters, device):
    B, height, width, F, K = shape
    generator = torch.Generator().manual_seed(B * height * width + F + K)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    parameter = {"bias": normal(F), "weight": normal(F, 1, K, K) / K, "conv_bias": normal(F)}
    return {
        "h": (2 * normal(B, height * width, F)).to(device, dtype),
        **{name: value.to(device, parameters) for name, value in parameter.items()},
        "grid": (height, width),
    }


def call(op, given):
    h, bias, weight, conv_bias, grid = given.values()
    return op(h, bias, weight, conv_bias, *grid)


@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_is_exact_to_a_millionth(errors, nan_filled, device, shape):
    found = errors(gelu_dwconv, reference, inputs(shape, torch.float32, torch.float32, device))
    assert found["out0"].kernel <= 1e-6, found
    assert max(e.kernel for name, e in found.items() if name != "out0") <= 1e-5, found


@pytest.mark.parametrize("shape", [(3, 5, 7, 70, 3), (1, 5, 6, 70, 4), (1, 5, 6, 70, 5)])
@pytest.mark.parametrize("parameters", ["same", torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_errs_no_more_than_eager(errors, nan_filled, device, dtype, parameters, shape):
    """And the gradients of fp32 parameters, which no 16-bit rounding touches, no more than in fp32."""
    found = errors(gelu_dwconv, reference, inputs(shape, dtype, dtype if parameters == "same" else parameters, device))
    fp32 = {"dbias", "dweight", "dconv_bias"} if parameters == torch.float32 else set()
    assert all(e.kernel <= 1.1 * e.reference for name, e in found.items() if name not in fp32), found
    assert all(found[name].kernel <= 1e-6 for name in fp32), found


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gpus_own_tanh_errs_no_more_than_eager_where_it_is_used(device, dtype, sign):
    """tanh.approx with its documented worst error, 2⁻¹¹ of the result, both ways: what the forward would do to a GELU.

    Within the bar in bf16, which takes it. Beyond it in fp16, whose rounding is as large: there the forward must be exact.
    """
    x = (2 * torch.randn(2**16, generator=torch.Generator().manual_seed(0))).to(dtype)
    truth = functional.gelu(x.double(), approximate="tanh")
    tanh = torch.tanh(math.sqrt(2 / math.pi) * (x.float() + 0.044715 * x.float() ** 3))
    approximate = (0.5 * x.float() * (1 + tanh * (1 + sign * 2**-11))).to(dtype)
    eager = functional.gelu(x.float(), approximate="tanh").to(dtype)
    ours, theirs = ((z.double() - truth).norm() / truth.norm() for z in (approximate, eager))
    assert (ours <= 1.1 * theirs) == (dtype == torch.bfloat16), (ours, theirs)

    launches = []
    given = inputs((1, 3, 4, 8, 3), dtype, dtype, torch.device("meta"))
    taps = given["weight"].flatten(1).t().float().contiguous()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "interpret", False)
        tensors = given["h"], given["bias"], taps, given["conv_bias"]
        module.forward(*tensors, 3, 4, False, lambda *_, **args: launches.append(args["EXACT"]))
    assert launches == [dtype == torch.float16]


@pytest.mark.parametrize("K", [3, 4, 5])
@pytest.mark.parametrize("bias", [20.0, -0.75, 1000.0])
def test_the_border_is_zero_after_gelu(errors, results, nan_filled, device, bias, K):
    """GELU(0 + bias) is 20, -0.17 (its minimum), 1000: outside the grid it must count as 0 all the same."""
    given = inputs((2, 4, 6, 16, K), torch.float32, torch.float32, device)
    given["bias"] = torch.full_like(given["bias"], bias)
    found = errors(gelu_dwconv, reference, given)
    assert found["out0"].kernel <= 1e-6, found
    # At a bias of 1000 GELU's slope is 1 and nothing is lost; at its minimum dh is all cancellation, in the reference as well.
    assert all(e.kernel <= max(1e-5, 1.1 * e.reference) for e in found.values()), found


def test_the_reference_is_a_convolution_of_gelu(device):
    """The truth everything here is measured against, written with the padding PyTorch documents for 'same'."""
    for K in (3, 4, 5):
        given = inputs((2, 5, 7, 6, K), torch.float64, torch.float64, device)
        a = functional.gelu(given["h"] + given["bias"], approximate="tanh").transpose(1, 2).unflatten(2, (5, 7))
        before, after = (K - 1) // 2, K // 2
        z = functional.conv2d(functional.pad(a, (before, after) * 2), given["weight"], given["conv_bias"], groups=6)
        torch.testing.assert_close(call(reference, given), z.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("op", [gelu_dwconv, reference])
def test_a_video_is_its_frames(results, device, op):
    """Three lengths: every frame an image, to the bit, and no frame a neighbour of the next one."""
    images = inputs((6, 4, 5, 24, 4), torch.float32, torch.float32, device)
    video = images | {"h": images["h"].view(2, 60, 24), "grid": (3, 4, 5)}
    of_images, of_video = results(op, images), results(op, video)
    assert of_video["out0"].shape == of_video["dh"].shape == (2, 60, 24)
    assert torch.equal(of_video["out0"].view(6, 20, 24), of_images["out0"])
    upstream = torch.randn(6, 20, 24, device=device)
    (ours,) = torch.autograd.grad(call(op, video | {"h": video["h"].requires_grad_()}), video["h"], upstream.view(2, 60, 24))
    (expected,) = torch.autograd.grad(call(op, images | {"h": images["h"].requires_grad_()}), images["h"], upstream)
    assert torch.equal(ours.view(6, 20, 24), expected)


@pytest.mark.parametrize("shape", [(3, 4, 6, 70, 3), (3, 5, 7, 40, 4), (3, 4, 4, 24, 5)])
def test_nothing_outside_the_tensors_is_read(results, nan_filled, embedded, device, shape):
    given = inputs(shape, torch.bfloat16, torch.bfloat16, device)
    plain = results(gelu_dwconv, given)
    between = results(gelu_dwconv, {k: embedded(v) if isinstance(v, torch.Tensor) else v for k, v in given.items()})
    for name in plain:
        assert torch.equal(plain[name], between[name]), name


@pytest.mark.parametrize("shape", [(3, 4, 6, 70, 3), (3, 5, 7, 40, 4), (3, 4, 4, 24, 5)])
def test_an_image_of_nan_stays_in_its_image(results, nan_filled, device, shape):
    """Images share programs and strips; a neighbour in memory is no neighbour on the grid."""
    given = inputs(shape, torch.bfloat16, torch.bfloat16, device)
    clean = results(gelu_dwconv, given)
    given["h"][1] = torch.nan
    poisoned = results(gelu_dwconv, given)
    for name in ("out0", "dh"):
        assert torch.equal(clean[name][::2], poisoned[name][::2]), name
        assert poisoned[name][1].isnan().all()


def test_a_channel_of_nan_stays_in_its_channel(results, nan_filled, device):
    given = inputs((2, 4, 4, 70, 3), torch.float32, torch.float32, device)
    clean = results(gelu_dwconv, given)
    given["h"][..., 64] = torch.nan
    poisoned = results(gelu_dwconv, given)
    others = torch.arange(70, device=device) != 64
    for name in ("out0", "dh"):
        assert torch.equal(clean[name][..., others], poisoned[name][..., others]), name
    for name in ("dbias", "dweight", "dconv_bias"):
        assert torch.equal(clean[name][others], poisoned[name][others]), name


@pytest.mark.parametrize("K", [3, 4, 5])
def test_two_runs_give_the_same_bits(results, device, K):
    given = inputs((5, 3, 9, 33, K), torch.bfloat16, torch.float32, device)
    first, second = results(gelu_dwconv, given), results(gelu_dwconv, given)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_no_images(results, device):
    found = results(gelu_dwconv, inputs((0, 4, 4, 64, 3), torch.bfloat16, torch.float32, device))
    assert found["out0"].shape == found["dh"].shape == (0, 16, 64)
    for name, shape in {"dbias": (64,), "dweight": (64, 1, 3, 3), "dconv_bias": (64,)}.items():
        assert torch.equal(found[name], torch.zeros(shape, device=device)), name


def test_an_expanded_gradient(device):
    """What `.sum().backward()` hands over has zero strides."""
    given = inputs((2, 4, 5, 24, 3), torch.float32, torch.float32, device)
    leaves = [v.requires_grad_() for v in given.values() if isinstance(v, torch.Tensor)]
    ours = torch.autograd.grad(call(gelu_dwconv, given).sum(), leaves)
    expected = torch.autograd.grad(call(reference, given).sum(), leaves)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck looks at that of its own non-leaf copies
def test_opcheck(device):
    given = inputs((2, 4, 5, 24, 4), torch.float32, torch.float32, device)
    tensors = [given["h"], given["bias"], given["weight"], given["conv_bias"]]
    settings = (*given["grid"], True)
    torch.library.opcheck(torch.ops.fastdit.gelu_dwconv.default, (*tensors, *settings))
    torch.library.opcheck(torch.ops.fastdit.gelu_dwconv.default, (*(t.clone().requires_grad_() for t in tensors), *settings))


def test_compiles_without_a_break(results, device):
    given = inputs((2, 4, 5, 24, 3), torch.bfloat16, torch.float32, device)
    compiled = torch.compile(gelu_dwconv, fullgraph=True, backend="aot_eager")
    eager, ours = results(gelu_dwconv, given), results(compiled, given)
    for name in eager:
        assert torch.equal(eager[name], ours[name]), name


@pytest.mark.parametrize("shape", [(3, 4, 16, 64, 3), (1, 4, 32, 64, 3), (3, 3, 7, 70, 4), (5, 3, 9, 33, 5)])
def test_bytes(recording, device, shape):
    """Counted from the addresses each program touches: what `traffic` states, to the byte."""
    B, height, width, F, K = shape
    h, bias, weight, conv_bias, grid = inputs(shape, torch.bfloat16, torch.bfloat16, device).values()
    taps = weight.flatten(1).t().float().contiguous()
    stated = module.traffic(B, height, width, F, K, 2, 2)
    with recording() as recorder:
        _, counters = module.forward(h, bias, taps, conv_bias, *grid, True, module.run)
    assert recorder.traffic().programs == stated["forward"]
    with recording() as recorder:
        module.backward(h.clone(), h, bias, taps, *grid, counters, module.run)
    assert recorder.traffic().programs == stated["backward"]


@pytest.mark.parametrize("F", [3072, 4608])
@pytest.mark.parametrize(("B", "side", "most"), [(2, 16, 1.08), (1, 32, 1.15)])
def test_bytes_are_the_floor_and_little_more(recording, device, B, side, most, F):
    """The programs of one block of channels, counted in the stream's own width; every block is like it, counter and all."""
    K, blocks = 3, F // module.BLOCK
    h, bias, weight, conv_bias, grid = inputs((B, side, side, F, K), torch.bfloat16, torch.bfloat16, device).values()
    taps = weight.flatten(1).t().float().contiguous()

    def one_block(kernel, grid, num_warps, **args):
        assert grid[0] == blocks
        module.run(kernel, (1, grid[1]), num_warps, **args)

    counted = {}
    with recording() as recorder:
        _, counters = module.forward(h, bias, taps, conv_bias, *grid, True, one_block)
    counted["forward"] = blocks * recorder.traffic().programs
    with recording() as recorder:
        module.backward(h.clone(), h, bias, taps, *grid, counters, one_block)
    counted["backward"] = blocks * recorder.traffic().programs
    assert counted == module.traffic(B, *grid, F, K, 2, 2)

    elements = B * side * side * F
    assert counted["forward"] <= most * 4 * elements
    assert counted["backward"] <= most * 6 * elements


@pytest.mark.parametrize("K", [3, 4, 5])
@pytest.mark.parametrize("B", [32, 128, 1000])
@pytest.mark.parametrize(("side", "most"), [(16, 1.08), (32, 1.15)])
def test_bytes_at_the_batch_that_is_trained(side, most, B, K):
    moved, elements = module.traffic(B, side, side, 3072, K, 2, 2), B * side * side * 3072
    assert moved["forward"] <= most * 4 * elements
    assert moved["backward"] <= most * 6 * elements


@pytest.mark.parametrize("K", [3, 5])
@pytest.mark.parametrize("sign", ["over", "under", "random"])
def test_the_error_of_tanh_approx_is_below_bf16s(device, sign, K):
    """tanh.approx.f32 errs by 2⁻¹¹ of its result at most (PTX ISA). Off by that everywhere, the forward, rounded to bf16,
    would be within 1.1× of the error of rounding alone. The backward does not use it: dh would be off by 2.7×."""

    def approximate(h, bias, weight, conv_bias, height, width):
        y = (h + bias) / 2
        off = {"over": torch.ones_like(h), "under": -torch.ones_like(h), "random": torch.randn_like(h).sign()}[sign]
        a = y + y * torch.tanh(math.sqrt(2 / math.pi) * (2 * y + 0.044715 * (2 * y) ** 3)) * (1 + 2**-11 * off)
        a = a.transpose(1, 2).unflatten(2, (height, width))
        z = functional.conv2d(a, weight, conv_bias, padding=K // 2, groups=h.shape[-1])
        return z.flatten(2).transpose(1, 2)

    torch.manual_seed(0)
    rounded = inputs((2, 16, 16, 64, K), torch.bfloat16, torch.bfloat16, device)
    given = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in rounded.items()}
    truth = call(reference, given)
    z = call(approximate, given)
    error, least = (z.bfloat16() - truth).norm(), (truth.bfloat16() - truth).norm()
    assert error <= 1.1 * least, (error / least).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("exact", [True, False])
def test_which_tanh(device, dtype, exact):
    """tanh.approx only on a GPU, for 16-bit streams, unless asked otherwise."""
    seen = []

    def launch(kernel, grid, num_warps, **args):
        seen.append(args["EXACT"])

    h, parameter = torch.zeros(1, 16, 8, dtype=dtype, device=device), torch.zeros(8, device=device)
    module.forward(h, parameter, torch.zeros(9, 8, device=device), parameter, 4, 4, exact, launch)
    assert seen == [exact or dtype == torch.float32 or device.type == "cpu"]


def test_offsets_beyond_32_bits(last_program, device):
    """The last image of a stream of more than 2³¹ elements, as the last program of its launch computes it."""
    B, side, F, K = 1026, 16, 8192, 3
    last = slice(F - module.BLOCK, F)
    h = torch.empty(B, side * side, F, dtype=torch.bfloat16, device=device)  # on a CPU, only the pages touched become memory
    assert h.numel() > 2**31
    h[-1, :, last] = torch.randn(side * side, module.BLOCK).to(h)
    bias, conv_bias, taps = (torch.randn(*shape, F, device=device) for shape in ((), (), (K * K,)))

    def launch(kernel, *options, **args):
        if "p_h" in args:  # the partials' sum would meet those of programs that did not run
            last_program(kernel, *options, **args)

    z, counters = module.forward(h, bias, taps, conv_bias, side, side, True, launch)
    dh, _ = module.backward(h, h, bias, taps, side, side, counters, launch)

    image = h[-1:, :, last].contiguous()
    bias, conv_bias, taps = bias[last], conv_bias[last], taps[:, last].contiguous()
    near, counters = module.forward(image, bias, taps, conv_bias, side, side, True, module.run)
    assert torch.equal(z[-1:, :, last], near)
    assert torch.equal(dh[-1:, :, last], module.backward(image, image, bias, taps, side, side, counters, module.run)[0])


@pytest.mark.parametrize("K", [3, 4])
def test_whole_model(device, K):
    """The same weights on TRITON and on REFERENCE: loss and the gradient of every parameter."""
    config = ModelConfig(input_size=(6, 10), channels=4, num_classes=5, depth=2, width=16, num_heads=2, conv_kernel=K)
    generator = torch.Generator().manual_seed(3)
    x, target = (torch.randn(3, 4, 6, 10, generator=generator).to(device) for _ in range(2))
    t, y = torch.tensor([3, 500, 999], device=device), torch.tensor([0, 4, 2], device=device)
    found = []
    for ops in (TRITON, REFERENCE):
        model = DiT(config, ops).to(device)
        generator = torch.Generator().manual_seed(4)  # every parameter random: adaLN-Zero's zeros would hide most of the model
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
        loss = functional.mse_loss(model(x, t, y), target)
        loss.backward()
        found.append({"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()})
    ours, expected = found
    assert any("mlp.conv.weight" in name for name in expected)
    for name, truth in expected.items():
        assert (ours[name] - truth).norm() <= 1e-5 * truth.norm(), name


def good():
    return {
        "h": torch.zeros(2, 12, 8),
        "bias": torch.zeros(8),
        "weight": torch.zeros(8, 1, 3, 3),
        "conv_bias": torch.zeros(8),
        "grid": (3, 4),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.zeros(12, 8)}, r"h has shape \[12, 8\], expected \[B, T, F\]"),
        ({"h": torch.zeros(2, 12, 8193)}, r"h has shape \[2, 12, 8193\].* F from 1 to 8192"),
        ({"h": torch.zeros(2, 12, 8, dtype=torch.float64)}, r"h has shape .* float64 .*bfloat16 or float16 or float32"),
        ({"h": torch.zeros(12, 2, 8).transpose(0, 1)}, r"h has shape .*contiguous"),
        ({"grid": (4, 4)}, r"h has 12 tokens; .* and is \(4, 4\)"),
        ({"grid": (-3, -4)}, r"h has 12 tokens; .* and is \(-3, -4\)"),
        ({"grid": (2, -3, -2)}, r"h has 12 tokens; .* and is \(2, -3, -2\)"),
        ({"grid": (2, 2, 3, 1)}, r"h has 12 tokens; .* and is \(2, 2, 3, 1\)"),
        ({"grid": (12,)}, r"weight has shape \[8, 1, 3, 3\]; expected \[F, 1, K\] with K in \(3, 4, 5, 7\) for a grid of 1"),
        ({"grid": ()}, r"h has 12 tokens; .* and is \(\)"),
        (
            {"weight": torch.zeros(8, 1, 2, 2)},
            r"weight has shape \[8, 1, 2, 2\]; expected \[F, 1, K, K\] with K in \(3, 4, 5\)",
        ),
        (
            {"weight": torch.zeros(8, 1, 7, 7)},
            r"weight has shape \[8, 1, 7, 7\]; expected \[F, 1, K, K\] with K in \(3, 4, 5\)",
        ),
        ({"weight": torch.zeros(8, 1, 5, 3)}, r"weight has shape \[8, 1, 5, 3\].*\[F, 1, K, K\] = \[8, 1, 3, 3\]"),
        ({"weight": torch.zeros(8, 3, 3)}, r"weight has shape \[8, 3, 3\]; expected \[F, 1, K, K\]"),
        ({"weight": torch.zeros(9, 1, 3, 3)}, r"weight has shape \[9, 1, 3, 3\].* = \[8, 1, 3, 3\]"),
        ({"weight": torch.zeros(8, 1, 3, 3, dtype=torch.bfloat16)}, r"weight has shape .* bfloat16 .*float32"),
        ({"bias": torch.zeros(7)}, r"bias has shape \[7\].*expected \[F\] = \[8\]"),
        ({"bias": torch.zeros(8, dtype=torch.int32)}, r"bias has shape .* int32 .*bfloat16 or float16 or float32"),
        ({"bias": torch.zeros(8, device="meta")}, r"bias has shape .* on meta; expected .* on cpu"),
        ({"conv_bias": torch.zeros(8, 1)}, r"conv_bias has shape \[8, 1\].*expected \[F\] = \[8\]"),
        ({"conv_bias": torch.zeros(16)[::2]}, r"conv_bias has shape \[8\], strides \[2\].*contiguous"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=f"^gelu_dwconv: {message}"):
        call(gelu_dwconv, good() | change)
