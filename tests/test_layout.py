"""The house: what may import what, and which names would shadow somebody else's module."""

import ast
import importlib.util
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(ROOT.glob("fastdit/*.py")) + sorted(ROOT.glob("kernels/fastdit_kernels/*.py"))

# Imports go down only; files of one rank do not import each other, except within `fastdit_kernels`.
RANKS = [
    {"fastdit_kernels"},
    {"config", "draws", "manifest"},
    {"command", "cats", "gauges", "trackers", "weights", "pickles", "charts", "metrics"},
    {"pretrained"},
    {"model", "diffusion", "vae", "images", "parallel", "optim", "checkpoint", "meter", "packs", "gpus", "profiler"},
    {"latents", "pictures", "foreign", "pipeline", "footprint"},
    {"costs", "quality", "inception"},
    {"train", "encode", "sample", "convert", "export", "plan", "evaluate", "report", "compare"},
]


def rank(name: str) -> int:
    found = [i for i, names in enumerate(RANKS) if name in names]
    assert found, f"{name} has no rank: add it to RANKS and to the map in README"
    return found[0]


def imports(path: Path) -> set[str]:
    """Our own modules a file imports: fastdit's by stem, the kernels' by package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} is a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "fastdit" else [node.module or ""]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top == "fastdit_kernels":
                found.add(top)
            elif top == "fastdit" and rest:
                found.add(rest.partition(".")[0])
    return found


@pytest.mark.parametrize("path", sorted(ROOT.glob("fastdit/*.py")), ids=lambda p: p.stem)
def test_imports_go_down_only(path: Path):
    if path.stem == "__init__":
        assert imports(path) == set()
        return
    for name in imports(path) - {path.stem}:
        assert rank(name) < rank(path.stem), f"{path.stem} (rank {rank(path.stem)}) imports {name} (rank {rank(name)})"


@pytest.mark.parametrize("path", sorted(ROOT.glob("kernels/fastdit_kernels/*.py")), ids=lambda p: p.stem)
def test_kernels_import_only_torch_and_triton(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            top = name.partition(".")[0]
            assert top in {"torch", "triton", "fastdit_kernels"} | sys.stdlib_module_names, f"{path.name} imports {name}"


def test_no_package_is_named_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert [p.parent.name for p in ROOT.glob("*/*/__init__.py")] == ["fastdit_kernels"]


def test_no_file_of_fastdit_shadows_an_import():
    """`torchrun fastdit/train.py` puts fastdit/ first on sys.path, so a file there hides any module of its name."""
    site = Path(sysconfig.get_path("purelib"))
    installed = {p.stem for p in site.iterdir()} | set(sys.stdlib_module_names)
    for path in ROOT.glob("fastdit/*.py"):
        if path.stem != "__init__":
            assert path.stem not in installed, f"fastdit/{path.name} shadows an importable module"


def test_what_is_tested_exists():
    """One stem in three folders: every test and bench file is named after a source file, or is listed here with its reason."""
    stems = {p.stem for p in SOURCES}
    whole = {
        "layout",  # the house itself
        "aot",  # every kernel, compiled ahead of time
        "block",  # one block of model.py
        "step",  # the whole training step
        "main_job",  # the verbs together
        "reliability",  # whatever may happen to a run
        "fuzz",  # whatever may be given to a run
        "samplers",  # the other half of diffusion.py
        "guidance",  # by classes, in diffusion.py, pictures.py and training
    }
    for path in [*ROOT.glob("tests/test_*.py"), *ROOT.glob("bench/bench_*.py")]:
        stem = path.stem.partition("_")[2]
        assert stem in stems | whole, f"{path} is named after no source file"


def test_diffusers_imports_beside_us():
    assert importlib.util.find_spec("kernels") is None or "fastdit" not in str(importlib.util.find_spec("kernels"))
