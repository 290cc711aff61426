"""Samples that are arrays of numbers, not pictures: sequences, fields, clips; each perhaps with a condition, class and length.

They come from safetensors or parquet files, or are made (data/experts.py). A file has `x` [N, C, L], [N, C, rows, columns] or
[N, C, frames, rows, columns], and may have `condition` [N, K], `label` [N] and `length` [N]. `length` counts along the grid's
first axis; what x holds beyond it is padding. Every byte is untrusted: no number is used before it is checked.
"""

import bisect
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdit.config import DataConfig, UserError, plain, times
from fastdit.data.source import MAX_CLASSES
from fastdit.runtime.tensors import load_weights

X, CONDITION, LENGTH = "x", "condition", "length"  # names of tensors and columns; that of labels is --data.label_column
LARGEST = 1e30  # of a number in x or a condition: its square is finite in fp64, and so is what fp32 makes of it
AT_ONCE = 256  # rows read at a time
Numbers = NDArray[np.floating[Any] | np.integer[Any]]


class Sample(NamedTuple):
    """One sample of a source as it was read, unchecked; of x, the array or the reason why there is none."""

    name: str
    x: Any  # array [C, …], or a str
    condition: Any = None  # array [K]
    label: int | None = None
    length: int | None = None


@dataclass(frozen=True)
class ArraySource:
    """Items 0 … length - 1, read in any order by any number of ranks; an item gives one sample, or as an episode does, some."""

    name: str  # what it is, for reports and the pack's manifest
    length: int
    shape: tuple[int, ...]  # of x: channels, then a grid of one to three dimensions
    condition: int  # numbers of a condition; 0: there are none
    labelled: bool
    lengths: bool  # whether samples have lengths
    samples: Callable[[int, int], Iterator[Sample]]
    normaliser: str = "mean_std"
    class_names: tuple[str, ...] = ()
    chunk: int = AT_ONCE  # items between two commits of an encoding
    items: str = "samples"  # what they are
    transform: str = "none"  # what was done to the numbers before they are normalised

    def reason(self, sample: Sample) -> str:
        """Why a sample cannot be used; empty for a good one."""
        if isinstance(sample.x, str):
            return sample.x
        if sample.x.shape != self.shape:
            return f"x of {times(sample.x.shape)}, expected {times(self.shape)}"
        if self.lengths and (sample.length is None or not 1 <= sample.length <= self.shape[1]):
            return f"length {sample.length}, expected 1 … {self.shape[1]}"
        if self.labelled and (sample.label is None or not 0 <= sample.label < (len(self.class_names) or MAX_CLASSES)):
            return f"label {sample.label} is not a class"
        if self.condition and (sample.condition is None or sample.condition.shape != (self.condition,)):
            found = "none" if sample.condition is None else f"{sample.condition.size} numbers"
            return f"a condition of {found}, expected {self.condition}"
        for what, values in ((X, sample.x[:, : sample.length]), (CONDITION, sample.condition if self.condition else None)):
            if values is not None and not (np.abs(values) <= LARGEST).all():  # NaN too
                return f"{what} has NaN, infinite or huge numbers"
        return ""


# --- files ---


class Table(NamedTuple):
    """A file of samples: its rows, what they have, and a function that reads some of them."""

    path: str
    rows: int
    shape: tuple[int, ...]  # of x
    condition: int
    labelled: bool
    lengths: bool
    read: Callable[[int, int], Iterator[Sample]]


def is_parquet_of_arrays(path: str) -> bool:
    """Whether a parquet file has a column x, and so holds arrays and not pictures; what is no parquet file has none."""
    import pyarrow.parquet

    try:
        return X in pyarrow.parquet.read_schema(os.path.expanduser(path)).names
    except Exception:  # the one who reads it says what is wrong with it
        return False


def array_files(folder: str) -> list[str]:
    """The safetensors files of a folder by name, hidden ones and links left out; none where there are none."""
    with os.scandir(os.path.expanduser(folder)) as entries:
        found = [e.path for e in entries if e.name.endswith(".safetensors") and not e.name.startswith(".")]
    return sorted(path for path in found if os.path.isfile(path) and not os.path.islink(path))


