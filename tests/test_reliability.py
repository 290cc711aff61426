"""Whatever may happen to a run: kills, signals, hangs, NaN, full memory. It goes on bit for bit, or ends in a line.

Each run is a tiny one of the default recipe. Two runs are the same where their last checkpoints are, in every byte: weights,
moments, averages, counts; and their curves, in every bit of every loss and norm.
"""

import contextlib
import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.utils.tensorboard  # here, as what follows: a rank is a fork, and need not import it again

# ruff: noqa: F401
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler
from torch.distributed.tensor import DTensor

from fastdit import command, evaluate, export, pictures, report, sample, sampling, train
from fastdit import config as C
from fastdit.checkpoint import Checkpoints
from fastdit.config import Config, TrainConfig
from fastdit.data import encoding
from fastdit.data import images as images_
from fastdit.data.encoding import Pack
from fastdit.meter import Meter
from fastdit.model import DiT
from fastdit.optim import Optimizer
from fastdit.planning import memory
from fastdit.quality import evaluation
from fastdit.recipes import RECIPES
from fastdit.runtime import ranks, saved, sharding
from fastdit.runtime.run import save_config
from fastdit.runtime.tensors import load_weights
from fastdit.spikes import Spikes
from fastdit.weights import start

ROOT = Path(__file__).parent.parent
STEPS, BATCH = 8, 16


def counts(few: int, full: int):
    """How often CI tries, and how often `pytest -m soak` does."""
    return pytest.mark.parametrize("count", [few, pytest.param(full, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])])


def tiny(folder: Path, packs: Path, world: int = 1, **groups) -> Config:
    """Eight steps of 16 images in two micro-steps; an epoch is three steps; every step is printed, every second one saved."""
    config = C.replace(
        RECIPES["cats"],
        run={"name": "tiny", "folder": str(folder / "runs")},
        data={"num_images": 3 * BATCH, "packs": str(packs)},
        model={"patch": 8, "depth": 2, "width": 32, "num_heads": 2},
        sample={"num": 2, "steps": 1},
        train={"images": STEPS * BATCH, "batch": BATCH // 2 // world, "grad_accum": 2, "warmup_images": 32},
        log={"print_every": BATCH, "sample_every": 4 * BATCH, "save_every": 2 * BATCH},
        parallel={"threads": 1},
    )
    return C.replace(config, **groups)


def run(config: Config) -> None:
    """The whole verb, from the config on; ends this rank with its exit code."""
    command.run(train.train, lambda argv: config, memory.no_memory)


def curve(folder: Path) -> list[tuple]:
    lines = map(json.loads, (folder / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines())
    return [(n["images"], (n["loss"] or 0.0).hex(), (n["grad_norm"] or 0.0).hex(), n["lr"], n["skipped"]) for n in lines]


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "runs" / "tiny" / "checkpoints").iterdir())


def result(folder: Path) -> tuple[str, list[tuple]]:
    """The hashes of the last checkpoint's files, and the curve."""
    return (checkpoints(folder)[-1] / "SHA256SUMS").read_text(), curve(folder)


@pytest.fixture(scope="module")
def packs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("packs")


@pytest.fixture(scope="module")
def finish(run_ranks) -> Callable[..., list]:
    """finish(config, world): run to the end, every rank with exit code 0."""

    def finish(config: Config, world: int = 1, function=run, *args, timeout: float = 120) -> list:
        ends = run_ranks.outcomes(world, function, config, *args, init=False, timeout=timeout)
        assert [end.code for end in ends] == [0] * world, "\n".join(end.error + end.output for end in ends)
        return ends

    return finish


@pytest.fixture(scope="module")
def plain(finish, packs, tmp_path_factory) -> Callable[[int], tuple[str, list[tuple]]]:
    """plain(world): the result of the uninterrupted run."""
    known: dict[int, Any] = {}

    def plain(world: int):
        if world not in known:
            folder = tmp_path_factory.mktemp(f"plain{world}")
            finish(tiny(folder, packs, world), world)
            known[world] = result(folder)
        return known[world]

    return plain


# --- killed ---


def hook(owner: Any, name: str, act: Callable[[], None], number: int, after: bool = False) -> None:
    """Have `act` called before, or after, call `number` (1, 2, …) of a function."""
    real, calls = getattr(owner, name), [0]

    def hooked(*args, **kwargs):
        calls[0] += 1
        if calls[0] == number and not after:
            act()
        value = real(*args, **kwargs)
        if calls[0] == number and after:
            if isinstance(args[0], Checkpoints):
                args[0].wait()
            act()
        return value

    setattr(owner, name, hooked)


def hook_disk(act: Callable[[], None], number: int) -> list[int]:
    """Have `act` called at the number-th call of a save that reaches the disk. Returns the count of such calls, as it grows."""
    saving, calls = [False], [0]
    real = Checkpoints._write

    def write(*args):
        saving[0] = True
        real(*args)
        saving[0] = False

    Checkpoints._write = write
    for name in ("open", "write", "fsync", "rename", "mkdir", "rmdir", "unlink", "close"):
        before = getattr(os, name)

        def counted(*args, before=before, **kwargs):
            if saving[0]:
                calls[0] += 1
                if calls[0] == number:
                    act()
            return before(*args, **kwargs)

        setattr(os, name, counted)
    return calls


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


PLACES = {
    "step": (Optimizer, "step", False),
    "micro-step": (Pack, "batch", False),
    "sampling": (pictures, "save_grid", False),
    "vote": (ranks.Stop, "agreed", False),
    "after a save": (Checkpoints, "save", True),
    "in a save": (Checkpoints, "save", False),
    "evaluation": (evaluation, "record", False),
}


def hooked_run(config: Config, place: str, number: int, victims: tuple[int, ...], act: Callable[[], None] = die) -> None:
    if int(os.environ["RANK"]) in victims:
        if place == "disk":
            hook_disk(act, number)
        else:
            owner, name, after = PLACES[place]
            hook(owner, name, act, number, after)
    run(config)


CUTS = [
    ("micro-step", 7, 1),  # the first of the second epoch
    ("micro-step", 10, 2),  # the second of two
    ("after a save", 2, 1),
    ("sampling", 1, 1),
    ("step", 1, 2),  # before there is a checkpoint
    ("step", STEPS, 2),  # the last
    ("in a save", 4, 1),  # the last save
]


