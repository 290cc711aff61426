"""A run with Muon: killed and resumed, on other numbers of ranks, its memory and its cost on paper."""

import importlib
import signal
from pathlib import Path

import pytest
import torch
from fastdit_kernels.reference import REFERENCE

from fastdit import config as C
from fastdit import muon
from fastdit.config import Config
from fastdit.model import DiT
from fastdit.planning import costs, memory
from fastdit.planning.flops import train_flops_per_image
from fastdit.planning.gpus import GPUS
from fastdit.recipes import RECIPES
from fastdit.runtime.run import load_config
from fastdit.runtime.tensors import load_weights

with pytest.MonkeyPatch.context() as patch:  # a file beside this one, which is no package
    patch.syspath_prepend(Path(__file__).parent)
    whole_runs = importlib.import_module("whole_runs")
    STEPS, BATCH, run, run_signalled = whole_runs.STEPS, whole_runs.BATCH, whole_runs.run, whole_runs.run_signalled
    curve, weights = whole_runs.curve, whole_runs.weights


def tiny(folder: Path, ranks: int = 1, **train) -> Config:
    return whole_runs.tiny(
        folder,
        train={"batch": BATCH // ranks, "ema": 0.5, "optimizer": "muon"} | train,
        log={"sample_every": 10**6},
        parallel={"precision": "fp32"},
    )


@pytest.fixture(scope="module")
def whole(run_ranks, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert run_ranks(1, run, tiny(folder), init=False) == [0]
    return folder


def test_the_state_is_one_momentum_a_matrix(whole):
    [shards] = (whole / "runs" / "tiny" / "checkpoints").glob(f"*{STEPS * BATCH}/shards/*.safetensors")
    names = load_weights(shards)[0].keys()
    matrices = {name for name in weights(whole) if muon.orthogonalised(name)}
    assert len(matrices) == 2 * 4
    assert {name.partition(".")[2] for name in names if name.startswith("momentum.")} == matrices
    assert {name.partition(".")[2] for name in names if name.startswith("exp_avg.")} == weights(whole).keys() - matrices


@pytest.mark.parametrize("after", [2, 4, 6])
def test_killed_it_resumes_to_the_bit(whole, run_ranks, tmp_path, after):
    [end] = run_ranks.outcomes(1, run_signalled, tiny(tmp_path), after, init=False)
    assert end.code == -signal.SIGKILL
    assert run_ranks(1, run, tiny(tmp_path), init=False) == [0]
    assert curve(tmp_path) == curve(whole)
    ours, theirs = weights(tmp_path), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_it_goes_on_with_other_ranks(whole, run_ranks, tmp_path, first, then):
    ends = run_ranks.outcomes(first, run_signalled, tiny(tmp_path, first), 4, init=False)
    assert all(end.code == -signal.SIGKILL for end in ends)
    assert run_ranks(then, run, tiny(tmp_path, then), init=False) == [0] * then
    for ours, theirs in zip(curve(tmp_path), curve(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)  # sums in another order, made orthogonal


def test_a_run_keeps_its_optimizer(whole, run_ranks):
    [end] = run_ranks.outcomes(1, run, tiny(whole, optimizer="adamw"), init=False)
    assert end.code != 0
    assert "train.optimizer: adamw here, muon there" in end.error + end.output
    assert load_config(whole / "runs" / "tiny" / "config.json").train.optimizer == "muon"


def test_plan_counts_one_number_a_matrix():
    config = RECIPES["cats-256"]
    with_muon = C.replace(config, train={"optimizer": "muon"})
    with torch.device("meta"):
        named = DiT(config.model, REFERENCE).named_parameters()
    matrices = sum(p.numel() for name, p in named if muon.orthogonalised(name))
    adamw, ours = memory.state_bytes(config, 1), memory.state_bytes(with_muon, 1)
    assert sum(adamw.values()) - sum(ours.values()) == 4 * matrices
    assert ours["Muon's momentum"] == 4 * matrices


def test_it_costs_at_most_8_percent_of_a_step_on_8_ranks():
    config = RECIPES["cats-256"]  # B/2, batch 32 a rank
    with torch.device("meta"):
        named = DiT(config.model, REFERENCE).named_parameters()
    shapes = [(name, p.shape[0], p.shape[1]) for name, p in named if muon.orthogonalised(name)]
    parts = muon.spread(shapes, 8)
    most = max(sum(muon.flops(p.rows, p.columns) for p in parts if p.owner == rank) for rank in range(8))
    step = config.train.batch * train_flops_per_image(config.model)
    assert 0.03 < most / step <= 0.08
    cluster = costs.Cluster(GPUS["a100-80gb"], 8, 1, 25.0)
    with_muon = C.replace(config, train={"optimizer": "muon"})
    [part] = [part for part in costs.parts(with_muon, cluster) if part.name == "Newton–Schulz"]
    assert part.flops == most
    assert not any(part.name == "Newton–Schulz" for part in costs.parts(config, cluster))
    [message] = {m.name: m for m in costs.messages(with_muon, cluster)}.keys() - {
        m.name for m in costs.messages(config, cluster)
    }
    assert message.startswith("all-to-all")
