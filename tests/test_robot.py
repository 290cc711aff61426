"""The robot: episodes that follow from their seeds, experts' data, closed loops and what is counted of them.

Where the simulator is not installed, a point that has to reach a goal stands in for the arm.
"""

import importlib.util
import itertools
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from fastdit_kernels.reference import REFERENCE
from PIL import Image

from fastdit import evaluate, sampling
from fastdit.config import Config, DataConfig, UserError, replace
from fastdit.data import encoding, experts
from fastdit.data import pack as packs
from fastdit.data.normaliser import Affine, Normaliser
from fastdit.model import DiT
from fastdit.recipes import RECIPES
from fastdit.robot import closed_loop, evaluation, film, rollouts, simulator
from fastdit.robot.evaluation import EXPERT, Work
from fastdit.robot.policy import Policy
from fastdit.robot.simulator import TASKS, Simulator
from fastdit.runtime.ranks import World
from fastdit.runtime.run import load_config, save_config
from fastdit.weights.folder import save_pretrained

CPU = torch.device("cpu")
simulated = pytest.mark.skipif(importlib.util.find_spec("metaworld") is None, reason="needs pip install -e '.[robot]'")


class Point:
    """A point in space that moves as it is told, and has to come near a goal that the seed decides."""

    def __init__(self, task: str) -> None:
        self.task = task

    def observe(self) -> np.ndarray:
        return np.concatenate([self.at, np.zeros(33), self.goal])

    def reset(self, seed: int) -> np.ndarray:
        self.at, self.goal = np.zeros(3), np.random.default_rng(seed).uniform(-5, 5, 3)
        return self.observe()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, bool]:
        self.at = self.at + np.clip(np.asarray(action, np.float64)[:3], -1, 1)
        return self.observe(), bool(np.abs(self.at - self.goal).max() < 0.5)

    def expert(self, observation: np.ndarray) -> np.ndarray:
        return np.append(np.clip(observation[36:] - observation[:3], -1, 1), 0.0)


@pytest.fixture
def points(monkeypatch):
    monkeypatch.setattr(rollouts, "Simulator", Point)
    monkeypatch.setattr(experts, "Simulator", Point)
    monkeypatch.setattr(experts, "require", lambda: None)
    rollouts.simulators.cache_clear()
    yield
    rollouts.simulators.cache_clear()


def towards(observations: np.ndarray, task: int, chunk: int, first: int) -> np.ndarray:
    """Sixteen actions that go to the goal and stay there."""
    left = observations[:, 36:] - observations[:, :3]
    out = []
    for _ in range(16):
        move = np.clip(left, -1, 1)
        left = left - move
        out.append(np.concatenate([move, np.zeros((len(left), 1))], axis=1))
    return np.stack(out, axis=1)


# --- closed loops ---


def test_a_policy_sees_what_its_actions_made_of_the_world(points):
    looked = []

    def policy(observations, task, chunk, first):
        looked.append((observations.copy(), task, chunk, first))
        return towards(observations, task, chunk, first)

    outcomes = rollouts.group(policy, "push", seed=0, first=20, count=3, executed=2)
    assert all(o.success for o in outcomes)
    assert [(task, chunk, first) for _, task, chunk, first in looked] == [(1, n, 20) for n in range(len(looked))]
    for i, outcome in enumerate(outcomes):
        goal = np.random.default_rng(rollouts.seeds(0, 20 + i, 1)[0]).uniform(-5, 5, 3)
        assert outcome.steps == len(outcome.actions) == len(outcome.path) - 1 == np.ceil(np.abs(goal).max() - 0.5)
        for n, (observations, *_) in enumerate(looked):
            at = np.array(outcome.path[min(2 * n, outcome.steps)])
            np.testing.assert_allclose(observations[i, :3], at)


def test_an_episode_that_does_not_succeed_ends(points):
    outcomes = rollouts.group(lambda o, *_: np.zeros((len(o), 16, 4)), "reach", seed=0, first=0, count=2)
    assert [(o.success, o.steps) for o in outcomes] == [(False, simulator.MOST_STEPS)] * 2


def test_an_episode_is_the_same_whatever_it_is_played_beside(points):
    alone = [rollouts.group(towards, "reach", 0, n, 1)[0] for n in range(4)]
    assert rollouts.group(towards, "reach", 0, 0, 4) == alone


