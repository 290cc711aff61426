"""Attention against fp64, its choice of backend, and the call layout that flash-attn documents."""

import math
import sys
from types import ModuleType

import pytest
import torch
from fastdit_kernels.attention import attention, choose_attention, eager, sdpa


def truth(q, k, v):
    """softmax(q kᵀ / √K) v in fp64, [B, T, H, K] → [B, T, H·K]."""
    q, k, v = (x.double() for x in (q, k, v))
    weights = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhts,bshk->bthk", weights.softmax(-1), v).flatten(2)


@pytest.mark.parametrize("shape", [(2, 16, 3, 3, 16), (1, 7, 3, 1, 5), (3, 64, 3, 2, 72)], ids=str)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_attention_and_its_gradient_equal_fp64(shape, packed, backend):
    qkv = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours = qkv.clone().requires_grad_()
    exact = qkv.double().requires_grad_()
    out = attention(ours if packed else ours.unbind(2), backend=backend)
    expected = truth(*exact.unbind(2))
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(out.shape)
    out.backward(upstream)
    expected.backward(upstream.double())
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 16, 48), (2, 16, 2, 3, 16), (2, 3, 16, 3, 16)], ids=str)
def test_another_shape_is_refused_by_name(shape):
    with pytest.raises(ValueError, match=r"qkv has shape .*expected \[B, T, 3, H, K\]"):
        attention(torch.randn(shape))


@pytest.fixture
def without_flash(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)


@pytest.mark.usefixtures("without_flash")
def test_flash_without_the_package_says_how_to_install_it():
    with pytest.raises(ValueError, match=r"pip install 'fastdit\[flash\]'") as error:
        attention(torch.randn(1, 4, 3, 1, 8), backend="flash")
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("without_flash")
def test_auto_without_the_package_is_sdpa():
    assert choose_attention("auto", torch.device("cuda"), torch.bfloat16, 64, 256) is sdpa


def test_auto_on_a_cpu_is_what_is_fastest_there():
    cpu = torch.device("cpu")
    assert choose_attention("auto", cpu, torch.bfloat16, 64, 256) is eager
    assert choose_attention("auto", cpu, torch.bfloat16, 64, 4096) is sdpa, "all pairs of 4,096 tokens would not fit"
    assert choose_attention("auto", cpu, torch.float32, 64, 256) is sdpa


def stand_in(name: str, monkeypatch, packed: bool, tuples: bool) -> list[str]:
    """A module with flash-attn's documented signatures, exact inside, that records which call was made."""
    calls: list[str] = []

    def result(q, k, v):
        out = truth(q, k, v).view(q.shape).to(q.dtype)
        return (out, torch.zeros(1)) if tuples else out

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        assert q.ndim == k.ndim == v.ndim == 4, "flash-attn takes [B, T, H, K]"
        assert not causal
        calls.append("func" + ", deterministic" * deterministic)
        return result(q, k, v)

    def flash_attn_qkvpacked_func(
        qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        assert qkv.ndim == 5, "flash-attn's packed call takes [B, T, 3, H, K]"
        assert qkv.shape[2] == 3
        assert not causal
        calls.append("qkvpacked" + ", deterministic" * deterministic)
        return result(*qkv.unbind(2))

    module = ModuleType(name)
    module.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec(name, None)
    module.flash_attn_func = flash_attn_func
    if packed:
        module.flash_attn_qkvpacked_func = flash_attn_qkvpacked_func
    monkeypatch.setitem(sys.modules, name, module)
    return calls


@pytest.mark.parametrize(
    ("name", "packed", "tuples", "expected"),
    [
        ("flash_attn", True, False, "qkvpacked"),
        ("flash_attn_interface", True, False, "qkvpacked"),
        ("flash_attn_interface", False, True, "func"),
    ],
)
def test_flash_is_called_in_its_documented_layout(monkeypatch, name, packed, tuples, expected):
    calls = stand_in(name, monkeypatch, packed, tuples)
    qkv = torch.randn(2, 6, 3, 2, 8)
    out = attention(qkv, backend="flash")
    assert calls == [expected]
    torch.testing.assert_close(out.double(), truth(*qkv.unbind(2)), rtol=1e-5, atol=1e-6)
    attention(qkv.unbind(2), backend="flash")
    assert calls == [expected, "func"], "separate q, k, v (QK-norm) take the unpacked call"


def test_flash_is_told_to_be_deterministic(monkeypatch):
    calls = stand_in("flash_attn", monkeypatch, packed=True, tuples=False)
    qkv = torch.randn(2, 6, 3, 2, 8)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    attention(qkv, backend="flash")
    attention(qkv.unbind(2), backend="flash")
    assert calls == ["qkvpacked, deterministic", "func, deterministic"]


def test_auto_never_takes_flash_on_a_cpu(monkeypatch):
    calls = stand_in("flash_attn", monkeypatch, packed=True, tuples=False)
    attention(torch.randn(1, 4, 3, 1, 8), backend="auto")
    assert calls == []


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "taken"),
    [
        (torch.bfloat16, 64, (8, 0), True),
        (torch.float16, 256, (8, 9), True),
        (torch.float32, 64, (8, 0), False),
        (torch.bfloat16, 288, (8, 0), False),
        (torch.bfloat16, 64, (7, 5), False),
    ],
)
def test_auto_takes_flash_where_device_dtype_and_head_size_allow(monkeypatch, dtype, head_dim, capability, taken):
    stand_in("flash_attn", monkeypatch, packed=True, tuples=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    chosen = choose_attention("auto", torch.device("cuda", 0), dtype, head_dim, 256)
    assert (getattr(chosen, "keywords", {}).get("module") is sys.modules["flash_attn"]) == taken


def test_hoppers_own_module_is_preferred_there_and_only_there(monkeypatch):
    for name in ("flash_attn", "flash_attn_interface"):
        stand_in(name, monkeypatch, packed=True, tuples=False)
    for capability, expected in (((9, 0), "flash_attn_interface"), ((8, 0), "flash_attn"), ((10, 0), "flash_attn")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, c=capability: c)
        chosen = choose_attention("auto", torch.device("cuda", 0), torch.bfloat16, 64, 256)
        assert chosen.keywords["module"].__name__ == expected
