"""Muon: momentum, made orthogonal matrix by matrix (kellerjordan.github.io/posts/muon), each on one rank and not on all.

A matrix's update is U·Vᵀ of its Nesterov momentum's SVD, near enough, by five Newton–Schulz steps. 0.2·√max(rows, columns)
times it is as long as AdamW's updates, so that AdamW's learning rate and weight decay apply (arXiv 2502.16982, section 2.2).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from fastdit.runtime.guarded import descend, towards
from fastdit.runtime.sharding import local

MOMENTUM = 0.95
A, B, C, STEPS = 3.4445, -4.7750, 2.0315, 5  # of Jordan's quintic: singular values end between about 0.7 and 1.2
MATRICES = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")


def orthogonalised(name: str) -> bool:
    """Whether Muon updates this parameter: the matrices of the blocks. AdamW has the rest."""
    return name.startswith("blocks.") and name.endswith(MATRICES)


def newton_schulz(x: Tensor) -> Tensor:
    """U·S·Vᵀ of each of x [N, rows, columns], rows ≤ columns, in x's dtype: S near 1 where x's singular values are not tiny."""
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x


def flops(rows: int, columns: int) -> int:
    """FLOPs of newton_schulz on one matrix: three products a step, two per multiply-add."""
    short, long = sorted((rows, columns))
    return 2 * STEPS * (2 * short * short * long + short**3)


def updates(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Each matrix made orthogonal and scaled. Those of one shape, or of its transpose, are one batched product."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for number, matrix in enumerate(matrices):
        by_shape.setdefault(tuple(sorted(matrix.shape)), []).append(number)
    found = list(matrices)
    for (short, long), numbers in by_shape.items():
        wide = [matrices[n] if matrices[n].shape[0] == short else matrices[n].mT for n in numbers]
        made = newton_schulz(torch.stack(wide)) * (0.2 * math.sqrt(long))
        for n, o in zip(numbers, made, strict=True):
            found[n] = o if matrices[n].shape[0] == short else o.mT
    return found


# --- over ranks ---


class Part(NamedTuple):
    """Rows of a parameter that are a matrix of their own, and the rank that makes it orthogonal."""

    parameter: int
    first: int
    rows: int
    columns: int
    owner: int


def spread(shapes: Sequence[tuple[str, int, int]], ranks: int) -> list[Part]:
    """The matrices in (name, rows, columns) over ranks, the costliest first, each to the rank with least to do. By parameter.

    qkv is three matrices: a direction of q says nothing about one of v.
    """
    parts = []
    for number, (name, rows, columns) in enumerate(shapes):
        each = rows // 3 if name.endswith("qkv.weight") else rows
        parts += [Part(number, first, each, columns, 0) for first in range(0, rows, each)]
    load = [0] * ranks
    for n in sorted(range(len(parts)), key=lambda n: -flops(parts[n].rows, parts[n].columns)):  # stable, so equal on all ranks
        owner = load.index(min(load))
        load[owner] += flops(parts[n].rows, parts[n].columns)
        parts[n] = parts[n]._replace(owner=owner)
    return parts


class Muon:
    """Steps on local shards of these parameters, by plain names. `momenta` is fp32, sharded as they are.

    The ranks of one copy of the weights share the work; other copies do the same on the same numbers. Two collectives a step.
    """

    def __init__(self, named: dict[str, nn.Parameter], weight_decay: float):
        self.named, self.weight_decay = named, weight_decay
        self.momenta = {name: torch.zeros_like(p, requires_grad=False) for name, p in named.items()}
        first = next(iter(named.values()))
        self.dtype = torch.bfloat16 if first.device.type == "cuda" else torch.float32
        self.group: dist.ProcessGroup | None = None
        ranks, self.rank = 1, 0
        if isinstance(first, DTensor):
            dim = next(d for d, placement in enumerate(first.placements) if isinstance(placement, Shard))
            self.group, ranks = first.device_mesh.get_group(dim), first.device_mesh.size(dim)
            self.rank = first.device_mesh.get_local_rank(dim)
        self.ranks = range(ranks)
        self.parts = spread([(name, p.shape[0], p.shape[1]) for name, p in named.items()], ranks)
        self.sent = sorted(self.parts, key=lambda part: part.owner)
        self.mine = [part for part in self.sent if part.owner == self.rank]
        self.rows = [-(-p.shape[0] // ranks) for p in named.values()]  # of each parameter that a rank holds, but for the last

    def held(self, part: Part, rank: int) -> tuple[int, int]:
        """The first row of a part that a rank's shard holds, counted from the part's own first, and how many."""
        each = self.rows[part.parameter]
        first, end = max(rank * each, part.first), min((rank + 1) * each, part.first + part.rows)
        return first - part.first, max(0, end - first)

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor], lr: Tensor, grad_scale: Tensor, found_inf: Tensor) -> None:
        """One step by these gradients divided by grad_scale, in the order of `named`; where found_inf is 1, none to the bit."""
        weights = [local(p) for p in self.named.values()]
        momenta = [local(m) for m in self.momenta.values() if local(m).numel()]
        moved = [local(g).float() for g in grads]
        full = [n for n, w in enumerate(weights) if w.numel()]
        if full:  # a rank may hold no row of any
            scaled = list(torch._foreach_div([moved[n] for n in full], grad_scale))
            towards(momenta, scaled, 1 - MOMENTUM, found_inf)
            torch._foreach_lerp_(scaled, momenta, MOMENTUM)  # Nesterov's: this gradient counts once more
            for n, update in zip(full, scaled, strict=True):
                moved[n] = update
        moved = self._orthogonal(moved)
        if full:
            descend([weights[n] for n in full], [moved[n] for n in full], lr, self.weight_decay, found_inf)

    def _orthogonal(self, moved: list[Tensor]) -> list[Tensor]:
        """The updates of this rank's shards, out of their momentum: to the owners of the matrices, and back."""
        out = []
        for part in self.sent:
            row, rows = self.held(part, self.rank)
            start = part.first + row - self.rank * self.rows[part.parameter]
            out.append(moved[part.parameter][start : start + rows].to(self.dtype) if rows else None)
        to = [sum(self._size(p, self.rank) for p in self.sent if p.owner == rank) for rank in self.ranks]
        came = [sum(self._size(p, rank) for p in self.mine) for rank in self.ranks]
        pieces = self._exchange([t for t in out if t is not None], to, came, moved[0].device).split(
            [self._size(p, rank) for rank in self.ranks for p in self.mine]
        )
        whole = [
            torch.cat(pieces[n :: len(self.mine)]).view(part.rows, part.columns) for n, part in enumerate(self.mine)
        ]  # ranks hold rows in their order
        made = updates(whole)
        back = []
        for rank in self.ranks:
            for part, matrix in zip(self.mine, made, strict=True):
                row, rows = self.held(part, rank)
                if rows:
                    back.append(matrix[row : row + rows])
        arrived = self._exchange(back, came, to, moved[0].device).split([self._size(p, self.rank) for p in self.sent])
        by_part = dict(zip(self.sent, arrived, strict=True))
        found: list[list[Tensor]] = [[] for _ in moved]
        for part in self.parts:  # of one parameter in the order of its rows
            found[part.parameter].append(by_part[part])
        return [torch.cat(rows).view_as(m).float() for rows, m in zip(found, moved, strict=True)]

    def _size(self, part: Part, rank: int) -> int:
        return self.held(part, rank)[1] * part.columns

    def _exchange(self, pieces: list[Tensor], to: list[int], came: list[int], device: torch.device) -> Tensor:
        """Send `to` numbers to each rank, get `came` from each: one collective, none on one rank."""
        flat = torch.cat([t.reshape(-1) for t in pieces]) if pieces else torch.empty(0, dtype=self.dtype, device=device)
        if self.group is None:
            return flat
        got = torch.empty(sum(came), dtype=self.dtype, device=device)
        dist.all_to_all_single(got, flat, came, to, group=self.group)
        return got
