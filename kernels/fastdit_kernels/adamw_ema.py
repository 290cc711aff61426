"""AdamW and the averaged weights, every tensor of a model in one launch: 36 bytes per parameter in fp32 and with 16-bit copies.

With g the gradient divided by grad_scale, k the step's number and c = 1 - βᵏ (arXiv 1711.05101, algorithm 2),

    m ← m + (1-β₁)(g - m)     v ← β₂·v + (1-β₂)·g²     p ← p - lr·(λ·p + (m/c₁) / (√(v/c₂) + ε))     e ← e + w·(p - e)

A program owns BLOCK consecutive numbers of one tensor: it reads p, g, m, v and e, and writes p, m, v and e. Bound by memory.
PyTorch's fused AdamW and a fused average behind it move 44 bytes: the one also writes the scaled gradient back, the other reads
the parameter again. Where a network computes on 16-bit copies of its parameters, g may have their type, and p is written to
them too: 2 bytes less and 2 more, and passes that would cast the one (6 bytes) and the other (6) are gone.

A program finds its tensor in a table of addresses, made anew each time, since gradients move. Where found_inf is not 0 every
access is masked away, and all stay as they are to the bit.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit_kernels.checks import require
from fastdit_kernels.launch import Launch, run
from fastdit_kernels.reference import log

__all__ = ["adamw_ema"]

BLOCK, NUM_WARPS = 1024, 4  # a thread has eight numbers of each tensor: two 128-bit accesses, or one in 16 bits
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def correction(step, log_beta):
    """1 - βᵏ = -expm1(k·ln β), which the subtraction itself would leave with three digits at β = 0.999."""
    x = step * log_beta
    series = -x * (1.0 + x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120)))))
    return tl.where(x > -0.1, series, 1.0 - tl.exp(x))


@triton.jit
def adamw_ema_kernel(
    p_table,  # [6, N] int64, or 7 with copies: addresses of p, g, m, v and e; sizes; addresses of the copies
    p_programs,  # [programs, 2] int32: which tensor, and which block of it
    p_decays,  # [N]
    p_steps,  # [N]
    p_grad_scale,  # []
    p_found_inf,  # []
    p_lr,  # []
    p_weight,  # []
    N,
    beta2,
    rest1,  # 1 - β₁
    rest2,  # 1 - β₂
    log_beta1,
    log_beta2,
    eps,
    GRAD: tl.constexpr,  # the gradients' type
    COPY: tl.constexpr,  # the copies' type, or None
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    i_t, i_b = tl.load(p_programs + 2 * i), tl.load(p_programs + 2 * i + 1).to(tl.int64)
    p_row = p_table + i_t  # a column of the table
    p_p = tl.load(p_row).to(tl.pointer_type(tl.float32))
    p_g = tl.load(p_row + N).to(tl.pointer_type(GRAD))
    p_m = tl.load(p_row + 2 * N).to(tl.pointer_type(tl.float32))
    p_v = tl.load(p_row + 3 * N).to(tl.pointer_type(tl.float32))
    p_e = tl.load(p_row + 4 * N).to(tl.pointer_type(tl.float32))
    size = tl.where(tl.load(p_found_inf) == 0, tl.load(p_row + 5 * N), 0)
    if ALIGNED:  # or the compiler would access 32 bits at a time
        p_p, p_g, p_m = tl.multiple_of(p_p, 16), tl.multiple_of(p_g, 16), tl.multiple_of(p_m, 16)
        p_v, p_e, size = tl.multiple_of(p_v, 16), tl.multiple_of(p_e, 16), tl.multiple_of(size, 8)
    o = i_b * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    lr, weight = tl.load(p_lr), tl.load(p_weight)

    b_g = tl.div_rn(tl.load(p_g + o, mask=m, other=0.0).to(tl.float32), tl.load(p_grad_scale))
    b_m = tl.load(p_m + o, mask=m, other=0.0)
    b_m += rest1 * (b_g - b_m)
    b_v = beta2 * tl.load(p_v + o, mask=m, other=0.0) + rest2 * b_g * b_g
    step = tl.load(p_steps + i_t)
    mhat = tl.div_rn(b_m, correction(step, log_beta1))
    vhat = tl.div_rn(b_v, correction(step, log_beta2))
    b_p = tl.load(p_p + o, mask=m, other=0.0)
    b_p -= lr * (tl.load(p_decays + i_t) * b_p + tl.div_rn(mhat, tl.sqrt_rn(vhat) + eps))
    b_e = tl.load(p_e + o, mask=m, other=0.0)
    b_e += weight * (b_p - b_e)
    tl.store(p_m + o, b_m, mask=m)
    tl.store(p_v + o, b_v, mask=m)
    tl.store(p_p + o, b_p, mask=m)
    tl.store(p_e + o, b_e, mask=m)
    if COPY is not None:
        p_copy = tl.load(p_row + 6 * N).to(tl.pointer_type(COPY))
        if ALIGNED:
            p_copy = tl.multiple_of(p_copy, 16)
        tl.store(p_copy + o, b_p.to(COPY), mask=m)


@lru_cache(maxsize=8)  # a run has one, or two where some tensors are not aligned
def programs(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Which tensor of these sizes, and which block of it, each program owns: int32 [programs, 2]."""
    blocks = torch.tensor([triton.cdiv(size, BLOCK) for size in sizes])
    tensor = torch.repeat_interleave(blocks)
    block = torch.arange(len(tensor)) - (blocks.cumsum(0) - blocks)[tensor]
    return torch.stack([tensor, block], 1).to(device, torch.int32)


