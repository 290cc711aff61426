"""torch.save's files, read by torch.load(weights_only=True), which runs no code.

Here stands what torch.load leaves out: limits on size and on work before it starts, checksums, and stand-ins for the classes of
other programs, so that a Lightning checkpoint opens where its own code is not installed.
"""

import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from fastdit.config import UserError, plain
from fastdit.runtime.process import ignored

LIMIT = 64 << 20  # bytes of the pickle; a real one has some hundred thousand
VALUES = 64 << 20  # values that it holds, those that several places share counted in each

# What torch.load calls by itself and a file of weights needs. The rest of what it calls can claim memory at will.
HARMLESS = re.compile(
    r"torch\.(cuda\.)?[A-Z][A-Za-z0-9]+Storage|torch\.(Size|device|[a-z]+\d*(_\w+)?)"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|parameter|parameter_with_state)"
    r"|collections\.OrderedDict|_codecs\.encode|builtins\.(set|complex)"
)


class _Object:
    """Stands for any class or function: what it would have made becomes an OrderedDict, with its fields in `__dict__`."""

    def __new__(cls, *args: Any) -> Any:
        return OrderedDict()


class _Opaque:
    """Stands for NumPy's: their state is a tuple, which an OrderedDict cannot take."""

    def __new__(cls, *args: Any) -> Any:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def load_pickled(path: Path) -> Any:
    """What torch.save was given (its zip format, torch 1.6 or later), CPU tensors mapped from the file.

    An object of a class that torch does not know is an OrderedDict; `vars` of it are its fields. Raises UserError, one line.
    """
    try:
        sizes, names = _guard(path)
        strange = get_unsafe_globals_in_checkpoint(str(path))
        for name in sorted(names.difference(strange)):
            if not HARMLESS.fullmatch(name):
                raise ValueError(f"it calls {name}, which weights do not need")
        stand_ins: list[Any] = [(_Opaque if name.startswith("numpy.") else _Object, name) for name in strange]
        with ignored(), safe_globals(stand_ins):
            root = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        _check_tensors(root, sizes)
    except Exception as error:  # torch.load raises many kinds, and each says that this is no file of weights
        # torch's own message would have the user turn weights_only off; what is wrong stands in the error below it.
        said = str(error.__context__ or error) if "weights_only" in str(error) else str(error)
        line = next((line.strip() for line in said.splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{path} is not a readable file of torch.save (torch 1.6 or later): {plain(line, 200)}") from None
    return root


def fields(value: Any) -> dict[str, Any]:
    """The fields of an object, or the items of a dict."""
    found = {**(getattr(value, "__dict__", None) or {}), **(value if isinstance(value, dict) else {})}
    return {name: item for name, item in found.items() if isinstance(name, str)}


def _guard(path: Path) -> tuple[set[int], set[str]]:
    """Refuse, before torch.load, what would take more memory or time than the file's size explains.

    Returns the sizes of the file's entries, and the classes and functions that its pickle names.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        # torch stores without compressing; what unpacks to more than the file itself is a bomb.
        if any(info.compress_type != zipfile.ZIP_STORED for info in entries):
            raise ValueError("it is compressed, which torch.save never does")
        if sum(info.file_size for info in entries) > path.stat().st_size:
            raise ValueError("its entries overlap")
        pickles = [info for info in entries if info.filename.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError(f"it holds {len(pickles)} pickles; torch.save writes one")
        if pickles[0].file_size > LIMIT:
            raise ValueError(f"its pickle has {pickles[0].file_size} bytes; at most {LIMIT} are believable")
        names = check_pickle(archive.read(pickles[0]))
        if damaged := archive.testzip():
            raise ValueError(f"{damaged[:100]!r} does not have its checksum")
    return {info.file_size for info in entries}, names


def check_pickle(pickle: bytes) -> set[str]:
    """The classes and functions that a pickle names. Raises ValueError if it shares its values into endless work.

    A tuple t = (t', t') of a tuple t' = (t'', t'') … has 2^200 members in 1 kB. As a key of a dict, torch.load would hash each.
    """
    names = set()
    stack: list[int | None] = []  # how many values each value holds; None: a mark
    memo: dict[Any, int | None] = {}
    arg: Any
    for op, arg, _ in pickletools.genops(pickle):
        if op.name == "GLOBAL":
            module, name = arg.split(" ", 1)
            module, name = NAME_MAPPING.get((module, name)) or (IMPORT_MAPPING.get(module, module), name)  # Python 2's
            names.add(f"{module}.{name}")
        if op.name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
            continue
        if op.name in ("BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
            continue
        total = 1
        if pickletools.markobject in op.stack_before:
            while (size := stack.pop()) is not None:
                total += size
        for _ in [kind for kind in op.stack_before if kind not in (pickletools.markobject, pickletools.stackslice)]:
            total += stack.pop() or 0
        if total > VALUES:
            raise ValueError(f"it holds more than {VALUES} values, most of them the same")
        stack += [None if kind is pickletools.markobject else total for kind in op.stack_after]
    return names


def _check_tensors(root: Any, sizes: set[int]) -> None:
    """Raise ValueError for a tensor that repeats itself, to any size one likes, or whose storage is no entry of the file."""
    waiting, seen = [root], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            stored = value.untyped_storage().nbytes()
            if value.numel() * value.element_size() > stored:
                raise ValueError(f"a tensor of shape {tuple(value.shape)} leaves its storage of {stored} bytes")
            if stored not in sizes:
                raise ValueError(f"a storage of {stored} bytes is not what the file has")
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