def test_no_evaluation_has_a_goal_of_training_or_of_another():
    training = {n + attempt * experts.EPISODES for n in range(experts.EPISODES) for attempt in range(experts.TRIES)}
    seen = [set(rollouts.seeds(seed, 0, 1000)) for seed in range(5)]
    assert all(len(s) == 1000 and not s & training for s in seen)
    assert all(not seen[a] & seen[b] for a in range(5) for b in range(a))


# --- what is counted ---


def play(evaluations: int, task: str, first: int, count: int) -> list[rollouts.Outcome]:
    """Episode n succeeds where the evaluations divide it; experts always do."""
    return [
        rollouts.Outcome(evaluations == EXPERT or n % evaluations == 0, n, [[0.0] * 4] * n, [[0.0] * 3] * (n + 1))
        for n in range(first, first + count)
    ]


def test_what_is_finished_is_not_played_again_on_any_number_of_processes(tmp_path):
    wanted = evaluation.work((1, 2), 25)
    assert {(w.evaluations, w.task) for w in wanted} == {(e, t) for e in (0, 1, 2) for t in TASKS}
    assert sum(w.size for w in wanted) == 25 * 3 * len(TASKS)
    played: list[Work] = []
    evaluation.run(tmp_path, wanted[:20], 0, play, played.append)
    file = tmp_path / "episodes-0.jsonl"
    file.write_text(file.read_text()[:-30])  # as a kill leaves it
    missing = [w for w in wanted if w not in evaluation.finished(tmp_path)]
    assert missing == wanted[19:]
    evaluation.run(tmp_path, missing[0::2], 0, play, played.append)
    evaluation.run(tmp_path, missing[1::2], 1, play, played.append)
    found = evaluation.finished(tmp_path)
    assert set(found) == set(wanted)
    rates = evaluation.rates(found, wanted)
    assert rates == {e: dict.fromkeys(TASKS, (n, 25)) for e, n in ((0, 25), (1, 25), (2, 13))}
    assert {line["task"] for line in evaluation.paths(tmp_path)} == set(TASKS)


def test_the_table_has_a_row_for_each_task(tmp_path):
    wanted = evaluation.work((2,), 10)
    evaluation.run(tmp_path, wanted, 0, play, lambda w: None)
    lines = [" ".join(line.split()) for line in evaluation.table(evaluation.rates(evaluation.finished(tmp_path), wanted))]
    assert lines[0] == "task scripted expert 2 evaluations"
    assert [line.split()[0] for line in lines[1:]] == [*TASKS, "all"]
    assert lines[1].endswith("100 % (72-100) 50 % (24-76)")
    assert lines[-1].endswith("100 % (94-100) 50 % (38-62)")


@pytest.mark.parametrize(
    ("good", "num", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (1, 2, 0.0945, 0.9055)],
)
def test_wilsons_interval_is_the_published_one(good, num, low, high):
    """81 of 263 is the example of Newcombe 1998, table I."""
    assert evaluation.wilson(good, num) == pytest.approx((low, high), abs=1e-4)


def test_the_plot_shows_a_path_for_each_task(tmp_path):
    episodes = [{"task": task, "path": [[0, 0, 0], [i, 1, 2]]} for i, task in enumerate(TASKS)]
    assert film.plot(tmp_path / "paths.png", episodes) == tmp_path / "paths.png"
    assert (tmp_path / "paths.png").stat().st_size > 10_000
    assert film.plot(tmp_path / "none.png", []) is None


# --- data ---


def config(tmp_path, episodes: int = 2 * len(TASKS)) -> Config:
    data = {"path": experts.PATH, "kind": "arrays", "packs": str(tmp_path / "packs"), "num_images": episodes}
    return replace(RECIPES["cats"], data=data, model={"patch": 1})


def check_data(tmp_path, episodes: int) -> None:
    path = encoding.ensure(config(tmp_path, episodes), World(0, 1, 0, 1, CPU), lambda line: None)
    m = packs.read_manifest(path)
    assert (m.image_shape, m.condition, m.class_names) == ((4, 16), 39, list(TASKS))
    source = experts.open_experts(DataConfig(num_images=episodes))
    samples = list(source.samples(0, episodes))
    assert m.count == len(samples)
    assert {s.label for s in samples} == set(range(len(TASKS)))
    # The chunks of an episode overlap: each is the one before, a step later.
    for a, b in itertools.pairwise(samples):
        if a.name.split(" of ", 1)[1] == b.name.split(" of ", 1)[1]:
            assert np.array_equal(a.x[:, 1:], b.x[:, :-1])
    pack = packs.Pack(path, CPU, 0)
    actions = Normaliser.from_dict(m.normaliser).x.physical(pack.batch(0, m.count).x0)
    assert actions.abs().max() <= 1.000001