def addresses(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor],
    copies: Sequence[Tensor] = (),
) -> Tensor:
    """The kernel's table, on the CPU: where each parameter, gradient, moment, average and copy begins, and its size."""
    rows = [[t.data_ptr() for t in tensors] for tensors in (params, grads, exp_avgs, exp_avg_sqs, averages)]
    rows += [[p.numel() for p in params], *([[t.data_ptr() for t in copies]] if copies else [])]
    return torch.tensor(rows)


def update(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor], copies: Sequence[Tensor], decays: Tensor, steps: Tensor, grad_scale: Tensor,
    found_inf: Tensor, lr: Tensor, weight: Tensor, table: Tensor | None, beta1: float, beta2: float, eps: float, launch: Launch,
) -> None:  # fmt: skip
    device, groups = steps.device, [params, grads, exp_avgs, exp_avg_sqs, averages, *([copies] if copies else [])]
    sizes = [p.numel() for p in params]
    rows = zip(sizes, *([t.data_ptr() for t in group] for group in groups), strict=True)
    aligned = [n % 8 == 0 and not any(start % 16 for start in starts) for n, *starts in rows]
    if table is None:
        # The caching host allocator keeps a pinned block until the copy out of it is done.
        made = addresses(params, grads, exp_avgs, exp_avg_sqs, averages, copies)
        table = (made.pin_memory() if device.type == "cuda" else made).to(device, non_blocking=True)
    for wanted in (True, False):
        owned = programs(tuple(n * (flag == wanted) for n, flag in zip(sizes, aligned, strict=True)), device)
        if len(owned):
            launch(
                adamw_ema_kernel, (len(owned),), NUM_WARPS, p_table=table, p_programs=owned, p_decays=decays, p_steps=steps,
                p_grad_scale=grad_scale, p_found_inf=found_inf, p_lr=lr, p_weight=weight, N=len(sizes), beta2=beta2,
                rest1=1 - beta1, rest2=1 - beta2, log_beta1=log(beta1), log_beta2=log(beta2), eps=eps,
                GRAD=TYPES[grads[0].dtype], COPY=TYPES[copies[0].dtype] if copies else None, ALIGNED=wanted, BLOCK=BLOCK,
            )  # fmt: skip


def traffic(sizes: Sequence[int], grad: int = 4, copy: int = 0) -> int:
    """Bytes of one update of tensors of these sizes, every address once: numbers, and the table and the list of programs.

    grad and copy: bytes of a gradient's number and of a copy's, 0 where there are none.
    """
    columns = 8 * (7 if copy else 6) + 2 * 4
    return (32 + grad + copy) * sum(sizes) + columns * len(sizes) + 8 * sum(triton.cdiv(n, BLOCK) for n in sizes) + 16


@torch.library.custom_op("fastdit::adamw_ema", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "averages", "copies"))
def _op(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor], copies: Sequence[Tensor], decays: Tensor, steps: Tensor, grad_scale: Tensor,
    found_inf: Tensor, lr: Tensor, weight: Tensor, table: Tensor | None, beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    update(
        params, grads, exp_avgs, exp_avg_sqs, averages, copies, decays, steps, grad_scale, found_inf, lr, weight, table, beta1,
        beta2, eps, run,
    )  # fmt: skip


@_op.register_fake
def _(*args) -> None:
    pass


def adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor],
    decays: Tensor,
    steps: Tensor,
    grad_scale: Tensor,
    found_inf: Tensor,
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight: float | Tensor,
    table: Tensor | None = None,
    copies: Sequence[Tensor] = (),
) -> None:
    """One step of AdamW (arXiv 1711.05101), and of an exponential average of what it makes, on N tensors in place.

    params, grads, exp_avgs, exp_avg_sqs and averages: N tensors each, of one shape down the lists, contiguous; copies: as many,
    which become the new parameters, rounded, or none. decays [N]: each one's weight decay; steps [N]: its steps, this one
    counted. grad_scale []: gradients are divided by it, and stay as they are. found_inf []: where it is not 0, nothing changes.
    weight: how far the averages move towards the new parameters. All are on one device and fp32, but gradients and copies may
    be bf16 or fp16, each list of one type. Raises ValueError for anything else.

    lr and weight may be tensors [] on the device, and table `addresses` of the six lists there: a CUDA graph then holds nothing
    of the host's.
    """
    device, N = steps.device, len(params)
    groups = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "averages": averages}
    for name, tensors in [*groups.items(), *([("copies", copies)] if copies else [])]:
        if len(tensors) != N:
            raise ValueError(f"adamw_ema: {len(tensors)} {name} for {N} params")
        dtypes: tuple[torch.dtype, ...] = (torch.float32,)
        if N and name in ("grads", "copies") and tensors[0].dtype in TYPES:
            dtypes = (tensors[0].dtype,)
        for t, p in zip(tensors, params, strict=True):
            if t.shape != p.shape or t.dtype not in dtypes or t.device != device or not t.is_contiguous():
                require("adamw_ema", f"one of {name}", t, "its parameter's shape", p.shape, dtypes, device)
    for name, t in {"decays": decays, "steps": steps}.items():
        require("adamw_ema", name, t, "[N]", (N,), (torch.float32,), device)
    lr, weight = (v if isinstance(v, Tensor) else torch.full((), v, device=device) for v in (lr, weight))
    for name, t in {"grad_scale": grad_scale, "found_inf": found_inf, "lr": lr, "weight": weight}.items():
        require("adamw_ema", name, t, "[]", (), (torch.float32,), device)
    if table is not None:
        rows = 7 if copies else 6
        require("adamw_ema", "table", table, f"[{rows}, N]", (rows, N), (torch.int64,), device)
    if N:
        _op(*groups.values(), list(copies), decays, steps, grad_scale, found_inf, lr, weight, table, beta1, beta2, eps)
