"""The data of the recipe `robot`: episodes of scripted experts in the simulator, cut into chunks of actions.

A sample is the next 16 actions (x, 4 channels of 16), the observation before the first (its condition), and the task (its
class). An episode goes on for a chunk after the task is done, so that a policy learns to hold still.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fastdit.config import DataConfig
from fastdit.data.arrays import ArraySource, Sample
from fastdit.robot.simulator import ACTION, MOST_STEPS, OBSERVATION, TASKS, Simulator, require

PATH = "robot:metaworld"  # the --data.path that names these data
EPISODES = 100  # of each task
HORIZON = 16  # actions of a chunk
TRIES = 10  # seeds tried for an episode in which the expert does the task; it fails in at most one of five
CHUNK = 5 * len(TASKS)  # episodes between two commits

TRANSFORM = f"chunks of {HORIZON} actions of Meta-World's scripted experts, tasks {', '.join(TASKS)}"


def open_experts(data: DataConfig) -> ArraySource:
    """The experts' episodes, --data.num_images of them instead of 100 of each task. Raises UserError without the simulator."""
    require()
    simulators: dict[str, Simulator] = {}

    def samples(start: int, stop: int) -> Iterator[Sample]:
        for number in range(start, stop):
            task, n = number % len(TASKS), number // len(TASKS)
            name = TASKS[task]
            if name not in simulators:
                simulators[name] = Simulator(name)
            found = successful(simulators[name], n)
            if found is None:
                yield Sample(f"episode {n} of {name}", f"the expert failed in {TRIES} tries")
                continue
            observations, actions = found
            for t in range(len(actions) - HORIZON + 1):
                x = actions[t : t + HORIZON].T
                yield Sample(f"step {t} of episode {n} of {name}", x, observations[t], task)

    return ArraySource(
        name="Meta-World's scripted experts",
        length=data.num_images or EPISODES * len(TASKS),
        shape=(ACTION, HORIZON),
        condition=OBSERVATION,
        labelled=True,
        lengths=False,
        samples=samples,
        normaliser=data.normaliser,
        class_names=TASKS,
        chunk=CHUNK,
        items="episodes",
        transform=TRANSFORM,
    )


Episode = tuple[NDArray[np.float64], NDArray[np.float64]]


def successful(simulator: Simulator, number: int) -> Episode | None:
    """Observations [T, 39] and actions [T, 4] of an episode in which the expert does the task; of several seeds the first."""
    for attempt in range(TRIES):
        if found := episode(simulator, number + attempt * EPISODES):
            return found
    return None


def episode(simulator: Simulator, seed: int) -> Episode | None:
    """An expert's episode, going on for HORIZON steps after the task is done; None where it is not done in time."""
    observation = simulator.reset(seed)
    observations: list[NDArray[np.float64]] = []
    actions: list[NDArray[np.float64]] = []
    left: int | None = None  # steps to go once the task is done
    while left != 0:
        if len(actions) == MOST_STEPS:
            return None
        action = simulator.expert(observation)
        observations.append(observation)
        actions.append(action)
        observation, done = simulator.step(action)
        if left is not None:
            left -= 1
        elif done:
            left = HORIZON
    return np.array(observations), np.array(actions)
