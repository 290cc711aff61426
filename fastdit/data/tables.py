"""Images in rows of a table with an image column and perhaps a label column: parquet files, or a dataset of the hub.

`datasets` reads both. No code of a dataset's own is run, and a row's `path`, which may name any file of this machine, is never
opened.
"""

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from fastdit.config import DataConfig, UserError, plain
from fastdit.data.source import ImageSource, Row

AT_ONCE = 64  # encoded images held in memory at a time
MAX_NAMES = 10_000  # different strings of a label column; more are captions or ids, not classes


def open_hub(data: DataConfig, path: str, split: str, revision: str, threads: int) -> ImageSource:
    """A dataset of the hub, or a local copy of one. Raises UserError where it cannot be had or has no images."""
    name = f"{path} {split}{revision and '@' + revision}"
    table = _load(data, path, [], path=path, split=split, revision=revision or None)
    commit = re.search("@([0-9a-f]{40})/", " ".join(table.info.download_checksums or {}))
    if commit:
        name, revision = f"{name} commit {commit[1]}", commit[1]
    return _images(data, table, plain(name), revision, threads)


def open_parquet(data: DataConfig, path: str, files: Sequence[str], threads: int) -> ImageSource:
    """Parquet files of the same columns. Raises UserError, which names the file where one of them is at fault."""
    _same_columns(data, files)
    table = _load(data, path, files, path="parquet", data_files=list(files), split="train")
    return _images(data, table, plain(path), "", threads)


def _load(data: DataConfig, named: str, files: Sequence[str], **options: Any) -> Any:
    """The table, its images left encoded. `files`: where to look for the cause if it cannot be loaded."""
    import datasets  # here: it takes a second to import, and a run on a folder of pictures needs none of it

    try:
        table = datasets.load_dataset(**options)
    except Exception as error:  # of the network, the hub, the cache or the files: all are about what was asked for
        for file in files:
            _readable(file)
        where = "" if os.path.exists(os.path.expanduser(named)) else "no such folder, and not loaded from the hub: "
        raise UserError(f"--data.path {plain(named)}: {where}{_reason(error)}") from None
    features = table.features or {}
    if data.image_column not in features:  # the only column of pictures, whatever it is called
        pictures = [column for column, feature in features.items() if _holds_images(feature)]
        if len(pictures) != 1:
            lacks = f"no column {data.image_column!r}, and {'several columns' if pictures else 'no column'} of pictures"
            columns = plain(", ".join(table.column_names or ["unknown"]))
            raise UserError(f"--data.path {plain(named)} has {lacks}; its columns: {columns}")
        table = table.rename_column(pictures[0], data.image_column)
    elif not _holds_images(feature := features[data.image_column]):
        raise UserError(
            f"--data.path {plain(named)}: column {data.image_column!r} holds {plain(feature, 80)}, not encoded pictures"
        )
    return table.cast_column(data.image_column, datasets.Image(decode=False))


def _holds_images(feature: Any) -> bool:
    """Whether a column has the bytes of encoded pictures. `datasets` would take lists of numbers and paths for pictures too."""
    import datasets

    if isinstance(feature, dict):
        feature = feature.get("bytes")
    return isinstance(feature, datasets.Image) or (isinstance(feature, datasets.Value) and "binary" in feature.dtype)


def _same_columns(data: DataConfig, files: Sequence[str]) -> None:
    """Raise UserError naming the first parquet file that cannot be read or differs in the columns that are used."""
    import pyarrow.parquet

    first: dict[str, str] = {}
    for file in files:
        try:
            schema = pyarrow.parquet.read_schema(file)
        except Exception as error:
            raise UserError(f"--data.path {plain(file)}: not a readable parquet file ({_reason(error)})") from None
        for column in filter(None, (data.image_column, data.label_column)):
            kind = str(schema.field(column).type) if column in schema.names else "nothing"
            if first.setdefault(column, kind) != kind:
                raise UserError(
                    f"--data.path {plain(file)}: column {column!r} holds {plain(kind, 80)}, but {plain(first[column], 80)} "
                    f"in {plain(files[0])}"
                )


def _readable(file: str) -> None:
    """Read a parquet file whole. Raises UserError naming it where that fails."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            for _ in opened.iter_batches(AT_ONCE):
                pass
    except Exception as error:
        raise UserError(f"--data.path {plain(file)}: not a readable parquet file ({_reason(error)})") from None


def _reason(error: BaseException) -> str:
    """An error's first line. `datasets` puts the cause below an error that only says that there is one."""
    while type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__
    return plain((str(error).strip().splitlines() or [type(error).__name__])[0])


def _images(data: DataConfig, table: Any, name: str, revision: str, threads: int) -> ImageSource:
    length = min(len(table), data.num_images or len(table))
    if not length:
        raise UserError(f"{name} has no rows")
    names, numbers, labelled = _classes(data, table, name)
    table = table.select_columns([data.image_column, *([data.label_column] if labelled else [])])

    def rows(start: int, stop: int) -> Iterator[Row]:
        for i in range(start, min(stop, length), AT_ONCE):
            end = min(i + AT_ONCE, stop, length)
            try:
                part = table[i:end]
            except Exception as error:  # the cached copy may be damaged or gone
                raise UserError(f"{name}: rows {i} to {end - 1} cannot be read ({_reason(error)})") from None
            labels = part[data.label_column] if labelled else [None] * (end - i)
            for n, (image, label) in enumerate(zip(part[data.image_column], labels, strict=True), i):
                content = (image or {}).get("bytes") or "no image bytes in the row; files it names are not opened"
                yield Row(f"row {n}", content, numbers.get(label) if numbers else label)

    return ImageSource(name, length, data.image_size, labelled, names, rows, threads, data.crop, revision)


def _classes(data: DataConfig, table: Any, name: str) -> tuple[tuple[str, ...], dict[str, int], bool]:
    """The classes' names, the numbers of strings that are labels, and whether there are labels.

    Numbers are classes as they are; a column of strings has its strings for classes, in sorted order.
    """
    import datasets

    feature = table.features.get(data.label_column)
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names), {}, True
    if not isinstance(feature, datasets.Value):
        return (), {}, False
    if "int" in feature.dtype:
        return (), {}, True
    if "string" not in feature.dtype:
        return (), {}, False
    words = sorted(word for word in table.unique(data.label_column) if word is not None)
    if len(words) > MAX_NAMES:
        raise UserError(
            f"{name}: column {data.label_column!r} has {len(words):,} different strings, and at most {MAX_NAMES:,} can be "
            "classes (--data.label_column names another column, and None trains without classes)"
        )
    return tuple(words), {word: n for n, word in enumerate(words)}, bool(words)
