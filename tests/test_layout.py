"""The house: what may import what, and which names would shadow somebody else's module."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FASTDIT = sorted((ROOT / "fastdit").rglob("*.py"))
SOURCES = FASTDIT + sorted(ROOT.glob("kernels/fastdit_kernels/*.py"))

# Imports go down only. Files of one rank do not import each other, except inside a wing and inside `fastdit_kernels`.
# A wing is named by its folder, "runtime"; a file of a wing that stands higher than the rest by its path, "weights.pipeline".
KERNELS = "fastdit_kernels"  # below all ranks: a package of its own
RANKS = [
    {"config"},
    {"runtime", "robot.simulator", "recipes", "options", "embeddings", "given", "posthoc", "consistency", "bound", "tokendrop"},
    {"command", "pictures", "model", "modulations", "diffusion", "ema", "muon", "spikes", "checkpoint", "meter", "data"},
    {"optim", "sampling", "steps", "weights", "panel"},
    {"weights.pipeline", "quality", "planning", "robot"},
    {"train", "encode", "sample", "convert", "export", "plan", "evaluate", "report"},
]


def module(path: Path) -> str:
    """fastdit/data/pack.py → data.pack"""
    return ".".join(path.relative_to(ROOT / "fastdit").with_suffix("").parts)


def rank(name: str) -> int:
    found = [i for i, names in enumerate(RANKS) if name in names] or [
        i for i, names in enumerate(RANKS) if name.partition(".")[0] in names
    ]
    assert found, f"{name} has no rank: add it to RANKS"
    return found[0]


def imports(path: Path) -> set[str]:
    """Our own modules a file imports, as `module` names them; the kernels by their package's name."""
    known, found = {module(p) for p in FASTDIT}, set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} is a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top == KERNELS:
                found.add(top)
            elif top == "fastdit" and rest:
                found.add(rest if rest in known else rest.rpartition(".")[0])
    return found - {""}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_is_longer_than_300_lines(path: Path):
    assert len(path.read_text().splitlines()) <= 300


def test_there_are_at_most_six_ranks():
    assert len(RANKS) <= 6


@pytest.mark.parametrize("path", FASTDIT, ids=module)
def test_imports_go_down_only(path: Path):
    name = module(path)
    if name == "__init__":  # what it gives is imported when it is asked for
        assert imports(path) == set()
        return
    for other in imports(path) - {name, KERNELS}:
        wing = other.rpartition(".")[0]
        within = wing and wing == name.rpartition(".")[0] and rank(other) == rank(name)
        assert within or rank(other) < rank(name), f"{name} (rank {rank(name)}) imports {other} (rank {rank(other)})"


def test_fastdit_gives_its_api_and_imports_none_of_it_before():
    lines = """
import sys, fastdit
assert not {"torch", "diffusers", "tyro"} & set(sys.modules), "import fastdit takes time"
assert set(fastdit.__all__) <= set(dir(fastdit))
from fastdit import DiT, load, sample
from fastdit.model import DiT as model
from fastdit.weights.folder import load as folder
assert (DiT, load) == (model, folder) and callable(sample) and fastdit.sample is sample
import fastdit.sample
assert fastdit.sample is sample and callable(sample.sample)
try:
    fastdit.nothing
except AttributeError as error:
    print(error)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    ran = subprocess.run([sys.executable, "-c", lines], env=env, capture_output=True, text=True, check=False)
    assert ran.stdout == "module 'fastdit' has no attribute 'nothing'\n", ran.stderr


def test_no_imports_go_round():
    graph = {module(path): imports(path) - {KERNELS} for path in FASTDIT}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " → ".join((*above, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_model_needs_only_config_runtime_and_kernels():
    allowed = RANKS[0] | RANKS[1]
    assert {name.partition(".")[0] for name in imports(ROOT / "fastdit" / "model.py") - {KERNELS}} <= allowed


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
    assert [p.parent.name for p in ROOT.glob("*/*/__init__.py")] == ["fastdit_kernels"]  # wings are plain folders


def test_no_file_of_fastdit_is_named_like_a_standard_module():
    """`torchrun fastdit/train.py` puts fastdit/ first on sys.path until fastdit itself is imported."""
    for path in (ROOT / "fastdit").iterdir():
        assert path.stem not in sys.stdlib_module_names, f"fastdit/{path.name} shadows a standard module"


def test_no_verb_stands_in_for_an_installed_package(tmp_path):
    """Installed packages named like each of our files and wings are what a script gets that imports them after fastdit."""
    names = sorted(
        {p.stem for p in (ROOT / "fastdit").iterdir() if p.suffix == ".py" or p.is_dir()} - {"__init__", "__pycache__"}
    )
    for name in [*names, "kernels"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("WHOSE = 'theirs'")
    verb = tmp_path / "fastdit" / "verb.py"
    shutil.copytree(ROOT / "fastdit", verb.parent, ignore=shutil.ignore_patterns("__pycache__"))
    checks = [f"import {name}; assert {name}.WHOSE == 'theirs', {name}" for name in [*names, "kernels"]]
    lines = ["import fastdit", *checks, "from diffusers import AutoencoderKL", "import datasets", "print('theirs')"]
    verb.write_text("\n".join(lines))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "kernels")])}
    ran = subprocess.run([sys.executable, str(verb)], env=env, capture_output=True, text=True, check=False)
    assert ran.stdout == "theirs\n", ran.stderr


def test_what_is_tested_exists():
    """One stem in three folders: every test and bench file is named after a source file, or is listed here with its reason."""
    stems = {p.stem for p in SOURCES}
    whole = {
        "layout",  # the house itself
        "board",  # bench/board.py, quality per second
        "muon_run",  # muon.py in whole runs
        "few_steps",  # bench/few_steps.py, quality by evaluations a picture
        "sweep",  # bench/sweep.py, settings compared on a split of the training set
        "summary",  # bench/summary.py, which keeps results
        "aot",  # every kernel, compiled ahead of time
        "ptx",  # every kernel, as it is compiled, executed without a GPU
        "sequences",  # grids of one and three dimensions, conditions and padding, through whole runs
        "gpu",  # what only a GPU shows, of the whole run
        "ptx_machine",  # what executes it
        "block",  # one block of model.py
        "step",  # the whole training step
        "busy",  # the whole training step, beside busy processes
        "readme",  # what the pages promise
        "robot",  # the wing: a closed loop needs all of it
        "main_job",  # the verbs together
        "reliability",  # whatever may happen to a run
        "fuzz",  # whatever may be given to a run
        "latents",  # normalised per channel, from the encoding to every place that decodes them
        "consistency_run",  # a run that begins to learn jumps on its way
        "samplers",  # the other half of diffusion.py
        "guidance",  # by classes, in diffusion.py, sampling.py and training
    }
    for path in [*ROOT.glob("tests/test_*.py"), *ROOT.glob("bench/bench_*.py")]:
        stem = path.stem.partition("_")[2]
        assert stem in stems | whole, f"{path} is named after no source file"


def test_our_kernels_folder_is_no_package():
    """Hugging Face's `kernels`, which diffusers imports where it is installed, must be theirs."""
    found = importlib.util.find_spec("kernels")
    assert found is None or found.origin is None or Path(found.origin).parent != ROOT / "kernels"
