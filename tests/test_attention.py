"""Attention against fp64, its choice of backend, and the call layout that flash-attn documents."""

import math
import sys
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import ModuleType

import pytest
import torch
from fastdit_kernels.attention import attention, choose_attention, eager, sdpa, sdpa_cudnn_first
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode


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
@pytest.mark.parametrize("backend", ["auto", "sdpa"])
@pytest.mark.parametrize(
    ("capability", "cudnn", "expected"),
    [((8, 0), True, sdpa), ((9, 0), True, sdpa_cudnn_first), ((9, 0), False, sdpa), ((10, 0), True, sdpa)],
)
def test_without_the_package_it_is_pytorchs_own_by_cudnn_on_hopper(monkeypatch, backend, capability, cudnn, expected):
    """But where PyTorch is to be deterministic, for which `--parallel.deterministic` turns cuDNN off."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: cudnn)
    assert choose_attention(backend, torch.device("cuda"), torch.bfloat16, 64, 256) is expected


def test_cudnn_is_asked_first_also_when_compiled():
    """And PyTorch's own order is back afterwards."""
    before, orders = torch._C._get_sdp_priority_order(), []
    qkv = torch.randn(2, 6, 3, 2, 8, requires_grad=True)
    expected = truth(*qkv.unbind(2))

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            orders.append(torch._C._get_sdp_priority_order()[0])
            return func(*args, **(kwargs or {}))

    with Seen():
        sdpa_cudnn_first(qkv)
    assert int(SDPBackend.CUDNN_ATTENTION.value) in orders
    torch._dynamo.reset()
    out = torch.compile(sdpa_cudnn_first, fullgraph=True, backend="aot_eager")(qkv)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch._C._get_sdp_priority_order() == before


def test_flash_attn_4_alone_is_no_flash_attn(monkeypatch, tmp_path):
    """It installs flash_attn/cute into a folder that no other package made, and its call is none that a compiler can trace."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("def flash_attn_func(): ...")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert choose_attention("auto", torch.device("cuda"), torch.bfloat16, 64, 256) is sdpa
    with pytest.raises(ValueError, match="needs the flash-attn package"):
        choose_attention("flash", torch.device("cuda"), torch.bfloat16, 64, 256)


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

    def called(tensors, causal: bool, deterministic: bool) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        assert not causal
        calls.append(("qkvpacked" if len(tensors) == 1 else "func") + ", deterministic" * deterministic)
        if len(tensors) == 3:
            assert {t.ndim for t in tensors} == {4}, "flash-attn takes [B, T, H, K]"
            return result(*tensors)
        assert tensors[0].ndim == 5, "flash-attn's packed call takes [B, T, 3, H, K]"
        assert tensors[0].shape[2] == 3
        return result(*tensors[0].unbind(2))

    def flash_attn_2(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        return called((q, k, v), causal, deterministic)

    def flash_attn_2_packed(
        qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        return called((qkv,), causal, deterministic)

    def flash_attn_3(
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
        return_attn_probs=False,
    ):  # fmt: skip
        return called((q, k, v), causal, deterministic)

    def flash_attn_3_packed(
        qkv, softmax_scale=None, causal=False, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
        attention_chunk=0, softcap=0.0, deterministic=False, num_heads_q=None, sm_margin=0, return_softmax=False,
    ):  # fmt: skip
        return called((qkv,), causal, deterministic)

    third = name == "flash_attn_interface"
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, SourceFileLoader(name, f"{name}/__init__.py"), origin=f"{name}/__init__.py")
    module.flash_attn_func = flash_attn_3 if third else flash_attn_2
    if packed:
        module.flash_attn_qkvpacked_func = flash_attn_3_packed if third else flash_attn_2_packed
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