def test_experts_become_chunks_of_actions(tmp_path, points):
    check_data(tmp_path, 2 * len(TASKS))


@simulated
def test_metaworlds_experts_become_chunks_of_actions(tmp_path):
    check_data(tmp_path, len(TASKS))


@simulated
@pytest.mark.parametrize("task", TASKS)
def test_an_episode_follows_from_its_seed(task):
    arm, other = Simulator(task), Simulator(task)
    first = experts.successful(arm, 3)
    assert first is not None
    experts.successful(arm, 4)
    for again in (experts.successful(arm, 3), experts.successful(other, 3)):
        assert again is not None
        for a, b in zip(first, again, strict=True):
            assert np.array_equal(a, b)
    assert first[0].shape == (len(first[1]), simulator.OBSERVATION)
    assert first[1].shape[1] == simulator.ACTION
    assert not np.array_equal(arm.reset(rollouts.seeds(0, 0, 1)[0])[36:], first[0][0, 36:])


def test_a_missing_simulator_is_one_line_that_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        encoding.ensure(config(tmp_path), World(0, 1, 0, 1, CPU), lambda line: None)
    assert str(error.value) == "the robot's simulator, metaworld, is not installed; pip install -e '.[robot]'"


def test_a_machine_that_cannot_render_gets_a_plot(tmp_path, monkeypatch):
    episodes = [{"task": task, "path": [[0, 0, 0], [1, 1, 2]], "actions": [[0, 0, 0, 0]]} for task in TASKS]
    ran = []

    def run(command, **options):
        ran.append(options["env"]["MUJOCO_GL"])
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", run)
    assert film.show(tmp_path, {**episodes[0], "seed": 1}, episodes) == tmp_path / "paths.png"
    assert ran == ["egl", "osmesa"]


# --- a policy ---


@pytest.fixture
def run(tmp_path):
    """A run of the recipe with a tiny network, whose plans are its random start."""
    tiny = {"depth": 1, "width": 16, "num_heads": 1}
    config = replace(RECIPES["robot"], model=tiny, run={"name": "robot"}, parallel={"precision": "fp32"})
    model = DiT(config.model, REFERENCE)
    model.init_weights(0)
    with torch.no_grad():
        for part in (model.final_layer.linear, model.adaLN_modulation):  # they start at zero
            part.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    normal = Affine((0.0,) * 39, (2.0,) * 39)
    model.normaliser = Normaliser("min_max", Affine((0.5,) * 4, (2.0,) * 4), normal)
    save_pretrained(model, tmp_path / "robot", config)
    return tmp_path / "robot"


def test_a_plan_is_a_function_of_observation_task_seed_and_number(run):
    policy = Policy.load(run)
    observations = np.random.default_rng(0).normal(size=(3, 39))
    plan = policy.plan(observations, 2, steps=2, seed=1, number=7)
    assert plan.shape == (3, 16, 4)
    assert torch.equal(plan, Policy.load(run).plan(observations, 2, steps=2, seed=1, number=7))
    torch.testing.assert_close(plan[1:2], policy.plan(observations[1:2], 2, steps=2, seed=1, number=8))
    for other in ({"seed": 2, "number": 7}, {"seed": 1, "number": 6}):
        assert not torch.allclose(plan, policy.plan(observations, 2, steps=2, **other))
    assert not torch.allclose(plan, policy.plan(observations, 3, steps=2, seed=1, number=7))
    assert not torch.allclose(plan, policy.plan(observations + 1, 2, steps=2, seed=1, number=7))


def test_plans_are_in_physical_units(run):
    policy = Policy.load(run)
    observations = np.random.default_rng(0).normal(size=(2, 39))
    x0 = sampling.sample(
        policy.model,
        policy.config.diffusion,
        (2, 4, 16),
        torch.tensor([1, 1]),
        condition=torch.from_numpy(observations / 2).float(),
        steps=3,
        seed=4,
        first=0,
    )
    torch.testing.assert_close(policy.plan(observations, 1, steps=3, seed=4), (x0 * 2 + 0.5).transpose(1, 2))


