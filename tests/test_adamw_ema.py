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
SETTINGS = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight": 0.02}


def tensors(device, sizes=SIZES, offset: int = 0, step: float = 5) -> dict:
    """All that one call takes. offset: numbers before each gradient in its allocation, as in FSDP's one buffer."""
    rng = torch.Generator().manual_seed(0)

    def some(scale: float = 1.0) -> list[torch.Tensor]:
        return [(torch.randn(size, generator=rng) * scale).to(device) for size in sizes]

    found = {name: some(1e-2 if name == "exp_avgs" else 1) for name in LISTS}
    found["exp_avg_sqs"] = [v.square() * 1e-4 for v in found["exp_avg_sqs"]]
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
    return [t.view(torch.int32).clone() for name in LISTS for t in given[name]]


@pytest.mark.parametrize(
    ("step", "offset", "beta2"), [*itertools.product([1, 5, 200, 100_000], [0, 1, 4], [0.999]), (1, 0, 0.0), (7, 0, 0.95)]
)
def test_at_most_as_wrong_as_pytorch(device, step, offset, beta2):
    """Each tensor's relative error to fp64, of both, on the same numbers; 1e-7 is a unit in the last place."""
    given, settings = tensors(device, offset=offset, step=step), SETTINGS | {"beta2": beta2}
    truth, eager = cast(given, torch.float64), cast(given, torch.float32)
    grads = [g.clone() for g in given["grads"]]
    reference.adamw_ema(**truth, **settings)
    pytorch(eager, **settings)
    adamw_ema(**given, **settings)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "averages"):
        for ours, theirs, exact in zip(given[name], eager[name], truth[name], strict=True):
            if exact.numel():
                mistake = [float((t.double() - exact).norm() / exact.norm()) for t in (ours, theirs)]
                assert mistake[0] <= max(1.1 * mistake[1], 1e-7), (name, tuple(exact.shape), mistake)
    assert all(torch.equal(a, b) for a, b in zip(given["grads"], grads, strict=True))


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


def test_found_inf_changes_nothing(device):
    given = tensors(device)
    for t in given["averages"]:
        t.fill_(-0.0)
    given["grads"][1].fill_(torch.nan)
    given["found_inf"].fill_(1)
    before = bits(given)
    adamw_ema(**given, **SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(before, bits(given), strict=True))


def test_neighbours_are_neither_read_nor_written(device, embedded):
    given = tensors(device)
    expected = cast(given, torch.float32)
    adamw_ema(**expected, **SETTINGS)
    inside = {k: [embedded(t) for t in v] if isinstance(v, list) else v for k, v in given.items()}
    adamw_ema(**inside, **SETTINGS)
    for name in LISTS:
        for t, e in zip(inside[name], expected[name], strict=True):
            torch.testing.assert_close(t, e, rtol=2e-7, atol=0)
            around = t.as_strided((t.storage_offset(),), (1,), 0)
            assert around.isnan().all()
            assert t.as_strided((4096,), (1,), t.storage_offset() + t.numel()).isnan().all()


def test_two_runs_are_bit_equal(device):
    a, b = tensors(device), tensors(device)
    adamw_ema(**a, **SETTINGS)
    adamw_ema(**b, **SETTINGS)
    assert all(torch.equal(x, y) for x, y in zip(bits(a), bits(b), strict=True))


def test_bytes_by_address_are_the_stated_ones(device, recording):
    sizes = [(BLOCK,), (3, BLOCK), (8, 12)]
    given = tensors(device, sizes)
    with recording() as recorder:
        adamw_ema(**given, **SETTINGS)
    assert recorder.traffic().memory == traffic([t.numel() for t in given["params"]])
    assert traffic([768 * 3072]) == pytest.approx(36 * 768 * 3072, rel=1e-3)


def test_opcheck(device):
    given = tensors(device, [(3,), (BLOCK + 1,)])
    op = torch.ops.fastdit.adamw_ema.default
    lists = [given[name] for name in LISTS]
    rest = [given[name] for name in ("decays", "steps", "grad_scale", "found_inf")]
    lr, weight = torch.tensor(3e-3, device=device), torch.tensor(0.02, device=device)
    for table in (None, addresses(*lists).to(device)):
        torch.library.opcheck(op, (*lists, *rest, lr, weight, table, 0.9, 0.999, 1e-8), test_utils="test_schema")
    torch.library.opcheck(op, (*lists, *rest, lr, weight, None, 0.9, 0.999, 1e-8))


def test_what_changes_between_steps_may_stand_on_the_device(device):
    """The learning rate, the averages' weight and the table of addresses: a graph replays the launch with new ones."""
    given, same = tensors(device), tensors(device)
    adamw_ema(**given, **SETTINGS)
    scalars = {name: torch.tensor(SETTINGS[name], device=device) for name in ("lr", "weight")}
    adamw_ema(**same, **SETTINGS | scalars, table=addresses(*(same[name] for name in LISTS)).to(device))
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
        ({"steps": torch.zeros(3)}, r"steps has shape \[3\]"),
        ({"found_inf": torch.zeros(1)}, r"found_inf has shape \[1\]"),
    ],
)
def test_what_it_does_not_take_is_one_line(change, message):
    given = tensors(torch.device("cpu"), [(2, 3), (4,)]) | change
    with pytest.raises(ValueError, match=message) as error:
        adamw_ema(**given, **SETTINGS)
    assert "\n" not in str(error.value)
