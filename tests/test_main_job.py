"""The verbs together: train, kill, resume, spread over ranks, sample. Each run is a tiny one of the default recipe."""

import dataclasses
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdit import command, train
from fastdit import config as C
from fastdit.checkpoint import Checkpoints
from fastdit.config import Config, UserError
from fastdit.data import encoding
from fastdit.diffusion import choose_objective
from fastdit.optim import Optimizer
from fastdit.runtime import ranks
from fastdit.runtime.run import load_config
from fastdit.runtime.sharding import main_param
from fastdit.runtime.tensors import load_weights
from fastdit.sample import Options, sample
from fastdit.weights import start

ROOT = Path(__file__).parent.parent

with pytest.MonkeyPatch.context() as patch:  # a file beside this one, which is no package
    patch.syspath_prepend(Path(__file__).parent)
    whole_runs = importlib.import_module("whole_runs")
    STEPS, BATCH, tiny = whole_runs.STEPS, whole_runs.BATCH, whole_runs.tiny
    run, run_signalled = whole_runs.run, whole_runs.run_signalled
    metrics, curve, weights = whole_runs.metrics, whole_runs.curve, whole_runs.weights


@pytest.fixture(scope="module")
def whole(run_ranks, tmp_path_factory) -> Path:
    """The uninterrupted run on one rank."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_ranks(1, run, tiny(folder), init=False) == [0]
    return folder


@pytest.fixture(scope="module")
def whole_fp32(run_ranks, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole_fp32")
    assert run_ranks(1, run, tiny(folder, parallel={"precision": "fp32"}), init=False) == [0]
    return folder


def test_a_run_leaves_what_it_says(whole):
    folder = whole / "runs" / "tiny"
    assert load_config(folder / "config.json") == tiny(whole)
    assert [line["images"] for line in metrics(whole)] == [BATCH * (i + 1) for i in range(STEPS)]
    assert all(line["loss"] > 0 and line["img_per_s"] > 0 and line["mfu"] is None for line in metrics(whole))
    assert [int(p.stem) for p in sorted((folder / "samples").glob("*.png"))] == [3 * BATCH, 6 * BATCH]
    with Image.open(folder / "samples" / f"{6 * BATCH:09d}.png") as grid:  # two by two, each with its class's name below it
        assert grid.size == (2 + 2 * (3 * 32 + 2), 2 + 2 * (3 * 32 + 14 + 2))
    assert sorted(int(p.name) for p in (folder / "checkpoints").iterdir()) == [2 * BATCH, 4 * BATCH, 6 * BATCH]


def test_a_run_on_the_kernels_follows_pytorchs_and_goes_on_without_them(run_ranks, tmp_path):
    """Every op, and the optimizer, by its kernel: here the interpreter runs them, which takes its time."""

    def config(folder: str, steps: int, kernels: str) -> Config:
        small = {"model": {"patch": 8, "depth": 1, "width": 32, "num_heads": 2}, "sample": {"num": 1, "steps": 1}}
        length = {"images": steps * 8, "batch": 8, "warmup_images": 16, "lr_decay": "constant"}
        made = tiny(tmp_path / folder, parallel={"precision": "fp32"}, train=length, log={"sample_every": 10**6}, **small)
        return dataclasses.replace(made, kernels=kernels)

    for folder, steps, kernels in (("a", 2, "triton"), ("b", 3, "auto"), ("a", 3, "auto")):
        assert run_ranks(1, run, config(folder, steps, kernels), init=False) == [0]
    for ours, theirs in zip(curve(tmp_path / "a"), curve(tmp_path / "b"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_profiled_run_leaves_a_trace_and_a_table_and_the_same_curve(whole, run_ranks, tmp_path):
    config = dataclasses.replace(tiny(tmp_path), profile=2)
    assert run_ranks(1, run, config, init=False) == [0]
    assert curve(tmp_path) == curve(whole)
    folder = tmp_path / "runs" / "tiny" / "profile"
    at = f"{6 * BATCH:09d}"  # steps 5 and 6: three warm up, and the tracer's own first is not counted
    assert {p.name for p in folder.iterdir()} == {f"{at}.json.gz", f"{at}.txt"}
    text = (folder / f"{at}.txt").read_text()
    assert "one step of 2 traced" in text
    for kind in ("matrix products", "attention", "optimizer and EMA", "not in any op"):
        assert kind in text


def test_running_it_again_changes_nothing(whole, run_ranks):
    before = curve(whole)
    assert run_ranks(1, run, tiny(whole), init=False) == [0]
    assert curve(whole) == before


@pytest.mark.parametrize("after", [1, 3, 4, 6])
def test_a_killed_run_resumes_bit_for_bit(whole, run_ranks, tmp_path, after):
    [end] = run_ranks.outcomes(1, run_signalled, tiny(tmp_path), after, signal.SIGKILL, init=False)
    assert end.code == -signal.SIGKILL
    assert run_ranks(1, run, tiny(tmp_path), init=False) == [0]
    assert curve(tmp_path) == curve(whole)
    ours, theirs = weights(tmp_path), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_signal_to_one_rank_saves_and_stops_all(whole_fp32, run_ranks, tmp_path, number):
    config = tiny(tmp_path, parallel={"precision": "fp32"}, train={"batch": BATCH // 2}, log={"save_every": 10**6})
    codes = run_ranks(2, run_signalled_on_rank_1, config, 2, number, init=False)
    assert codes == [128 + number] * 2
    [saved] = (tmp_path / "runs" / "tiny" / "checkpoints").iterdir()
    assert 0 < int(saved.name) < STEPS * BATCH
    assert run_ranks(2, run, config, init=False) == [0, 0]
    assert [line[0] for line in curve(tmp_path)] == [line[0] for line in curve(whole_fp32)]


def run_signalled_on_rank_1(config: Config, after: int, number: int) -> int:
    return run_signalled(config, after, number) if os.environ["RANK"] == "1" else run(config)


@pytest.mark.parametrize(("world", "accum"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_ranks_and_accumulation_do_not_change_the_curve(whole_fp32, run_ranks, tmp_path, world, accum):
    config = tiny(
        tmp_path,
        parallel={"precision": "fp32"},
        train={"batch": BATCH // world // accum, "grad_accum": accum},
        sample={"num": 5},
    )
    assert run_ranks(world, run, config, init=False) == [0] * world
    ours, theirs = (torch.tensor(curve(f), dtype=torch.float64) for f in (tmp_path, whole_fp32))
    assert torch.equal(ours[:, 0], theirs[:, 0])
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)  # fp32, up to the order of the sums


def run_hybrid(config: Config) -> tuple[int, list[str]]:
    """A whole run, and the mesh dimensions its weights lay on: the optimizer is asked while it steps."""
    before, seen = Optimizer.step, set()

    def step(self, *args):
        meshes = {p.device_mesh for p in self.adamw.named.values()}
        seen.update(f"{name} {size}" for mesh in meshes for name, size in zip(mesh.mesh_dim_names, mesh.shape, strict=True))
        return before(self, *args)

    Optimizer.step = step
    return train.train(config), sorted(seen)


@pytest.mark.parametrize("accum", [1, 2])
def test_two_nodes_of_two_ranks_follow_one_rank_and_hand_over_to_it(whole_fp32, run_ranks, tmp_path, accum):
    """HSDP: weights sharded over 2 and replicated over 2. Stopped half-way, one rank goes on from what the four saved."""
    whole = {"precision": "fp32"}
    half = tiny(tmp_path, parallel=whole | {"shard": 2}, train={"batch": BATCH // 4 // accum, "grad_accum": accum})
    stopped = run_ranks.outcomes(4, run_signalled, half, 4, signal.SIGTERM, init=False)
    assert [end.value for end in stopped] == [128 + signal.SIGTERM] * 4
    finished = tiny(tmp_path, parallel=whole)
    assert run_ranks(1, run, finished, init=False) == [0]
    ours, theirs = (torch.tensor(curve(f), dtype=torch.float64) for f in (tmp_path, whole_fp32))
    torch.testing.assert_close(ours[ours[:, 0].argsort()].unique(dim=0), theirs, rtol=2e-6, atol=0)
    fresh = C.replace(half, run={"name": "hybrid"})
    assert run_ranks(4, run_hybrid, fresh, init=False) == [(0, ["replicate 2", "shard 2"])] * 4
    ours = torch.tensor(curve(tmp_path, "hybrid"), dtype=torch.float64)
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)


def test_two_ranks_in_bf16_follow_one_rank_to_bf16_rounding(whole, run_ranks, tmp_path):
    assert run_ranks(2, run, tiny(tmp_path, train={"batch": BATCH // 2}), init=False) == [0, 0]
    ours, theirs = (torch.tensor(curve(f), dtype=torch.float64) for f in (tmp_path, whole))
    torch.testing.assert_close(ours[:, 1], theirs[:, 1], rtol=2**-8, atol=0)


def test_a_run_goes_on_with_another_number_of_ranks(whole_fp32, run_ranks, tmp_path):
    config = tiny(tmp_path, parallel={"precision": "fp32"}, train={"batch": BATCH // 2})
    for outcome in run_ranks.outcomes(2, run_signalled, config, 4, signal.SIGKILL, init=False):
        assert outcome.code == -signal.SIGKILL
    assert run_ranks(1, run, C.replace(config, train={"batch": BATCH}), init=False) == [0]
    ours, theirs = (torch.tensor(curve(f), dtype=torch.float64) for f in (tmp_path, whole_fp32))
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)


def said_by(run_ranks, config: Config, world: int = 1) -> str:
    """The one line a run refuses with, the same on every rank."""
    [line] = set(run_ranks(world, refused, config, init=False))
    assert "\n" not in line
    return line


def refused(config: Config) -> str:
    with pytest.raises(UserError) as error:
        train.train(config)
    return str(error.value)


def test_a_run_of_another_config_is_refused_and_untouched(whole, run_ranks):
    before = {p: p.read_bytes() for p in (whole / "runs").rglob("*") if p.is_file()}
    said = said_by(run_ranks, tiny(whole, train={"lr": 0.5}), world=2)
    assert "train.lr: 0.5 here, 0.004 there" in said
    assert "--run.fresh" in said
    said = said_by(run_ranks, tiny(whole, run={"seed": 3}))
    assert "run.seed: 3 here, 0 there" in said
    assert {p: p.read_bytes() for p in (whole / "runs").rglob("*") if p.is_file()} == before


def test_another_global_batch_is_refused(whole, run_ranks):
    said = said_by(run_ranks, tiny(whole), world=2)
    assert "global batch of 16 images, this command 32" in said


def test_fresh_starts_beside_the_old_run(whole, run_ranks):
    assert run_ranks(1, run, tiny(whole, run={"fresh": True}), init=False) == [0]
    assert curve(whole, "tiny-2") == curve(whole)


def test_a_folder_that_is_no_run_is_refused(run_ranks, tmp_path):
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "thesis.tex").write_text("mine")
    assert "holds no config.json" in said_by(run_ranks, tiny(tmp_path))


def test_the_number_of_classes_is_the_datas(run_ranks, tmp_path):
    assert run_ranks(1, run, tiny(tmp_path, model={"num_classes": 3}), init=False) == [0]
    assert load_config(tmp_path / "runs" / "tiny" / "config.json").model.num_classes == 15
    names = json.loads((tmp_path / "runs" / "tiny" / "classes.json").read_text())
    assert (len(names), names[3]) == (15, "mauve")


def test_non_finite_steps_in_a_row_stop_the_run(run_ranks, tmp_path):
    said = run_ranks(1, refused_with_nan, tiny(tmp_path, train={"max_skips": 3}), 3, init=False)[0]
    assert "3 steps in a row had a non-finite gradient" in said
    assert sorted(int(p.name) for p in (tmp_path / "runs" / "tiny" / "checkpoints").iterdir())[0] == 2 * BATCH
    assert run_ranks(1, run, tiny(tmp_path, train={"max_skips": 3}), init=False) == [0]


def refused_with_nan(config: Config, after: int) -> str:
    draw, calls = train.draw, [0]

    def nan_later(objective, x0, *rest):
        calls[0] += 1
        return draw(objective, x0 * (float("nan") if calls[0] >= after else 1), *rest)

    train.draw = nan_later
    return refused(config)


class HostSyncs(TorchDispatchMode):
    """Collects the ops that make the host wait for a value on the device."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.patch = pytest.MonkeyPatch()

    def __enter__(self):
        for name in ("tolist", "cpu", "numpy"):  # on a CPU tensor they dispatch nothing that could be caught
            before = getattr(torch.Tensor, name)

            def noted(tensor, *args, before=before, name=name, **kwargs):
                # Which rows a pack reads, and where to, is on the host by nature, on a GPU too.
                if not sys._getframe(1).f_code.co_filename.endswith("data/pack.py"):
                    self.found.append(name)
                return before(tensor, *args, **kwargs)

            self.patch.setattr(torch.Tensor, name, noted)
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def syncs_in_a_step(config: Config) -> list[str]:
    world = ranks.init(config.parallel)
    pack = encoding.Pack(encoding.ensure(config, world), world.device, 0)
    model = start.build(config, world)
    optimizer = Optimizer(model, config.train, BATCH)
    objective = choose_objective(config, world.device)
    with HostSyncs() as syncs:
        for i in range(3):
            train.step(model, objective, optimizer, pack, config, world, i * BATCH)
    with HostSyncs() as control:
        torch.ones(1).item(), torch.ones(1).tolist(), torch.ones(1).cpu(), torch.ones(1).numpy()
    assert control.found == ["aten._local_scalar_dense.default", "tolist", "cpu", "numpy"]
    pack.close()
    return syncs.found


