"""docs/block.png: the bytes that a block's memory-bound ops move, and those of each op. From counted figures, not timed ones.

    python docs/block.py

Left: bench/results/bench_block-cpu-fp32.json, halved from 32 bits to 16. Right: bench/results/static.json, with the counts for
torch.compile that docs/kernels.md states.
"""

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
COMPILER = {  # bytes per element under torch.compile, forward and backward; of the convolution's backward the least
    "ln_modulate": (4, 10),
    "gate_residual_ln_modulate": (8, 18),
    "gelu_dwconv K=3": (12, 18),
}


def read(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((ROOT / "bench" / "results" / name).read_text())["rows"]
    return rows


def passes(baseline: str) -> list[float]:
    """Bytes per 16-bit element of the stream of each op of a block, the largest first."""
    rows = [r for r in read("bench_block-cpu-fp32.json") if r["op"].startswith("of a block: ") and r["baseline"] == baseline]
    sizes = [r["extra"]["B per element"] / 2 for r in rows if not r["op"].endswith("all that memory binds")]
    return sorted(sizes, reverse=True)


def draw() -> Figure:
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
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
    for op, compiler in COMPILER.items():
        for direction, theirs in zip(("forward", "backward"), compiler, strict=True):
            [row] = [r for r in counted if r["op"] == f"{op} {direction}"]
            y = len(names)
            ops.barh(y - 0.2, theirs, 0.38, color=COMPILED)
            ops.barh(y + 0.2, row["bytes_per_element"], 0.38, color=OURS)
            ops.plot([row["floor_bytes_per_element"]] * 2, [y + 0.01, y + 0.39], color="black", linewidth=1.5)
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
