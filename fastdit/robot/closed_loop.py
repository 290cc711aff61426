"""evaluate.py of a policy: play what episodes are missing, all processes together; then the first says how many succeeded."""

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from rich.console import Console

from fastdit.config import Config, UserError, plain
from fastdit.data import experts
from fastdit.robot import evaluation, film, rollouts
from fastdit.robot.evaluation import EXPERT, NUM, Work
from fastdit.robot.policy import CHUNKS, Policy
from fastdit.robot.rollouts import Outcome
from fastdit.robot.simulator import TASKS, Floats, require
from fastdit.runtime import ranks
from fastdit.runtime.files import write_text
from fastdit.weights.folder import Located


def figures_file(home: Path, seed: int) -> Path:
    """Where the figures of a seed's episodes are kept in a run folder."""
    return home / f"policy-{seed}.json"


def evaluate(found: Located, config: Config, steps: int | None, num: int | None, out: str | None) -> None:
    """Success of the policy in `found` over unseen goals, and its latency, at `steps` evaluations or at 1, 2, 4 and 20.

    num: episodes of each task; None: 50. out: the folder to keep them in instead of evaluations/. Raises UserError.
    """
    if config.data.path != experts.PATH:
        raise UserError(
            f"{plain(found.weights)} was trained on {plain(config.data.path)}; only policies of the recipe robot have a "
            "simulator to be played in"
        )
    require()
    evaluations = (steps,) if steps else evaluation.EVALUATIONS
    wanted = evaluation.work(evaluations, num or NUM)
    world = ranks.init(config.parallel)
    console = Console(quiet=world.rank > 0)
    folder = ranks.once(world, lambda: prepare(found, config, out))
    policy = ranks.every(world, lambda: Policy(found._replace(config=config), world.device))
    torch.set_num_threads(1)  # a plan is small, and so are the simulator's steps: each process has a core
    missing = ranks.once(world, lambda: [w for w in wanted if w not in evaluation.finished(folder)])
    share = [len(missing) * n // world.size for n in range(world.size + 1)]
    mine = missing[share[world.rank] : share[world.rank + 1]]

    def play(evaluations: int, task: str, first: int, count: int) -> list[Outcome]:
        if evaluations == EXPERT:
            return rollouts.expert(task, config.run.seed, first, count)
        return rollouts.group(planner(policy, evaluations, config.run.seed), task, config.run.seed, first, count)

    def said(group: Work) -> None:
        who = "expert" if group.evaluations == EXPERT else evaluation.name(group.evaluations)
        console.print(f"{group.task}, {who}: episodes {group.first} to {group.first + group.size - 1}", highlight=False)

    ranks.every(world, lambda: evaluation.run(folder, mine, world.rank, play, said))
    ranks.shutdown()
    if world.rank == 0:
        tell(folder, found, config, wanted, policy, console)


def planner(policy: Policy, evaluations: int, seed: int) -> rollouts.Policy:
    """The policy as rollouts take one. No two chunks of a seed have the same noise."""

    def plan(observations: Floats, task: int, chunk: int, first: int) -> NDArray[Any]:
        number = ((task * CHUNKS + chunk) << 20) + first
        return policy.plan(observations, task, steps=evaluations, seed=seed, number=number).numpy()

    return plan


def prepare(found: Located, config: Config, out: str | None) -> Path:
    """The folder of these weights' episodes by these settings. Rank 0 alone calls this."""
    with found.weights.open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    follows_from = {
        "weights": weights,
        "seed": config.run.seed,
        "executed": rollouts.EXECUTED,
        "sampler": config.sample.sampler,
        "precision": config.parallel.precision,
    }
    text = json.dumps(follows_from, indent=2, sort_keys=True)
    root = Path(out) if out else found.home / "evaluations"
    seen = found.weights.stem if found.images_seen is None else f"{found.images_seen:012d}"
    folder = root / f"policy-{seen}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "episodes.json", text + "\n")
    return folder


def tell(folder: Path, found: Located, config: Config, wanted: list[Work], policy: Policy, console: Console) -> None:
    """Print the figures and keep them in the run folder; make a film or a plot. Rank 0 alone calls this."""
    counted = evaluation.rates(evaluation.finished(folder), wanted)
    asked = [e for e in counted if e != EXPERT]
    latency = {e: policy.latency(e, 200 if e <= 4 else 50) for e in asked}
    first = [line for line in evaluation.paths(folder) if line["evaluations"] == max(asked) and line["task"] in TASKS]
    shown = None
    if first:
        seed = rollouts.seeds(config.run.seed, 0, 1)[0]
        shown = film.show(folder, {**first[0], "seed": seed}, first)
    num = next(iter(counted[EXPERT].values()))[1]
    lines = [
        f"success in {num} episodes a task on goals that no training episode had, seed {config.run.seed}; 95 % intervals",
        *evaluation.table(counted),
        *(f"a chunk at {evaluation.name(e)}: {ms:.1f} ms, 99th percentile {p99:.1f} ms" for e, (ms, p99) in latency.items()),
        f"episodes: {folder}" + (f"; to look at: {shown}" if shown else ""),
    ]
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
    figures = {
        "images": found.images_seen,
        "seed": config.run.seed,
        "executed": rollouts.EXECUTED,
        "success": {str(e): tasks for e, tasks in counted.items()},
        "latency_ms": {str(e): {"median": ms, "p99": p99} for e, (ms, p99) in latency.items()},
        "threads": torch.get_num_threads(),
        "machine": evaluation.machine(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_text(figures_file(found.home, config.run.seed), json.dumps(figures, indent=1) + "\n")
