"""A LeRobot dataset in its documented layouts: what is read is what was written, and bad folders are refused in one line."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fastdit import config as C
from fastdit.config import UserError
from fastdit.data import encoding
from fastdit.data.normaliser import Normaliser
from fastdit.recipes import RECIPES
from fastdit.runtime import rng
from fastdit.runtime.ranks import World

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
LENGTHS = (20, 5, 31)  # steps of each episode
TASKS = ["pick up the cup", "open the drawer"]
HORIZON = 16


def quiet(line: str) -> None:
    pass


def episodes() -> list[dict[str, np.ndarray]]:
    g = np.random.default_rng(0)
    return [
        {
            "action": g.normal(size=(n, 3)).astype(np.float32),
            "observation.state": g.normal(2, 5, size=(n, 7)).astype(np.float32),
            "frame_index": np.arange(n),
            "episode_index": np.full(n, i),
            "task_index": np.full(n, i % 2),
        }
        for i, n in enumerate(LENGTHS)
    ]


def table(parts: list[dict[str, np.ndarray]], shuffled: bool = False) -> pa.Table:
    whole = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    order = np.random.default_rng(1).permutation(len(whole["action"])) if shuffled else slice(None)
    columns = {key: pa.array(list(v[order])) if v.ndim == 2 else pa.array(v[order]) for key, v in whole.items()}
    return pa.table({**columns, "timestamp": pa.array(whole["frame_index"][order] / 30, pa.float32())})


def info(version: str) -> dict[str, object]:
    def feature(dtype: str, n: int) -> dict[str, object]:
        return {"dtype": dtype, "shape": [n], "names": None}

    features = {"action": feature("float32", 3), "observation.state": feature("float32", 7)}
    features |= {name: feature("int64", 1) for name in ("frame_index", "episode_index", "task_index", "index")}
    return {"codebase_version": version, "fps": 30, "total_episodes": len(LENGTHS), "features": features}


def write(root: Path, version: str) -> Path:
    """v2: a file for each episode and tasks.jsonl. v3: many episodes in a file, and tasks.parquet as pandas writes it."""
    data = root / "data/chunk-000"
    data.mkdir(parents=True)
    (root / "meta").mkdir()
    (root / "meta/info.json").write_text(json.dumps(info(version)))
    if version == "v2.1":
        for i, episode in enumerate(episodes()):
            pq.write_table(table([episode]), data / f"episode_{i:06d}.parquet")
        tasks = [json.dumps({"task_index": i, "task": task}) + "\n" for i, task in enumerate(TASKS)]
        (root / "meta/tasks.jsonl").write_text("".join(tasks))
    else:
        pq.write_table(table(episodes(), shuffled=True), data / "file-000.parquet")
        pq.write_table(pa.table({"task_index": [0, 1], "__index_level_0__": TASKS}), root / "meta/tasks.parquet")
    return root


def settings(path: Path, packs: Path, **data: object) -> C.Config:
    return C.replace(RECIPES["cats"], data={"path": str(path), "packs": str(packs), **data}, model={"patch": 1})


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_a_pack_holds_the_chunks_of_every_step(tmp_path, version):
    config = settings(write(tmp_path / "own", version), tmp_path / "packs", normaliser="min_max")
    pack = encoding.open_pack(config, ALONE, quiet)
    m = pack.manifest
    assert (m.count, m.image_shape, m.condition, m.lengths) == (sum(LENGTHS), (3, HORIZON), 7, True)
    assert m.class_names == TASKS
    batch = pack.batch(0, m.count)
    back = torch.empty(m.count, dtype=torch.int64)
    back[rng.order(0, 0, m.count)] = torch.arange(m.count)
    own = Normaliser.from_dict(m.normaliser)
    actions, states = own.x.physical(batch.x0)[back], own.condition.physical(batch.condition)[back]
    n = 0
    for i, episode in enumerate(episodes()):
        for t in range(LENGTHS[i]):
            left = min(HORIZON, LENGTHS[i] - t)
            assert batch.length[back][n] == left
            assert batch.y[back][n] == i % 2
            np.testing.assert_allclose(actions[n, :, :left].T, episode["action"][t : t + left], atol=1e-5)
            np.testing.assert_allclose(states[n], episode["observation.state"][t], atol=1e-5)
            n += 1


def test_one_task_is_no_class_and_labels_may_be_left_out(tmp_path):
    root = write(tmp_path / "own", "v2.1")
    config = settings(root, tmp_path / "packs", label_column=None)
    assert not encoding.open_pack(config, ALONE, quiet).manifest.labelled
    (root / "meta/tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": TASKS[0]}) + "\n")
    assert not encoding.open_pack(settings(root, tmp_path / "packs"), ALONE, quiet).manifest.labelled


def test_so_many_episodes_are_used(tmp_path):
    config = settings(write(tmp_path / "own", "v3.0"), tmp_path / "packs", num_images=2)
    assert encoding.open_pack(config, ALONE, quiet).manifest.count == sum(LENGTHS[:2])


def spoil_info(root: Path, **changes: object) -> None:
    (root / "meta/info.json").write_text(json.dumps({**info("v2.1"), **changes}))


BAD = {
    "version": (lambda r: spoil_info(r, codebase_version="v1.6"), r"info\.json: not .* \(format v1\.6, known are v2 and v3\)$"),
    "features": (lambda r: spoil_info(r, features={}), r"info\.json: not that of a LeRobot dataset \(it has no 'action'\)$"),
    "torn": (lambda r: (r / "meta/info.json").write_text("{"), r"info\.json: not that of a LeRobot dataset \("),
    "no data": (
        lambda r: [p.unlink() for p in r.glob("data/*/*")],
        r"own: no episodes in data/\*/\*\.parquet of this LeRobot dataset$",
    ),
    "column": (
        lambda r: pq.write_table(table(episodes()).drop(["action"]), r / "data/chunk-000/episode_000001.parquet"),
        r"episode_000001\.parquet: not the episodes of a LeRobot dataset \(it has no column action\)$",
    ),
    "twice": (
        lambda r: pq.write_table(table(episodes()[:1]), r / "data/chunk-000/episode_000009.parquet"),
        r"own: episode 0 is in two files$",
    ),
    "damaged": (
        lambda r: (r / "data/chunk-000/episode_000001.parquet").write_bytes(b"PAR1" * 9),
        r"episode_000001\.parquet: not the episodes of a LeRobot dataset \(",
    ),
    "width": (
        lambda r: spoil_info(r, features={**info("v2.1")["features"], "observation.state": {"shape": [6]}}),
        r"samples cannot be used; .*a condition of 7 numbers, expected 6",
    ),
    "nan": (
        lambda r: pq.write_table(
            table([{**episodes()[1], "observation.state": np.full((5, 7), np.nan)}]),
            r / "data/chunk-000/episode_000001.parquet",
        ),
        r"'step 0 of episode 1 of episode_000001\.parquet': condition has NaN",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_folder_is_one_line(tmp_path, what):
    root = write(tmp_path / "own", "v2.1")
    spoil, said = BAD[what]
    spoil(root)
    with pytest.raises(UserError) as error:
        encoding.ensure(settings(root, tmp_path / "packs"), ALONE, quiet)
    assert re.search(said, str(error.value)), error.value
    assert "\n" not in str(error.value)