@pytest.mark.parametrize(("place", "number", "world"), CUTS)
def test_killed_at_any_kind_of_cut_it_goes_on_to_the_bit(run_ranks, finish, plain, packs, tmp_path, place, number, world):
    config = tiny(tmp_path, packs, world)
    for rank, end in enumerate(run_ranks.outcomes(world, hooked_run, config, place, number, tuple(range(world)), init=False)):
        assert end.code == -signal.SIGKILL or (rank and end.code == 1), end.error + end.output
    finish(config, world)
    assert result(tmp_path) == plain(world)


def test_ten_kills_of_one_run(run_ranks, finish, packs, tmp_path):
    longer = {"train": {"images": 14 * BATCH}, "log": {"save_every": BATCH, "sample_every": 10**6}}
    finish(tiny(tmp_path / "plain", packs, **longer))
    config = tiny(tmp_path, packs, **longer)
    for i in range(10):
        place, number = ("after a save", 1) if i % 2 else ("step", 2)
        [end] = run_ranks.outcomes(1, hooked_run, config, place, number, (0,), init=False)
        assert end.code == -signal.SIGKILL
    assert 5 * BATCH <= curve(tmp_path)[-1][0] < 14 * BATCH
    finish(config)
    assert result(tmp_path) == result(tmp_path / "plain")


def run_compiled(config: Config, place: str, number: int) -> None:
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")  # the compiler's own, as it looks about
    train.sample, Meter.image = (lambda *args: None), (lambda *args: None)  # or sampling would be compiled too
    hooked_run(config, place, number, (0,))


@pytest.mark.soak  # 40 s of compiling, minutes on a slow machine
@pytest.mark.timeout(1800)
def test_a_compiled_run_goes_on_to_the_bit(run_ranks, finish, packs, tmp_path, monkeypatch, soaked):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    compiled = {
        "parallel": {"compile": "on", "threads": 1},
        "model": {"patch": 8, "depth": 1, "width": 32, "num_heads": 2},
        "train": {"images": 4 * BATCH},
        "log": {"sample_every": 10**6},
    }
    finish(tiny(tmp_path / "plain", packs, **compiled), 1, run_compiled, "step", 0, timeout=600)
    config = tiny(tmp_path, packs, **compiled)
    [end] = run_ranks.outcomes(1, run_compiled, config, "step", 4, init=False, timeout=600)
    assert end.code == -signal.SIGKILL, end.error
    finish(config, 1, run_compiled, "step", 0, timeout=600)
    assert result(tmp_path) == result(tmp_path / "plain")
    soaked("3: compiled run killed and resumed, identical", passed=1)


def disk_calls(config: Config) -> None:
    calls = hook_disk(die, 0)
    train.train(config)
    print(f"{calls[0]} calls")


class KillAll:
    """SIGKILL to every rank at once, this one last."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self) -> None:
        for file in self.folder.glob("*.pid"):
            with contextlib.suppress(ProcessLookupError):
                if int(file.stem) != os.getpid():
                    os.kill(int(file.stem), signal.SIGKILL)
        die()


def run_all_killed(config: Config, number: int, victim: int, folder: Path) -> None:
    (folder / f"{os.getpid()}.pid").touch()
    hooked_run(config, "disk", number, (victim,), KillAll(folder))


PARTS = [pytest.param(25, seed, marks=[pytest.mark.soak, pytest.mark.timeout(3600)]) for seed in range(1, 9)]


@pytest.mark.parametrize(("count", "seed"), [(8, 0), *PARTS])
def test_all_ranks_killed_inside_a_save(run_ranks, finish, plain, packs, tmp_path, count, seed, soaked):
    rng, reached, same = random.Random(seed), 0, 0
    totals = {}
    for world in (1, 2):
        ends = finish(tiny(tmp_path / f"count{world}", packs, world), world, disk_calls)
        totals[world] = [int(re.search(r"(\d+) calls", end.output)[1]) for end in ends]
        assert totals[world][0] > 40
    for trial in range(count):
        world = 1 + (trial % 4 == 3)
        victim = rng.randrange(world)
        folder = tmp_path / str(trial)
        folder.mkdir()
        config, point = tiny(folder, packs, world), rng.randint(1, totals[world][victim])
        ends = run_ranks.outcomes(world, run_all_killed, config, point, victim, folder, init=False)
        # Which calls a save makes hardly varies; where the last one was not reached, the run has simply ended.
        reached += ends[victim].code == -signal.SIGKILL
        assert all(end.code in (0, 1, -signal.SIGKILL) for end in ends), ends
        for end in finish(config, world):
            assert "passed over" not in end.output
        same += result(folder) == plain(world)
    assert same == count
    assert reached >= 0.95 * count
    soaked(f"1: all ranks killed inside a save, part {seed} of 8", required=25, tried=count, passed=same, killed=reached)


@counts(5, 50)
def test_one_rank_killed_ends_the_other_soon(run_ranks, finish, plain, packs, tmp_path, count, soaked):
    rng, slowest = random.Random(1), 0.0
    kinds = ["step", "micro-step", "vote", "disk", "sampling"]
    for trial in range(count):
        victim, place = rng.randrange(2), kinds[trial % 5]
        if place == "sampling":
            victim = 0  # who writes the grid
        number = {"micro-step": rng.randint(1, 16), "sampling": 1, "disk": rng.randint(1, 10)}.get(place, rng.randint(1, STEPS))
        folder = tmp_path / str(trial)
        config = tiny(folder, packs, 2)
        ends = run_ranks.outcomes(2, hooked_run, config, place, number, (victim,), init=False)
        other = ends[1 - victim]
        assert ends[victim].code == -signal.SIGKILL, (place, number, ends)
        assert other.code == 1, (place, number, other)
        line = other.output.splitlines()[-1]
        assert line.startswith(f"error: rank {1 - victim}: another rank has ended"), other.output
        assert "Traceback" not in other.output
        slowest = max(slowest, other.seconds - ends[victim].seconds)
        assert slowest < 5
        finish(config, 2)
        assert result(folder) == plain(2), (place, number)
    soaked("2: one rank of two killed, the other ends", required=50, passed=count, slowest_s=round(slowest, 2))


def hang() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize(("place", "victim"), [("step", 1), ("vote", 0), ("disk", 1)])
def test_a_hung_rank_is_noticed(run_ranks, packs, tmp_path, place, victim, plain):
    plain(2)  # the pack
    config = tiny(tmp_path, packs, 2, parallel={"timeout_minutes": 2 / 60, "threads": 1})
    ends = run_ranks.outcomes(2, timed_run, config, place, 3, victim, tmp_path / "stopped", init=False, grace=0.1)
    noticed = (run_ranks.folder / str(run_ranks.calls - 1) / f"{1 - victim}.log").stat().st_mtime
    assert ends[1 - victim].code == 1, ends
    assert (
        ends[1 - victim]
        .output.splitlines()[-1]
        .startswith(f"error: rank {1 - victim}: another rank has been silent for --parallel.timeout_minutes")
    )
    assert 1 < noticed - (tmp_path / "stopped").stat().st_mtime < 2 + 2


def timed_run(config: Config, place: str, number: int, victim: int, file: Path) -> None:
    hooked_run(config, place, number, (victim,), lambda: (file.touch(), hang()))


# --- signalled ---


def run_signalled(config: Config, number: int, at: int, victims: tuple[int, ...]) -> None:
    hooked_run(config, "step", at, victims, lambda: os.kill(os.getpid(), number))


@counts(6, 30)
def test_a_signal_saves_one_step_on_all_ranks_and_has_its_code(run_ranks, finish, plain, packs, tmp_path, count, soaked):
    rng = random.Random(2)
    for trial in range(count):
        number = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)[trial % 4]
        victims = ((0, 1), (0,), (1,))[trial // 3 % 3]
        folder = tmp_path / str(trial)
        config = tiny(folder, packs, 2)
        at = rng.randint(1, STEPS - 2)
        ends = run_ranks.outcomes(2, run_signalled, config, int(number), at, victims, init=False)
        assert [end.code for end in ends] == [128 + number] * 2, ends
        saved = int(checkpoints(folder)[-1].name) // BATCH
        assert at <= saved <= at + 1
        assert f"stopped by signal {int(number)} at {saved * BATCH} images" in ends[0].output
        finish(config, 2)
        assert result(folder) == plain(2)
    soaked("10: signals to all ranks or one", required=30, passed=count)


# --- other numbers of ranks ---


def run_noting_images(config: Config, folder: Path) -> None:
    """Each image's place in the pack, by its number in the run, goes to a file."""
    pick, found = Pack._pick, {}

    def noting(self, first, count):
        places = pick(self, first, count)
        found.update(zip(range(first, first + count), places.tolist(), strict=True))
        return places

    Pack._pick = noting
    folder.mkdir(parents=True, exist_ok=True)
    train.train(config)
    (folder / f"{time.time_ns()}.json").write_text(json.dumps(found))


