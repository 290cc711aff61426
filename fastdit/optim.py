"""AdamW, the learning rate, the non-finite guard and the averaged weights (EMA), all on local shards and without a host sync.

Every rank updates its own shard. The only message is the global gradient norm, one number per step; through it all ranks see a
NaN on any rank and skip the step. `optimizer.found_inf` is a number on the device that the fused kernels read: where it is 1,
they leave parameters, moments, step counts and averages unchanged, to the bit.
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim.adamw import adamw

from fastdit.config import TrainConfig
from fastdit.ema import EMA, PostHoc
from fastdit.muon import Muon, orthogonalised
from fastdit.runtime import graph
from fastdit.runtime.sharding import collect_gradients, local, main_param, named_parameters, named_shards, refresh
from fastdit.spikes import Spikes

BETA1, EPS = 0.9, 1e-8


# --- AdamW ---


class ShardAdamW(torch.optim.AdamW):
    """torch.optim.AdamW, fused, stepping on local shards: going through DTensor costs 9 ms per 200 parameters, this 0.6 ms.

    The state exists from the start; `get_state_dict` on a fresh optimizer would take a step to create it. `clip_and_check` sets
    `grad_scale` (gradients are divided by it) and `found_inf` (1: change nothing) before each step. `skips` counts skipped
    steps on the device: all of them, and those in a row up to now.
    """

    def __init__(self, model: nn.Module, config: TrainConfig):
        self.named = {n: p for n, p in named_shards(model).items() if config.optimizer == "adamw" or not orthogonalised(n)}
        pulled = {name: decays(model, name) for name in self.named}
        groups = [
            {"params": [p for n, p in self.named.items() if pulled[n]], "weight_decay": config.weight_decay},
            {"params": [p for n, p in self.named.items() if not pulled[n]], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        super().__init__(groups, lr=config.lr, betas=(BETA1, config.beta2), eps=EPS, fused=True)
        device = next(iter(self.named.values())).device
        self.grad_scale = torch.ones((), device=device)
        self.found_inf = torch.zeros((), device=device)
        self.skips = torch.zeros(2, device=device)
        self.steps = torch.zeros(len(self.named), device=device)
        self.decays = torch.tensor([config.weight_decay * pulled[name] for name in self.named], device=device)
        for p, step in zip(self.named.values(), self.steps, strict=True):
            self.state[p]["step"] = step
            self.state[p]["exp_avg"] = torch.zeros_like(p, requires_grad=False)
            self.state[p]["exp_avg_sq"] = torch.zeros_like(p, requires_grad=False)

    @torch.no_grad()
    def step(self, lr: Tensor) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and local(p).numel()]
            state = [self.state[p] for p in params]
            adamw(
                [local(p) for p in params],
                [local(p.grad) for p in params],
                [local(s["exp_avg"]) for s in state],
                [local(s["exp_avg_sq"]) for s in state],
                [],
                [s["step"] for s in state],
                fused=True,
                grad_scale=self.grad_scale,
                found_inf=self.found_inf,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=lr,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            # A rank with nothing of a parameter still counts its steps: the counts are saved once, for all ranks.
            others = [self.state[p]["step"] for p in group["params"] if p.grad is not None and not local(p).numel()]
            if others:
                torch._foreach_add_(others, 1 - self.found_inf)


def decays(model: nn.Module, name: str) -> bool:
    """Whether weight decay pulls on this parameter: only on weights that multiply activations (matrices and convolutions).

    Not on biases and gains, which set an offset or a scale. Not on the class and position tables: their rows are looked up, and
    decay would shrink the row of a class that a batch does not contain.
    """
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    return leaf == "weight" and module.get_parameter(leaf).ndim >= 2 and not isinstance(module, nn.Embedding)


def lr_at(images_seen: int, config: TrainConfig) -> float:
    """The learning rate at so many images seen. Count a step's own images in, so that the first step's rate is not 0.

    Linear from 0 over `warmup_images`; then constant, or half a cosine that reaches 0 at `images`.
    """
    if images_seen < config.warmup_images:
        return config.lr * images_seen / config.warmup_images
    if config.lr_decay == "constant":
        return config.lr
    rest = max(1, config.images - config.warmup_images)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (images_seen - config.warmup_images) / rest)))


@torch.no_grad()
def clip_and_check(optimizer: ShardAdamW, grads: list[Tensor], max_norm: float, spike: Tensor | None = None) -> Tensor:
    """The global norm of these gradients, fp32 on the device, before clipping; prepares the optimizer's next step by it.

    The step divides the gradients by max(1, norm / max_norm), which saves a pass over them; max_norm 0 turns clipping off.
    After a non-finite norm or a spike the step changes nothing on any rank. One all-reduce of one number.
    """
    if not grads:
        raise ValueError("no parameter has a gradient; call backward first")
    # Each tensor's in fp32, whatever its type. The sum over tensors and ranks in fp64, so that it hardly depends on how the
    # weights are sharded.
    square = torch.stack(torch._foreach_norm([local(g) for g in grads], dtype=torch.float32)).double().square().sum()
    first = grads[0]
    if isinstance(first, DTensor):
        assert all(isinstance(g, DTensor) and g.device_mesh == first.device_mesh for g in grads), "one mesh for all parameters"
        for dim, placement in enumerate(first.placements):
            if isinstance(placement, Shard):  # over a replicating dimension the gradients are already equal
                dist.all_reduce(square, group=first.device_mesh.get_group(dim))
    norm = square.sqrt().float()
    optimizer.found_inf.copy_(~norm.isfinite() if spike is None else ~norm.isfinite() | spike)
    # As torch.nn.utils.clip_grad_norm_ clips, to its 1e-6. Never a NaN, though the step would not read it.
    scale = ((norm + 1e-6) / max_norm).clamp(min=1.0) if max_norm else torch.ones_like(norm)
    optimizer.grad_scale.copy_(scale.nan_to_num(1.0, 1.0, 1.0))
    total, in_a_row = optimizer.skips.unbind()
    total.add_(optimizer.found_inf)
    in_a_row.add_(1).mul_(optimizer.found_inf)
    return norm


# --- all of it, as the training step sees it ---


class Optimizer:
    """What follows a backward: the learning rate, the guard, AdamW and the averaged weights. For a model already sharded.

    kernel: whether AdamW and the average are one pass of our Triton kernel, 36 bytes a parameter, or PyTorch's fused two, 44.
    On one rank it also writes the copies that the network computes with, and reads their gradients, where no others are summed
    with them: the passes that would cast both are left out, at the same bits.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, global_batch: int, kernel: bool = False):
        self.model, self.config, self.global_batch = model, config, global_batch
        self.adamw = ShardAdamW(model, config)
        matrices = {n: p for n, p in named_shards(model).items() if n not in self.adamw.named}
        self.muon = Muon(matrices, config.weight_decay) if matrices else None
        self.named = {**self.adamw.named, **matrices}
        self.ema = PostHoc(model) if config.ema == "posthoc" else EMA(model, config.ema)
        self.spikes = Spikes(config.spike_sigma, self.adamw.skips.device) if config.spike_sigma else None
        self.adamw_ema: Callable[..., None] | None = None
        self.table: Tensor | None = None
        self.copies: list[nn.Parameter] = []  # of `named`, written by the kernel, and after Muon
        if kernel and not isinstance(self.ema, PostHoc):
            held = named_parameters(model)
            self.copies = [held[n] for n in self.named if main_param(held[n]) is not held[n]]
            states = [self.adamw.state[p] for p in self.adamw.named.values()]
            moments = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
            averages = [self.ema.tensors[name] for name in self.adamw.named]
            lists = ([*self.adamw.named.values()], *moments, averages, self.copies[: len(states)])
            self.shards = [[local(t) for t in tensors] for tensors in lists]  # found once: a step moves none of them
            from fastdit_kernels.adamw_ema import adamw_ema, addresses  # here: they import triton, which only Linux has

            self.adamw_ema, self.address_table = adamw_ema, addresses

    def begin(self, prefix: str) -> None:
        """Count the steps of these parameters from 0: they had no gradient so far, and AdamW corrects its moments by the count.

        Without it their first steps would be up to six times the learning rate.
        """
        for name, steps in zip(self.adamw.named, self.adamw.steps, strict=True):
            if name.startswith(prefix):
                steps.zero_()

    def rates(self, images_seen: int) -> Tensor:
        """The learning rate, and the weight of the average, of the step on the global batch that follows: [2] on the device.

        A step takes nothing else from the host. fp32 where a kernel reads them, else fp64.
        """
        lr, weight = lr_at(images_seen + self.global_batch, self.config), self.ema.weight(images_seen // self.global_batch)
        device = self.adamw.skips.device
        gpu = device.type == "cuda"
        dtype = torch.float32 if gpu or self.adamw_ema else torch.float64
        return torch.tensor([lr, weight], dtype=dtype, pin_memory=gpu).to(device, non_blocking=True)

    def step(self, rates: Tensor, loss: Tensor | None = None) -> Tensor:
        """The step at these `rates`; clears the gradients. Returns their norm, on the device.

        loss: this rank's mean, by which spikes are found; without it none are.
        """
        lr, weight = rates.unbind()
        spike = self.spikes.find(loss) if self.spikes and loss is not None else None
        grads = self._gradients()
        norm = clip_and_check(self.adamw, grads, self.config.grad_clip, spike)
        if self.muon is not None:  # its matrices always have gradients, and stand last
            grads, of_muon = grads[: -len(self.muon.named)], grads[-len(self.muon.named) :]
            self.muon.step(of_muon, lr, self.adamw.grad_scale, self.adamw.found_inf)
        if self.adamw_ema is None:
            self.adamw.step(lr)
            if not isinstance(self.ema, PostHoc):  # `follow` moves that
                self.ema.update(weight, self.adamw.found_inf)
        else:
            self._one_pass(grads, lr, weight)
            if self.muon is not None:
                self._after_muon(weight)
        for p in (*self.named.values(), *self.copies):
            p.grad = None
        if not self.copies:
            refresh(self.model)
        return norm

    def _gradients(self) -> list[Tensor]:
        """Of each of `named`: the copies' own where the kernel reads them and no micro-step came before, else fp32."""
        parameters = [*self.named.values()]
        if self.copies and all(p.grad is None for p in parameters):
            parameters = self.copies
        else:
            collect_gradients(self.model)
        return [p.grad for p in parameters if p.grad is not None]

    def follow(self, images_seen: int) -> None:
        """What is done after a step that ended at so many images, outside of it: averages that do not move at each one."""
        if isinstance(self.ema, PostHoc):
            self.ema.follow(images_seen, self.global_batch)

    @torch.no_grad()
    def _one_pass(self, grads: list[Tensor], lr: Tensor, weight: Tensor) -> None:
        """AdamW's step and the update of the average, in one launch over all local shards."""
        assert self.adamw_ema is not None
        adamw = self.adamw
        adamw.steps.add_(1).sub_(adamw.found_inf)
        params, exp_avgs, exp_avg_sqs, averages, copies = self.shards
        lists = params, [local(g) for g in grads], exp_avgs, exp_avg_sqs, averages
        self.table = None
        if graph.capturing():
            # A graph would copy from the host memory of the capture, which is free by then: `captured` fills the table.
            self.addresses = self.address_table(*lists, copies=copies)
            self.table = torch.empty(self.addresses.shape, dtype=torch.int64, device=adamw.skips.device)
        self.adamw_ema(
            *lists, adamw.decays, adamw.steps, adamw.grad_scale, adamw.found_inf,
            lr=lr, beta1=BETA1, beta2=self.config.beta2, eps=EPS, weight=weight, table=self.table, copies=copies,
        )  # fmt: skip

    @torch.no_grad()
    def _after_muon(self, weight: Tensor) -> None:
        """What the kernel does for AdamW's parameters in its pass: the average and the copies, here of Muon's matrices."""
        assert self.muon is not None
        self.ema.update(weight, self.adamw.found_inf, self.muon.named)
        if copies := self.copies[len(self.adamw.named) :]:
            torch._foreach_copy_(list[Tensor](copies), list[Tensor](self.muon.named.values()))

    def captured(self, succeeded: bool) -> None:
        """After a step was captured as a graph: fill the table of addresses; or clear what a failed capture left."""
        if not succeeded:
            self.model.zero_grad()
            for p in self.named.values():
                p.grad = None
        elif self.table is not None:
            self.table.copy_(self.addresses)

    def tensors(self) -> dict[str, Tensor]:
        """Everything a step changes, by name, sharing memory with the live tensors: what a checkpoint saves and loads in place.

        model.X, exp_avg.X, exp_avg_sq.X, ema.X of each parameter's shape; step.X [1] and skips [2], equal on all ranks. fp32.
        Muon's matrices have momentum.X in place of exp_avg.X, exp_avg_sq.X and step.X. Post-hoc averages add narrow.X. Where
        spikes are skipped, losses too, by which they are found: fp64, equal on all ranks.
        """
        found: dict[str, Tensor] = {"skips": self.adamw.skips}
        if self.spikes:
            found["losses"] = self.spikes.window
        for name, p in self.adamw.named.items():
            state = self.adamw.state[p]
            found[f"model.{name}"] = p.detach()
            found[f"exp_avg.{name}"] = state["exp_avg"]
            found[f"exp_avg_sq.{name}"] = state["exp_avg_sq"]
            found[f"step.{name}"] = state["step"].view(1)
        if self.muon is not None:
            found |= {f"model.{name}": p.detach() for name, p in self.muon.named.items()}
            found |= {f"momentum.{name}": momentum for name, momentum in self.muon.momenta.items()}
        found.update(self.ema.saved())
        return found
