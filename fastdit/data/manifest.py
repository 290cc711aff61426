"""manifest.json of a pack: what the rows are, where they came from, and their checksums. It may come from anywhere."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastdit.config import UserError, plain
from fastdit.data.normaliser import Normaliser
from fastdit.runtime.files import read_file

FORMAT = 1
LIMIT = 1 << 28  # bytes of manifest.json; ImageNet's has 5 MB
DTYPES = {"uint8": torch.uint8, "bfloat16": torch.bfloat16, "float32": torch.float32}
WIDEST = 1 << 16  # numbers in a condition


@dataclass(frozen=True)
class Manifest:
    """What a pack holds."""

    format: int
    dataset: str
    transform: str
    vae: str  # empty: the rows are pixels
    vae_revision: str
    count: int
    shape: list[int]  # of a row
    dtype: str
    scale: float  # z = (latent - shift)·scale, where no normaliser says otherwise
    shift: float
    labelled: bool
    num_classes: int
    class_names: list[str]
    chunks: list[list[Any]]  # [rows, SHA-256] of each stretch of rows, in order
    labels_sha256: str
    skipped: list[list[str]]  # [image, reason]
    # Absent where empty: of datasets that have none, and of packs made before there were such fields.
    revision: str = ""  # commit of the hub dataset
    vae_sha256: str = ""  # of the VAE's weights
    latents_mean: list[float] = field(default_factory=list)  # per channel, of all images and their mirror images, unscaled
    latents_std: list[float] = field(default_factory=list)  # exact over the posterior
    # Of arrays alone (data/arrays.py), but for the normaliser, which latents have too that are normalised per channel.
    condition: int = 0  # numbers in each sample's condition; 0: there are none
    lengths: bool = False  # whether each sample says how much of it is no padding
    normaliser: dict[str, Any] | None = None  # data/normaliser.py, as its `to_dict` gives it
    beside_sha256: str = ""  # of the conditions and lengths

    @property
    def arrays(self) -> bool:
        """Whether the rows are arrays of fp32 numbers, and no images."""
        return self.dtype == "float32"

    @property
    def image_shape(self) -> tuple[int, ...]:
        """[C, h, w] of what the network sees; of arrays [C, L], [C, rows, columns] or [C, frames, rows, columns]."""
        return (self.shape[1] // 2, *self.shape[2:]) if self.vae else tuple(self.shape)

    @property
    def units(self) -> Normaliser | None:
        """What brings its arrays to physical units, or its latents to the VAE's; None for pixels, and latents of one scale."""
        return None if self.normaliser is None else Normaliser.from_dict(self.normaliser)

    @property
    def fits(self) -> tuple[tuple[int, ...], int, int, str, Literal["scalar", "channel"]]:
        """What `validation.fit` wants to know."""
        kind = self.normaliser["kind"] if self.normaliser else ""
        latents: Literal["scalar", "channel"] = "channel" if kind and not self.arrays else "scalar"
        return self.image_shape, self.num_classes, self.condition, kind if self.arrays else "", latents

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def scaling(m: Manifest, device: torch.device) -> tuple[float | Tensor, float | Tensor]:
    """Scale and shift of latents: z = (latent - shift)·scale. Numbers, or fp32 [C, 1, 1] where each channel has its own."""
    if m.units is None:
        return m.scale, m.shift
    mean, deviation = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in m.units.x)
    return (1 / deviation).float().to(device), mean.float().to(device)


REQUIRED = [f.name for f in dataclasses.fields(Manifest) if f.default is f.default_factory is dataclasses.MISSING]
PLAIN = {"int": int, "str": str, "float": float, "bool": bool}  # types of fields that are no lists


def read_manifest(path: Path) -> Manifest:
    """The manifest of the pack in this folder, every field checked: it may come from anywhere. Raises UserError."""
    file = path / "manifest.json"
    try:
        data = json.loads(read_file(file, LIMIT))
        types = {f.name: f.type for f in dataclasses.fields(Manifest)}
        if not isinstance(data, dict) or not set(REQUIRED) <= data.keys() <= types.keys():
            raise ValueError(f"fields differ from {', '.join(types)}")
        for name, value in data.items():
            expected = dict if name == "normaliser" else PLAIN.get(getattr(types[name], "__name__", ""), list)
            if type(value) is not expected:
                raise ValueError(f"{name} is {value!r}")
        manifest = Manifest(**data)
        _check(manifest)
    except (OSError, ValueError, RecursionError) as error:
        why = f"not the manifest of a pack ({plain(error, 200)})"
        raise UserError(f"{plain(file)}: {why}; delete {plain(path)} to encode anew") from None
    return manifest