def images(folder: Path) -> dict[int, int]:
    """Of all launches: place by number."""
    seen: dict[int, int] = {}
    for file in sorted(folder.glob("*.json")):
        for number, place in json.loads(file.read_text()).items():
            assert seen.setdefault(int(number), place) == place
    return seen


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-6), ("bf16", 1e-4)])
def test_four_ranks_then_two_then_one_in_the_middle_of_an_epoch(finish, packs, tmp_path, precision, bound):
    def config(folder: Path, world: int, steps: int) -> Config:
        middle = {"num_images": 200, "packs": str(packs)}
        sizes = {"images": steps * BATCH, "batch": BATCH // world, "grad_accum": 1, "lr_decay": "constant"}
        parallelism = {"precision": precision, "threads": 1}
        return tiny(folder, packs, world, data=middle, train=sizes, parallel=parallelism, log={"sample_every": 10**6})

    finish(config(tmp_path / "plain", 1, 6), 1, run_noting_images, tmp_path / "plain" / "seen")
    for world, steps in ((4, 2), (2, 4), (1, 6)):
        finish(config(tmp_path, world, steps), world, run_noting_images, tmp_path / "seen")
    assert images(tmp_path / "seen") == images(tmp_path / "plain" / "seen")
    assert sorted(images(tmp_path / "seen")) == list(range(6 * BATCH))
    ours, theirs = ([float.fromhex(line[1]) for line in curve(f)] for f in (tmp_path, tmp_path / "plain"))
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < bound, [ours, theirs]


@pytest.mark.parametrize(("worlds", "threads"), [((2, 1, 2), (1, 1, 1)), ((1, 1, 1), (1, 2, 1))], ids=["ranks", "threads"])
def test_there_and_back_again(finish, packs, tmp_path, worlds, threads):
    """Two ranks, one, two; or one thread, two, one. The images are the same; sums are made in another order, to 1e-6."""

    def config(folder: Path, part: int) -> Config:
        world, steps = worlds[part], 2 * (part + 1)
        sizes = {"images": steps * BATCH, "batch": BATCH // 2 // world, "lr_decay": "constant"}
        parallelism = {"precision": "fp32", "threads": threads[part]}
        return tiny(folder, packs, world, train=sizes, parallel=parallelism, log={"sample_every": 10**6})

    whole = C.replace(config(tmp_path / "plain", 0), train={"images": 6 * BATCH})
    finish(whole, worlds[0], run_noting_images, tmp_path / "plain" / "seen")
    for part, world in enumerate(worlds):
        finish(config(tmp_path, part), world, run_noting_images, tmp_path / "seen")
    assert images(tmp_path / "seen") == images(tmp_path / "plain" / "seen")
    ours, theirs = (curve(f) for f in (tmp_path, tmp_path / "plain"))
    assert ours[:2] == theirs[:2]  # before anything changed, to the bit
    for a, b in zip(ours, theirs, strict=True):
        assert float.fromhex(a[1]) == pytest.approx(float.fromhex(b[1]), abs=1e-6)


def initial(config: Config) -> dict[str, torch.Tensor]:
    model = start.build(config, ranks.init(config.parallel))
    weights = {n: sharding.main_param(p).detach() for n, p in model.named_parameters()}
    return {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in weights.items()}


def test_the_first_weights_are_the_same_on_any_number_of_ranks(run_ranks, packs, tmp_path):
    config = tiny(tmp_path, packs, parallel={"shard": 0, "threads": 1})
    [expected] = run_ranks(1, initial, config, init=False)
    assert len(expected) > 20
    for world in (2, 3, 4):
        for found in run_ranks(world, initial, config, init=False):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], t) for name, t in expected.items())


@pytest.mark.parametrize("every", [1, 3, 100])
def test_saving_does_not_change_where_a_run_goes(finish, plain, packs, tmp_path, every):
    finish(tiny(tmp_path, packs, log={"save_every": every * BATCH}))
    assert result(tmp_path) == plain(1)


# --- restarted by torchrun ---

