"""Bytes of a micro-step's activations, from the real model on the meta device: nothing is allocated, no GPU is needed."""

import weakref
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from fastdit_kernels import Ops
from fastdit_kernels.attention import QKV
from fastdit_kernels.reference import REFERENCE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdit.config import Config, ModelConfig, ParallelConfig
from fastdit.model import DiT
from fastdit.runtime import sharding
from fastdit.runtime.hardware import compute_dtype

FEW, MANY = 8, 64  # images of the traces from which larger batches follow


class Activations(NamedTuple):
    """Bytes of a micro-step beside the weights: what the forward leaves for the backward, and the most alive at once."""

    saved: int
    peak: int


def activations(config: Config, batch: int, ops: Ops | None = None) -> Activations:
    """Forward and backward of the config's model on the meta device, where tensors have sizes and no bytes.

    ops: those the run would use; by default what --kernels and --attention choose on a GPU. Eager: a compiled block saves as
    much or less. Beyond MANY images a line through FEW and MANY: on a CPU, ops work in chunks, and a trace takes as long as
    there are chunks.
    """
    ops = ops or planned_ops(config)
    if batch <= MANY:
        return _traced(config.model, config.parallel, batch, ops)
    few, many = (_traced(config.model, config.parallel, n, ops) for n in (FEW, MANY))
    growth = (batch - MANY) / (MANY - FEW)
    return Activations(*(round(b + growth * (b - a)) for a, b in zip(few, many, strict=True)))


@lru_cache(maxsize=16)
def _traced(m: ModelConfig, parallel: ParallelConfig, batch: int, ops: Ops) -> Activations:
    ops = ops._replace(attention=flash_attention)
    with torch.device("meta"):
        model = DiT(m, ops).to(compute_dtype(parallel.precision))
        sharding.checkpoint(model, parallel)
        x, t = torch.empty(batch, m.channels, *m.input_size), torch.empty(batch)
        y = torch.empty(batch, dtype=torch.int64) if m.num_classes else None
        given = {"condition": torch.empty(batch, m.condition)} if m.condition else {}
    weights = {_key(p) for p in model.parameters()}
    for p in model.parameters():  # a gradient leaves as soon as it is reduced
        if p.requires_grad:  # a fixed position embedding has no gradient
            p.register_post_accumulate_grad_hook(_forget)
    saved: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _key(tensor) not in weights:
            saved[_key(tensor)] = tensor.untyped_storage()  # kept: a freed one's key may come again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = (model(x, t, y, **given)[:, : m.channels] - x).square().mean()
    kept = sum(storage.nbytes() for storage in saved.values())
    del loss
    saved.clear()
    with Alive() as alive:
        (model(x, t, y, **given)[:, : m.channels] - x).square().mean().backward()
    return Activations(kept, max(alive.peak, kept))


def planned_ops(config: Config) -> Ops:
    """The kernels of a GPU, as --kernels chooses them; the reference where Triton is not to be had."""
    if config.kernels == "reference":
        return REFERENCE
    try:
        from fastdit_kernels.triton_ops import TRITON
    except ImportError:
        return REFERENCE
    return TRITON


class Alive(TorchDispatchMode):
    """Counts the bytes of storages that ops make and that are still referenced: `now`, and `peak`, the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (key := _key(tensor)) not in self.seen | given:
                storage = tensor.untyped_storage()
                self.seen.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        return out

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        B, T, H, _ = q.shape
        ctx.save_for_backward(q, k, v, out, q.new_empty(B, H, T, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in ctx.saved_tensors[:3])


def flash_attention(qkv: QKV) -> Tensor:
    """What any fused attention keeps (arXiv 2205.14135, algorithm 1): q, k, v, its output and a log-sum-exp per row.

    On the meta device PyTorch would choose its unfused path, which keeps [B, H, T, T].
    """
    q, k, v = qkv.unbind(2) if isinstance(qkv, Tensor) else qkv
    out: Tensor = _Flash.apply(q, k, v)
    return out.flatten(2)
