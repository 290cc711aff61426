"""docs/block.png: the bytes that a block's memory-bound ops move, and those of single ops. Counted, not timed.

    python docs/block.py

Left: bench/results/bench_block-cpu-fp32.json, halved from 32 bits to 16. Right: bench/results/static.json
for the kernels, and for eager and compiled PyTorch the bytes that the benches of the ops state.
"""

import ast
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
OURS, COMPILED, EAGER = "#2a7f62", "#d98032", "#8d99ae"
WAYS = {  # baseline of bench_block → what it is called, its colour
    "the seed's way": ("eager PyTorch", EAGER),
    "the seed's way, torch.compile": ("torch.compile", COMPILED),
    "fastdit": ("fastdit kernels", OURS),
}
OPS = {"ln_modulate": "bench_ln_modulate", "gate_residual_ln_modulate": "bench_gate_residual_ln_modulate"}
OPS |= {"gelu_dwconv K=3": "bench_gelu_dwconv"}  # each op's bench, which states the bytes of its baselines


def read(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((ROOT / "bench" / "results" / name).read_text())["rows"]
    return rows


def baselines(bench: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Bytes per element that eager and compiled PyTorch move, (forward, backward) each, as the bench of an op has them."""
    tree = ast.parse((ROOT / "bench" / f"{bench}.py").read_text())
    [node] = [n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "BYTES"]
    stated = ast.literal_eval(node.value)
    return next(v for k, v in stated.items() if k.startswith("eager")), stated["torch.compile"]


def passes(baseline: str) -> list[float]:
    """Bytes per 16-bit element of the stream of each op of a block, the largest first."""
    rows = [r for r in read("bench_block-cpu-fp32.json") if r["op"].startswith("of a block: ") and r["baseline"] == baseline]
    sizes = [r["extra"]["B per element"] / 2 for r in rows if not r["op"].endswith("all that memory binds")]
    return sorted(sizes, reverse=True)


def draw() -> Figure:
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    block, ops = figure.subplots(1, 2, width_ratios=(1.15, 1))

    for y, (baseline, (_, colour)) in enumerate(WAYS.items()):
        left = 0.0
        for size in passes(baseline):
            block.barh(y, size, left=left, color=colour, edgecolor="white", linewidth=0.8)
            left += size
        block.text(left + 4, y, f"{left:.0f}", va="center")
    block.set_yticks(range(len(WAYS)), [name for name, _ in WAYS.values()])
    block.invert_yaxis()
    block.set_xlim(0, 350)
    block.set_title("One block, forward and backward; a segment is one kind of op", loc="left", fontsize=10)

    counted = [r for r in read("static.json") if r["device"].startswith("A100") and r["width"] in (768, 3072)]
    names = []
    for op, bench in OPS.items():
        eager, compiled = baselines(bench)
        for i, direction in enumerate(("forward", "backward")):
            [row] = [r for r in counted if r["op"] == f"{op} {direction}"]
            y = len(names)
            sizes = (eager[i], compiled[i], row["bytes_per_element"])
            for offset, size, (_, colour) in zip((-0.27, 0, 0.27), sizes, WAYS.values(), strict=True):
                ops.barh(y + offset, size, 0.25, color=colour)
            ops.plot([row["floor_bytes_per_element"]] * 2, [y + 0.14, y + 0.4], color="black", linewidth=1.5)
            names.append(f"{op} {direction}".replace("gate_residual_", "gate_residual_\n"))
    ops.set_yticks(range(len(names)), names, fontsize=7.5)
    ops.invert_yaxis()
    ops.set_title("Each op; the black line is the least possible", loc="left", fontsize=10)

    for axes in (block, ops):
        axes.set_xlabel("bytes per element in 16 bits", loc="right", color="#777", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    draw().savefig(Path(__file__).with_suffix(".png"), dpi=110)