RESTARTED = """
import os, pathlib, signal, sys
from fastdit import command, train
from fastdit.optim import Optimizer
from fastdit.runtime.run import load_config

folder, kills = pathlib.Path(sys.argv.pop(1)), int(sys.argv.pop(1))
rank, attempt = os.environ["RANK"], int(os.environ["TORCHELASTIC_RESTART_COUNT"])
(folder / f"launch{attempt}-{rank}").touch()
real, calls = Optimizer.step, [0]

def step(self, *args):
    calls[0] += 1
    if calls[0] == 3 and attempt < kills and rank == str(attempt % 2):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *args)

Optimizer.step = step
command.run(train.train, lambda argv: load_config(pathlib.Path(argv[0])))
"""


@counts(1, 3)
def test_torchrun_restarts_as_often_as_ranks_are_killed(finish, plain, packs, tmp_path, count, soaked):
    (tmp_path / "killed.py").write_text(RESTARTED)
    for kills in range(1, count + 1):
        folder = tmp_path / str(kills)
        folder.mkdir()
        config = tiny(folder, packs, 2)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", str(kills)]
        command += [
            "--master-port",
            str(random.randrange(10_000, 30_000)),
            str(tmp_path / "killed.py"),
            str(folder),
            str(kills),
        ]
        save_config(config, tmp_path / "asked.json")
        end = subprocess.run([*command, str(tmp_path / "asked.json")], capture_output=True, text=True, timeout=150)
        assert end.returncode == 0, end.stdout + end.stderr
        assert sorted(p.name for p in folder.glob("launch*")) == [f"launch{a}-{r}" for a in range(kills + 1) for r in (0, 1)]
        assert result(folder) == plain(2)
    soaked("12: kills under torchrun --max-restarts, each one restart", required=3, passed=count)


# --- exit codes, by either way of starting ---

SMALL = ["--data.num_images", "64", "--model.patch", "8", "--model.depth", "1", "--model.width", "64", "--train.batch", "8"]
SMALL += ["--train.images", "64000000", "--log.sample_every", "1000000000"]
LAUNCHERS = {
    "python": [sys.executable, str(ROOT / "fastdit" / "train.py")],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"],
}