@pytest.mark.parametrize(
    ("shape", "label", "said"),
    [
        ((1, 38), 0, r"^observations of 1×38; this policy takes \[B, 39\]$"),
        ((39,), 0, r"^observations of 39; this policy takes \[B, 39\]$"),
        ((1, 39), None, r"^task None; this policy knows tasks 0 … 5$"),
        ((1, 39), 6, r"^task 6; this policy knows tasks 0 … 5$"),
    ],
)
def test_a_policy_refuses_what_it_does_not_know(run, shape, label, said):
    with pytest.raises(UserError, match=said):
        Policy.load(run).plan(np.zeros(shape), label)
    with pytest.raises(UserError, match=r"^an observation holds numbers that are not finite$"):
        Policy.load(run).plan(np.full((1, 39), np.nan), 0)


def test_evaluate_plays_episodes_once_and_keeps_the_figures(run, points, monkeypatch, capsys):
    monkeypatch.setattr(closed_loop, "require", lambda: None)
    monkeypatch.setattr(film, "show", lambda folder, episode, others: folder / "paths.png")
    monkeypatch.setattr(Policy, "latency", lambda self, steps, repeats: (2.0, 3.0))
    evaluate.evaluate(evaluate.Options(str(run), num_images=3, steps=2, seed=5))
    said = capsys.readouterr().out
    assert "success in 3 episodes a task on goals that no training episode had, seed 5; 95 % intervals" in said
    assert "a chunk at 2 evaluations: 2.0 ms, 99th percentile 3.0 ms" in said
    figures = json.loads((run / "policy-5.json").read_text())
    assert figures["success"]["0"] == {task: [3, 3] for task in TASKS}
    assert set(figures["success"]) == {"0", "2"}
    assert figures["latency_ms"] == {"2": {"median": 2.0, "p99": 3.0}}

    def again(*_: object) -> list[rollouts.Outcome]:
        raise AssertionError("played twice")

    monkeypatch.setattr(rollouts, "group", again)
    evaluate.evaluate(evaluate.Options(str(run), num_images=3, steps=2, seed=5))
    assert json.loads((run / "policy-5.json").read_text())["success"] == figures["success"]


def test_arrays_without_a_simulator_are_refused(run):
    config = load_config(run / "config.json")
    save_config(replace(config, data={"path": "waves"}), run / "config.json")
    with pytest.raises(
        UserError, match=r"was trained on waves; only policies of the recipe robot have a simulator to be played in$"
    ):
        evaluate.evaluate(evaluate.Options(str(run)))


def test_a_film_repeats_the_episode(tmp_path, monkeypatch):
    """By a renderer that paints where the hand is: no display is needed."""
    seen = []

    class Renderer:
        def __init__(self, model: object, height: int, width: int) -> None:
            self.shape = (height, width, 3)

        def update_scene(self, data: Point, camera: str) -> None:
            seen.append(data.at.copy())

        def render(self) -> np.ndarray:
            return np.full(self.shape, 40 * len(seen) % 256, np.uint8)

    class Filmed(Point):
        @property
        def env(self) -> types.SimpleNamespace:
            return types.SimpleNamespace(model=None, data=self)

    monkeypatch.setitem(sys.modules, "mujoco", types.SimpleNamespace(Renderer=Renderer))
    monkeypatch.setattr(film, "Simulator", Filmed)
    actions = [[0.5, 0.0, 0.25, 0.0]] * 6
    film.render({"task": "reach", "seed": 3, "actions": actions}, tmp_path / "episode.gif")
    np.testing.assert_allclose(seen, [[0.5 * n, 0.0, 0.25 * n] for n in (1, 3, 5)])
    with Image.open(tmp_path / "episode.gif") as made:
        assert (made.n_frames, made.size) == (3, (film.SIZE, film.SIZE))


def test_the_figures_of_the_page_are_those_of_the_json():
    root = Path(__file__).parent.parent
    found = json.loads((root / "bench/results/robot.json").read_text())["0"]["success"]
    page = (root / "docs/policy.md").read_text()
    rows = [f"| {task} | " + " | ".join("{} of {}".format(*found[e][task]) for e in found) + " |" for task in TASKS]
    totals = [[sum(counts) for counts in zip(*found[e].values(), strict=True)] for e in found]
    rows.append("| all, 95 % interval | " + " | ".join(evaluation.cell(*total) for total in totals) + " |")
    assert all(row in page for row in rows)
