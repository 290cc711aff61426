"""Where a run's checkpoints are: in its folder, or on a disk that the user named; found by every verb, and never by a link."""

import os
import re
import shutil
from pathlib import Path

import pytest

from fastdit import config as C
from fastdit import evaluate, export, report, sample, train
from fastdit.command import parse_run
from fastdit.config import Config, UserError
from fastdit.planning import memory
from fastdit.recipes import RECIPES
from fastdit.runtime import saved
from fastdit.runtime.run import checkpoints_of, load_config, save_config
from fastdit.weights.folder import load, locate

BATCH = 16


def tiny(folder: Path, disk: Path | None, **groups) -> Config:
    """Four steps of 16 images, a checkpoint after every second one."""
    config = C.replace(
        RECIPES["cats"],
        run={"name": "tiny", "folder": str(folder / "runs"), "checkpoints": None if disk is None else str(disk)},
        data={"num_images": 64, "packs": str(folder / "packs")},
        model={"patch": 8, "depth": 1, "width": 32, "num_heads": 2},
        sample={"num": 2, "steps": 1},
        train={"images": 4 * BATCH, "batch": BATCH, "warmup_images": 32, "lr_decay": "constant"},
        log={"print_every": BATCH, "sample_every": 10**6, "save_every": 2 * BATCH},
        parallel={"threads": 1},
    )
    return C.replace(config, **groups)


def run(config: Config, on_purpose: bool = False) -> int:
    return train.train(config, on_purpose)


def refused(config: Config, on_purpose: bool = False) -> str:
    with pytest.raises(UserError) as error:
        train.train(config, on_purpose)
    return str(error.value)


def names(folder: Path) -> list[int]:
    return [int(name) for name in saved.complete(folder)]


def verbs(run: Path, out: Path) -> None:
    sample.sample(sample.Options(str(run), num_images=1, steps=1, out=str(out / "pictures")))
    evaluate.evaluate(evaluate.Options(str(run), num_images=16, metric="none", steps=1, out=str(out / "evaluations")))
    export.export(export.Options(str(run), out=str(out / "export")))
    export.export(export.Options(str(run), weights="live", out=str(out / "live")))
    report.report(report.Options(str(run)))


@pytest.fixture(scope="module")
def first(run_ranks, tmp_path_factory) -> Path:
    """A finished run whose checkpoints are on another disk: runs/tiny and disk/tiny."""
    folder = tmp_path_factory.mktemp("first")
    (folder / "disk").mkdir()
    assert run_ranks(1, run, tiny(folder, folder / "disk"), init=False) == [0]
    return folder


@pytest.fixture
def moved(first, tmp_path) -> Path:
    """A copy that is a run of its own: its checkpoints' file says that they are this run's."""
    shutil.copytree(first, tmp_path, dirs_exist_ok=True)
    config = tiny(tmp_path, tmp_path / "disk")
    save_config(load_config(first / "runs" / "tiny" / "config.json"), tmp_path / "runs" / "tiny" / "config.json")
    config = C.replace(load_config(tmp_path / "runs" / "tiny" / "config.json"), run=vars(config.run), data=vars(config.data))
    save_config(config, tmp_path / "runs" / "tiny" / "config.json")
    (tmp_path / "disk" / "tiny" / "run").write_text(f"{tmp_path / 'runs' / 'tiny'}\n")
    return tmp_path


def test_checkpoints_on_another_disk_are_written_recorded_and_found(moved, run_ranks):
    folder, disk = moved / "runs" / "tiny", moved / "disk"
    assert not (folder / "checkpoints").exists()
    assert names(disk / "tiny") == [2 * BATCH, 4 * BATCH]
    assert load_config(folder / "config.json").run.checkpoints == str(disk)
    run_ranks(1, verbs, folder, moved / "out", init=False)
    for what in ("export", "live"):
        assert load_config(moved / "out" / what / "config.json").run.checkpoints is None  # a disk of ours is nobody's concern
    # The same command goes on, with the setting and without it; so does the run by its folder.
    longer = {"train": {"images": 6 * BATCH, "batch": BATCH, "warmup_images": 32, "lr_decay": "constant"}}
    assert run_ranks(1, run, tiny(moved, disk, **longer), init=False) == [0]
    assert names(disk / "tiny") == [2 * BATCH, 4 * BATCH, 6 * BATCH]
    longer["train"]["images"] = 8 * BATCH
    assert run_ranks(1, run, tiny(moved, None, **longer), init=False) == [0]
    assert names(disk / "tiny") == [4 * BATCH, 6 * BATCH, 8 * BATCH]
    assert load_config(folder / "config.json").run.checkpoints == str(disk)
    assert not (folder / "checkpoints").exists()


