"""docs/cats.png and docs/cats.json: the main job on this machine, from the command to the last picture, and its quality.

    python docs/cats.py [FOLDER]

FOLDER takes the run and its pack, and must not exist; by default a temporary one. Takes as long as the default run and the
offline evaluation of 2,000 pictures.
"""

import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent


def make(folder: Path) -> dict[str, Any]:
    """Train and evaluate in this folder; the picture goes to docs/cats.png. Returns what docs/cats.json holds."""
    options = ["--run.folder", str(folder / "runs"), "--data.packs", str(folder / "packs")]
    start = time.perf_counter()
    verb("train.py", *options)
    wall = time.perf_counter() - start
    run = folder / "runs" / "cats"
    verb("evaluate.py", str(run))
    shutil.copy(max((run / "samples").glob("*.png")), ROOT / "docs" / "cats.png")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])
    last = lines[-1]
    return {
        "command": "python fastdit/train.py",
        "device": f"CPU, {processor()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip(),
        "images": last["images"],
        "steps": last["step"],
        "wall_seconds": round(wall, 1),
        "training_seconds": round(last["seconds"], 1),
        "img_per_s_median": round(statistics.median(line["img_per_s"] for line in lines), 1),
        "loss": last["loss"],
        "data_wait_share_max": max(line["data_wait_share"] for line in lines[1:]),
        "memory_gib": round(max(line["memory_gib"] for line in lines), 2),
        "skipped": last["skipped"],
        "evaluation": figures,
    }


def verb(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "fastdit" / name), *arguments], check=True)


def processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.machine()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(temporary) / "cats"
        folder.mkdir(parents=True)
        (ROOT / "docs" / "cats.json").write_text(json.dumps(make(folder), indent=1) + "\n")