@pytest.mark.parametrize("accum", [1, 2])
def test_no_step_waits_for_the_device(run_ranks, tmp_path, accum):
    config = tiny(tmp_path, model={"class_dropout": 0.1}, train={"grad_accum": accum, "batch": BATCH // accum})
    assert run_ranks(1, syncs_in_a_step, config, init=False) == [[]]


def sampled(options: Options) -> None:
    sample(options)


def test_a_picture_is_the_same_whatever_the_batch_and_the_ranks(whole, run_ranks, tmp_path):
    run_folder = str(whole / "runs" / "tiny")
    ways = [(1, 64, 0, 5), (1, 2, 0, 5), (2, 2, 0, 5), (1, 64, 2, 3)]
    for i, (world, batch, first, num) in enumerate(ways):
        options = Options(
            run_folder, num_images=num, first=first, batch=batch, singles=True, out=str(tmp_path / str(i)), precision="fp32"
        )
        run_ranks(world, sampled, options, init=False)
    pictures = [{p.name: p.read_bytes() for p in (tmp_path / str(i)).glob("*/*.png")} for i in range(len(ways))]
    assert sorted(pictures[0]) == [f"{n:06d}.png" for n in range(5)]
    assert pictures[1] == pictures[2] == pictures[0]
    assert pictures[3] == {name: pictures[0][name] for name in ("000002.png", "000003.png", "000004.png")}


def test_sampling_refuses_in_one_line(whole, run_ranks, tmp_path):
    lone = tmp_path / "lone.safetensors"
    lone.write_bytes(next(whole.rglob("ema.safetensors")).read_bytes())
    (tmp_path / "empty").mkdir()
    run_folder = str(whole / "runs" / "tiny")
    for options, said in (
        (Options(str(tmp_path / "nowhere")), "does not exist"),
        (Options(str(tmp_path / "empty")), "holds no checkpoint"),
        (Options(str(lone)), "no config.json beside it"),
        (Options(run_folder, num_images=0), "--num_images is 0"),
        (Options(run_folder, label=15), "classes 0 … 14"),
        (Options(run_folder, steps=5000), "--sample.steps 5000"),
        (Options(run_folder, guidance=2.0), "class_dropout"),
        (Options(run_folder, sampler="ddim"), "euler"),
    ):
        with pytest.raises(UserError, match=rf"\A[^\n]*{re.escape(said)}[^\n]*\Z"):
            sample(options)


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_starts_from_given_weights(whole, run_ranks, tmp_path, world):
    path = str(next((whole / "runs").rglob(f"*{STEPS * BATCH}/ema.safetensors")))
    config = tiny(tmp_path, train={"init_from": path, "batch": BATCH // world})
    given = load_weights(Path(path))[0]
    for built in run_ranks(world, built_weights, config, init=False):
        assert built.keys() == given.keys()
        assert all(torch.equal(built[name], given[name]) for name in given)


def built_weights(config: Config) -> dict[str, torch.Tensor]:
    model = start.build(config, ranks.init(config.parallel))
    weights = {name: main_param(p).detach() for name, p in model.named_parameters()}
    return {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in weights.items()}


def test_weights_that_do_not_fit_are_refused_by_name(whole, run_ranks, tmp_path):
    path = str(next((whole / "runs").rglob("ema.safetensors")))
    said = said_by(run_ranks, tiny(tmp_path, train={"init_from": path}, model={"width": 64}), world=2)
    assert "holds another architecture; it starts a run with --model.width 32" in said
    assert "no-such-file does not exist" in said_by(run_ranks, tiny(tmp_path, train={"init_from": "no-such-file"}))


def test_the_newest_checkpoint_holds_everything_a_step_changes(whole):
    assert Checkpoints(whole / "runs" / "tiny" / "checkpoints", 3).latest() == STEPS * BATCH


@pytest.mark.parametrize("verb", ["train", "encode", "sample"])
def test_a_bad_option_is_one_line_and_status_2(verb, tmp_path):
    end = subprocess.run(
        [sys.executable, ROOT / "fastdit" / f"{verb}.py", "--nonsense", "1"], capture_output=True, text=True, cwd=tmp_path
    )
    assert end.returncode == 2
    assert end.stdout == ""
    assert end.stderr.startswith("error: unknown option --nonsense")
    assert end.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_torchrun_hands_every_option_on():
    """It reads the arguments of a script too, and refuses one that begins two of its own options."""
    from torch.distributed.run import get_args_parser

    from fastdit import evaluate

    options = [*command._option_names(Config), *command._option_names(Options), *command._option_names(evaluate.Options)]
    for option in options:
        given = get_args_parser().parse_args(["script.py", "RUN", f"--{option}", "1"])
        assert given.training_script_args == ["RUN", f"--{option}", "1"]