def open_arrays(data: DataConfig) -> ArraySource:
    """The arrays a config names: a folder of safetensors, or one file. Raises UserError where they do not go together."""
    assert data.path is not None
    root = os.path.expanduser(data.path)
    files = array_files(root) if os.path.isdir(root) else [root]
    tables = [
        _parquet(f, data.label_column) if f.lower().endswith(".parquet") else _tensors(f, data.label_column) for f in files
    ]
    first = tables[0]
    for table in tables[1:]:
        for what in ("shape", "condition", "labelled", "lengths"):
            ours, theirs = getattr(table, what), getattr(first, what)
            if ours != theirs:
                shown = [times(v) if isinstance(v, tuple) else str(v) for v in (ours, theirs)]
                named = {"shape": "x of one sample is", "condition": "numbers of a condition:", "labelled": "has labels:"}
                said = f"{named.get(what, 'has lengths:')} {shown[0]}, but {shown[1]} in {plain(first.path)}"
                raise UserError(f"--data.path {plain(table.path)}: {said}")
    starts = [0, *itertools.accumulate(table.rows for table in tables)]
    length = min(starts[-1], data.num_images or starts[-1])
    if not length:
        raise UserError(f"--data.path {plain(data.path)} has no rows")

    def samples(start: int, stop: int) -> Iterator[Sample]:
        stop = min(stop, length)
        for number in range(bisect.bisect_right(starts, start) - 1, len(tables)):
            begin, end = max(start, starts[number]), min(stop, starts[number + 1])
            if begin < end:
                yield from tables[number].read(begin - starts[number], end - starts[number])

    return ArraySource(
        name=plain(data.path, 4096),
        length=length,
        shape=first.shape,
        condition=first.condition,
        labelled=first.labelled,
        lengths=first.lengths,
        samples=samples,
        normaliser=data.normaliser,
    )


def check_shape(path: str, shape: Sequence[int]) -> None:
    """Raise UserError where x of a file, [N, C, …], is not of one to three dimensions beside its channels."""
    if not 3 <= len(shape) <= 5 or min(shape[1:]) < 1 or max(shape[1:]) > 1 << 16:
        raise UserError(
            f"--data.path {plain(path)}: x is {times(tuple(shape)) or 'one number'}; "
            "it must be samples × channels × a grid of 1 to 3 dimensions"
        )


