"""bench/sweep.py: settings of the cats compared on a split of their training set."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from fastdit import config as C
from fastdit.config import UserError
from fastdit.data.cats import Cats
from fastdit.quality import features
from fastdit.recipes import RECIPES

BENCH = str(Path(__file__).parent.parent / "bench")


def script():
    sys.path.insert(0, BENCH)
    return importlib.import_module("sweep")


def made(folder: Path, *run: str) -> None:
    sweep = script()
    features.load_network = lambda device: lambda images: images.float().flatten(1)[:, ::41] / 255
    model = {"patch": 8, "depth": 1, "width": 32, "num_heads": 2}
    RECIPES["cats"] = C.replace(RECIPES["cats"], model=model, parallel={"precision": "fp32", "threads": 1})
    sweep.sweep(sweep.Options(run=run, images=96, num=16, cats=400, results=str(folder)))


def test_no_look_is_on_both_sides_of_the_split():
    split = script().Split(2_000, 32, 0)
    looks = [tuple(cat[[0, 1, 2, 4]]) for cat in Cats(2_000, 32).cats]
    kept, trained = ({looks[i] for i in part.tolist()} for part in (split.kept, split.trained))
    assert not kept & trained
    assert len(split.kept) + len(split.trained) == 2_000
    assert 1 / 12 < len(split.kept) / 2_000 < 1 / 6


def test_an_epoch_of_the_split_has_each_training_cat_once():
    split = script().Split(400, 32, 3)
    count = len(split.trained)
    whole = split.batch(0, count)
    parts = [split.batch(first, min(64, count - first)) for first in range(0, count, 64)]
    assert torch.equal(whole.x0, torch.cat([part.x0 for part in parts]))
    assert torch.equal(whole.y, torch.cat([part.y for part in parts]))
    assert sorted(whole.y.tolist()) == sorted(split.labels[split.trained].tolist())
    across = split.batch(count - 5, 10)
    assert torch.equal(across.x0[:5], whole.x0[-5:])
    assert torch.equal(across.x0[5:], split.batch(count, 5).x0)
    assert not torch.equal(split.batch(count, count).x0, whole.x0)


def test_a_run_is_kept_with_its_settings(run_ranks, tmp_path, capsys):
    assert run_ranks(1, made, tmp_path, "small", "train.batch=8", "diffusion.flow_t_logit=[0,1]", init=False) == [None]
    assert run_ranks(1, made, tmp_path, "plain", init=False) == [None]
    assert run_ranks(1, made, tmp_path, "small", "train.batch=4", init=False) == [None]
    [path] = tmp_path.glob("sweep-*.json")
    plain, small = json.loads(path.read_text())
    assert (plain["row"], plain["settings"]) == ("plain", [])
    assert (small["row"], small["settings"]) == ("small", ["train.batch=4"])  # the last of this name
    for entry in (plain, small):
        assert {"kid", "swd", "coverage", "nearest"} == entry["points"]["scores"].keys()
        assert entry["points"]["loss"] > 0
    table = script().table([plain, small])
    assert table.count("\n") == 3
    assert "| small | train.batch=4 | 96 |" in table


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ((), "needs a name"),
        (("train.batch=8",), "needs a name"),
        (("small", "train.bach=8"), "did you mean batch"),
        (("small", "batch=8"), "not GROUP.NAME=VALUE"),
        (("small", "train.lr=-1"), "lr"),
    ],
)
def test_what_cannot_be_is_refused(run, said, tmp_path):
    sweep = script()
    with pytest.raises(UserError, match=said):
        sweep.sweep(sweep.Options(run=run, results=str(tmp_path)))


def test_settings_are_laid_over_the_recipe():
    sweep = script()
    config = sweep.settings(
        ["train.lr=5e-3", "train.lr_decay=constant", "diffusion.flow_t_logit=[0, 1]"], sweep.Options(("x",))
    )
    assert (config.train.lr, config.train.lr_decay) == (5e-3, "constant")
    assert config.diffusion.flow_t_logit == (0, 1)
    assert config.train.warmup_images == 1_000
