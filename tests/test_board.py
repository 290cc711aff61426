"""The board of quality per second: each row trains as its users would, for its seconds; what is done is not done again."""

import contextlib
import dataclasses
import importlib
import io
import itertools
import json
import sys
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fastdit import config as C
from fastdit.config import UserError
from fastdit.data import encoding
from fastdit.quality import features
from fastdit.recipes import RECIPES
from fastdit.runtime import ranks
from fastdit.runtime.resuming import differences
from fastdit.runtime.validation import validate

pytest.importorskip("matplotlib")

BENCH = str(Path(__file__).parent.parent / "bench")
SMALL = {"patch": 8, "depth": 1, "width": 32, "num_heads": 2}


def opened(name: str) -> ModuleType:
    """A module of bench/ as it is when bench/board.py runs: its folder comes first on sys.path."""
    if BENCH not in sys.path:
        sys.path.insert(0, BENCH)
    return importlib.import_module(name)


board, rows, page = (opened(name) for name in ("board", "board_rows", "board_page"))


def small(folder: Path, *names: str):
    """Those rows with a tiny network, on few cats."""
    groups = {
        "data": {"num_images": 200, "packs": str(folder / "packs")},
        "model": SMALL,
        "sample": {"steps": 2},
        "parallel": {"precision": "fp32", "threads": 1},
    }
    return {name: rows.ROWS[name]._replace(config=C.replace(rows.ROWS[name].config, **groups)) for name in names}


def pixels(images: torch.Tensor) -> torch.Tensor:
    return images.float().flatten(1)[:, ::41] / 255


def made(folder: Path, names: tuple[str, ...], **options) -> list[str]:
    """Make a board; the rows that were trained for it."""
    warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths")
    features.load_network, features.require = (lambda device: pixels), (lambda: None)
    measure, trained = board.measure, []

    def counted(row, *args):
        trained.append(row.about)
        return measure(row, *args)

    board.measure = counted
    settings = {"seconds": 0.4, "seeds": 1, "num": 20, "packs": str(folder / "packs")}
    settings |= {"results": str(folder / "results"), "docs": str(folder / "docs"), **options}
    board.board(board.Options(**settings), small(folder, *names))
    return trained


def test_a_board_is_made_and_goes_on_where_it_was(run_ranks, tmp_path):
    names = ("seed", "standard", "sit", "before", "ours", "no-ema")
    [outcome] = run_ranks.outcomes(1, made, tmp_path, names, init=False)
    assert outcome.code == 0, outcome.error
    assert outcome.value == [rows.ROWS[name].about for name in names]
    [path] = (tmp_path / "results").iterdir()
    assert path.name in ("board-cpu.json", "board-cpu-fp32.json") or torch.cuda.is_available()
    found = json.loads(path.read_text())
    assert [e["row"] for e in found] == list(names)
    for entry in found:
        assert len(entry["points"]) == len(board.TIMES)
        for share, point in zip(board.TIMES, entry["points"], strict=True):
            assert point["seconds"] >= share * 0.4
            assert point["images"] % entry["settings"]["train"]["batch"] == 0
            assert set(page.FIGURES) <= point.keys()
        assert [p["images"] for p in entry["points"]] == sorted(p["images"] for p in entry["points"])
        assert entry["floor"]["coverage"] > 0.5
    assert (tmp_path / "docs" / "board.png").read_bytes().startswith(b"\x89PNG")
    for name in names:
        assert rows.ROWS[name].about in outcome.output
    assert "real images, held out" in outcome.output

    assert run_ranks(1, made, tmp_path, names, init=False) == [[]]
    both = {"seeds": 2, "rows": ("ours", "sit")}
    assert run_ranks(1, lambda_free, tmp_path, names, both, init=False) == [[rows.ROWS[n].about for n in ("sit", "ours")]]
    kept = json.loads(path.read_text())
    assert sorted((e["row"], e["seed"]) for e in kept) == sorted([*((n, 0) for n in names), ("ours", 1), ("sit", 1)])
    longer = {"seconds": 0.5, "rows": ("ours",)}
    assert run_ranks(1, lambda_free, tmp_path, names, longer, init=False) == [[rows.ROWS["ours"].about]]


def lambda_free(folder: Path, names: tuple[str, ...], options: dict) -> list[str]:
    return made(folder, names, **options)


