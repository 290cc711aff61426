"""docs/speed.png: how much longer the baselines take than fastdit, on two CPU cores with bf16. From bench/results.

python docs/speed.py
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
BEST, FIRST = "x the time of ours at its best", "x of the first"
GROUPS = {  # title → (bench, start of the shape, ratio, place of the group's rows among those of its shape)
    "training step, DiT-B/2 with depthwise MLP": ("bench_step-cpu", "B/2", BEST, slice(0, 5)),
    "training step, DiT-B/2 with plain MLP": ("bench_step-cpu", "B/2", BEST, slice(10, 15)),
    "sampling step, DiT-B/2, batch 1": ("bench_sample-cpu", "B/2, batch 1,", FIRST, slice(None)),
    "sampling step, DiT-B/2, batch 64": ("bench_sample-cpu", "B/2, batch 64,", FIRST, slice(None)),
    "GELU and convolution, K = 3": ("bench_gelu_dwconv-cpu", "B=8 16×16 F=3072 K=3", FIRST, slice(None)),
    "GELU and convolution, K = 5": ("bench_gelu_dwconv-cpu", "B=8 16×16 F=3072 K=5", FIRST, slice(None)),
}
SAID = {"the seed's way": "seed repository", "seed NCHW": "seed repository", "standard DiT": "standard modules"}


def ratios(bench: str, shape: str, ratio: str, part: slice) -> dict[str, float]:
    """Times of the baselines, in times of fastdit, by baseline."""
    rows = json.loads((ROOT / "bench" / "results" / f"{bench}.json").read_text())["rows"]
    chosen = [r for r in rows if r["shape"].startswith(shape)][part]
    found = {r["baseline"]: r["extra"][ratio] for r in chosen if ratio in r["extra"]}
    return {name: value for name, value in found.items() if not name.startswith(("its matrix", "reference", "fastdit"))}


def draw() -> Figure:
    figure = Figure(figsize=(8.6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    y, ticks = 0.0, {}
    for title, where in GROUPS.items():
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.text(0.05, y, title, va="center", fontweight="bold", fontsize=8.5, bbox=box)
        y += 1
        for name, value in ratios(*where).items():
            base, _, compiled = name.partition(", ")
            axes.barh(y, value, color="#d98032" if "compile" in name else "#8d99ae", height=0.8)
            axes.text(value + 0.05, y, f"{value:.2f}", va="center", fontsize=8)
            ticks[y] = f"{SAID.get(base, base)}{', ' + compiled.replace('torch.compile', 'compiled') if compiled else ''}"
            y += 1
        y += 0.3
    axes.axvline(1, color="#2a7f62", linewidth=2)
    axes.text(1.02, -1.2, "fastdit = 1", color="#2a7f62", fontsize=9, va="center")
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=8)
    axes.invert_yaxis()
    axes.set_ylim(y, -1.8)
    axes.set_xlabel("time, in times of fastdit", loc="right", color="#777")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    draw().savefig(Path(__file__).with_suffix(".png"), dpi=110)
