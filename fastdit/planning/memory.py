"""Memory of one rank on paper: states by their sizes, activations from the model's own graph on the meta device.

Nothing is allocated and no GPU is needed. Numbers are bytes unless a name says otherwise.
"""

import math
import weakref
from typing import Any, NamedTuple

import torch
from fastdit_kernels import Ops
from fastdit_kernels.attention import QKV
from fastdit_kernels.cpu import CPU
from fastdit_kernels.reference import REFERENCE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdit.config import Config, ModelConfig, UserError, replace
from fastdit.model import DiT, num_frequencies, out_channels
from fastdit.runtime import sharding
from fastdit.runtime.hardware import compute_dtype, memory_bytes, precision

RESERVED = 2 * 10**9  # for the CUDA context, NCCL's buffers and what the allocator cannot hand out

PROCESS = 10**9  # of a rank on a CPU: PyTorch and its libraries, 0.7 GB before a model is there

# --- activations: the real model on the meta device ---


class Activations(NamedTuple):
    """Bytes of a micro-step beside the weights: what the forward leaves for the backward, and the most alive at once."""

    saved: int
    peak: int


def activations(config: Config, batch: int, ops: Ops | None = None) -> Activations:
    """Forward and backward of the config's model on the meta device, where tensors have sizes and no bytes.

    ops: those the run would use; by default what --kernels and --attention choose on a GPU. Eager: a compiled block saves as
    much or less.
    """
    dtype = compute_dtype(config.parallel.precision)
    ops = (ops or planned_ops(config))._replace(attention=flash_attention)
    m = config.model
    with torch.device("meta"):
        model = DiT(m, ops).to(dtype)
        sharding.checkpoint(model, config.parallel)
        x, t = torch.empty(batch, m.channels, *m.input_size), torch.empty(batch)
        y = torch.empty(batch, dtype=torch.int64) if m.num_classes else None
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
        loss = (model(x, t, y)[:, : m.channels] - x).square().mean()
    kept = sum(storage.nbytes() for storage in saved.values())
    del loss
    saved.clear()
    with Alive() as alive:
        (model(x, t, y)[:, : m.channels] - x).square().mean().backward()
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


# --- memory of one rank ---