def test_a_checkpoint_elsewhere_is_opened_by_its_own_path(moved):
    newest = saved.newest(moved / "disk" / "tiny")
    for source in (newest, newest / "ema.safetensors"):
        found = locate(source)
        assert (found.home, found.images_seen) == (moved / "runs" / "tiny", 4 * BATCH)
    assert load(newest, precision="fp32").run == load_config(moved / "runs" / "tiny" / "config.json")
    (moved / "disk" / "tiny" / "run").write_text("/etc\n")
    with pytest.raises(UserError, match="the run in /etc does not keep its checkpoints there"):
        locate(newest)


def test_a_disk_that_is_gone_is_a_line(moved, run_ranks, tmp_path):
    shutil.move(moved / "disk", moved / "gone")
    said = "which is not there; mount its disk, or say where they were moved"
    assert said in run_ranks(1, refused, tiny(moved, moved / "disk"), init=False)[0]
    with pytest.raises(UserError, match=said):
        locate(moved / "runs" / "tiny")
    new = C.replace(tiny(moved, moved / "disk"), run={"name": "new"})
    assert (
        f"--run.checkpoints {moved / 'disk'}: no such folder; is its disk mounted?" in run_ranks(1, refused, new, init=False)[0]
    )
    assert not (moved / "disk").exists()
    assert not (moved / "runs" / "new").exists()
    # Once it is back, so is the run.
    shutil.move(moved / "gone", moved / "disk")
    assert locate(moved / "runs" / "tiny").images_seen == 4 * BATCH


def test_checkpoints_are_moved_on_purpose(moved, run_ranks):
    disk, other, folder = moved / "disk", moved / "other", moved / "runs" / "tiny"
    other.mkdir()

    def asked(*more: str) -> Config:
        config, on_purpose = parse_run([str(folder), *more], "train.py", "")
        assert on_purpose
        return C.replace(config, run={"folder": str(moved / "runs")})

    # Not moved yet, and not asked for by the run's folder.
    [said] = run_ranks(1, refused, asked("--run.checkpoints", str(other), "--train.images", "96"), True, init=False)
    assert f"keeps its checkpoints in {disk / 'tiny'}; move that to {other / 'tiny'}, then train.py {folder}" in said
    shutil.move(disk / "tiny", other / "tiny")
    [said] = run_ranks(1, refused, tiny(moved, other), init=False)
    assert f"move that to {other / 'tiny'}, then train.py {folder} --run.checkpoints {other}" in said
    assert run_ranks(1, run, asked("--run.checkpoints", str(other), "--train.images", "96"), True, init=False) == [0]
    assert names(other / "tiny") == [2 * BATCH, 4 * BATCH, 6 * BATCH]
    assert load_config(folder / "config.json").run.checkpoints == str(other)
    # And home again, into the run's folder.
    shutil.move(other / "tiny", folder / "checkpoints")
    home = asked("--run.checkpoints", "None", "--train.images", "128")
    assert run_ranks(1, run, home, True, init=False) == [0]
    assert names(folder / "checkpoints") == [4 * BATCH, 6 * BATCH, 8 * BATCH]
    assert load_config(folder / "config.json").run.checkpoints is None
    assert locate(folder).images_seen == 8 * BATCH


def test_no_run_takes_the_checkpoints_of_another(moved, run_ranks, tmp_path):
    disk = moved / "disk"
    # A new run of the same name in another folder of runs, by the same setting.
    other = C.replace(tiny(moved, disk), run={"folder": str(moved / "others")})
    [said] = run_ranks(1, refused, other, init=False)
    assert f"{disk / 'tiny'} is there already, and {moved / 'others' / 'tiny'} is a new run" in said
    assert not (moved / "others").exists()
    # A copy of the run's folder: both would write there.
    shutil.copytree(moved / "runs", moved / "copies")
    copied = C.replace(tiny(moved, disk), run={"folder": str(moved / "copies")})
    [said] = run_ranks(1, refused, copied, init=False)
    assert f"belong to the run {moved / 'runs' / 'tiny'}, not to {moved / 'copies' / 'tiny'}" in said
    with pytest.raises(UserError, match="belong to the run"):
        locate(moved / "copies" / "tiny")
    # A run whose folder was moved has them still, for there is no other.
    shutil.rmtree(moved / "runs")
    assert locate(moved / "copies" / "tiny").images_seen == 4 * BATCH
    assert run_ranks(1, run, copied, init=False) == [0]
    assert (disk / "tiny" / "run").read_text() == f"{moved / 'copies' / 'tiny'}\n"


