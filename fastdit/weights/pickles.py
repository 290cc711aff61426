"""Tensors out of torch.save's files with nothing executed: the pickle inside is read as data.

A pickle is a program that may call anything. `pickletools` splits it into instructions; the loop here builds numbers, strings,
lists and dicts from them and calls nothing. A global stays a name, and a call a record of what would have been called. Only the
records by which torch rebuilds tensors mean something, and those tensors are cut out of the file here, within its bounds.
"""

import math
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdit.config import UserError

LIMIT = 64 << 20  # bytes of the pickle; a real one has some hundred thousand

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Global(NamedTuple):
    """A class or function by name, never imported."""

    module: str
    name: str


class Inert:
    """What another reader would have made by calling `what`: its arguments, items and state, as data."""

    def __init__(self, what: Any, args: Any) -> None:
        self.what, self.args, self.items, self.state = what, args, {}, None  # type: ignore[var-annotated]


class Storage(NamedTuple):
    """A run of numbers: an entry of the file."""

    key: str
    dtype: torch.dtype
    numel: int


class Stored(NamedTuple):
    """A tensor in the file: a view of a storage, in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Pickled(NamedTuple):
    """What torch.save was given, with `Stored` for tensors and `Inert` for objects, and the way to a tensor's numbers."""

    root: Any
    fetch: Callable[[Stored], Tensor]  # on the CPU; raises UserError


def load_pickled(path: Path) -> Pickled:
    """Read a file of torch.save (its zip format, torch ≥ 1.6). Raises UserError, one line, for anything else."""
    try:
        archive = zipfile.ZipFile(path)
        size = path.stat().st_size
        entries = {info.filename: info for info in archive.infolist()}
        # torch stores without compressing; what unpacks to more than the file itself is a bomb.
        if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
            raise ValueError("it is compressed, which torch.save never does")
        if sum(info.file_size for info in archive.infolist()) > size:
            raise ValueError("its entries overlap")
        pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"it holds {len(pickles)} pickles; torch.save writes one")
        prefix = pickles[0].removesuffix("data.pkl")
        if entries[pickles[0]].file_size > LIMIT:
            raise ValueError(f"its pickle has {entries[pickles[0]].file_size} bytes; at most {LIMIT} are believable")
        if f"{prefix}byteorder" in entries and archive.read(f"{prefix}byteorder") != b"little":
            raise ValueError("its numbers are not little-endian")
        root = parse(archive.read(pickles[0]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} is not a readable file of torch.save (torch 1.6 or later): {reason}") from None
    buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def fetch(stored: Stored) -> Tensor:
        storage, offset, shape, stride = stored
        try:
            info = entries[f"{prefix}data/{storage.key}"]
            if info.file_size != storage.numel * storage.dtype.itemsize:
                raise ValueError("its length is not what the pickle says")
            count: int = math.prod(shape)
            last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
            # More elements than the storage has would be a tensor that repeats itself, of any size one likes.
            if count > storage.numel or (count and last >= storage.numel):
                raise ValueError("the tensor leaves its storage")
            if (storage.key, storage.dtype) not in buffers:
                data = bytearray(archive.read(info))  # compares the checksum
                empty = torch.empty(0, dtype=storage.dtype)
                buffers[storage.key, storage.dtype] = torch.frombuffer(data, dtype=storage.dtype) if data else empty
            return buffers[storage.key, storage.dtype].as_strided(shape, stride, offset)
        except (OSError, ValueError, LookupError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: storage {storage.key[:40]!r} is not readable: {str(error)[:200]}") from None

    return Pickled(root, fetch)


def parse(pickle: bytes) -> Any:
    """The value a pickle describes. Raises ValueError, LookupError or TypeError for one that describes none."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def to_mark() -> list[Any]:
        start = marks.pop()
        if start > len(stack):
            raise ValueError("the pickle pops below a mark")
        items = stack[start:]
        del stack[start:]
        return items

    def set_items(target: Any, pairs: list[Any]) -> None:
        into = target.items if isinstance(target, Inert) else target
        if isinstance(into, dict):
            # Only plain keys: hashing nested tuples that share their parts may take for ever.
            into.update((k, v) for k, v in zip(pairs[::2], pairs[1::2], strict=True) if isinstance(k, str | int))

    arg: Any
    for op, arg, _ in pickletools.genops(pickle):
        match op.name:
            case "PROTO" | "FRAME":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[op.name])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE" | "EMPTY_SET":
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": list}[op.name]())
            case "MARK":
                marks.append(len(stack))
            case "LIST" | "FROZENSET":
                stack.append(to_mark())
            case "TUPLE":
                stack.append(tuple(to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(op.name[-1])
                if count > len(stack):
                    raise ValueError("the pickle's stack is too short")
                stack[-count:] = [tuple(stack[-count:])]
            case "DICT":
                pairs = to_mark()
                stack.append({})
                set_items(stack[-1], pairs)
            case "APPEND":
                value = stack.pop()
                if isinstance(stack[-1], list):
                    stack[-1].append(value)
            case "APPENDS" | "ADDITEMS":
                values = to_mark()
                if isinstance(stack[-1], list):
                    stack[-1].extend(values)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                set_items(stack[-1], [key, value])
            case "SETITEMS":
                pairs = to_mark()
                set_items(stack[-1], pairs)
            case "POP":
                if marks and marks[-1] == len(stack):
                    marks.pop()
                else:
                    stack.pop()
            case "POP_MARK":
                to_mark()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "GLOBAL":
                stack.append(Global(*arg.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(Global(module, name))
            case "INST":
                stack.append(Inert(Global(*arg.split(" ", 1)), tuple(to_mark())))
            case "OBJ":
                what, *args = to_mark()
                stack.append(Inert(what, tuple(args)))
            case "REDUCE" | "NEWOBJ":
                args, what = stack.pop(), stack.pop()
                stack.append(_recorded(what, args))
            case "NEWOBJ_EX":
                _, args, what = stack.pop(), stack.pop(), stack.pop()
                stack.append(Inert(what, args))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], Inert):
                    stack[-1].state = state
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "STOP":
                return stack.pop()
            case "PERSID" | "EXT1" | "EXT2" | "EXT4" | "NEXT_BUFFER" | "READONLY_BUFFER":
                raise ValueError(f"the pickle has a {op.name}, which torch.save never writes")
            case _:  # every other instruction pushes the number or string it carries
                stack.append(arg)
    raise ValueError("the pickle has no end")


def _recorded(what: Any, args: Any) -> Any:
    """The result of the few calls that mean something here: torch's tensors, and OrderedDict."""
    if what == ("collections", "OrderedDict"):
        return {}
    if what in (("torch._utils", "_rebuild_parameter"), ("torch._utils", "_rebuild_parameter_with_state")):
        return args[0]
    if what in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor")):
        storage, offset, shape, stride = args[:4]
        numbers = (offset, *shape, *stride)
        if not isinstance(storage, Storage) or len(shape) != len(stride) or len(shape) > 8:
            raise ValueError("the pickle holds a tensor that is none")
        if not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
            raise ValueError("the pickle holds a tensor of impossible shape")
        return Stored(storage, offset, tuple(shape), tuple(stride))
    return Inert(what, args)


def _storage(identity: Any) -> Storage | Inert:
    match identity:
        case ("storage", Global("torch" | "torch.cuda", name), str(key), _, int(numel)) if name in STORAGES and numel >= 0:
            return Storage(key, STORAGES[name], numel)
    return Inert(None, identity)