def num_parameters(m: ModelConfig) -> int:
    """Parameters of the model, by its widths alone: nothing is built, however large they are."""
    D, F, T = m.width, m.mlp_ratio * m.width, math.prod(side // m.patch for side in m.input_size)
    embed = (m.channels * m.patch**2 + 1) * D + T * D + (num_frequencies(m) + 1) * D + (D + 1) * D
    classes = (m.num_classes + (m.class_dropout > 0)) * D if m.num_classes else 0
    convolution = F * (m.conv_kernel**2 + 1) if m.conv_kernel else 0
    norms = 2 * (D // m.num_heads) if m.qk_norm else 0
    block = (D + 1) * 4 * D + (D + 1) * F + (F + 1) * D + convolution + norms
    modulation = (D + 1) * (6 * m.depth + 2) * D
    return embed + classes + modulation + m.depth * block + (D + 1) * m.patch**2 * out_channels(m)


def check_sampling(config: Config, memory: float) -> None:
    """Raise UserError where one picture takes more than `memory` bytes at the very least: before anything is built."""
    m = config.model
    T = math.prod(side // m.patch for side in m.input_size)
    dtype = 4 if config.parallel.precision == "fp32" else 2
    activations = T * (m.mlp_ratio + 3) * m.width * dtype + 4 * m.channels * math.prod(m.input_size)
    needed = dtype * num_parameters(m) + activations
    if needed > memory:
        raise UserError(
            f"by plan one picture of this model takes {needed / 1e9:,.1f} GB at least, and there are {memory / 1e9:,.1f} GB: "
            f"depth {m.depth:,}, width {m.width:,}, input {m.input_size[0]:,}×{m.input_size[1]:,}, {m.num_classes:,} classes"
        )


class Sizes(NamedTuple):
    """Numbers of parameters. FSDP gathers a block at a time, and as one group what is outside blocks, the root."""

    whole: int
    block: int
    root: int
    shard: int  # of one rank
    trained: int  # of one rank's shard: those that have a gradient


def sizes(config: ModelConfig, ranks: int) -> Sizes:
    """Parameters of the model, sharded over so many ranks: each by its rows, padded to the same number on every rank."""
    with torch.device("meta"):
        model = DiT(config, REFERENCE)
    whole = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.blocks[0].parameters())

    def rows(p: Tensor) -> int:
        return -(-p.shape[0] // ranks) * (p.numel() // p.shape[0])

    shard = sum(rows(p) for p in model.parameters())
    trained = sum(rows(p) for p in model.parameters() if p.requires_grad)
    return Sizes(whole, block, whole - block * config.depth, shard, trained)


def state_bytes(config: Config, ranks: int) -> dict[str, int]:
    """Bytes that one rank holds whatever the batch, by what they are, with the weights sharded over so many ranks."""
    s, p = sizes(config.model, ranks), config.parallel
    itemsize = compute_dtype(p.precision).itemsize
    gathered = min(s.root + 2 * s.block, s.whole) if p.reshard_after_forward else s.whole  # one at work, one on its way
    if ranks == 1:  # no FSDP: a copy in 16 bits; none where the network computes with the parameters themselves
        gathered = s.whole if itemsize < 4 else 0
    held = {
        "parameters": 4 * s.shard,
        "gradients": 4 * s.trained,
        "AdamW moments": 8 * s.trained,
        "EMA": 4 * s.trained,
        "gathered weights": itemsize * gathered,
    }
    if config.train.grad_accum > 1:
        held["whole gradients, accumulated"] = 4 * s.whole
    return held


def batch_bytes(config: Config, batch: int, ops: Ops | None = None) -> dict[str, int]:
    """Bytes that come and go within a step, at the worst moment: early in the backward, or when the last gradients leave."""
    a, s = activations(config, batch, ops), sizes(config.model, 1)
    leaving = (
        4 + compute_dtype(config.parallel.precision).itemsize
    )  # a gradient as computed, and its fp32 copy for the reduction
    early = a.peak + 2 * s.block * leaving
    return {
        "activations": a.saved,
        "backward's own": max(early, s.root * leaving) - a.saved,
    }


def largest_batch(config: Config, ranks: int, memory: float, ops: Ops | None = None) -> int:
    """The most images per rank and micro-step that fit into `memory` bytes with the weights sharded over `ranks`; 0: none."""
    room = memory - RESERVED - sum(state_bytes(config, ranks).values())
    few, many = 8, 64
    low, high = (sum(batch_bytes(config, n, ops).values()) for n in (few, many))
    per_image = (high - low) / (many - few)  # what grows with the batch grows in proportion
    return max(0, int(many + (room - high) / per_image))


def advice(config: Config, ranks: int, memory: float, ops: Ops | None = None) -> str:
    """One line for whoever ran out of memory: the batches that fit by plan, with activations kept and recomputed."""
    kept, again = (largest_batch(recomputing(config, on), ranks, memory, ops) for on in (False, True))
    if not again:
        return f"by plan no batch fits into {memory / 1e9:.0f} GB; shard the weights over more ranks, or take a smaller model"
    with_recompute = f"{again} with --parallel.checkpoint_activations"
    return f"by plan --train.batch {kept} fits, or {with_recompute}" if kept else f"by plan --train.batch {with_recompute} fits"


def check(config: Config, device: torch.device, ranks: int = 1, num_images: int | None = None) -> str | None:
    """One line where a run cannot work on this device, before it starts; None where it can, by plan.

    ranks: processes on this node, over which the weights are sharded; on a CPU they share its memory. num_images: of the data.
    """
    t, m = config.train, config.model
    if num_images is not None and t.batch > num_images:
        return f"--train.batch {t.batch:,} is more than the {num_images:,} images there are; at most --train.batch {num_images}"
    share = memory_bytes() / (1 if device.type == "cuda" else ranks)
    held = 20 * num_parameters(m) / ranks  # fp32 weights, gradients, two moments, average: before a huge model is built
    if held <= share:
        config = replace(config, parallel={"precision": precision(config.parallel.precision, device)})
        ops = None if device.type == "cuda" else CPU
        held = sum(state_bytes(config, ranks).values())
        reserved = RESERVED if device.type == "cuda" else PROCESS
        need = held + sum(batch_bytes(config, t.batch, ops).values()) + reserved
        if need <= share:
            return None
        # A line through two batches, so a little less than all of the memory.
        fits = largest_batch(config, ranks, 0.99 * share + RESERVED - reserved, ops)
        if fits:
            return (
                f"by plan a step takes {need / 1e9:,.1f} GB at --train.batch {t.batch}, and there are {share / 1e9:,.1f} GB: "
                f"--train.batch {fits} fits, or --parallel.checkpoint_activations needs less"
            )
    return (
        f"by plan this model takes {held / 1e9:,.1f} GB to train whatever the batch, and there are {share / 1e9:,.1f} GB: "
        f"depth {m.depth:,}, width {m.width:,}"
    )


def recomputing(config: Config, on: bool) -> Config:
    return replace(config, parallel={"checkpoint_activations": on})
