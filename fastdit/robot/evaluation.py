"""How often a policy does its tasks: closed-loop episodes on goals that no training episode had, counted by task.

All processes share the episodes. Those that are finished are kept, a line each: the same command goes on where it was, on any
number of processes.
"""

import json
import math
import os
import platform
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastdit.robot.rollouts import GROUP, Outcome
from fastdit.robot.simulator import TASKS
from fastdit.runtime.files import json_lines

EXPERT = 0  # stands for the scripted expert where evaluations of the network are counted
EVALUATIONS = (1, 2, 4, 20)
NUM = 50  # episodes of each task

Run = Callable[[int, str, int, int], list[Outcome]]  # (evaluations, task, first episode, count) → outcomes
Rate = tuple[int, int]  # successes, episodes


class Work(NamedTuple):
    """A group of episodes by one policy."""

    evaluations: int
    task: str
    first: int
    size: int


def work(evaluations: Sequence[int], num: int) -> list[Work]:
    """All groups of an evaluation, those of a task together: whoever runs them makes few simulators."""
    return [
        Work(e, task, first, min(GROUP, num - first))
        for task in TASKS
        for e in (EXPERT, *evaluations)
        for first in range(0, num, GROUP)
    ]


def finished(folder: Path) -> dict[Work, list[dict[str, Any]]]:
    """The outcomes that are kept in a folder, by group; a group that a kill tore is left out."""
    lines: dict[Work, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("episodes*.jsonl")):
        for line in json_lines(path.read_text(errors="replace", encoding="utf-8")):
            try:
                key = Work(line["evaluations"], line["task"], line["first"], len(line["outcomes"]))
                lines[key] = [{"success": bool(o["success"]), "steps": int(o["steps"])} for o in line["outcomes"]]
            except (KeyError, TypeError, ValueError):
                continue
    return lines


def run(folder: Path, missing: Sequence[Work], rank: int, play: Run, progress: Callable[[Work], None]) -> None:
    """Play the groups of this process and keep each as it ends. The first episode of a group is kept whole, for pictures."""
    with (folder / f"episodes-{rank}.jsonl").open("a", encoding="utf-8") as file:
        if file.tell():
            file.write("\n")  # a kill may have torn the last line
        for group in missing:
            outcomes = play(group.evaluations, group.task, group.first, group.size)
            shown = {"actions": outcomes[0].actions, "path": outcomes[0].path} if group.first == 0 else {}
            line = {
                **group._asdict(),
                "outcomes": [{"success": o.success, "steps": o.steps} for o in outcomes],
                **shown,
            }
            file.write(json.dumps(line) + "\n")
            file.flush()
            progress(group)


def paths(folder: Path) -> Iterator[dict[str, Any]]:
    """The groups that hold a whole episode."""
    for path in sorted(folder.glob("episodes*.jsonl")):
        yield from (line for line in json_lines(path.read_text(errors="replace", encoding="utf-8")) if "path" in line)


def rates(found: Mapping[Work, Sequence[Mapping[str, Any]]], wanted: Sequence[Work]) -> dict[int, dict[str, Rate]]:
    """Successes and episodes by evaluations and task, of the groups that are wanted."""
    counted: dict[int, dict[str, Rate]] = defaultdict(dict)
    for group in wanted:
        good, all_ = counted[group.evaluations].get(group.task, (0, 0))
        outcomes = found[group]
        counted[group.evaluations][group.task] = good + sum(o["success"] for o in outcomes), all_ + len(outcomes)
    return dict(counted)


def wilson(good: int, num: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a rate, seen `good` times of `num` (Wilson 1927): within 0 … 1, and right for rates near 1."""
    rate, spread = good / num, z * z / num
    middle = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(rate * (1 - rate) / num + spread / (4 * num))
    return max(0.0, middle - half), min(1.0, middle + half)


def table(counted: Mapping[int, Mapping[str, Rate]]) -> list[str]:
    """Success per task, and over all, with its interval: a column for the experts and for each number of evaluations."""
    columns = sorted(counted)
    names = ["scripted expert" if e == EXPERT else name(e) for e in columns]
    rows = [["task", *names]]
    for task in TASKS:
        rows.append([task, *(cell(*counted[e][task]) for e in columns)])
    totals = [tuple(map(sum, zip(*counted[e].values(), strict=True))) for e in columns]
    rows.append(["all", *(cell(good, num) for good, num in totals)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def name(evaluations: int) -> str:
    return f"{evaluations} evaluation{'s' if evaluations > 1 else ''}"


def cell(good: int, num: int) -> str:
    low, high = wilson(good, num)
    return f"{100 * good / num:.0f} % ({100 * low:.0f}-{100 * high:.0f})"


def machine() -> dict[str, Any]:
    """What figures were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"device": device, "cores": len(os.sched_getaffinity(0)), **versions}
