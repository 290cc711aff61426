"""Bidirectional attention on the layout the qkv projection writes, so that no transpose or copy precedes it.

At T = 256 attention is about 5 % of a DiT's FLOPs; the backends differ in layout and launch cost more than in arithmetic.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Backend = Literal["auto", "eager", "sdpa", "flash"]
QKV = Tensor | tuple[Tensor, Tensor, Tensor]

FLASH_DTYPES = (torch.float16, torch.bfloat16)
FLASH_MAX_HEAD_DIM = 256
EAGER_MAX_TOKENS = 512  # the weights of all pairs outgrow the cache: at 1,024 PyTorch's own takes 0.8 of the time
# flash-attn 3 (Hopper only) installs its own top-level module beside flash-attn 2's (sm_80 and later). Both are ops that a
# compiler can trace, with a call for packed tensors. flash-attn 4 is neither, and is not used: it installs flash_attn.cute,
# alone or into flash-attn 2's package.
FLASH_MODULES = {"flash_attn_interface": (9, 9), "flash_attn": (8, 99)}
# PyTorch asks its own flash-attention first, which is flash-attn 2's, written for Ampere. cuDNN's is written for Hopper.
HOPPER = 9
CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def _flash_module(device: torch.device) -> ModuleType | None:
    """The newest installed flash-attn that runs on this device, or None. A CPU tensor gets whichever is installed."""
    for name, (lowest, highest) in FLASH_MODULES.items():
        found = importlib.util.find_spec(name)
        if found is None or found.loader is None or found.origin is None:  # there is none, or a folder without code of its own
            continue
        major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else highest
        if lowest <= major <= highest:
            return importlib.import_module(name)
    return None


def choose_attention(
    backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int, num_tokens: int
) -> Callable[[QKV], Tensor]:
    """Settle the backend once, before compilation: nothing is imported or probed inside the traced function.

    `auto` takes flash-attn where it is installed and device, dtype and head_dim allow; on a CPU, in 16 bits, `eager` up to
    512 tokens; else PyTorch's scaled_dot_product_attention, on Hopper by cuDNN where it can. Raises ValueError for `flash`
    without flash-attn.
    """
    if backend == "eager" or (
        backend == "auto" and device.type == "cpu" and dtype in FLASH_DTYPES and num_tokens <= EAGER_MAX_TOKENS
    ):
        return eager
    # Where PyTorch is to be deterministic, cuDNN is left out, and what is left is in PyTorch's own order.
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == HOPPER
    pytorchs = sdpa_cudnn_first if hopper and torch.backends.cuda.cudnn_sdp_enabled() else sdpa
    if backend == "sdpa":
        return pytorchs
    fits = device.type == "cuda" and dtype in FLASH_DTYPES and head_dim <= FLASH_MAX_HEAD_DIM
    module = _flash_module(device) if backend == "flash" or fits else None
    if module is not None:
        # Its backward adds atomically, in whatever order, unless it is told not to.
        options = {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}
        return partial(_flash, module=module, options=options)
    if backend == "flash":
        raise ValueError("attention backend 'flash' needs the flash-attn package: pip install 'fastdit[flash]'")
    return pytorchs


def attention(qkv: QKV, backend: Backend = "auto") -> Tensor:
    """softmax(q kᵀ / √K) v for every head, no mask.

    qkv: packed [B, T, 3, H, K], or three tensors [B, T, H, K] (where QK-norm has made a new q and k).
    Returns [B, T, H·K], contiguous. Raises ValueError for any other shape, or for `flash` without flash-attn.
    """
    x = qkv if isinstance(qkv, Tensor) else qkv[0]
    if isinstance(qkv, Tensor) and (x.ndim != 5 or x.shape[2] != 3):
        raise ValueError(f"attention: qkv has shape {tuple(x.shape)}, expected [B, T, 3, H, K]")
    return choose_attention(backend, x.device, x.dtype, x.shape[-1], x.shape[1])(qkv)


def eager(qkv: QKV) -> Tensor:
    """Batched products and a softmax. On a CPU with bf16 instructions its forward and backward take 0.22 of the time of
    PyTorch's own attention at T = 256, K = 64, and 0.05 at T = 64; its weights are rounded to the stream's dtype in between.
    """
    return _Eager.apply(qkv if isinstance(qkv, Tensor) else torch.stack(qkv, 2))


class _Eager(torch.autograd.Function):
    """Each product reads and writes whole matrices [T, K] or [T, T], after one copy of q, k and v, and before one of out."""

    @staticmethod
    def forward(ctx, qkv):
        B, T, _, H, K = qkv.shape
        q, k, v = qkv.permute(2, 0, 3, 1, 4).reshape(3, B * H, T, K).unbind(0)
        # beta = 0: the zero is not read, and alpha costs no pass of its own.
        weights = torch.baddbmm(q.new_zeros(()), q, k.transpose(1, 2), beta=0, alpha=K**-0.5).softmax(-1)
        ctx.save_for_backward(q, k, v, weights)
        ctx.shape = B, H, T, K
        return (weights @ v).view(ctx.shape).transpose(1, 2).flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, weights = ctx.saved_tensors
        B, H, T, K = ctx.shape
        dout = dout.view(B, T, H, K).transpose(1, 2).reshape(B * H, T, K)
        dv = weights.transpose(1, 2) @ dout
        dscores = torch._softmax_backward_data(dout @ v.transpose(1, 2), weights, -1, weights.dtype)
        zero = q.new_zeros(())
        dq = torch.baddbmm(zero, dscores, k, beta=0, alpha=K**-0.5)
        dk = torch.baddbmm(zero, dscores.transpose(1, 2), q, beta=0, alpha=K**-0.5)
        return torch.stack([d.view(ctx.shape).transpose(1, 2) for d in (dq, dk, dv)], 2)  # [B, T, 3, H, K]


def sdpa(qkv: QKV) -> Tensor:
    """PyTorch's own attention: on a GPU it dispatches to the same algorithm as flash-attn."""
    q, k, v = (t.transpose(1, 2) for t in (qkv.unbind(2) if isinstance(qkv, Tensor) else qkv))  # [B, H, T, K]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def sdpa_cudnn_first(qkv: QKV) -> Tensor:
    """`sdpa` by cuDNN where it takes these sizes, else by the next backend that does."""
    with sdpa_kernel(CUDNN_FIRST, set_priority=True):
        return sdpa(qkv)


def masked(qkv: QKV, valid: Tensor) -> Tensor:
    """Attention to the tokens that valid, bool [B, T], says, of which each sample has one at least: PyTorch's own.

    flash-attn takes no mask, and its varlen form takes packed tokens: their number would differ from batch to batch.
    """
    q, k, v = (t.transpose(1, 2) for t in (qkv.unbind(2) if isinstance(qkv, Tensor) else qkv))  # [B, H, T, K]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None]).transpose(1, 2).flatten(2)


def _flash(qkv: QKV, module: ModuleType, options: dict[str, bool]) -> Tensor:
    packed = getattr(module, "flash_attn_qkvpacked_func", None)
    if isinstance(qkv, Tensor) and packed is not None:
        out = packed(qkv, **options)  # its backward writes one dqkv, where three gradients would be stacked by a copy
    else:
        out = module.flash_attn_func(*(qkv.unbind(2) if isinstance(qkv, Tensor) else qkv), **options)
    # Some releases of flash-attn 3 return (out, softmax_lse).
    return (out[0] if isinstance(out, tuple) else out).flatten(2)