def launch(way: str, folder: Path, arguments: list[str], most_bytes: int) -> subprocess.Popen:
    """train.py by `python` or by `torchrun` for two processes, in a session of its own, with a limit to a file's size."""
    command = list(LAUNCHERS[way])
    if way == "torchrun":
        command += ["--master-port", str(random.randrange(10_000, 30_000)), str(ROOT / "fastdit" / "train.py")]
    command += [*SMALL, "--run.folder", str(folder / "runs"), "--data.packs", str(folder / "packs"), *arguments]

    def prepare() -> None:
        for number in (signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        if most_bytes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    with (folder / "log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, preexec_fn=prepare, env=environment)


SOAK = [pytest.mark.soak, pytest.mark.timeout(600)]
STOPS = [(s, way) for way in ("python", "torchrun") for s in ("SIGTERM", "SIGINT", "SIGHUP")]
ENDS = [
    pytest.param("usage", "python", 2),
    pytest.param("usage", "torchrun", 1),
    pytest.param("SIGTERM", "torchrun", 1),
    pytest.param("disk", "python", 2, marks=SOAK),
    pytest.param("disk", "torchrun", 1, marks=SOAK),
    *(pytest.param(s, way, 1 if way == "torchrun" else 128 + signal.Signals[s], marks=SOAK) for s, way in STOPS),
]


@pytest.mark.parametrize(("what", "way", "code"), ENDS)
def test_exit_codes_by_either_way_of_starting(tmp_path, what, way, code, soaked):
    """torchrun has 1 for all that is not 0, and adds lines of its own. Ours is one line, and what could be saved is."""
    arguments = {"usage": ["--data.path", "/nowhere"], "disk": ["--log.save_every", "80"]}.get(what, [])
    started, log = launch(way, tmp_path, arguments, 300_000 if what == "disk" else 0), tmp_path / "log"
    if what.startswith("SIG"):
        end = time.monotonic() + 200
        while "img/s" not in log.read_text() and started.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        started.send_signal(signal.Signals[what])
    assert started.wait(200) == code, log.read_text()
    lines = log.read_text().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    ours = next((i for i, line in enumerate(lines) if re.match(r"\[?[WE]\d{4} |Traceback", line)), len(lines))
    if what.startswith("SIG"):
        assert errors == []
        assert any(line.startswith(f"stopped by signal {int(signal.Signals[what])} at") for line in lines)
        assert len(list((tmp_path / "runs" / "cats" / "checkpoints").iterdir())) == 1
    else:
        said = "--data.path /nowhere: no such folder" if what == "usage" else "was not saved: rank 0: File too large ("
        assert len(errors) == 1
        assert said in errors[0]
        assert lines.index(errors[0]) < ours  # before what torchrun says
    soaked(f"exit codes: {what} by {way}", code=code)


# --- numbers that are none ---


def poisoned_run(config: Config, what: str, value: float, victim: int, at: int) -> None:
    """A NaN or an infinity on one rank: in its images, its gradients, or its weights, at optimizer step `at`."""
    if int(os.environ["RANK"]) == victim:
        calls = [0]
        if what == "input":
            batch = Pack.batch

            def poisoned(self, first, count):
                found = batch(self, first, count)
                calls[0] += 1
                if calls[0] == 2 * at:
                    found.x0[0, 0, 0, 0] = value
                return found

            Pack.batch = poisoned
        else:
            step = Optimizer.step

            def poisoned_step(self, *args):
                calls[0] += 1
                if calls[0] == at:
                    p = self.adamw.named["blocks.0.mlp.fc1.weight"]
                    tensor = p.grad if what == "gradient" else p.detach()
                    tensor.to_local()[0, 0] = value
                return step(self, *args)

            Optimizer.step = poisoned_step
    run(config)


ALL = [(what, value, rank) for what in ("input", "gradient") for value in (float("nan"), float("inf")) for rank in (0, 1)]


@counts(4, len(ALL))
def test_a_poisoned_step_is_skipped_by_all_ranks_together(finish, packs, tmp_path, count, soaked):
    """Whatever was poisoned on whichever rank, the runs are the same: the step changed nothing."""
    results = []
    for i, (what, value, victim) in enumerate(
        [ALL[0], ALL[3], ALL[5], ALL[6], *(a for a in ALL if a not in (ALL[0], ALL[3], ALL[5], ALL[6]))][:count]
    ):
        finish(tiny(tmp_path / str(i), packs, 2), 2, poisoned_run, what, value, victim, 3)
        results.append(result(tmp_path / str(i)))
        assert [line[4] for line in results[-1][1]] == [0, 0, *[1] * (STEPS - 2)]
        for checkpoint in checkpoints(tmp_path / str(i)):
            assert_finite(checkpoint)
    assert all(r == results[0] for r in results)
    soaked("13a: NaN and Inf in inputs and gradients of each rank", required=len(ALL), passed=len(results))


def assert_finite(checkpoint: Path) -> None:
    for file in checkpoint.rglob("*.safetensors"):
        for name, tensor in load_weights(file)[0].items():
            assert tensor.isfinite().all(), (file, name)


@pytest.mark.parametrize(("value", "victim"), [("nan", 1), ("inf", 0)])
def test_a_poisoned_weight_ends_the_run_and_is_never_saved(run_ranks, finish, plain, packs, tmp_path, value, victim):
    config = tiny(tmp_path, packs, 2)
    ends = run_ranks.outcomes(2, poisoned_run, config, "weight", float(value), victim, 3, init=False)
    assert [end.code for end in ends] == [2, 2], ends
    lines = [line for end in ends for line in end.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.search(rf"not saved: rank {victim}: .* is not finite; earlier ones are untouched", lines[0])
    assert [int(p.name) for p in checkpoints(tmp_path)] == [2 * BATCH]
    assert_finite(checkpoints(tmp_path)[0])
    finish(config, 2)
    assert result(tmp_path) == plain(2)


def test_skips_in_a_row_end_the_run_on_all_ranks(run_ranks, finish, plain, packs, tmp_path):
    config = tiny(
        tmp_path,
        packs,
        2,
        train={"max_skips": 2, "batch": BATCH // 4, "grad_accum": 2, "images": STEPS * BATCH, "warmup_images": 32},
    )
    ends = run_ranks.outcomes(2, run_with_nan_from, config, 4, init=False)
    assert [end.code for end in ends] == [2, 2], ends
    assert "2 steps in a row had a non-finite gradient" in ends[0].output
    assert "error" not in ends[1].output
    for checkpoint in checkpoints(tmp_path):
        assert_finite(checkpoint)


def scale_images(factor: Callable[[int], float]) -> None:
    """Multiply the images of each micro-step by a factor that depends on the number of the first."""
    draw = train.draw
    train.draw = lambda objective, x0, *rest: draw(objective, x0 * factor(rest[2]), *rest)


def run_with_nan_from(config: Config, first: int) -> None:
    scale_images(lambda image: float("nan") if image >= (first - 1) * BATCH else 1.0)
    run(config)


# --- spikes ---


def series(steps: int, seed: int) -> list[float]:
    """A loss as training gives it: it falls tenfold at first, and scatters to the right as a mean over noise levels does."""
    rng = random.Random(seed)
    return [(0.1 + 0.9 * 2.718 ** (-n / 60)) * rng.gammavariate(12, 1 / 12) for n in range(steps)]


def restated(losses: list[float], sigma: float) -> list[bool]:
    kept: list[float] = []
    found = []
    for loss in losses:
        last = kept[-Spikes.WINDOW :]
        mean = sum(last) / max(len(last), 1)
        deviation = (sum((x - mean) ** 2 for x in last) / max(len(last), 1)) ** 0.5
        found.append(len(kept) >= Spikes.FEW and loss > mean + sigma * deviation)
        if not found[-1]:
            kept.append(loss)
    return found


def test_spikes_are_found_and_nothing_else_is(soaked):
    losses = series(2_000, 0)
    spikes = Spikes(6.0, torch.device("cpu"))
    assert [bool(spikes.find(torch.tensor(x))) for x in losses] == [False] * 2_000
    places = sorted(random.Random(1).sample(range(300, 2_000), 20))
    places[1] = places[0] + 1  # two in a row
    for place in places:
        losses[place] *= 10
    spikes = Spikes(6.0, torch.device("cpu"))
    found = [bool(spikes.find(torch.tensor(x, dtype=torch.float64))) for x in losses]
    assert [i for i, spike in enumerate(found) if spike] == sorted(set(places))
    assert found == restated(losses, 6.0)


def test_what_is_no_number_never_enters_the_window():
    spikes = Spikes(6.0, torch.device("cpu"))
    for n in range(Spikes.WINDOW + 40):
        assert not spikes.find(torch.tensor(1 + n % 7 / 10))
    before = spikes.window.clone()
    assert not spikes.find(torch.tensor(float("nan")))
    assert spikes.find(torch.tensor(float("inf")))
    assert torch.equal(spikes.window, before)
    assert spikes.find(torch.tensor(9.0))


def run_with_spike(config: Config, at: int, victim: int, place: str, number: int) -> None:
    Spikes.FEW = 3
    first = (at - 1) * BATCH
    rank = int(os.environ["RANK"])
    scale_images(lambda image: 50.0 if rank == victim and first <= image < first + BATCH else 1.0)
    hooked_run(config, place, number, (0, 1))


def test_a_spike_on_one_rank_is_skipped_by_all_and_the_window_survives_a_kill(run_ranks, finish, packs, tmp_path):
    def config(folder: Path) -> Config:
        c = tiny(folder, packs, 2)
        # Under DDPM: the loss of flow's velocity scatters so far over a few images that three losses tell no spike.
        return C.replace(c, train={"spike_sigma": 6.0}, diffusion={"kind": "ddpm"})

    finish(config(tmp_path / "plain"), 2, run_with_spike, 6, 1, "step", 0)
    assert [line[4] for line in curve(tmp_path / "plain")] == [0, 0, 0, 0, 0, 1, 1, 1]
    for end in run_ranks.outcomes(2, run_with_spike, config(tmp_path), 6, 1, "step", 6, init=False):
        assert end.code == -signal.SIGKILL
    finish(config(tmp_path), 2, run_with_spike, 6, 1, "step", 0)
    assert result(tmp_path) == result(tmp_path / "plain")


# --- names that are no words ---


def every_verb(config: Config, out: Path) -> None:
    """Train twice, the second time past a damaged checkpoint; sample, evaluate, export, report; at last an error."""
    short = C.replace(config, train={"images": 4 * BATCH, "lr_decay": "constant"})
    train.train(short)
    folder = Path(config.run.folder) / "tiny"
    (max((folder / "checkpoints").iterdir()) / "checkpoint.json").write_bytes(b"damaged")
    train.train(C.replace(short, train={"images": 6 * BATCH}))
    sample.sample(sample.Options(str(folder), num_images=1, steps=1, out=str(out)))
    evaluate.evaluate(evaluate.Options(str(folder), num_images=16, metric="none", steps=1, npz=True, out=str(out)))
    print(report.report(report.Options(str(folder))).name)
    export.export(export.Options(str(folder), out=str(out / "exported")))
    command.run(train.train, lambda argv: C.replace(short, run={"seed": 5}))


def test_what_a_name_holds_reaches_no_terminal(run_ranks, packs, tmp_path):
    """A folder may be called what colours a terminal, clears it, forges a line or is markup of the printing library."""
    evil = tmp_path / "a\x1b[31mred\x1b]0;title\x07\nerror: forged\r[bold][/nothing]"
    evil.mkdir(parents=True)  # the markup's slash makes two of it
    [end] = run_ranks.outcomes(1, every_verb, tiny(evil, packs), evil / "out\x1b[2J", init=False, timeout=120)
    assert end.code == 2, end.output + end.error
    lines = end.output.splitlines()
    for said in ("is passed over", "finished: 96 images", "1 pictures of", "for the ADM suite", "error: ", "run     tiny in"):
        assert any(said in line for line in lines), said
    assert all(line.isprintable() for line in end.output.split("\n")), end.output
    assert not any(line.startswith("error: forged") for line in lines)
    assert "[bold][/nothing]" in next(line for line in lines if "finished" in line)


# --- what one rank alone meets ---


def run_without_memory(config: Config, victim: int, how: str) -> None:
    def empty(*args) -> None:
        if how == "real":
            torch.empty(1 << 60)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    if int(os.environ["RANK"]) == victim:
        train.draw = empty
    run(config)


@pytest.mark.parametrize(("how", "victim"), [("cuda", 1), ("real", 0)])
def test_out_of_memory_says_which_batch_would_do(run_ranks, plain, packs, tmp_path, how, victim):
    plain(2)
    config = C.replace(tiny(tmp_path, packs, 2), train={"batch": 6, "grad_accum": 2})
    ends = run_ranks.outcomes(2, run_without_memory, config, victim, how, init=False)
    assert [end.code for end in ends] == [1, 1], ends
    said = [line for line in ends[victim].output.splitlines() if "error" in line]
    assert len(said) == 1
    assert said[0].startswith(
        f"error: rank {victim}: out of memory at --train.batch 6; --train.batch 3 --train.grad_accum 4 trains the same"
    )
    assert "Traceback" not in ends[0].output + ends[1].output
    assert f"error: rank {1 - victim}: another rank has ended" in ends[1 - victim].output


def run_on_full_disk(config: Config) -> None:
    def report(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")

    if os.environ["RANK"] == "0":
        Meter.report = report
    run(config)


def test_a_full_disk_under_the_metrics_is_a_line(run_ranks, plain, packs, tmp_path):
    plain(2)
    ends = run_ranks.outcomes(2, run_on_full_disk, tiny(tmp_path, packs, 2), init=False)
    assert [end.code for end in ends] == [1, 1], ends
    assert "error: rank 0: metrics.jsonl: No space left on device" in ends[0].output
    assert "Traceback" not in ends[0].output + ends[1].output


def failing_alike(config: ..., kind: str) -> None:
    world = ranks.init(config.parallel)

    def fail() -> None:
        if world.rank == 1:
            raise {"user": C.UserError, "value": KeyError}[kind]("a reason")

    command.exit_cleanly(lambda: ranks.as_one(lambda: ranks.every(world, fail)), world.rank)


def test_a_failure_on_one_rank_is_said_once_and_by_all_left(run_ranks, packs, tmp_path):
    ends = run_ranks.outcomes(3, failing_alike, tiny(tmp_path, packs), "user", init=False)
    assert [end.code for end in ends] == [2, 2, 2]
    assert "".join(end.output for end in ends) == "error: a reason\n"
    ends = run_ranks.outcomes(3, failing_alike, tiny(tmp_path, packs), "value", init=False)
    assert [end.code for end in ends] == [2, 1, 2], ends
    assert "error: rank 1: KeyError: 'a reason'" in ends[0].output
    assert "KeyError" in ends[1].error


# --- few images, the same images, wild settings ---

FLAT = {"patch": 8, "depth": 1, "width": 32, "num_heads": 2, "num_classes": 0}


def own(folder: Path, packs: Path, number: int, constant: bool = False, **groups) -> Config:
    """A run on so many pictures of one's own, without classes; batches of one picture."""
    (folder / "pictures").mkdir()
    for n in range(number):
        pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
        pictures.save_png(torch.full_like(pixels, 77) if constant else pixels, folder / "pictures" / f"{n}.png")
    data = {"path": str(folder / "pictures"), "num_images": None, "packs": str(packs), "label_column": None}
    train_ = {"images": 4 * BATCH, "batch": 1, "grad_accum": 1}
    return C.replace(tiny(folder, packs, data=data, model=FLAT, train=train_, log={"print_every": BATCH}), **groups)


WILD = {"train": {"lr": 1e9, "warmup_images": 0, "images": 10**6}, "log": {"save_every": 4}}
ODD = [
    ("one picture", 1, False, 1, {}, 0, ""),
    ("fewer pictures than ranks", 2, False, 3, {"train": {"images": 48}}, 0, ""),
    ("constant pictures", 20, True, 1, {"eval": {"every_images": 2 * BATCH, "num": 16}}, 0, "training images of"),
    ("a batch above the data", 5, False, 1, {"train": {"batch": 8}}, 2, "--train.batch 8 is more than the 5 images there are"),
    ("an evaluation on one", 1, False, 1, {"eval": {"every_images": 8, "num": 16}}, 2, "a comparison needs at least 12"),
    ("no picture", 0, False, 1, {}, 2, "no image"),
    ("a wild rate", 20, False, 1, WILD, 2, "a lower --train.lr may help"),
]


@pytest.mark.parametrize(
    ("number", "constant", "world", "groups", "code", "said"), [odd[1:] for odd in ODD], ids=[o[0] for o in ODD]
)
def test_odd_data_and_settings(run_ranks, packs, tmp_path, number, constant, world, groups, code, said):
    """Each trains to its end with finite losses, or is refused in one line; what was saved is finite."""
    config = own(tmp_path, packs, number, constant, **groups)
    ends = run_ranks.outcomes(world, run, config, init=False, timeout=120)
    assert [end.code for end in ends] == [code] * world, ends
    assert said in ends[0].output
    assert "Traceback" not in "".join(end.output + end.error for end in ends)
    if code:
        assert sum(line.startswith("error: ") for line in ends[0].output.splitlines()) == 1
        for checkpoint in checkpoints(tmp_path) if (tmp_path / "runs").exists() else []:
            assert_finite(checkpoint)
    else:
        assert all(float.fromhex(line[1]) > 0 for line in curve(tmp_path))


def test_evaluation_changes_no_run_and_a_kill_in_it_costs_nothing(run_ranks, finish, packs, tmp_path):
    often = {"every_images": 2 * BATCH, "num": 16}
    finish(tiny(tmp_path / "without", packs))
    finish(tiny(tmp_path / "with", packs, eval=often))
    assert result(tmp_path / "with") == result(tmp_path / "without")
    config = tiny(tmp_path, packs, eval=often)
    [end] = run_ranks.outcomes(1, hooked_run, config, "evaluation", 2, (0,), init=False)
    assert end.code == -signal.SIGKILL, end.output
    finish(config)
    assert result(tmp_path) == result(tmp_path / "without")
    kept = (tmp_path / "runs" / "tiny" / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["images"] for line in kept] == [2 * BATCH, 4 * BATCH, 6 * BATCH, 8 * BATCH]


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_hundred_thousand_files_take_seconds(run_ranks, finish, tmp_path, soaked):
    """Each start looks at every file's size and time, for a picture that changed. Of the pictures 64 are used."""
    number = 100_000
    config = own(tmp_path, tmp_path / "packs", 64, data={"num_images": 64}, train={"images": BATCH, "batch": 8})
    first = (tmp_path / "pictures" / "0.png").read_bytes()
    for n in range(64, number):
        (tmp_path / "pictures" / f"{n}.png").write_bytes(first)
    start = time.perf_counter()
    encoding.folder(config.data)
    named = time.perf_counter() - start
    start = time.perf_counter()
    images_.open_images(config.data)
    opened = time.perf_counter() - start
    finish(config)
    assert named < 20
    assert opened < 30
    seconds = {"each_start_s": round(named, 2), "before_encoding_s": round(opened, 2)}
    soaked("100,000 files in a folder: what looking at them takes", **seconds)


def run_noting_writes(config: Config, packs: Path) -> None:
    """What is opened to write, made, renamed or removed below a folder, printed as it happens."""

    def note(event: str, args: tuple) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")) and str(args[0]).startswith(str(packs)):
            print(f"wrote: {event} {args[0]}", flush=True)

    sys.addaudithook(note)
    run(config)


def test_a_pack_that_is_there_is_only_read(finish, plain, packs, tmp_path):
    """So that packs may lie where nobody can write."""
    plain(1)
    before = {path: path.stat().st_mtime_ns for path in packs.rglob("*")}
    [end] = finish(tiny(tmp_path, packs), 1, run_noting_writes, packs)
    assert "wrote: " not in end.output, end.output
    assert {path: path.stat().st_mtime_ns for path in packs.rglob("*")} == before


# --- latents ---


def autoencoder(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16],
        latent_channels=4,
        norm_num_groups=4,
    ).save_pretrained(folder)


def latent(folder: Path) -> Config:
    """A run on 48 pictures of 16×16 as latents of 8×8: in folder/pack, by folder/vae."""
    if not (folder / "pack").exists():
        autoencoder(folder / "vae", 0)
        pixels = torch.randint(0, 256, (48, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        data = torch.utils.data.TensorDataset(pixels, torch.arange(48) % 3)
        encoding.pack_dataset(data, folder / "pack", image_size=(16, 16), vae=str(folder / "vae"))
    data = {"num_images": None, "path": str(folder / "pack"), "vae": str(folder / "vae"), "image_size": (16, 16)}
    model = {"patch": 4, "depth": 1, "width": 32, "num_heads": 2, "input_size": (8, 8), "channels": 4, "num_classes": 3}
    return tiny(folder, folder, data=data, model=model, diffusion={"clip_x0": False})


def test_a_run_on_latents_killed_goes_on_to_the_bit(run_ranks, finish, tmp_path):
    config = latent(tmp_path)
    finish(config)
    plain = result(tmp_path)
    shutil.move(tmp_path / "runs", tmp_path / "plain")
    for place, number in (("micro-step", 7), ("in a save", 2)):
        [end] = run_ranks.outcomes(1, hooked_run, config, place, number, (0,), init=False)
        assert end.code == -signal.SIGKILL, end.output
    finish(config)
    assert result(tmp_path) == plain


def read_latents(source: Path, out: Path, vae: str | None) -> list[str]:
    """What the verbs that decode say of a run: an error's line each, or nothing."""
    short = {"steps": 1, "vae": vae}
    verbs = (
        lambda: sample.sample(sample.Options(str(source), num_images=1, out=str(out), **short)),
        lambda: sample.sample(sample.Options(str(source), latency=True, **short)),
        lambda: evaluate.evaluate(evaluate.Options(str(source), num_images=16, metric="none", out=str(out), **short)),
        lambda: export.export(export.Options(str(source), format="pipeline", vae=vae or "", out=str(out / "pipeline"))),
    )
    said = []
    for verb in verbs:
        try:
            verb()
        except C.UserError as error:
            said.append(str(error))
    return said


def test_an_autoencoder_swapped_under_a_pack_is_refused_by_name(run_ranks, finish, tmp_path):
    """Its latents stay, and decode to other pictures: grids, evaluations and samples would be of another model."""
    config = C.replace(latent(tmp_path), train={"lr_decay": "constant"})
    finish(C.replace(config, train={"images": 2 * BATCH}))
    run_folder, vae = tmp_path / "runs" / "tiny", tmp_path / "vae"
    assert run_ranks(1, read_latents, run_folder, tmp_path / "before", None, init=False) == [[]]
    shutil.move(vae, tmp_path / "first")
    autoencoder(vae, 1)
    digits = "[0-9a-f]{16}"
    line = rf"--data\.vae {vae} is not the autoencoder that made the latents \(SHA-256 {digits} then, {digits} now\)"
    [said] = run_ranks(1, read_latents, run_folder, tmp_path / "after", None, init=False)
    assert len(said) == 4
    assert all(re.match(line, error) for error in said), said
    # Who names another decoder on purpose has it.
    assert run_ranks(1, read_latents, run_folder, tmp_path / "asked", str(vae), init=False) == [[]]
    for asked in (config, C.replace(config, run={"name": "new"})):
        [end] = run_ranks.outcomes(1, run, asked, init=False)
        assert end.code == 2, end.output
        assert re.search(line, end.output)
    assert not (tmp_path / "runs" / "new").exists()
    shutil.rmtree(vae)
    shutil.move(tmp_path / "first", vae)
    finish(config)


# --- other verbs beside a training ---


def train_or_read(config: Config, out: Path, tries: int) -> dict[str, int]:
    """Rank 0 trains, and saves at every step. Rank 1, for itself, reads its newest checkpoint by each verb, then stops it."""
    reading = os.environ["RANK"] == "1"
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    os.environ["MASTER_PORT"] = str(random.randrange(10_000, 30_000))
    if not reading:
        (out / "pid").write_text(str(os.getpid()))
        assert train.train(config) == 128 + signal.SIGTERM
        return {}
    source, seen = Path(config.run.folder) / "tiny", set()
    while saved.newest(source / "checkpoints") is None:
        time.sleep(0.05)
    counts = {"read": 0, "refused": 0}
    for n in range(tries):
        made = out / str(n)
        for verb, options in (
            (sample.sample, sample.Options(str(source), num_images=1, steps=1, out=str(made / "pictures"))),
            (export.export, export.Options(str(source), out=str(made / "ema"))),
            (export.export, export.Options(str(source), weights="live", out=str(made / "live"))),
            (evaluate.evaluate, evaluate.Options(str(source), num_images=16, metric="none", steps=1, out=str(made / "made"))),
        ):
            try:
                verb(options)
                counts["read"] += 1
            except C.UserError:  # four steps later that checkpoint is gone
                counts["refused"] += 1
        seen |= {load_weights(file)[0]["x_embedder.bias"].sum().item() for file in made.rglob("model.safetensors")}
    os.kill(int((out / "pid").read_text()), signal.SIGTERM)
    return counts | {"seen": len(seen)}


@counts(3, 25)
def test_other_verbs_read_a_run_that_goes_on(run_ranks, packs, tmp_path, count, soaked):
    """Each save renames a folder into place, and a fourth one removes the oldest, while others look for the newest."""
    lengths = {"images": 10**7, "lr_decay": "constant"}
    often = {"save_every": BATCH, "sample_every": 10**9, "print_every": 100 * BATCH}
    _, found = run_ranks(
        2, train_or_read, tiny(tmp_path, packs, train=lengths, log=often), tmp_path, count, init=False, timeout=600
    )
    assert found["read"] + found["refused"] == 4 * count, found
    assert found["read"] >= 0.9 * 4 * count, found
    assert found["seen"] > 1, found
    soaked("sampling, export and evaluation beside a training that saves at every step", tried=4 * count, **found)


def sample_seeing(newest: Path, older: Path, out: Path) -> None:
    """Rank 1 looked before the newest checkpoint was there."""
    seen = older if os.environ["RANK"] == "1" else newest
    sample.sample(sample.Options(str(seen), num_images=4, steps=1, singles=True, precision="fp32", out=str(out)))


def test_ranks_that_find_different_checkpoints_sample_one(run_ranks, finish, packs, tmp_path):
    finish(tiny(tmp_path, packs))
    older, newest = checkpoints(tmp_path)[-2:]
    for world, seen in ((1, newest), (2, older)):
        run_ranks(world, sample_seeing, newest, seen, tmp_path / str(world), init=False)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).rglob("0*.png")} for n in "12")
    assert len(one) == 4
    assert one == two


# --- bad configurations reach nothing ---


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ({"data": {"path": "/nowhere"}}, "--data.path /nowhere: no such folder"),
        ({"parallel": {"shard": 3}}, "--parallel.shard 3 does not divide the 2 ranks"),
        ({"attention": "flash"}, "flash"),
        ({"run": {"name": "link"}}, "link is a symbolic link"),
        ({"run": {"name": "linked"}}, "checkpoints is a symbolic link"),
        ({"model": {"patch": 5}}, "--model.patch 5 does not divide"),
    ],
)
def test_what_turns_out_wrong_later_leaves_the_disk_alone(run_ranks, plain, packs, tmp_path, groups, said):
    plain(2)
    (tmp_path / "runs" / "linked").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "runs" / "link")
    os.symlink(tmp_path / "elsewhere", tmp_path / "runs" / "linked" / "checkpoints")
    before = {str(p) for root in (tmp_path, packs) for p in root.rglob("*")}
    config = tiny(tmp_path, packs, 2)
    config = C.replace(config, **{k: v for k, v in groups.items() if isinstance(v, dict)})
    config = config if "attention" not in groups else type(config)(**{**vars(config), "attention": "flash"})
    ends = run_ranks.outcomes(2, run, config, init=False)
    assert [end.code for end in ends] == [2, 2], ends
    [line] = (ends[0].output + ends[1].output).splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert {str(p) for root in (tmp_path, packs) for p in root.rglob("*")} == before


