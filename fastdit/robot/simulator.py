"""A simulated arm at six tasks: Meta-World's MuJoCo environments and their scripted experts (arXiv 1910.10897).

An action is four numbers from -1 to 1, how the hand moves and how tightly it grips. An observation is 39 numbers: hand, gripper
and objects now, the same one step before, and the goal. An episode follows from its task, its seed and its actions alone.
"""

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdit.config import UserError

TASKS = ("reach", "push", "drawer-open", "button-press-topdown", "window-close", "door-open")
OBSERVATION, ACTION = 39, 4
MOST_STEPS = 200  # of an episode; the experts need 30 to 95

Floats = NDArray[np.float64]


def require() -> None:
    """Raise UserError where the simulator is not installed."""
    if not all(importlib.util.find_spec(name) for name in ("metaworld", "mujoco")):
        raise UserError("the robot's simulator, metaworld, is not installed; pip install -e '.[robot]'")


class Simulator:
    """One task, in one episode at a time."""

    def __init__(self, task: str) -> None:
        """Raises UserError where the simulator is not installed."""
        require()
        with _quiet():
            from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
            from metaworld.policies import ENV_POLICY_MAP

            self.env: Any = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-v3-goal-observable"](seed=0)
            self.policy: Any = ENV_POLICY_MAP[f"{task}-v3"]()
        # Each reset draws objects and goal anew, from the seed that `reset` sets.
        self.env._freeze_rand_vec = False
        self.env.seeded_rand_vec = True

    def reset(self, seed: int) -> Floats:
        """The first observation [39] of an episode. The seed decides where objects and goal are."""
        with _quiet():
            self.env.seed(seed)
            observation, _ = self.env.reset()
        return np.array(observation)

    def step(self, action: NDArray[Any]) -> tuple[Floats, bool]:
        """The observation after an action [4], and whether the task is done. The action is clipped to ±1."""
        with _quiet():
            observation, _, _, _, info = self.env.step(np.clip(np.asarray(action, np.float64), -1, 1))
        return np.array(observation), bool(info["success"])

    def expert(self, observation: Floats) -> Floats:
        """The scripted expert's action [4]."""
        with _quiet():
            return np.clip(np.asarray(self.policy.get_action(observation), np.float64), -1, 1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of the simulator's own code: of gymnasium's spaces, and of experts that act beyond ±1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