def _tensors(path: str, label: str | None) -> Table:
    """A safetensors file. Its header is read now, its numbers when they are asked for."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # no mapping
    except Exception as error:  # of the format, or of the disk
        raise UserError(f"--data.path {plain(path)}: not a readable safetensors file ({plain(error, 100)})") from None
    if X not in shapes:
        raise UserError(
            f"--data.path {plain(path)} has no tensor 'x'; its tensors: {plain(', '.join(sorted(shapes)) or 'none')}"
        )
    check_shape(path, shapes[X])
    beside = {CONDITION: 2, label: 1, LENGTH: 1}
    for name, dimensions in beside.items():
        if name in shapes and (len(shapes[name]) != dimensions or shapes[name][0] != shapes[X][0]):
            wanted = f"{shapes[X][0]} × K" if dimensions == 2 else str(shapes[X][0])
            raise UserError(f"--data.path {plain(path)}: {name} is {times(shapes[name])}; beside this x it must be {wanted}")

    def read(start: int, stop: int) -> Iterator[Sample]:
        with safetensors.safe_open(path, framework="pt") as file:
            for begin in range(start, stop, AT_ONCE):
                end = min(begin + AT_ONCE, stop)
                part = {name: file.get_slice(name)[begin:end] for name in (X, *beside) if name in shapes}
                yield from _rows(Path(path).name, begin, part, label)

    condition = shapes[CONDITION][1] if CONDITION in shapes else 0
    return Table(path, shapes[X][0], shapes[X][1:], condition, label in shapes, LENGTH in shapes, read)


def _rows(name: str, first: int, part: dict[Any, Tensor], label: str | None) -> Iterator[Sample]:
    def numbers(key: str | None) -> list[Any] | None:
        values = part.get(key)
        if values is None or values.is_complex():
            return None
        return list((values.double() if values.dtype == torch.float64 else values.float()).numpy())

    def whole(key: str | None) -> list[int | None] | None:
        values = part.get(key)
        if values is None:
            return None
        return [int(v) if v == v // 1 else None for v in values.tolist()]

    count = len(part[X])
    xs = numbers(X) or ["x is complex"] * count
    conditions, labels, lengths = (found or [None] * count for found in (numbers(CONDITION), whole(label), whole(LENGTH)))
    for n, values in enumerate(zip(xs, conditions, labels, lengths, strict=True), first):
        yield Sample(f"row {n} of {name}", *values)


def _parquet(path: str, label: str | None) -> Table:
    """A parquet file: x and condition in columns of nested lists, label and length in columns of whole numbers."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = [name for name in (X, CONDITION, label, LENGTH) if name in file.schema_arrow.names]
        head = next(file.iter_batches(1, columns=columns), None)
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    except Exception as error:
        raise UserError(f"--data.path {plain(path)}: not a readable parquet file ({plain(error, 100)})") from None
    if X not in columns or head is None:
        raise UserError(f"--data.path {plain(path)} has no {'rows' if X in columns else 'column x'}")
    for name in columns:
        kind = head.schema.field(name).type
        nested = pyarrow.types.is_list(kind) or pyarrow.types.is_fixed_size_list(kind) or pyarrow.types.is_large_list(kind)
        if nested != (name in (X, CONDITION)) or not (nested or pyarrow.types.is_integer(kind)):
            wanted = "lists of numbers" if name in (X, CONDITION) else "whole numbers"
            raise UserError(f"--data.path {plain(path)}: column {name!r} holds {plain(kind, 80)}; it must hold {wanted}")
    x, condition = (nested_array(head[name][:1]) if name in columns else np.zeros((1, 0)) for name in (X, CONDITION))
    if x is None or condition is None:
        raise UserError(f"--data.path {plain(path)}: row 0 has ragged, empty or missing lists")
    check_shape(path, x.shape)
    if condition.ndim != 2:
        raise UserError(f"--data.path {plain(path)}: a condition of {times(condition.shape[1:])}; it must be a list of numbers")
    starts = [0, *itertools.accumulate(groups)]

    def read(start: int, stop: int) -> Iterator[Sample]:
        with pyarrow.parquet.ParquetFile(path) as opened:
            for number, begin in enumerate(starts[:-1]):
                rows = range(max(start - begin, 0), min(stop - begin, groups[number]))
                if len(rows):
                    table = opened.read_row_group(number, columns=columns).slice(rows.start, len(rows)).to_batches()
                    yield from _listed(Path(path).name, begin + rows.start, table, label)

    return Table(path, starts[-1], x.shape[1:], condition.shape[1], label in columns, LENGTH in columns, read)


def _listed(name: str, first: int, batches: list[Any], label: str | None) -> Iterator[Sample]:
    number = first
    for batch in batches:
        for i in range(batch.num_rows):
            at = {column: batch[column][i : i + 1] for column in batch.schema.names}
            x, condition = (nested_array(at[key]) if key in at else None for key in (X, CONDITION))
            label_, length = (at[key][0].as_py() if key in at else None for key in (label, LENGTH))
            content = "x is ragged, empty or missing" if x is None else x[0]
            yield Sample(f"row {number} of {name}", content, None if condition is None else condition[0], label_, length)
            number += 1


def nested_array(column: Any) -> Numbers | None:
    """An arrow array of nested lists of numbers as an array [N, …]; None where they are ragged, empty or missing."""
    import pyarrow
    import pyarrow.compute

    shape = [len(column)]
    while not (pyarrow.types.is_integer(column.type) or pyarrow.types.is_floating(column.type)):
        if column.null_count or not hasattr(column, "flatten") or not hasattr(column.type, "value_type"):
            return None
        lengths = pyarrow.compute.list_value_length(column).unique().to_pylist()
        if len(lengths) != 1 or not lengths[0]:
            return None
        shape.append(lengths[0])
        column = column.flatten()
    if column.null_count:
        return None
    return np.asarray(column.to_numpy(zero_copy_only=False)).reshape(shape)


# --- what a user asks for ---


def read_conditions(path: Path) -> Tensor:
    """[n, K] of a .npy file, or of the tensor `condition` in a .safetensors file. Raises UserError."""
    if path.suffix == ".safetensors":
        found = load_weights(path)[0].get(CONDITION)
        if found is None:
            raise UserError(f"{plain(path)} holds no tensor `condition`")
        return found
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise UserError(f"{plain(path)} is not a .npy file of conditions ({plain(error, 200)})") from None
