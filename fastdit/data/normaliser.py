"""What brings arrays to the numbers a network is trained on, and back: stored = (physical - offset) / scale, per channel.

It belongs to the pack, and goes with the weights, so that a loaded model takes and gives physical units. Latents have one too
where their channels are normalised one by one: their physical units are the autoencoder's.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdit.config import UserError, plain
from fastdit.runtime.files import read_file, write_text

FILE = "normaliser.json"  # beside the weights
LIMIT = 1 << 24  # bytes of it
KINDS = ("mean_std", "min_max")


class Affine(NamedTuple):
    """An offset and a scale for each channel of x, or for each number of a condition."""

    offset: tuple[float, ...]
    scale: tuple[float, ...]

    def normalise(self, physical: Tensor) -> Tensor:
        """Physical [B, C, …] → normalised, fp32."""
        offset, scale = self._like(physical)
        return ((physical.double() - offset) / scale).float()

    def physical(self, normalised: Tensor) -> Tensor:
        """Normalised [B, C, …] → physical units, fp32."""
        offset, scale = self._like(normalised)
        return (normalised.double() * scale + offset).float()

    def _like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Offset and scale, fp64 [C, 1, …], fit for x."""
        if x.ndim < 2 or x.shape[1] != len(self.scale):
            raise UserError(f"an array of {'×'.join(map(str, x.shape))}; the normaliser is for [B, {len(self.scale)}, …]")
        shape = (-1, *[1] * (x.ndim - 2))
        offset, scale = (torch.tensor(v, dtype=torch.float64, device=x.device).view(shape) for v in self)
        return offset, scale


class Normaliser(NamedTuple):
    """The normaliser of a pack of arrays."""

    kind: str  # mean_std: mean 0 and deviation 1; min_max: from -1 to 1
    x: Affine
    condition: Affine | None = None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in manifest.json and normaliser.json."""
        parts = {name: value for name, value in (("x", self.x), ("condition", self.condition)) if value is not None}
        return {"kind": self.kind} | {name: {k: list(v) for k, v in p._asdict().items()} for name, p in parts.items()}

    @staticmethod
    def from_dict(found: Mapping[str, Any]) -> "Normaliser":
        """The inverse of to_dict, for what may come from anywhere. Raises ValueError."""
        if not {"kind", "x"} <= found.keys() <= {"kind", "x", "condition"} or found["kind"] not in KINDS:
            raise ValueError(f"no normaliser: {plain(dict(found), 80)}")
        return Normaliser(found["kind"], _affine(found["x"]), _affine(found["condition"]) if "condition" in found else None)

    def write(self, folder: Path) -> None:
        """Keep it beside the weights of a folder."""
        write_text(folder / FILE, json.dumps(self.to_dict(), indent=1) + "\n")

    @staticmethod
    def read(folder: Path, name: str = FILE) -> "Normaliser | None":
        """What `write` kept in a folder; None where there is none. Raises UserError for a damaged file."""
        file = folder / name
        if not file.exists():
            return None
        try:
            found = json.loads(read_file(file, LIMIT))
            if not isinstance(found, dict):
                raise ValueError("not a JSON object")
            return Normaliser.from_dict(found)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{plain(file)}: not a normaliser ({plain(error, 200)})") from None


def _affine(found: object) -> Affine:
    if isinstance(found, dict) and found.keys() == {"offset", "scale"}:
        offset, scale = found["offset"], found["scale"]
        if isinstance(offset, list) and isinstance(scale, list) and 0 < len(offset) == len(scale):
            numbers = [x for x in (*offset, *scale) if type(x) in (int, float) and math.isfinite(x)]
            if len(numbers) == 2 * len(offset) and min(scale) > 0:
                return Affine(tuple(offset), tuple(scale))
    raise ValueError("offset and scale must be as many finite numbers, the scale positive")


# --- what it follows from ---


class Moments(NamedTuple):
    """Of each channel: added up over the parts of a dataset, in their order."""

    num: int
    total: Tensor  # fp64 [C], as the others
    squares: Tensor  # of the differences from the mean
    least: Tensor
    most: Tensor

    @staticmethod
    def of(values: Tensor) -> "Moments":
        """Of values [n, C], any floating dtype."""
        v = values.double()
        return Moments(len(v), v.sum(0), (v - v.mean(0)).square().sum(0), v.amin(0), v.amax(0))

    def plus(self, other: "Moments") -> "Moments":
        """Of both together. Squares are about each part's own mean: a large mean costs no digits (Chan et al. 1979)."""
        num = self.num + other.num
        apart = other.total / other.num - self.total / self.num
        squares = self.squares + other.squares + apart.square() * (self.num * other.num / num)
        least, most = torch.minimum(self.least, other.least), torch.maximum(self.most, other.most)
        return Moments(num, self.total + other.total, squares, least, most)

    def affine(self, kind: str) -> Affine:
        """The offset and scale of these channels. One that never changes keeps its scale and becomes 0."""
        if kind == "min_max":
            offset, scale = (self.most + self.least) / 2, (self.most - self.least) / 2
        else:
            offset, scale = self.total / self.num, (self.squares / self.num).sqrt()
        constant = self.most - self.least <= 1e-6 * torch.maximum(self.most.abs(), self.least.abs())
        return Affine(tuple(offset.tolist()), tuple(torch.where(constant, 1.0, scale).tolist()))

    def to_list(self) -> list[Any]:
        """As it stands in a chunk's JSON."""
        return [self.num, *(part.tolist() for part in self[1:])]

    @staticmethod
    def from_list(found: list[Any]) -> "Moments":
        num, *parts = found
        total, squares, least, most = (torch.tensor(part, dtype=torch.float64) for part in parts)
        return Moments(num, total, squares, least, most)
