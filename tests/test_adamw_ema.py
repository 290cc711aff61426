"""adamw_ema against fp64 and against PyTorch's own fused ops, on sizes and addresses of every kind."""

import inspect
import itertools

import pytest
import torch
from fastdit_kernels import reference
from fastdit_kernels.adamw_ema import BLOCK, adamw_ema, addresses, traffic

pytestmark = pytest.mark.gpu

LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "averages")
SIZES = [(BLOCK,), (3, BLOCK), (1,), (BLOCK + 1,), (7, 5), (0,), (4, 3 * BLOCK - 4), (2, 2)]
KINDS = [
    (torch.float32, None),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float16),
]
SETTINGS = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight": 0.02}


def tensors(device, sizes=SIZES, offset: int = 0, step: float = 5, grad=torch.float32, copy=None) -> dict:
    """All that one call takes. offset: numbers before each gradient in its allocation, as in FSDP's one buffer.

    grad and copy: the dtypes of gradients and copies.
    """
    rng = torch.Generator().manual_seed(0)

    def some(scale: float = 1.0) -> list[torch.Tensor]:
        return [(torch.randn(size, generator=rng) * scale).to(device) for size in sizes]

    found = {name: some(1e-2 if name == "exp_avgs" else 1) for name in LISTS}
    found["exp_avg_sqs"] = [v.square() * 1e-4 for v in found["exp_avg_sqs"]]
    found["grads"] = [g.to(grad) for g in found["grads"]]
    if copy:
        found["copies"] = [p.to(copy) for p in found["params"]]
    if offset:
        found["grads"] = [torch.cat([g.new_zeros(offset), g.flatten()])[offset:].view(g.shape) for g in found["grads"]]
    found["decays"] = torch.tensor([0.1 * (i % 2) for i in range(len(sizes))], device=device)
    found["steps"] = torch.arange(len(sizes), dtype=torch.float32, device=device) + step
    found["grad_scale"], found["found_inf"] = torch.tensor(1.7, device=device), torch.zeros((), device=device)
    return found


def cast(given: dict, dtype: torch.dtype) -> dict:
    return {k: [t.to(dtype, copy=True) for t in v] if isinstance(v, list) else v.to(dtype, copy=True) for k, v in given.items()}


def pytorch(given: dict, lr: float, beta1: float, beta2: float, eps: float, weight: float) -> None:
    """PyTorch's fused AdamW, then a fused average: one call for each tensor, since their decays differ."""
    lists = zip(*(given[name] for name in LISTS), given["decays"].tolist(), given["steps"], strict=True)
    for p, g, m, v, e, decay, step in lists:
        torch._fused_adamw_(
            [p], [g], [m], [v], [], [step], lr=lr, beta1=beta1, beta2=beta2, weight_decay=decay, eps=eps, amsgrad=False,
            maximize=False, grad_scale=given["grad_scale"], found_inf=given["found_inf"],
        )  # fmt: skip
        e.lerp_(p, weight)


def bits(given: dict) -> list[torch.Tensor]:
    lists = (given.get(name, []) for name in (*LISTS, "copies"))
    return [t.view(torch.int32 if t.itemsize == 4 else torch.int16).clone() for tensors in lists for t in tensors]


def compared(*groups: list[torch.Tensor]):
    """What is compared of lists: all as one vector, and the large tensors. How a few numbers round is luck."""
    yield [torch.cat([t.flatten() for t in tensors]) for tensors in groups]
    yield from (same for same in zip(*groups, strict=True) if same[0].numel() >= BLOCK)


