"""A run's folder: what config.json may hold, a run of the format before, and what a resumed run may be changed in."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastdit import config as C
from fastdit import train
from fastdit.command import parse_run
from fastdit.config import Config, UserError
from fastdit.recipes import RECIPES
from fastdit.runtime.resuming import differences
from fastdit.runtime.run import load_config, save_config

HERE = Path(__file__).parent
OLD = HERE / "data" / "run-0.1"  # fastdit 0.1's: 48 of 96 images, and what it went on to lose
LOSSES = [0.4681696891784668, 0.4860428273677826, 0.4987143278121948, 0.43516942858695984, 0.45014917850494385]
LOSSES += [0.4436303973197937]


def run(config: Config, on_purpose: bool = False) -> int:
    return train.train(config, on_purpose)


def at(folder: Path, config: Config) -> Config:
    return C.replace(config, run={"folder": str(folder / "runs")}, data={"packs": str(folder / "packs")})


@pytest.fixture
def old(tmp_path) -> Path:
    folder = tmp_path / "runs" / "old"
    shutil.copytree(OLD, folder)
    return folder


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_of_the_format_before_goes_on_as_it_would_have(old, run_ranks, tmp_path):
    config = at(tmp_path, load_config(old / "config.json"))
    assert (config.data.crop, config.diffusion.prediction, config.train.lr_decay) == ("none", "x0", "cosine")
    assert run_ranks(1, run, config, init=False) == [0]
    assert [line["loss"] for line in lines(old)] == pytest.approx(LOSSES, rel=1e-5)
    assert json.loads((old / "config.json").read_text())["format"] == 2
    assert load_config(old / "config.json") == config


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [("diffusion", "min_snr", 5.0), ("parallel", "residual", "fp32")],
)
def test_a_setting_that_is_gone_is_refused_where_it_was_used(old, group, name, value):
    data = json.loads((old / "config.json").read_text())
    data[group][name] = value
    (old / "config.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=rf"config\.json: {group}\.{name} is {value!r}, which is no longer an option"):
        load_config(old / "config.json")


def test_sources_of_the_format_before_become_paths(old):
    data = json.loads((old / "config.json").read_text())
    data["data"] |= {"source": "hub", "path": "a/b", "split": "test", "revision": "v1", "vae": "c/d", "vae_revision": "v2"}
    data["model"]["num_classes"] = 0
    data["sample"] |= {"guidance_low": 0.25, "guidance_high": 0.5}
    (old / "config.json").write_text(json.dumps(data))
    config = load_config(old / "config.json")
    assert (config.data.path, config.data.vae, config.data.label_column) == ("a/b:test@v1", "c/d@v2", None)
    assert config.sample.guidance_interval == (0.25, 0.5)


def test_another_format_is_refused(tmp_path):
    save_config(RECIPES["cats"], tmp_path / "config.json")
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(data | {"format": 3}))
    with pytest.raises(UserError, match="format 3; this version reads 1 and 2"):
        load_config(tmp_path / "config.json")


def test_a_run_is_named_by_its_folder_and_changed_on_purpose(old, run_ranks, tmp_path, monkeypatch):
    """`train.py RUN --flag`: what may change is changed, said and kept; what may not is refused."""
    monkeypatch.chdir(tmp_path)
    config, on_purpose = parse_run(["runs/old", "--train.images", "128", "--lr", "5e-4"], "train.py", "")
    assert on_purpose
    changed = {d.partition(":")[0] for d in differences(config, load_config(old / "config.json"))}
    assert changed <= {"train.images", "train.lr", "run.folder", "model.channels", "model.num_classes", "model.input_size"}
    config = at(tmp_path, config)
    [without] = run_ranks(1, refused, config, False, init=False)
    assert "train.images: 128 here, 96 there" in without
    assert f"or change the run on purpose: train.py {old}" in without
    assert run_ranks(1, run, config, True, init=False) == [0]
    assert [line["images"] for line in lines(old)] == [16, 32, 48, 64, 80, 96, 112, 128]
    assert lines(old)[2]["loss"] == LOSSES[2]
    [kept] = [json.loads(line) for line in (old / "changes.jsonl").read_text().splitlines()]
    assert kept["images"] == 48
    assert sorted(change.partition(":")[0] for change in kept["changed"]) == ["train.images", "train.lr"]
    assert load_config(old / "config.json").train.images == 128
    seeded = C.replace(config, run={"seed": 5})
    [said] = run_ranks(1, refused, seeded, True, init=False)
    assert "run.seed: 5 here, 0 there" in said
    bf16 = C.replace(config, parallel={"precision": "bf16"})
    [said] = run_ranks(1, refused, bf16, True, init=False)
    assert "parallel.precision: bf16 here, fp32 there" in said


def refused(config: Config, on_purpose: bool) -> str:
    with pytest.raises(UserError) as error:
        train.train(config, on_purpose)
    return str(error.value)


def test_changed_data_are_refused_by_name(old, run_ranks, tmp_path):
    """The checkpoint knows which data it was trained on: 64 cats; with 80 the run would go on in another order."""
    config = at(tmp_path, load_config(old / "config.json"))
    half = C.replace(config, run={"name": "new"}, train={"images": 48})
    assert run_ranks(1, run, half, init=False) == [0]
    for path in (tmp_path / "packs").iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    new = tmp_path / "runs" / "new"
    data = json.loads((new / "config.json").read_text())
    data["data"]["num_images"] = 80
    (new / "config.json").write_text(json.dumps(data))
    [said] = run_ranks(
        1, refused, at(tmp_path, C.replace(load_config(new / "config.json"), train={"images": 96})), True, init=False
    )
    assert "the data are not those the run was trained on (images: 64 before, 80 now" in said
    assert "--train.init_from" in said


def test_a_folder_that_is_no_run_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    with pytest.raises(UserError, match=r"pictures holds no config\.json: it is not the folder of a run"):
        parse_run(["pictures"], "train.py", "")


def test_own_pictures_need_one_flag(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tabby", "black"):
        (tmp_path / "my cats" / name).mkdir(parents=True)
    config, _ = parse_run(["--data.path", "my cats"], "train.py", "")
    assert (config.run.name, config.model.num_classes, config.data.crop) == ("my-cats", 2, "center")
    config, _ = parse_run(["cats-256", "--data.path", "my cats"], "train.py", "")
    assert (config.model.input_size, config.model.channels, config.diffusion.clip_x0) == ((32, 32), 4, False)
    config, _ = parse_run(["--data.image_size", "64", "64"], "train.py", "")
    assert (config.run.name, config.model.input_size) == ("cats", (64, 64))
    config, _ = parse_run(["--width", "320"], "train.py", "")
    assert config.model.num_heads == 5


def test_help_comes_before_torch():
    """--help is answered in under two seconds: torch alone takes that long to import."""
    verb = [str(HERE.parent / "fastdit" / "train.py"), "--help"]
    ran = subprocess.run([sys.executable, "-X", "importtime", *verb], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-500:]
    assert "--train.lr" in ran.stdout
    assert not any(line.rpartition("|")[2].strip() == "torch" for line in ran.stderr.splitlines())
