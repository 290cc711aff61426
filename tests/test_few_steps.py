"""bench/few_steps.py: runs with and without jumps at equal seconds, scored by steps, each kept when it is done."""

import importlib
import json
import sys
import warnings
from pathlib import Path

import pytest
import torch

from fastdit import config as C
from fastdit.config import UserError
from fastdit.quality import features
from fastdit.recipes import RECIPES

BENCH = str(Path(__file__).parent.parent / "bench")


def made(folder: Path, **options) -> tuple[str, list[float]]:
    """The table, and the numbers of images that runs were trained for."""
    sys.path.insert(0, BENCH)
    warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths")
    script = importlib.import_module("few_steps")
    features.load_network = lambda device: lambda images: images.float().flatten(1)[:, ::41] / 255
    features.require = lambda: None
    RECIPES["cats"] = C.replace(
        RECIPES["cats"],
        data={"num_images": 200},
        model={"patch": 8, "depth": 1, "width": 32, "num_heads": 2},
        train={"batch": 16},
        parallel={"precision": "fp32", "threads": 1},
    )
    measure, trained, said = script.measure, [], []

    def counted(config, *args):
        trained.append(config.train.images)
        return measure(config, *args)

    script.measure, script.table = counted, lambda entries, plain=script.table: said.append(plain(entries)) or said[-1]
    script.seconds_per_step = lambda options, world: {"plain": 1.0, "jumps": 1.2, "ratio": 1.2}
    settings = {"images": 64, "share": 0.5, "seeds": 1, "num": 20, "packs": str(folder / "packs")}
    settings |= {"results": str(folder / "results"), "docs": str(folder / "docs"), **options}
    script.few_steps(script.Options(**settings))
    return said[0], trained


def test_runs_have_equal_seconds_and_are_not_made_twice(run_ranks, tmp_path):
    [(table, trained)] = run_ranks(1, made, tmp_path, init=False)
    assert trained == [64, round(64 / 1.1)]
    [path] = (tmp_path / "results").glob("few-steps-*.json")
    plain, jumps = json.loads(path.read_text())
    assert (plain["row"], jumps["row"]) == ("plain", "jumps")
    for entry in (plain, jumps):
        assert {"20", "4", "2", "1"} <= entry["points"].keys()
    assert jumps["points"]["images"] == 58
    assert table.count("\n") == 1 + 8
    assert "| plain | 1 | 20 |" in table
    assert " 1.00 × |" in table
    assert (tmp_path / "docs" / "few-steps.png").stat().st_size > 1000
    [(again, trained)] = run_ranks(1, made, tmp_path, init=False)
    assert (again, trained) == (table, [])


def test_what_cannot_be_is_refused():
    sys.path.insert(0, BENCH)
    script = importlib.import_module("few_steps")
    with pytest.raises(UserError, match="--share a share"):
        script.few_steps(script.Options(share=0.0))


def test_steps_are_timed_in_turns(run_ranks, tmp_path):
    [pace] = run_ranks(1, paced, tmp_path, init=False)
    assert set(pace) == {"plain", "jumps", "ratio"}
    assert all(value > 0 for value in pace.values())


def paced(folder: Path) -> dict[str, float]:
    from fastdit.runtime import ranks

    sys.path.insert(0, BENCH)
    script = importlib.import_module("few_steps")
    model = {"patch": 8, "depth": 1, "width": 32, "num_heads": 2}
    RECIPES["cats"] = C.replace(RECIPES["cats"], data={"num_images": 200}, model=model, parallel={"threads": 1})
    world = ranks.World(0, 1, 0, 1, torch.device("cpu"))
    return script.seconds_per_step(script.Options(timed=5, packs=str(folder / "packs")), world)
