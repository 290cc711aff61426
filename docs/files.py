"""Writes docs/files.md: the first sentence of every source file, by folder."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = {  # in the order in which one reads them
    "fastdit": "The verbs and the trainer",
    "fastdit/runtime": "`runtime`: this machine, its processes, a run's folder",
    "fastdit/data": "`data`: from images to batches",
    "fastdit/weights": "`weights`: trained models in and out",
    "fastdit/quality": "`quality`: how good pictures are",
    "fastdit/robot": "`robot`: a simulated arm, its policies and their episodes",
    "fastdit/planning": "`planning`: what a run will need",
    "kernels/fastdit_kernels": "The kernels",
    "bench": "Benches",
}
INTRODUCTION = """# The files

One line on each source file, by folder. Imports go down only: a file imports only files of lower ranks. The ranks are in
[tests/test_layout.py](../tests/test_layout.py), which fails where one is broken.
"""


def first_sentence(path: Path) -> str:
    said = ast.get_docstring(ast.parse(path.read_text()))
    assert said, f"{path} does not say what it is in its first line"
    return re.split(r"(?<=\.)\s+(?=[A-Z])", " ".join(said.split("\n\n")[0].split()))[0]


def page() -> str:
    """The whole page."""
    lines = [INTRODUCTION]
    for folder, title in FOLDERS.items():
        paths = sorted(p for p in (ROOT / folder).glob("*.py") if p.read_text())
        rows = [f"| `{path.relative_to(ROOT)}` | {first_sentence(path)} |" for path in paths]
        lines.append("\n".join([f"## {title}", "", "| file | what it is |", "|---|---|", *rows, ""]))
    return "\n".join(lines)


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page())
