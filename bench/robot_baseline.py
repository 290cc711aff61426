"""What a policy of the recipe robot is compared with: an MLP of as many parameters, trained by regression on the same chunks.

    python bench/robot_baseline.py runs/robot [SEED …]

It sees as many samples as the run did, plays the same episodes, and keeps its figures beside the run's own in
bench/results/robot.json. The latter are those of `evaluate.py runs/robot --seed SEED`, which comes first.
"""

import fastdit  # noqa: F401  # isort: skip  before torch

import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fastdit.data import encoding
from fastdit.data.normaliser import Normaliser
from fastdit.data.pack import Pack
from fastdit.planning.memory import num_parameters
from fastdit.robot import closed_loop, evaluation, rollouts
from fastdit.robot.simulator import TASKS, Floats
from fastdit.runtime.files import write_text
from fastdit.weights.folder import Located, locate

OUT = Path(__file__).parent / "results" / "robot.json"
LAYERS = 4  # of the hidden width, beside the first and the last


class Regression(nn.Module):
    """Observation and task → a chunk of actions, all of it at once."""

    def __init__(self, inputs: int, outputs: int, parameters: int) -> None:
        super().__init__()
        width = max(n for n in range(8, 4096, 8) if inputs * n + (LAYERS - 1) * n * n + n * outputs <= parameters)
        sizes = [inputs, *[width] * LAYERS]
        hidden = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.GELU())]
        self.net = nn.Sequential(*hidden, nn.Linear(width, outputs))

    def forward(self, condition: Tensor, y: Tensor) -> Tensor:
        return self.net(torch.cat([condition, F.one_hot(y, len(TASKS)).float()], dim=1))


def train(found: Located, seed: int) -> tuple[Regression, Normaliser]:
    """The MLP after as many samples as the run saw, in batches of its size; AdamW, its rate rising, then falling."""
    torch.manual_seed(seed)
    config = found.config
    pack = Pack(encoding.folder(config.data), torch.device("cpu"), seed)
    m, batch = pack.manifest, config.train.batch
    outputs = m.shape[0] * m.shape[1]
    model = Regression(m.condition + len(TASKS), outputs, num_parameters(config.model))
    steps = (found.images_seen or config.train.images) // batch
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=config.train.weight_decay)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for step in range(steps):
        x0, y, condition, _ = pack.batch(step * batch, batch)
        assert y is not None
        assert condition is not None
        loss = F.mse_loss(model(condition, y), x0.flatten(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    assert m.normaliser is not None
    return model.eval(), Normaliser.from_dict(m.normaliser)


def planner(model: Regression, normaliser: Normaliser) -> rollouts.Policy:
    """The MLP as rollouts take a policy."""
    assert normaliser.condition is not None
    seen = normaliser.condition

    @torch.inference_mode()
    def plan(observations: Floats, task: int, chunk: int, first: int) -> NDArray[Any]:
        condition = seen.normalise(torch.from_numpy(observations))
        out = model(condition, torch.full((len(observations),), task)).view(len(observations), len(normaliser.x.scale), -1)
        return normaliser.x.physical(out).transpose(1, 2).numpy()

    return plan


def measure(found: Located, seed: int) -> dict[str, Any]:
    """Figures of the MLP in a seed's episodes, and the run's own, which evaluate.py left in its folder."""
    start = time.process_time()
    model, normaliser = train(found, seed)
    trained = time.process_time() - start
    play, success = planner(model, normaliser), {}
    for task in TASKS:
        groups = [w for w in evaluation.work((1,), evaluation.NUM) if w.evaluations == 1 and w.task == task]
        outcomes = [o for w in groups for o in rollouts.group(play, task, seed, w.first, w.size)]
        success[task] = [sum(o.success for o in outcomes), len(outcomes)]
    own = json.loads(closed_loop.figures_file(found.home, seed).read_text())
    parameters = {"policy": num_parameters(found.config.model), "mlp": sum(p.numel() for p in model.parameters())}
    return {**own, "mlp": success, "mlp_train_cpu_s": round(trained, 1), "parameters": parameters}


def main(arguments: Sequence[str]) -> None:
    found = locate(arguments[0])
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in arguments[1:]] or [0]
    figures = {str(seed): measure(found, seed) for seed in seeds}
    write_text(OUT, json.dumps(figures, indent=1) + "\n")
    for seed, found_ in figures.items():
        print(f"seed {seed}: MLP", {task: f"{good} of {num}" for task, (good, num) in found_["mlp"].items()})


if __name__ == "__main__":
    main(sys.argv[1:])