def fashion(path: Path, first: int) -> str:
    """A parquet file as the hub has Fashion-MNIST: grey pictures of 28×28, ten classes."""
    images, labels = [], [n % 10 for n in range(first, first + 80)]
    for n, label in enumerate(labels, first):
        pixels = np.full((28, 28), 20 * label, np.uint8)
        pixels[4 + n % 7 : 20, 6:22] = 255 - 10 * label
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        images.append({"bytes": file.getvalue(), "path": None})
    pq.write_table(pa.table({"image": images, "label": labels}), path)
    return str(path)


def test_a_board_of_other_pictures_stands_beside_the_cats(run_ranks, tmp_path):
    held = {"data": fashion(tmp_path / "fashion.parquet", 0), "reference": fashion(tmp_path / "test.parquet", 80)}
    names = ("sit", "ours")
    options = {**held, "points": 1}
    assert run_ranks(1, lambda_free, tmp_path, names, options, init=False) == [[rows.ROWS[name].about for name in names]]
    [path] = (tmp_path / "results").iterdir()
    assert path.name.startswith("board-fashion-")
    for entry in json.loads(path.read_text()):
        assert (entry["settings"]["model"]["channels"], entry["settings"]["model"]["num_classes"]) == (1, 10)
        assert (entry["data"], entry["reference"]) == (held["data"], held["reference"])
        assert len(entry["points"]) == 1
        assert entry["points"][0]["nearest"] is not None
    assert (tmp_path / "docs" / "board-fashion.png").exists()
    assert run_ranks(1, lambda_free, tmp_path, names, options, init=False) == [[]]
    # Without held-out pictures the training images are what is left, and the figures say so.
    del options["reference"]
    assert run_ranks(1, lambda_free, tmp_path, ("ours",), options, init=False) == [[rows.ROWS["ours"].about]]
    assert json.loads(path.read_text())[-1]["floor"]["nearest"] is None


def test_every_row_is_valid_and_each_less_is_ours_but_for_one_thing():
    ours = RECIPES["cats"]
    for row in rows.ROWS.values():
        validate(row.config)
        assert row.config.data == ours.data
        wide = row.config.model == rows.BEFORE.model  # what it was before, and one row as wide
        assert (row.config.model.width, row.config.model.depth, row.config.model.patch) == (256 if wide else 192, 6, 4)
    changed = {
        "ddpm": {"diffusion.kind"},
        "velocity": {"diffusion.prediction"},
        "uniform": {"diffusion.flow_t"},
        "plain-mlp": {"model.conv_kernel"},
        "posthoc": {"train.ema"},
        "token-drop": {"model.token_drop"},
        "constant": {"train.lr_decay"},
        "slow": {"train.lr"},
        "wide": {"model.width", "model.num_heads"},
        "batch-8": {"train.batch"},
        "batch-32": {"train.batch", "train.lr", "train.beta2"},
        "no-ema": set(),
    }
    for name, settings in changed.items():
        row = rows.ROWS[name]
        assert {d.partition(":")[0] for d in differences(row.config, ours)} == settings, name
        assert row.averaged == (name != "no-ema")
    assert rows.ROWS["before"].config.diffusion == C.DiffusionConfig(prediction="x0")
    assert (rows.ROWS["before"].config.train.lr, rows.ROWS["slow"].config.train.lr) == (1e-3, 1e-3)
    for name in ("seed", "standard", "sit", "sit-raw"):
        row = rows.ROWS[name]
        assert row.plain
        assert (row.config.train.lr, row.config.train.lr_decay, row.config.train.warmup_images) == (1e-4, "constant", 0)
    assert [rows.ROWS[n].config.model.conv_kernel for n in ("seed", "standard", "sit")] == [4, 0, 0]
    assert [n for n, row in rows.ROWS.items() if not row.averaged] == ["seed", "sit-raw", "no-ema"]
    assert rows.ROWS["standard"].config.diffusion.beta_schedule == "linear"


def schedule_of(folder: Path) -> list[float]:
    """The learning rate of each step of a run at 10 images a second for 100 seconds."""
    row = small(folder, "ours")["ours"]
    world = ranks.init(row.config.parallel)
    with contextlib.closing(encoding.open_pack(row.config, world)) as pack:
        run = rows.Ours(row, world, pack, 100.0)
        rates = []

        def step(*args):
            rates.append(float(run.optimizer.rates(args[-1])[0]))
            return torch.zeros(()), torch.zeros(())

        rows.train.step = step
        for number in range(0, 31):
            run.step(32 * number, 3.2 * number)
    ranks.shutdown()
    return rates