# --- again and again ---


@counts(10, 100)
def test_clean_runs_end_with_0(finish, packs, tmp_path, count, soaked):
    for i in range(count):
        short = {"train": {"images": BATCH, "batch": BATCH // 2, "grad_accum": 1}}
        finish(tiny(tmp_path / str(i), packs, 2, **short), 2)
    soaked("19a: clean runs exit 0", required=100, passed=count)


def run_noting_resources(config: Config) -> None:
    save, found = Checkpoints.save, []

    def noting(self, *args, **kwargs):
        self.wait()  # so that a save under way counts in none of them
        threads = len(os.listdir("/proc/self/task"))
        rss = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        found.append((rss, len(os.listdir("/proc/self/fd")), threads))
        save(self, *args, **kwargs)

    Checkpoints.save = noting
    train.train(config)
    print(json.dumps(found))


@pytest.mark.parametrize(("steps", "saves"), [(240, 24), pytest.param(2_000, 100, marks=pytest.mark.soak)])
def test_long_runs_leak_nothing(finish, packs, tmp_path, steps, saves, soaked):
    sizes = {"images": steps * BATCH, "batch": BATCH, "grad_accum": 1, "warmup_images": 32}
    often = {"save_every": steps // saves * BATCH, "sample_every": 10**9, "print_every": 50 * BATCH}
    [end] = finish(tiny(tmp_path, packs, train=sizes, log=often), 1, run_noting_resources)
    found = json.loads(end.output.splitlines()[-2 if end.output.splitlines()[-1].startswith("finished") else -1])
    assert len(found) == saves
    settled = found[saves // 4 : -1]  # before the last save comes the only sampling
    assert len({threads for _, _, threads in settled}) == 1
    fds = [fds for _, fds, _ in settled]
    assert max(fds) <= min(fds) + 1, fds  # TensorBoard's thread opens its file anew for each line
    growth = settled[-1][0] / settled[0][0] - 1
    assert growth < 0.01, " ".join(str(rss >> 10) for rss, _, _ in found)
    soaked("19b: RSS growth over 2,000 steps with 100 saves", steps=steps, saves=saves, growth=round(growth, 5))
