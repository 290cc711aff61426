"""A run with Muon: killed and resumed, on other numbers of ranks, its memory and its cost on paper."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from fastdit_kernels.reference import REFERENCE

from fastdit import config as C
from fastdit import muon, train
from fastdit.config import Config
from fastdit.model import DiT
from fastdit.optim import Optimizer
from fastdit.planning import costs, memory
from fastdit.planning.flops import train_flops_per_image
from fastdit.planning.gpus import GPUS
from fastdit.recipes import RECIPES
from fastdit.runtime.run import load_config
from fastdit.runtime.tensors import load_weights

STEPS, BATCH = 6, 16


def tiny(folder: Path, ranks: int = 1, **train_) -> Config:
    return C.replace(
        RECIPES["cats"],
        run={"name": "tiny", "folder": str(folder / "runs")},
        data={"num_images": 200, "packs": str(folder / "packs")},
        model={"patch": 8, "depth": 2, "width": 32, "num_heads": 2},
        sample={"num": 4, "steps": 2},
        train={
            **{"images": STEPS * BATCH, "batch": BATCH // ranks, "warmup_images": 32, "ema": 0.5, "optimizer": "muon"},
            **train_,
        },
        log={"print_every": BATCH, "sample_every": 10**6, "save_every": 2 * BATCH},
        parallel={"threads": 1, "precision": "fp32"},
    )


def run(config: Config, killed_after: int | None = None) -> int:
    before, calls = Optimizer.step, [0]

    def step(self, *args):
        calls[0] += 1
        if calls[0] == killed_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return before(self, *args)

    Optimizer.step = step
    return train.train(config)


def curve(folder: Path) -> list[tuple]:
    lines = (folder / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    return [(line["images"], line["loss"], line["grad_norm"]) for line in map(json.loads, lines)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    [path] = (folder / "runs" / "tiny" / "checkpoints").glob(f"*{STEPS * BATCH}/ema.safetensors")
    return load_weights(path)[0]


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
    [end] = run_ranks.outcomes(1, run, tiny(tmp_path), after, init=False)
    assert end.code == -signal.SIGKILL
    assert run_ranks(1, run, tiny(tmp_path), init=False) == [0]
    assert curve(tmp_path) == curve(whole)
    ours, theirs = weights(tmp_path), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_it_goes_on_with_other_ranks(whole, run_ranks, tmp_path, first, then):
    ends = run_ranks.outcomes(first, run, tiny(tmp_path, first), 4, init=False)
    assert all(end.code == -signal.SIGKILL for end in ends)
    assert run_ranks(then, run, tiny(tmp_path, then), init=False) == [0] * then
    for ours, theirs in zip(curve(tmp_path), curve(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)  # sums in another order, made orthogonal


def test_a_run_keeps_its_optimizer(whole, run_ranks):
    [end] = run_ranks.outcomes(1, run, tiny(whole, optimizer="adamw"), init=False)
    assert end.code != 0
    assert re.search("train.optimizer: adamw here, muon there|train.optimizer: muon there", end.error + end.output)
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
