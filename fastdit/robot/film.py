"""An episode to look at: a GIF where MuJoCo can render without a display, else the hand's paths as a plot.

python -m fastdit.robot.film EPISODE.json OUT.gif     as `show` runs it, by one way of rendering
"""

import fastdit  # noqa: F401  # isort: skip

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastdit.robot.simulator import Simulator
from fastdit.runtime.files import atomic

WAYS = ("egl", "osmesa")  # of MuJoCo to render without a display
SIZE = 240  # pixels, each side
CAMERA = "corner2"  # of Meta-World's scenes
EVERY = 2  # steps between two frames
TIMEOUT = 120  # seconds that a rendering may take


def show(folder: Path, episode: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> Path | None:
    """episode.gif in a folder where MuJoCo can render, else paths.png of all these episodes where matplotlib is installed.

    episode: task, seed and the actions done. others: task and the hand's path. None where neither can be had.
    """
    gif = folder / "episode.gif"
    with tempfile.TemporaryDirectory() as scratch:
        told = Path(scratch) / "episode.json"
        told.write_text(json.dumps(dict(episode)), encoding="utf-8")
        for way in WAYS:
            command = [sys.executable, "-m", "fastdit.robot.film", str(told), str(gif)]
            environment = {**os.environ, "MUJOCO_GL": way, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            try:  # in a process of its own: MuJoCo reads the way when it loads, and a missing library may abort
                done = subprocess.run(command, env=environment, capture_output=True, timeout=TIMEOUT, check=False)
            except subprocess.TimeoutExpired:
                continue
            if done.returncode == 0:
                return gif
    return plot(folder / "paths.png", others)


def render(episode: Mapping[str, Any], out: Path) -> None:
    """Repeat an episode from its seed and actions, and keep what the simulator's camera sees."""
    import mujoco

    simulator = Simulator(episode["task"])
    camera = mujoco.Renderer(simulator.env.model, SIZE, SIZE)
    simulator.reset(episode["seed"])
    frames = []
    for n, action in enumerate(episode["actions"]):
        simulator.step(np.array(action))
        if n % EVERY == 0:
            camera.update_scene(simulator.env.data, camera=CAMERA)
            frames.append(Image.fromarray(np.rot90(camera.render(), 2)))  # this camera hangs upside down
    with atomic(out) as file:
        frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:], duration=50, loop=0)


def plot(out: Path, episodes: Sequence[Mapping[str, Any]]) -> Path | None:
    """The hand's paths from above and from the side, a row for each; None without matplotlib or episodes."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not episodes:
        return None
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 1)
    for episode in episodes:
        path = np.array(episode["path"])  # [T, 3], metres
        for axis, (across, up) in zip(axes, ((0, 1), (0, 2)), strict=True):
            [line] = axis.plot(path[:, across], path[:, up], label=episode["task"], marker=".", markersize=3, linewidth=1)
            axis.plot(path[-1, across], path[-1, up], marker="o", color=line.get_color())
    for axis, title in zip(axes, ("from above", "from the front"), strict=True):
        axis.set(title=f"the hand's path, {title}", xlabel="left to right, m", ylabel="away, m" if axis is axes[0] else "up, m")
        axis.set_aspect("equal", adjustable="datalim")
    axes[0].legend(fontsize=8)
    with atomic(out) as file:
        figure.savefig(file, format="png", dpi=100)
    return out


if __name__ == "__main__":
    render(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