def _check(m: Manifest) -> None:
    def need(ok: bool, field: str) -> None:
        if not ok:
            raise ValueError(f"{field} is {getattr(m, field)!r}"[:200])

    digest = re.compile("[0-9a-f]{64}")
    need(m.format == FORMAT, "format")
    need(m.dtype == "bfloat16" if m.vae else m.dtype in ("uint8", "float32"), "dtype")
    need(all(type(n) is int and 0 < n <= 1 << 16 for n in m.shape), "shape")
    if m.vae:
        need(len(m.shape) == 4 and m.shape[0] == 2 and m.shape[1] % 2 == 0, "shape")
    else:
        need(len(m.shape) in ((2, 3, 4) if m.arrays else (3,)), "shape")
    need(math.isfinite(m.scale) and m.scale > 0, "scale")
    need(math.isfinite(m.shift), "shift")
    need((m.num_classes > 0) == m.labelled and len(m.class_names) in (0, m.num_classes), "num_classes")
    need(all(type(name) is str for name in m.class_names), "class_names")
    need(bool(digest.fullmatch(m.labels_sha256)) if m.labelled else not m.labels_sha256, "labels_sha256")
    for chunk in m.chunks:
        need(type(chunk) is list and [type(x) for x in chunk] == [int, str] and chunk[0] >= 0, "chunks")
        need(bool(digest.fullmatch(chunk[1])), "chunks")
    need(m.count > 0 and m.count == sum(chunk[0] for chunk in m.chunks), "count")
    need(all(type(row) is list and [type(x) for x in row] == [str, str] for row in m.skipped), "skipped")
    _check_arrays(m, need)
    _check_latents(m, need)
    need(not m.vae_sha256 or bool(digest.fullmatch(m.vae_sha256)), "vae_sha256")


def _check_arrays(m: Manifest, need: Callable[[bool, str], None]) -> None:
    need(0 <= m.condition <= (WIDEST if m.arrays else 0), "condition")
    need(m.arrays or not m.lengths, "lengths")
    need((m.normaliser is not None) == m.arrays or bool(m.vae), "normaliser")
    if m.arrays and m.units is not None:
        _, x, condition = m.units
        need(len(x.scale) == m.shape[0] and len(condition.scale if condition else ()) == m.condition, "normaliser")
    beside = bool(re.fullmatch("[0-9a-f]{64}", m.beside_sha256))
    need(beside if m.condition or m.lengths else not m.beside_sha256, "beside_sha256")


def _check_latents(m: Manifest, need: Callable[[bool, str], None]) -> None:
    for name, values in (("latents_mean", m.latents_mean), ("latents_std", m.latents_std)):
        need(len(values) in ((0, m.shape[1] // 2) if m.vae else (0,)), name)
        need(all(type(x) is float and math.isfinite(x) for x in values), name)
    if m.vae and m.units is not None:
        kind, x, condition = m.units
        need((kind, len(x.scale), condition) == ("mean_std", m.shape[1] // 2, None), "normaliser")


def write(manifest: Manifest) -> bytes:
    """The content of manifest.json. Fields that are empty and not required are left out."""
    fields = dataclasses.asdict(manifest)
    return json.dumps({k: v for k, v in fields.items() if v or k in REQUIRED}, indent=1).encode()


def identity(m: Manifest) -> dict[str, str]:
    """What a pack is, in parts that a person can read: packs that agree in all of them train alike, bit for bit.

    Where the pictures and the VAE lie is no part of it, so that both may be moved.
    """
    names = f" ({plain(', '.join(m.class_names), 1000)})" if m.class_names else ""
    content = [m.chunks, m.labels_sha256, m.num_classes, m.class_names, m.scale, m.shift]
    content += ([m.beside_sha256] if m.arrays else []) + ([m.normaliser] if m.normaliser else [])
    return {
        "images": f"{m.count:,}",
        "classes": f"{m.num_classes:,}{names}",
        "size": "×".join(map(str, m.image_shape)),
        "transform": m.transform,
        "VAE": (m.vae_sha256[:16] or f"{m.vae} {m.vae_revision}".strip()) if m.vae else "none",
        **({"latents": "each channel by its own mean and deviation"} if m.vae and m.normaliser else {}),
        "hub revision": m.revision or "none",
        **({"condition": f"{m.condition} numbers", "lengths": "given" if m.lengths else "none"} if m.arrays else {}),
        "content": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
    }


def changes(before: Mapping[str, object], now: Mapping[str, str]) -> list[str]:
    """How a pack differs from the one of before, by their identities, e.g. ["images: 40 before, 41 now"]; empty if alike."""
    named = [
        f"{part}: {plain(before.get(part, 'unknown'))} before, {plain(value)} now"
        for part, value in now.items()
        if part != "content" and before.get(part) != value
    ]
    if not named and before.get("content") != now["content"]:
        named.append(f"the {'arrays' if 'condition' in now else 'pictures'}, their labels or their order")
    return named


def require_same(trained_on: object, manifest: "Manifest", run: Path) -> None:
    """Raise UserError where a pack is not the one whose identity a run's checkpoint holds; an older checkpoint holds none."""
    if isinstance(trained_on, dict) and (different := changes(trained_on, identity(manifest))):
        raise UserError(
            f"the data are not those the run was trained on ({'; '.join(different)}); restore them, or start a run on the "
            f"new ones from these weights: --run.name NEW --train.init_from {run}"
        )
