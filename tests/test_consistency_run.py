"""A run that begins to learn jumps on its way: killed and resumed, sharded, compiled, started from a plain one."""

import importlib
import re
import signal
import warnings
from pathlib import Path

import pytest
import torch

from fastdit import config as C
from fastdit import train
from fastdit.config import Config
from fastdit.runtime.run import load_config
from fastdit.runtime.tensors import load_weights

with pytest.MonkeyPatch.context() as patch:  # a file beside this one, which is no package
    patch.syspath_prepend(Path(__file__).parent)
    whole_runs = importlib.import_module("whole_runs")
    STEPS, BATCH, run, run_signalled = whole_runs.STEPS, whole_runs.BATCH, whole_runs.run, whole_runs.run_signalled
    curve, weights = whole_runs.curve, whole_runs.weights

SWITCH = 3


def tiny(folder: Path, **groups) -> Config:
    """The last three steps have jumps; labels are dropped, and guidance is learnt too."""
    config = whole_runs.tiny(
        folder,
        model={"class_dropout": 0.2, "jumps": True},
        diffusion={"consistency": 0.5, "model_guidance": 0.3},
        train={"ema": 0.5},
    )
    return C.replace(config, **groups)


@pytest.fixture(scope="module")
def whole(run_ranks, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert run_ranks(1, run, tiny(folder), init=False) == [0]
    return folder


@pytest.fixture(scope="module")
def whole_fp32(run_ranks, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole_fp32")
    assert run_ranks(1, run, tiny(folder, parallel={"precision": "fp32"}), init=False) == [0]
    return folder


def test_its_first_half_is_the_plain_runs_and_its_embedder_learns_in_the_second(whole, run_ranks, tmp_path):
    plain = tiny(tmp_path, diffusion={"consistency": 0.0}, model={"jumps": False})
    assert run_ranks(1, run, plain, init=False) == [0]
    assert curve(whole)[:SWITCH] == curve(tmp_path)[:SWITCH]
    assert curve(whole)[SWITCH:] != curve(tmp_path)[SWITCH:]
    [shards] = (whole / "runs" / "tiny" / "checkpoints").glob(f"*{STEPS * BATCH}/shards/*.safetensors")
    counts = {name: value.item() for name, value in load_weights(shards)[0].items() if name.startswith("step.")}
    assert {count for name, count in counts.items() if "jump_embedder" in name} == {STEPS - SWITCH}
    assert counts["step.pos_embed"] == STEPS
    learnt = weights(whole)["jump_embedder.2.weight"]
    assert learnt.abs().max() > 0
    assert learnt.isfinite().all()


@pytest.mark.parametrize("after", [SWITCH, SWITCH + 1, SWITCH + 2])
def test_killed_round_the_switch_it_resumes_bit_for_bit(whole, run_ranks, tmp_path, after):
    [end] = run_ranks.outcomes(1, run_signalled, tiny(tmp_path), after, init=False)
    assert end.code == -signal.SIGKILL
    assert run_ranks(1, run, tiny(tmp_path), init=False) == [0]
    assert curve(tmp_path) == curve(whole)
    ours, theirs = weights(tmp_path), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())


def run_compiled(config: Config) -> int:
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")  # the compiler's own, as it looks about
    return train.train(config)


@pytest.mark.parametrize(
    "how",
    ["two ranks", "accumulated", "recomputed", pytest.param("compiled", marks=[pytest.mark.soak, pytest.mark.timeout(900)])],
)
def test_it_is_the_same_run(whole_fp32, run_ranks, tmp_path, how):
    """In fp32, to the rounding of sums in another order. Compiling takes 40 s, and minutes on a slow machine."""
    changes, ranks = {
        "two ranks": ({"train": {"batch": BATCH // 2}}, 2),
        "accumulated": ({"train": {"batch": BATCH // 2, "grad_accum": 2}}, 1),
        "compiled": ({"parallel": {"compile": "on"}}, 1),
        "recomputed": ({"parallel": {"checkpoint_activations": True}}, 1),
    }[how]
    config = C.replace(tiny(tmp_path, parallel={"precision": "fp32"}), **changes)
    assert run_ranks(ranks, run_compiled, config, init=False, timeout=600) == [0] * ranks
    for ours, theirs in zip(curve(tmp_path), curve(whole_fp32), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4)


def test_a_finished_run_is_taught_jumps(run_ranks, tmp_path):
    plain = tiny(tmp_path, run={"name": "plain"}, diffusion={"consistency": 0.0}, model={"jumps": False})
    assert run_ranks(1, run, plain, init=False) == [0]
    tuned = tiny(tmp_path, diffusion={"consistency": 1.0}, train={"init_from": str(tmp_path / "runs" / "plain")})
    [end] = run_ranks.outcomes(1, run, tuned, init=False)
    assert end.code == 0, end.error
    assert re.search("started from .*; the length of a step is new: at 0 the network is as it was", end.output)
    assert load_config(tmp_path / "runs" / "tiny" / "config.json").model.jumps
    assert weights(tmp_path)["jump_embedder.2.weight"].abs().max() > 0


def test_a_taught_run_goes_on_without_jumps(whole, run_ranks, tmp_path):
    config = tiny(
        tmp_path,
        diffusion={"consistency": 0.0},
        model={"jumps": False},
        train={"init_from": str(whole / "runs" / "tiny")},
    )
    [end] = run_ranks.outcomes(1, run, config, init=False)
    assert end.code == 0, end.error
    assert not [name for name in weights(tmp_path) if name.startswith("jump_embedder")]
