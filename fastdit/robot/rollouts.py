"""Closed-loop episodes: a policy sees an observation, plans a chunk of actions, and does the first ones before it looks again.

Episodes run in groups, in step with each other, so that the network plans for all of a group at once. A group is a function of
the policy, the task, the seed and the group's number: the same on any number of processes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastdit.robot.simulator import MOST_STEPS, TASKS, Floats, Simulator

EXECUTED = 8  # actions of a chunk that are done before the next is planned
GROUP = 10  # episodes in step with each other
HELD_OUT = 1_000_000  # seeds from here on are of evaluations; training has those below

# (observations [B, 39], task, number of the chunk within its episode, number of the first episode) → actions [B, n, 4].
Policy = Callable[[Floats, int, int, int], NDArray[Any]]


class Outcome(NamedTuple):
    """How an episode ended."""

    success: bool
    steps: int
    actions: list[list[float]]  # done, [steps, 4]
    path: list[list[float]]  # of the hand, [steps + 1, 3]


@functools.cache
def simulators(task: str) -> tuple[Simulator, ...]:
    """The simulators of a group; each takes a sixth of a second to make."""
    return tuple(Simulator(task) for _ in range(GROUP))


def seeds(seed: int, first: int, count: int) -> list[int]:
    """The simulator's seeds of an evaluation's episodes first … first + count - 1. No two evaluations below 1,000 share one."""
    return [HELD_OUT * (1 + seed % 1_000) + n for n in range(first, first + count)]


def group(policy: Policy, task: str, seed: int, first: int, count: int, executed: int = EXECUTED) -> list[Outcome]:
    """Episodes first … first + count - 1 of a task, at most GROUP of them. An episode ends where the task is done."""
    running = simulators(task)[:count]
    observations = np.stack([s.reset(n) for s, n in zip(running, seeds(seed, first, count), strict=True)])
    paths: list[list[Any]] = [[observation[:3].tolist()] for observation in observations]
    done: list[list[Any]] = [[] for _ in running]
    ended = [False] * count
    chunk = 0
    while not all(ended) and len(max(done, key=len)) < MOST_STEPS:
        planned = policy(observations, TASKS.index(task), chunk, first)
        for i, simulator in enumerate(running):
            for action in planned[i, :executed]:
                if ended[i] or len(done[i]) == MOST_STEPS:
                    break
                observations[i], ended[i] = simulator.step(action)
                done[i].append([float(a) for a in action])
                paths[i].append(observations[i, :3].tolist())
        chunk += 1
    return [Outcome(e, len(a), a, p) for e, a, p in zip(ended, done, paths, strict=True)]


def expert(task: str, seed: int, first: int, count: int) -> list[Outcome]:
    """The same episodes by the task's scripted expert, which looks before each action."""

    def policy(observations: Floats, task_: int, chunk: int, first_: int) -> NDArray[Any]:
        pairs: Sequence[tuple[Simulator, Floats]] = list(zip(simulators(task), observations, strict=False))
        return np.stack([s.expert(o) for s, o in pairs])[:, None]

    return group(policy, task, seed, first, count, executed=1)