@pytest.mark.parametrize(("grad", "copy"), KINDS)
@pytest.mark.parametrize(
    ("step", "offset", "beta2"), [*itertools.product([1, 5, 200, 100_000], [0, 1, 4], [0.999]), (1, 0, 0.0), (7, 0, 0.95)]
)
def test_at_most_as_wrong_as_pytorch(device, step, offset, beta2, grad, copy):
    """Relative errors to fp64, of both, on the same numbers; 1e-7 is a unit in the last place."""
    given, settings = tensors(device, offset=offset, step=step, grad=grad, copy=copy), SETTINGS | {"beta2": beta2}
    truth, eager = cast(given, torch.float64), cast(given, torch.float32)
    grads = [g.clone() for g in given["grads"]]
    reference.adamw_ema(**truth, **settings)
    pytorch(eager, **settings)
    adamw_ema(**given, **settings)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "averages"):
        for ours, theirs, exact in compared(given[name], eager[name], truth[name]):
            mistake = [float((t.double() - exact).norm() / exact.norm()) for t in (ours, theirs)]
            assert mistake[0] <= max(1.1 * mistake[1], 1e-7), (name, tuple(exact.shape), mistake)
    assert all(torch.equal(a, b) for a, b in zip(given["grads"], grads, strict=True))
    for written, p in zip(given.get("copies", []), given["params"], strict=copy is not None):
        assert torch.equal(written, p.to(copy)), "a copy is the new parameter, rounded to the nearest"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_gradient_gives_the_bits_of_its_cast(device, dtype):
    given, widened = (tensors(device, grad=dtype, copy=dtype) for _ in range(2))
    widened["grads"] = [g.float() for g in widened["grads"]]
    adamw_ema(**given, **SETTINGS)
    adamw_ema(**widened, **SETTINGS)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "averages", "copies"):
        assert all(torch.equal(a, b) for a, b in zip(given[name], widened[name], strict=True)), name


