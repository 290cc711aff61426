"""A LeRobot dataset folder, of format v2 or v3, as chunks of actions: the data of a policy for a robot of one's own.

A sample is the next 16 actions (x), the state before the first (its condition) and the task (its class, where there are
several). Near the end of an episode fewer are left, and the sample's length says how many. Videos are not read.

    meta/info.json                                what the columns hold
    meta/tasks.jsonl, or meta/tasks.parquet (v3)  the tasks' names
    data/chunk-000/*.parquet                      a row for each step: action, observation.state, episode_index, frame_index
"""

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastdit.config import DataConfig, UserError, plain
from fastdit.data.arrays import ArraySource, Sample, nested_array
from fastdit.runtime.files import json_lines, read_file

INFO = "meta/info.json"
LIMIT = 1 << 26  # bytes of it
ACTION, STATE, EPISODE, FRAME, TASK = "action", "observation.state", "episode_index", "frame_index", "task_index"
VERSIONS = ("v2.", "v3.")


class Episode(NamedTuple):
    """Where an episode is."""

    number: int
    file: Path
    rows: NDArray[np.int64]  # of the file, in the order of their frames
    task: int


def is_lerobot(folder: str) -> bool:
    return os.path.isfile(os.path.join(os.path.expanduser(folder), INFO))


def open_lerobot(data: DataConfig) -> ArraySource:
    """The episodes of a LeRobot dataset; --data.num_images of them. Raises UserError, one line, for what is none."""
    import pyarrow.parquet

    assert data.path is not None
    root = Path(data.path).expanduser()
    widths = _widths(root)
    names = _tasks(root) if data.label_column else {}
    if len(names) < 2:
        names = {}  # one task is no class
    files = sorted(p for p in root.glob("data/*/*.parquet") if p.is_file() and not p.is_symlink())
    episodes = sorted(episode for file in files for episode in _episodes(file, bool(names)))
    if not episodes:
        raise UserError(f"--data.path {plain(data.path)}: no episodes in data/*/*.parquet of this LeRobot dataset")
    repeated = [b.number for a, b in itertools.pairwise(episodes) if a.number == b.number]
    if repeated:
        raise UserError(f"--data.path {plain(data.path)}: episode {repeated[0]} is in two files")
    order = sorted(names)
    read: dict[Path, Any] = {}  # the file read last: episodes follow each other in it

    def samples(start: int, stop: int) -> Iterator[Sample]:
        for episode in episodes[start:stop]:
            if episode.file not in read:
                read.clear()
                read[episode.file] = pyarrow.parquet.read_table(episode.file, columns=[ACTION, STATE])
            table = read[episode.file].take(episode.rows).combine_chunks()
            actions, states = (nested_array(table[key].chunk(0)) for key in (ACTION, STATE))
            name = f"episode {episode.number} of {episode.file.name}"
            if actions is None or states is None:
                yield Sample(name, "action or observation.state is ragged, empty or missing")
                continue
            for t in range(len(actions)):
                x = np.zeros((actions.shape[1], data.horizon), np.float64)
                length = min(data.horizon, len(actions) - t)
                x[:, :length] = actions[t : t + length].T
                label = order.index(episode.task) if episode.task in names else None
                yield Sample(f"step {t} of {name}", x, states[t], label, length)

    return ArraySource(
        name=plain(data.path, 4096),
        length=min(len(episodes), data.num_images or len(episodes)),
        shape=(widths[ACTION], data.horizon),
        condition=widths[STATE],
        labelled=bool(names),
        lengths=True,
        samples=samples,
        normaliser=data.normaliser,
        class_names=tuple(names[n] for n in order),
        chunk=8,
        items="episodes",
        transform=f"chunks of {data.horizon} actions",
    )


def _widths(root: Path) -> dict[str, int]:
    """Numbers in an action and in a state, by meta/info.json."""
    try:
        info = json.loads(read_file(root / INFO, LIMIT))
        version = info["codebase_version"]
        if not str(version).startswith(VERSIONS):
            raise ValueError(f"format {plain(version, 20)}, known are v2 and v3")
        shapes = {name: info["features"][name]["shape"] for name in (ACTION, STATE)}
        for name, shape in shapes.items():
            if not (isinstance(shape, list) and len(shape) == 1 and type(shape[0]) is int and 0 < shape[0] <= 1 << 16):
                raise ValueError(f"{name} has shape {plain(shape, 40)}, expected one number")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        said = f"it has no {error}" if isinstance(error, KeyError) else plain(error, 200)
        raise UserError(f"--data.path {plain(root / INFO)}: not that of a LeRobot dataset ({said})") from None
    return {name: shape[0] for name, shape in shapes.items()}


def _tasks(root: Path) -> dict[int, str]:
    """The tasks' names by their numbers; empty where the dataset does not say."""
    import pyarrow.parquet

    lines, table = root / "meta/tasks.jsonl", root / "meta/tasks.parquet"
    try:
        if lines.is_file():
            rows = list(json_lines(read_file(lines, LIMIT).decode()))
        elif table.is_file():
            rows = pyarrow.parquet.read_table(table).to_pylist()
        else:
            return {}
        # Of v3, written by pandas, the name may be the table's index.
        return {int(row[TASK]): plain(row.get("task", row.get("__index_level_0__"))) for row in rows}
    except Exception as error:
        raise UserError(f"--data.path {plain(root)}: its tasks cannot be read ({plain(error, 100)})") from None


def _episodes(file: Path, tasks: bool) -> list[Episode]:
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(file).names
        wanted = [EPISODE, FRAME, *([TASK] if tasks else [])]
        missing = [name for name in (ACTION, STATE, *wanted) if name not in names]
        if missing:
            raise ValueError(f"it has no column {missing[0]}")
        table = pyarrow.parquet.read_table(file, columns=wanted)
        episode, frame, *task = (np.asarray(table[name]).astype(np.int64) for name in wanted)
    except Exception as error:
        raise UserError(f"--data.path {plain(file)}: not the episodes of a LeRobot dataset ({plain(error, 100)})") from None
    order = np.lexsort((frame, episode))
    numbers, starts = np.unique(episode[order], return_index=True)
    rows = np.split(order, starts[1:]) if len(order) else []
    return [Episode(int(n), file, r, int(task[0][r[0]]) if task else 0) for n, r in zip(numbers, rows, strict=True)]
