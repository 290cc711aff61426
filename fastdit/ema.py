"""The averaged weights (EMA), on local shards and without a host sync: one of a given decay, or two for any length."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastdit.posthoc import LENGTHS, averaged_images, exponent
from fastdit.runtime.guarded import towards
from fastdit.runtime.sharding import local, named_shards, refresh


class EMA:
    """An fp32 exponential moving average of the weights, sharded as they are. `tensors` holds it by plain parameter names.

    The decay warms up as min(decay, (1 + step) / (10 + step)); otherwise the average of a short run would be mostly its start.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.params = named_shards(model)
        # clone keeps a DTensor's global shape; DTensor.from_local would guess it, wrongly where shards are uneven.
        self.tensors = {name: p.detach().to(torch.float32, copy=True) for name, p in self.params.items()}

    def weight(self, step: int) -> float:
        """How far the average moves towards the weights after optimizer step number `step`."""
        return 1 - min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, weight: float | Tensor, found_inf: Tensor | None = None, names: Iterable[str] | None = None) -> None:
        """Move the average, or that of these names, by this share towards the weights; nothing where found_inf is 1."""
        pairs = [(local(self.tensors[name]), local(self.params[name])) for name in (self.tensors if names is None else names)]
        averages = [e for e, p in pairs if e.numel()]
        weights = [p.float() for e, p in pairs if e.numel()]
        if not averages:  # more ranks than rows
            return
        towards(averages, weights, weight, found_inf)

    def saved(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the average, sharing memory."""
        return {f"ema.{name}": e for name, e in self.tensors.items()}

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within, the model computes with the averaged weights; afterwards its own are back, to the bit.

        The two are exchanged in place, so only one tensor's worth of memory is needed; `tensors` holds the model's own
        weights meanwhile. Do not train or save within.
        """
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        for name, average in self.tensors.items():
            p, e = local(self.params[name]), local(average)
            assert p.dtype == e.dtype, f"{name} is {p.dtype}; only fp32 weights come back exactly"
            kept = p.clone()
            p.copy_(e)
            e.copy_(kept)
        refresh(model)

    @torch.no_grad()
    def full_tensors(self) -> dict[str, Tensor]:
        """The whole averaged weights, on the CPU of rank 0; an empty dict elsewhere. Every rank must call it."""
        full = {}
        for name, e in self.tensors.items():
            whole = e.full_tensor() if isinstance(e, DTensor) else e
            if not dist.is_initialized() or dist.get_rank() == 0:
                full[name] = whole.to("cpu", copy=True)
        return full


class PostHoc(EMA):
    """Two power-function averages, fp32, sharded as the weights are, over images seen. `tensors` is the one of σ_rel 0.10.

    They move at one step in eight of a long run, as if the weights had stood still in between. Not within the step, so that a
    captured graph does not hold them.
    """

    def __init__(self, model: nn.Module):
        super().__init__(model, 0.0)
        self.narrow = {name: e.clone() for name, e in self.tensors.items()}

    def averages(self) -> dict[str, dict[str, Tensor]]:
        """Both averages, by LENGTHS' names, then by parameter."""
        return {"ema": self.tensors, "narrow": self.narrow}

    def saved(self) -> dict[str, Tensor]:
        """What checkpoints and snapshots hold, sharing memory."""
        return {f"{kind}.{name}": e for kind, average in self.averages().items() for name, e in average.items()}

    @torch.no_grad()
    def follow(self, images_seen: int, global_batch: int) -> None:
        """Move the averages after the step that ended at so many images. No message passes, nothing waits for the device."""
        at = averaged_images(images_seen, global_batch)
        if at != images_seen:
            return
        before = averaged_images(images_seen - global_batch, global_batch)
        weights = [local(p) for p in self.params.values() if local(p).numel()]
        for kind, average in self.averages().items() if weights else ():
            moved = 1 - (before / at) ** (exponent(LENGTHS[kind]) + 1)
            torch._foreach_lerp_([local(e) for e in average.values() if local(e).numel()], weights, moved)