def test_fresh_takes_a_name_that_is_free_in_both_places(moved, run_ranks):
    (moved / "disk" / "tiny-2").mkdir()
    config = C.replace(tiny(moved, moved / "disk", train={"images": BATCH, "batch": BATCH}), run={"fresh": True})
    assert run_ranks(1, run, config, init=False) == [0]
    assert names(moved / "disk" / "tiny-3") == [BATCH]
    assert (moved / "runs" / "tiny-3" / "config.json").is_file()


def test_no_link_and_no_forged_place_is_followed(moved, run_ranks, tmp_path):
    folder, disk = moved / "runs" / "tiny", moved / "disk"
    config = load_config(folder / "config.json")
    # A link in place of the folder, on the other disk or in the run.
    shutil.move(disk / "tiny", disk / "real")
    os.symlink(disk / "real", disk / "tiny")
    with pytest.raises(UserError, match="tiny is a symbolic link, which is not followed"):
        locate(folder)
    os.symlink(disk / "real", folder / "checkpoints")
    with pytest.raises(UserError, match="checkpoints is a symbolic link, which is not followed"):
        checkpoints_of(folder, C.replace(config, run={"checkpoints": None}))
    # A config.json from elsewhere that names somebody's folder of checkpoints.
    (folder / "checkpoints").unlink()
    (disk / "tiny").unlink()
    shutil.move(disk / "real", disk / "tiny")
    (disk / "tiny" / "run").unlink()
    before = sorted(str(p) for p in disk.rglob("*"))
    for said in run_ranks(1, refused, tiny(moved, disk), init=False):
        assert "has no file 'run' that says whose checkpoints it holds" in said
    assert sorted(str(p) for p in disk.rglob("*")) == before


def run_counting_plans(config: Config) -> None:
    check, calls = memory.check, []
    memory.check = lambda *args: calls.append(1) or check(*args)
    assert train.train(config) == 0
    print(f"{len(calls)} plans", flush=True)


def test_a_start_that_has_worked_plans_no_memory_again(run_ranks, tmp_path):
    """The plan traces the model, which takes a second or more. Other settings, other ranks, a new run: it is made."""

    def plans(world: int, images: int, **groups) -> list[int]:
        length = {"images": images, "lr_decay": "constant"}
        config = tiny(tmp_path, None, train={"batch": BATCH // world, "warmup_images": 32, **length}, **groups)
        ends = run_ranks.outcomes(world, run_counting_plans, config, init=False)
        assert [end.code for end in ends] == [0] * world, ends
        return [int(re.search(r"(\d+) plans", end.output)[1]) for end in ends]

    assert plans(1, 4 * BATCH) == [1]
    assert plans(1, 4 * BATCH) == [0]
    assert plans(1, 5 * BATCH) == [1]  # longer: other settings
    assert plans(1, 5 * BATCH, parallel={"threads": 1, "checkpoint_activations": True}) == [1]
    assert plans(2, 5 * BATCH) == [1, 1]
    [newest] = (tmp_path / "runs" / "tiny" / "checkpoints").glob("*80")
    (newest / "checkpoint.json").write_text("{}")
    assert plans(1, 5 * BATCH) == [1]


def killed_before_config(config: Config) -> None:
    from fastdit import train as verb
    from fastdit.runtime import resuming

    def die(*args) -> None:
        os._exit(9)

    resuming.save_config = die
    verb.train(config)


def test_a_start_killed_between_the_two_folders_is_said(run_ranks, tmp_path):
    (tmp_path / "disk").mkdir()
    config = tiny(tmp_path, tmp_path / "disk")
    [end] = run_ranks.outcomes(1, killed_before_config, config, init=False)
    assert end.code == 9
    [said] = run_ranks(1, refused, config, init=False)
    assert f"{tmp_path / 'disk' / 'tiny'} is there already" in said
    assert "delete it" in said
    shutil.rmtree(tmp_path / "disk" / "tiny")
    assert run_ranks(1, run, config, init=False) == [0]
