"""Tensors in safetensors files: whole weights, and the shards of a checkpoint.

They are not written by the safetensors package, nor by torch's HuggingFaceStorageWriter over it: those build the whole file
in memory first, holding the interpreter lock, so that training would stop for seconds per gigabyte. Here bytes go from the
tensors to the hash and the disk, and both release the lock. Reading is the package's, which checks what it is given.
"""

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.tensor import DTensor, Replicate

from fastdit.config import UserError
from fastdit.runtime.files import Written, atomic, write_file

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
NAMES = {name: dtype for dtype, name in DTYPES.items()}
OFFSETS = "DCP_SHARDING_INFO"  # where torch.distributed.checkpoint keeps, in a shard's metadata, where its pieces start
LIMIT = 16 << 20  # bytes of that, and of a file's header; real ones have thousands


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Written:
    """Write CPU tensors as one new safetensors file. Raises OSError, or ValueError for a dtype the format lacks."""
    return write_file(path, safetensors_bytes(tensors, metadata))


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, tensor by tensor. Raises ValueError for a dtype the format lacks."""
    names = sorted(tensors, key=lambda n: -tensors[n].element_size())  # so that every tensor is aligned to its element
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name in names:
        t = tensors[name]
        if t.dtype not in DTYPES:
            raise ValueError(f"{name} is {t.dtype}, which safetensors cannot hold")
        end = start + t.numel() * t.element_size()
        header[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
        start = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    yield len(encoded).to_bytes(8, "little") + encoded
    for name in names:
        # as_strided, since a dimension of size 1 may keep any stride and still count as contiguous.
        t = tensors[name].detach().contiguous()
        yield t.as_strided((t.numel(),), (1,)).view(torch.uint8).numpy().data


def save_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write CPU tensors as one safetensors file; what was at `path` stays until the new file is whole. Raises UserError."""
    try:
        with atomic(Path(path)) as file:
            file.writelines(safetensors_bytes(tensors, {"format": "pt", **(metadata or {})}))
    except OSError as error:
        raise UserError(f"{path} was not written: {error.strerror or error}") from None


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The CPU tensors and the metadata of a safetensors file from anywhere. Raises UserError, one line, if it is not one."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("not a file")
        _check_header(path)
        with safe_open(path, "pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}, dict(f.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise UserError(f"{path} is not a readable safetensors file: {said[:200]}") from None


def _check_header(path: Path) -> None:
    """Raise ValueError for a header that takes long to read, or that says two things of one tensor.

    The safetensors package checks the rest: names, dtypes, shapes, and that the tensors fill the file without overlapping.
    """
    with path.open("rb") as f:
        size = int.from_bytes(f.read(8), "little")
        if size > LIMIT:
            raise ValueError(f"its header has {size} bytes; at most {LIMIT} are believable")
        header = f.read(size)

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("its header has two entries of one name")
        return found

    json.loads(header, object_pairs_hook=unique)


# --- shards ---


class Piece(NamedTuple):
    """The box of a tensor that one rank holds: where it starts in the whole tensor, and the numbers in it."""

    name: str
    offset: tuple[int, ...]
    shard: Tensor


class Whole(NamedTuple):
    """What pieces add up to."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{'×'.join(map(str, self.shape)) or 'one number'} {str(self.dtype).removeprefix('torch.')}"


def owned(tensors: Mapping[str, Tensor], rank: int) -> list[Piece]:
    """What this rank writes, sharing memory. Of replicas the lowest ranks write theirs. Raises ValueError."""
    mine = {}
    for name, t in tensors.items():
        if t.ndim == 0 or t.numel() == 0 or t.dtype not in DTYPES:
            raise ValueError(f"{name} is {Whole(tuple(t.shape), t.dtype)}; a checkpoint wants elements and dimensions")
        if isinstance(t, DTensor):
            coordinate = t.device_mesh.get_coordinate()
            copies = [i for i, placement in enumerate(t.placements) if isinstance(placement, Replicate)]
            if coordinate is not None and not any(coordinate[i] for i in copies):
                mine[name] = t.detach()
        elif rank == 0:
            mine[name] = t.detach()
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(mine, is_coordinator=True)
    pieces = []
    for item in planner.create_local_plan().items:
        assert item.tensor_data is not None
        if item.tensor_data.chunk.sizes.numel():
            t = mine[item.index.fqn]
            shard = t.to_local() if isinstance(t, DTensor) else t
            pieces.append(Piece(item.index.fqn, tuple(item.tensor_data.chunk.offsets), shard))
    return pieces


def write_shard(path: Path, pieces: list[Piece]) -> Written:
    """Write this rank's pieces, on the CPU, in the layout of torch's HuggingFaceStorageWriter; its Reader reads them."""
    offsets = json.dumps({p.name: {"saved_offsets": p.offset} for p in pieces})
    metadata = {"format": "pt", "DCP_VERSION": "1.0", OFFSETS: offsets}
    return write_safetensors(path, {p.name: p.shard for p in pieces}, metadata)


def contents(folder: Path) -> dict[str, Whole]:
    """What a folder of shards holds, by name, as their headers say. Raises ValueError unless every tensor is whole."""
    boxes: dict[str, dict[tuple[int, ...], tuple[int, ...]]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for path in sorted(folder.iterdir()):
        try:
            with safe_open(path, "pt") as f:
                info = (f.metadata() or {}).get(OFFSETS, "")
                if len(info) > LIMIT:
                    raise ValueError("its list of offsets is too long")
                offsets = json.loads(info)
                for name in f.keys():  # noqa: SIM118  not a dict
                    piece = f.get_slice(name)
                    shape, dtype = tuple(piece.get_shape()), NAMES[piece.get_dtype()]
                    offset = tuple(offsets[name]["saved_offsets"])
                    if len(offset) != len(shape) or not all(type(o) is int and 0 <= o < 2**62 for o in offset):
                        raise ValueError(f"{name} starts at {offset}")
                    if offset in boxes.setdefault(name, {}) or dtypes.setdefault(name, dtype) != dtype:
                        raise ValueError(f"{name} is in another shard too")
                    boxes[name][offset] = shape
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path.name}: {str(error)[:200]}") from None
    found = {}
    for name, pieces in boxes.items():
        ends = [tuple(o + n for o, n in zip(offset, shape, strict=True)) for offset, shape in pieces.items()]
        if len({len(end) for end in ends}) != 1:
            raise ValueError(f"the shards of {name} differ in their number of dimensions")
        whole = Whole(tuple(max(sides) for sides in zip(*ends, strict=True)), dtypes[name])
        if sum(math.prod(shape) for shape in pieces.values()) != math.prod(whole.shape):
            raise ValueError(f"the shards of {name} do not add up to {whole}")
        found[name] = whole
    return found


def fit(found: Mapping[str, Whole], tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError, one line, if what was found is not exactly the tensors asked for."""
    wrong = [f"{n} is not in it" for n in tensors if n not in found]
    wrong += [f"it holds {n}, for which there is no place here" for n in found if n not in tensors]
    for name, t in tensors.items():
        if name in found and found[name] != (here := Whole(tuple(t.shape), t.dtype)):
            wrong.append(f"{name} is {found[name]} there and {here} here")
    if wrong:
        raise ValueError(wrong[0] + (f" (and {len(wrong) - 1} more differences)" if len(wrong) > 1 else ""))
