"""Memory of one rank on paper: states by their sizes, activations from the model's own graph on the meta device.

Nothing is allocated and no GPU is needed. Numbers are bytes unless a name says otherwise.
"""

import math
import os
from typing import NamedTuple

import torch
from fastdit_kernels import Ops
from fastdit_kernels.cpu import CPU
from fastdit_kernels.reference import REFERENCE
from torch import Tensor

from fastdit.config import Config, ModelConfig, UserError, replace
from fastdit.embeddings import num_frequencies, out_channels
from fastdit.model import DiT
from fastdit.muon import orthogonalised
from fastdit.planning.activations import FEW, MANY, activations
from fastdit.runtime.hardware import compute_dtype, memory_bytes, precision
from fastdit.runtime.ranks import World

RESERVED = 2 * 10**9  # for the CUDA context, NCCL's buffers and what the allocator cannot hand out

PROCESS = 10**9  # of a rank on a CPU: PyTorch and its libraries, 0.7 GB before a model is there


def num_parameters(m: ModelConfig) -> int:
    """Parameters of the model, computed from its widths: nothing is built, so any width may be asked for."""
    D, F, T = m.width, m.mlp_ratio * m.width, m.num_tokens
    embed = (m.channels * m.patch_size + 1) * D + T * D + (1 + m.jumps) * (num_frequencies(m) + 1 + D + 1) * D
    classes = (m.num_classes + (m.class_dropout > 0)) * D if m.num_classes else 0
    classes += (m.condition + 1 + (m.class_dropout > 0)) * D if m.condition else 0
    convolution = F * (m.conv_taps + 1) if m.conv_kernel else 0
    norms = 2 * (D // m.num_heads) if m.qk_norm else 0
    block = (D + 1) * 4 * D + (D + 1) * F + (F + 1) * D + convolution + norms
    modulation = (D + 1) * (6 * m.depth + 2) * D + (2 * D + 1) * D * m.token_drop
    return embed + classes + modulation + m.depth * block + (D + 1) * m.patch_size * out_channels(m)


def check_sampling(config: Config, memory: float) -> None:
    """Raise UserError where one picture takes more than `memory` bytes at the very least: before anything is built."""
    m = config.model
    dtype = 4 if config.parallel.precision == "fp32" else 2
    activations = m.num_tokens * (m.mlp_ratio + 3) * m.width * dtype + 4 * m.channels * math.prod(m.input_size)
    needed = dtype * num_parameters(m) + activations
    if needed > memory:
        raise UserError(
            f"by plan one picture of this model takes {needed / 1e9:,.1f} GB at least, and there are {memory / 1e9:,.1f} GB: "
            f"depth {m.depth:,}, width {m.width:,}, input {'×'.join(f'{side:,}' for side in m.input_size)}, "
            f"{m.num_classes:,} classes"
        )


class Sizes(NamedTuple):
    """Numbers of parameters. FSDP gathers a block at a time, and as one group what is outside blocks, the root."""

    whole: int
    block: int
    root: int
    shard: int  # of one rank
    trained: int  # of one rank's shard: those that have a gradient
    matrices: int  # of one rank's shard: those that Muon updates where it is asked for


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
    matrices = sum(rows(p) for name, p in model.named_parameters() if orthogonalised(name))
    return Sizes(whole, block, whole - block * config.depth, shard, trained, matrices)


def one_pass(config: Config) -> bool:
    """Whether AdamW and the average are our kernel. Post-hoc averages move less often, beside PyTorch's AdamW."""
    return config.kernels != "reference" and config.train.ema != "posthoc"


def narrow_gradients(config: Config, ranks: int) -> bool:
    """Whether the optimizer reads gradients in 16 bits: by our kernel, where nothing is summed over ranks or micro-steps."""
    narrow = compute_dtype(config.parallel.precision).itemsize < 4
    return narrow and ranks == 1 and config.train.grad_accum == 1 and one_pass(config)


def state_bytes(config: Config, ranks: int, on_gpu: bool = True) -> dict[str, int]:
    """Bytes that one rank holds at any batch size, by kind, with the weights sharded over so many ranks."""
    s, p = sizes(config.model, ranks), config.parallel
    itemsize = compute_dtype(p.precision).itemsize
    gathered = min(s.root + 2 * s.block, s.whole) if p.reshard_after_forward else s.whole  # one at work, one on its way
    if ranks == 1:  # no FSDP: a copy in 16 bits; none where the network computes with the parameters themselves
        gathered = s.whole if itemsize < 4 else 0
    held = {
        "parameters": 4 * s.shard,
        "gradients": (itemsize if on_gpu and narrow_gradients(config, ranks) else 4) * s.trained,
        "AdamW moments": 8 * s.trained,
        "EMA": (8 if config.train.ema == "posthoc" else 4) * s.trained,
        "gathered weights": itemsize * gathered,
    }
    if config.train.optimizer == "muon":  # one number for each of the blocks' matrices, where AdamW has two
        held |= {"AdamW moments": 8 * (s.trained - s.matrices), "Muon's momentum": 4 * s.matrices}
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
    room = memory - RESERVED - sum(state_bytes(config, ranks, on_gpu=ops is not CPU).values())
    low, high = (sum(batch_bytes(config, n, ops).values()) for n in (FEW, MANY))
    per_image = (high - low) / (MANY - FEW)  # what grows with the batch grows in proportion
    return max(0, int(MANY + (room - high) / per_image))


def advice(config: Config, ranks: int, memory: float, ops: Ops | None = None) -> str:
    """The batches that fit by plan, with activations kept and recomputed: one line for a user who ran out of memory."""
    kept, again = (largest_batch(recomputing(config, on), ranks, memory, ops) for on in (False, True))
    if not again:
        return f"by plan no batch fits into {memory / 1e9:.0f} GB; shard the weights over more ranks, or take a smaller model"
    with_recompute = f"{again} with --parallel.checkpoint_activations"
    return f"by plan --train.batch {kept} fits, or {with_recompute}" if kept else f"by plan --train.batch {with_recompute} fits"


def check(config: Config, device: torch.device, ranks: int = 1, num_images: int | None = None) -> str | None:
    """Why a run cannot work on this device by plan, in one line; None where it can.

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
        held = sum(state_bytes(config, ranks, device.type == "cuda").values())
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


def require(config: Config, world: World, num_images: int) -> None:
    """Raise UserError where, by plan, the run cannot work on this rank's device."""
    if refusal := check(config, world.device, config.parallel.shard or world.local_size, num_images):
        raise UserError(refusal)


def no_memory(config: Config) -> str:
    """The error line for memory that ran out: it names a batch that fits."""
    t, num_ranks = config.train, config.parallel.shard or int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    half = next((t.batch // n for n in range(2, t.batch) if t.batch % n == 0), 1)
    line = f"out of memory at --train.batch {t.batch}"
    if t.batch > 1:
        line += f"; --train.batch {half} --train.grad_accum {t.grad_accum * t.batch // half} trains the same in less"
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        line += f" ({advice(config, num_ranks, total)})"
    elif not config.parallel.checkpoint_activations:
        line += ", and --parallel.checkpoint_activations needs less too"
    return line