def test_the_learning_rate_ends_with_the_seconds(run_ranks, tmp_path):
    [rates] = run_ranks(1, schedule_of, tmp_path, init=False)
    peak = RECIPES["cats"].train.lr
    assert max(rates) == pytest.approx(peak, rel=0.02)
    assert rates.index(max(rates)) <= 4  # a twelfth of 1,000 images
    assert rates[-1] < 0.02 * peak
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))


def averaged_and_own(folder: Path) -> tuple[bool, bool, bool]:
    row = small(folder, "standard")["standard"]
    world = ranks.init(row.config.parallel)
    with contextlib.closing(encoding.open_pack(row.config, world)) as pack:
        run = rows.Plain(row, world, pack, 1.0)
        start = run.pictures(3)
        for step in range(3):
            run.step(32 * step, 0.1)
        own = {name: p.clone() for name, p in run.model.named_parameters()}
        averaged = run.pictures(3)
        back = all(torch.equal(p, own[name]) for name, p in run.model.named_parameters())
        run.ema = own
        plain = run.pictures(3)
    ranks.shutdown()
    moved = any(not torch.equal(p, average) for p, average in zip(own.values(), run.ema.values(), strict=True))
    return back, bool((averaged.int() - start.int()).abs().max() <= 8) and not moved, not torch.equal(averaged, plain)


def test_others_are_scored_on_averaged_weights_and_train_on_with_their_own(run_ranks, tmp_path):
    assert run_ranks(1, averaged_and_own, tmp_path, init=False) == [(True, True, True)]


def entry(row: str, seed: int, kids: list[float], joules: float | None) -> dict:
    figures = {"joules": joules, "swd": 0.1, "coverage": 0.0, "nearest": 9.0}
    points = [{"seconds": 10.0 * i, "images": 640 * i, "kid": kid, **figures} for i, kid in enumerate(kids, 1)]
    return {"row": row, "seed": seed, "floor": {"kid": 0.0, "swd": 0.01, "coverage": 0.9, "nearest": 5.0}, "points": points}


def test_the_table_has_the_seeds_spread_and_when_the_goal_was_reached():
    found = [entry("before", 0, [3.0, 1.0], 500.0), entry("ours", 0, [2.0, 0.5], 1000.0), entry("ours", 1, [1.0, 0.1], 3000.0)]
    found.append(entry("seed", 0, [5.0, 4.0], None))
    lines = page.table(found, rows.ROWS).splitlines()
    assert len(lines) == 2 + 3 + 1
    ours = next(line for line in lines if f"| {rows.ROWS['ours'].about} |" in line)
    assert "| 2 | 20 | 1,280 | 0.3 (0.1 … 0.5) |" in ours
    assert ours.endswith("| 15 (10 … 20) | 2 (1 … 3) |")
    assert next(line for line in lines if "the seed repository" in line).endswith("| not reached |  |")
    assert lines[-1] == "| real images, held out | | | | 0 (0 … 0) | 0.01 (0.01 … 0.01) | 0.9 (0.9 … 0.9) | 5 (5 … 5) | | |"
    [kid, coverage] = page.curves(found, rows.ROWS)
    assert {line.name for line in kid.lines} == {"before", "ours", "seed"}
    ours = next(line for line in kid.lines if line.name == "ours")
    assert ours.points == [(10.0, 1.5), (20.0, 0.3)]
    assert list(ours.band) == [(1.0, 2.0), (0.1, 0.5)]
    assert all(y == page.LEAST for line in coverage.lines for _, y in line.points)


def test_energy_is_the_counters_difference_through_their_wrap(monkeypatch):
    counters = iter([{"a": (900, 1000), "b": (5, 1000)}, {"a": (100, 1000), "b": (15, 1000)}, {}])
    monkeypatch.setattr(board.Joules, "_counters", staticmethod(lambda: next(counters)))
    meter = board.Joules(ranks.World(0, 1, 0, 1, torch.device("cpu")))
    assert meter.read() == pytest.approx(210e-6)
    assert meter.read() is None


def test_what_is_wrong_is_one_line(tmp_path):
    for options, said in (
        ({"rows": ("our",)}, "unknown row 'our'; did you mean ours?"),
        ({"seconds": 0.0}, "must be positive"),
        ({"num": 3}, "--num at least 16"),
        ({"points": 6}, "--points 1 to 5"),
        ({"reference": "x"}, "--reference goes with --data"),
    ):
        with pytest.raises(UserError, match=said):
            board.board(dataclasses.replace(board.Options(), **options))
    for text in ("{}", "[1]", "not json"):
        (tmp_path / "board.json").write_text(text)
        with pytest.raises(UserError, match="not a board"):
            board.read(tmp_path / "board.json")