def test_the_reference_is_pytorchs_own_step(device):
    given = tensors(device)
    eager = cast(given, torch.float32)
    reference.adamw_ema(**given, **SETTINGS)
    pytorch(eager, **SETTINGS)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "averages"):
        for ours, theirs in zip(given[name], eager[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_both_sides_have_equal_signatures():
    assert inspect.signature(adamw_ema) == inspect.signature(reference.adamw_ema)


@pytest.mark.parametrize(("grad", "copy"), KINDS)
def test_found_inf_changes_nothing(device, grad, copy):
    given = tensors(device, grad=grad, copy=copy)
    for t in given.get("copies", []):
        t.fill_(-0.0)
    for t in given["averages"]:
        t.fill_(-0.0)
    given["grads"][1].fill_(torch.nan)
    given["found_inf"].fill_(1)
    before = bits(given)
    adamw_ema(**given, **SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(before, bits(given), strict=True))


@pytest.mark.parametrize(("grad", "copy"), KINDS)
def test_neighbours_are_neither_read_nor_written(device, embedded, grad, copy):
    given = tensors(device, grad=grad, copy=copy)
    expected = {k: [t.clone() for t in v] if isinstance(v, list) else v.clone() for k, v in given.items()}
    adamw_ema(**expected, **SETTINGS)
    inside = {k: [embedded(t) for t in v] if isinstance(v, list) else v for k, v in given.items()}
    adamw_ema(**inside, **SETTINGS)
    for name in (*LISTS, *(["copies"] if copy else [])):
        for t, e in zip(inside[name], expected[name], strict=True):
            torch.testing.assert_close(t, e, rtol=2e-7 if t.itemsize == 4 else torch.finfo(t.dtype).eps, atol=0)
            around = t.as_strided((t.storage_offset(),), (1,), 0)
            assert around.isnan().all()
            assert t.as_strided((4096,), (1,), t.storage_offset() + t.numel()).isnan().all()


def test_two_runs_are_bit_equal(device):
    a, b = tensors(device), tensors(device)
    adamw_ema(**a, **SETTINGS)
    adamw_ema(**b, **SETTINGS)
    assert all(torch.equal(x, y) for x, y in zip(bits(a), bits(b), strict=True))


@pytest.mark.parametrize(("grad", "copy"), KINDS)
def test_bytes_by_address_are_the_stated_ones(device, recording, grad, copy):
    given = tensors(device, [(BLOCK,), (3, BLOCK), (8, 12)], grad=grad, copy=copy)
    with recording() as recorder:
        adamw_ema(**given, **SETTINGS)
    assert recorder.traffic().memory == traffic(
        [t.numel() for t in given["params"]], grad.itemsize, copy.itemsize if copy else 0
    )


def test_with_the_norm_a_parameter_costs_38_bytes_in_bf16_and_40_in_fp32():
    n = 768 * 3072
    assert 2 * n + traffic([n], grad=2, copy=2) == pytest.approx(38 * n, rel=1e-3)
    assert 4 * n + traffic([n]) == pytest.approx(40 * n, rel=1e-3)


@pytest.mark.parametrize("copy", [None, torch.bfloat16])
def test_opcheck(device, copy):
    given = tensors(device, [(3,), (BLOCK + 1,)], copy=copy)
    op = torch.ops.fastdit.adamw_ema.default
    lists = [*(given[name] for name in LISTS), given.get("copies", [])]
    rest = [given[name] for name in ("decays", "steps", "grad_scale", "found_inf")]
    lr, weight = torch.tensor(3e-3, device=device), torch.tensor(0.02, device=device)
    for table in (None, addresses(*lists).to(device)):
        torch.library.opcheck(op, (*lists, *rest, lr, weight, table, 0.9, 0.999, 1e-8), test_utils="test_schema")
    torch.library.opcheck(op, (*lists, *rest, lr, weight, None, 0.9, 0.999, 1e-8))


@pytest.mark.parametrize(("grad", "copy"), KINDS)
def test_what_changes_between_steps_may_stand_on_the_device(device, grad, copy):
    """The learning rate, the averages' weight and the table of addresses: a graph replays the launch with new ones."""
    given, same = (tensors(device, grad=grad, copy=copy) for _ in range(2))
    adamw_ema(**given, **SETTINGS)
    scalars = {name: torch.tensor(SETTINGS[name], device=device) for name in ("lr", "weight")}
    table = addresses(*(same[name] for name in LISTS), copies=same.get("copies", []))
    adamw_ema(**same, **SETTINGS | scalars, table=table.to(device))
    assert all(torch.equal(a, b) for a, b in zip(bits(given), bits(same), strict=True))


def test_none_is_nothing(device):
    none = torch.zeros(0, device=device)
    adamw_ema([], [], [], [], [], none, none, torch.ones((), device=device), torch.zeros((), device=device), **SETTINGS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": []}, "0 grads for 2 params"),
        ({"grads": [torch.zeros(2, 3), torch.zeros(5)]}, r"one of grads has shape \[5\].*its parameter's shape = \[4\]"),
        ({"averages": [torch.zeros(2, 3), torch.zeros(4).bfloat16()]}, "one of averages .*bfloat16"),
        ({"exp_avgs": [torch.zeros(3, 2).t(), torch.zeros(4)]}, "one of exp_avgs .*contiguous"),
        ({"grads": [torch.zeros(2, 3), torch.zeros(4).bfloat16()]}, "one of grads .*bfloat16.*expected.*float32"),
        ({"grads": [torch.zeros(2, 3).double(), torch.zeros(4).double()]}, "one of grads .*float64.*expected.*float32"),
        ({"copies": [torch.zeros(2, 3).bfloat16()]}, "1 copies for 2 params"),
        ({"copies": [torch.zeros(2, 3).bfloat16(), torch.zeros(4).half()]}, "one of copies .*float16.*expected.*bfloat16"),
        ({"steps": torch.zeros(3)}, r"steps has shape \[3\]"),
        ({"found_inf": torch.zeros(1)}, r"found_inf has shape \[1\]"),
    ],
)
def test_what_it_does_not_take_is_one_line(change, message):
    given = tensors(torch.device("cpu"), [(2, 3), (4,)]) | change
    with pytest.raises(ValueError, match=message) as error:
        adamw_ema(**given, **SETTINGS)
    assert "\n" not in str(error.value)
