"""The pages: the Python blocks run, the commands parse, every option, file and heading that they name exists."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from fastdit_kernels.reference import REFERENCE
from torch.nn import functional as F

import fastdit
from fastdit import convert, evaluate, export, plan, report, sample, train
from fastdit.command import _option_names, parse, parse_args, parse_run
from fastdit.config import Config, replace
from fastdit.data import classes
from fastdit.data import pack as packs
from fastdit.data.normaliser import Affine, Normaliser
from fastdit.model import DiT
from fastdit.recipes import RECIPES
from fastdit.robot.simulator import TASKS
from fastdit.weights.folder import locate, save_pretrained

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("C*.md"))]
RECORD = "CHANGELOG.md"  # it may name what is gone
VERBS = {"plan": plan, "sample": sample, "evaluate": evaluate, "report": report, "convert": convert, "export": export}
FLAGS = {"--help", "--table"}
# Options of torchrun, sbatch, pytest and mkdocs that stand in sentences or beside ours.
THEIRS = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--max-restarts", "--nodes", "--ntasks-per-node"}
THEIRS |= {"--gpus-per-node", "--requeue", "--signal", "--benchmark-compare", "--strict"}
# And those of these benches, by their source: they import from their own folder.
for bench in ("board", "few_steps"):
    text = (ROOT / "bench" / f"{bench}.py").read_text()
    THEIRS |= {f"--{name}" for name in re.findall(r"^    (\w+): [^=\n]+ = ", text, re.MULTILINE)}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """Every command of the bash blocks, in words, without comments."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


COMMANDS = [(page.name, words) for page in PAGES for words in commands(page)]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A folder with what the pages suppose: pictures in two classes, and the runs cats and mine, with a tiny network."""
    for name in ("bag", "coat"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
    tiny = replace(RECIPES["cats"], model={"depth": 1, "width": 16, "num_heads": 1}, run={"name": "cats"})
    model = DiT(tiny.model, REFERENCE)
    model.init_weights(0)
    for name in ("cats", "mine"):
        save_pretrained(model, tmp_path / "runs" / name, tiny)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def option_names() -> set[str]:
    names = {name for module in VERBS.values() for name in _option_names(module.Options)} | set(_option_names(Config))
    return {f"--{name}" for name in names} | FLAGS


def test_pages_are_read():
    assert len(blocks(ROOT / "README.md", "python")) == 3
    assert len(commands(ROOT / "README.md")) >= 12


@pytest.mark.parametrize("number", range(3), ids=["load and sample", "kernels", "own data set"])
def test_python_blocks_of_the_readme_run(home, number):
    given = {}
    exec(compile(blocks(ROOT / "README.md", "python")[number], "README.md", "exec"), given)
    if number == 0:
        assert given["images"].dtype == torch.uint8
        assert given["images"].shape == (4, 3, 32, 32)
    elif number == 1:
        for ours, theirs in zip(
            (given["r"], given["m"]),
            REFERENCE.gate_residual_ln_modulate(*(given[k] for k in ("x", "y", "gate", "shift", "scale"))),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)
    else:
        manifest = packs.verify(home / "my-pack")
        assert (manifest.count, manifest.num_classes, manifest.shape[1:]) == (100, 10, [64, 64])
        config, _ = parse_run(["--data.path", "my-pack"], "train.py", "")
        assert config.data.source == "folder"


def test_python_blocks_of_the_other_pages_run(home):
    given = {}
    for block in blocks(ROOT / "docs" / "python.md", "python"):
        exec(compile(block, "python.md", "exec"), given)
    assert given["image"].shape == (3, 32, 32)
    assert given["prediction"].shape == (2, 3, 32, 32)
    assert (home / "my-model" / "model.safetensors").is_file()
    assert given["x"].grad.isfinite().all()
    assert packs.verify(given["pack"]).class_names == ["day", "night"]
    run = {"README.md", "python.md", "sequences.md", "policy.md"}
    assert {page.name for page in PAGES if blocks(page, "python")} == run  # no page is left out


def test_the_page_on_sequences_runs(home):
    """Its file, its training as it is written, and what the network followed from."""
    [block] = blocks(ROOT / "docs" / "sequences.md", "python")
    exec(compile(block, "sequences.md", "exec"), {})
    [[python, script, *args]] = commands(ROOT / "docs" / "sequences.md")
    assert (python, script) == ("python", "fastdit/train.py")
    train.train(*parse_run([*args, "--log.sample_every", "100000", "--parallel.precision", "fp32"], "train.py", ""))
    found = locate("runs/waves")
    m = found.config.model
    assert (m.input_size, m.channels, m.num_classes, m.condition) == ((32,), 2, 2, 1)
    assert found.images_seen == 3200
    assert found.normaliser is not None
    offset, scale = found.normaliser.x
    assert all(19 < value < 21 for value in offset)  # the waves are about 20, and 5 high
    assert all(3 < value < 4 for value in scale)


def test_the_page_on_a_policy_runs(home):
    tiny = replace(RECIPES["robot"], model={"depth": 1, "width": 16, "num_heads": 1}, run={"name": "robot"})
    model = DiT(tiny.model, REFERENCE)
    model.init_weights(0)
    model.normaliser = Normaliser("min_max", Affine((0.0,) * 4, (1.0,) * 4), Affine((0.0,) * 39, (1.0,) * 39))
    save_pretrained(model, home / "runs" / "robot", tiny)
    classes.write(home / "runs" / "robot", TASKS)
    given = {}
    [block] = blocks(ROOT / "docs" / "policy.md", "python")
    exec(compile(block, "policy.md", "exec"), given)
    assert given["actions"].shape == (1, 16, 4)


def test_the_notebook_runs(home):
    cells = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())["cells"]
    given = {"__name__": "notebook"}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec(compile("".join(cell["source"]), cell["id"], "exec"), given)
    assert given["images"].shape == (8, 3, 32, 32)
    assert given["one"].shape == (4, 3, 32, 32)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in given["block"].parameters())
    assert packs.verify(home / "notebook-pack").class_names == ["north", "east", "south", "west"]
    # What the block computes, in plain PyTorch.
    block, x, c = given["block"], torch.randn(2, 64, 128), torch.randn(2, 128)
    shift, scale, gate, shift2, scale2, gate2 = (m[:, None] for m in block.modulation(c).chunk(6, dim=-1))
    r = x + gate * block.first(F.layer_norm(x, (128,), eps=1e-6) * (1 + scale) + shift)
    r = r + gate2 * block.second(F.layer_norm(r, (128,), eps=1e-6) * (1 + scale2) + shift2)
    torch.testing.assert_close(block(x, c), r)


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: value if isinstance(value, str) else " ".join(value))
def test_commands_parse(home, page, words):
    """By the verb's own parser. A command of another program must name files and extras that exist."""
    scripts = [i for i, word in enumerate(words) if re.fullmatch(r"fastdit/\w+\.py", word)]
    if not scripts:
        for word in words[1:]:
            if re.match(r"(fastdit|kernels|tests|bench|docs|\.ci)/", word):
                assert (ROOT / word.partition("::")[0]).exists(), f"{page} names {word}"
        extras = [name for word in words for name in re.findall(r"^\.\[(.+)\]$", word)]
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(extras) <= set(known), page
        return
    [at] = scripts
    assert (ROOT / words[at]).is_file(), f"{page} names {words[at]}"
    assert next(word for word in words if not re.match(r"[A-Z_]+=", word)) in ("python", "torchrun", "srun"), page
    verb, args = Path(words[at]).stem, words[at + 1 :]
    if args in (["--help"], ["--help", "all"]):
        return
    if verb == "train":
        named = bool(args) and args[0].startswith("runs/")
        if named and not Path(args[0]).exists():
            shutil.copytree("runs/cats", args[0])  # another run that a page supposes
        config, resumed = parse_run(args, "train.py", "")
        assert resumed == named
        assert config.model.num_classes == 2 or config.data.path != "~/pictures"
    elif verb == "encode":
        assert args[0] == "verify" or parse(args, "encode.py", "")
    elif verb == "plan":
        plan.parse(args)
    else:
        parse_args(VERBS[verb].Options, args, f"{verb}.py", "")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_exist(page):
    """In commands and in sentences alike."""
    if page.name == RECORD:
        return
    # What other programs are given is not ours.
    text = re.sub(r"(^|`)(pytest|pip|git|uv|docker|nsys|ncu|nvidia-smi) [^`\n]*", "", page.read_text(), flags=re.MULTILINE)
    named = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", text))
    unknown = {name for name in named if re.sub(r"(^--|\.)no_", r"\1", name) not in option_names()} - THEIRS
    assert not unknown, f"{page.name} names {', '.join(sorted(unknown))}"


def test_options_that_the_verbs_speak_of_exist():
    """In errors, help and comments. Only validation.py speaks of hidden settings, which a config.json may have wrong."""
    short = {f"--{name.rpartition('.')[2]}" for name in _option_names(Config)}
    known = option_names() | short | {"--parallel.shard", "--group.field", "--field", "--model", "--num"}
    for path in sorted({*(ROOT / "fastdit").rglob("*.py")} - {ROOT / "fastdit" / "runtime" / "validation.py"}):
        named = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", path.read_text()))
        unknown = {name for name in named if re.sub(r"(^--|\.)no_", r"\1", name) not in known} - THEIRS
        assert not unknown, f"{path.name} names {', '.join(sorted(unknown))}"


def anchors(page: Path) -> set[str]:
    """What GitHub and mkdocs call a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_files_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://|\.\./\.\./actions/", target):  # the second is GitHub's own page of the workflow
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links {target}"


def test_files_that_pages_name_in_code_exist():
    """Whole paths such as `fastdit/data/pack.py`."""
    for page in PAGES:
        if page.name != RECORD:
            for name in re.findall(r"`((?:fastdit|kernels|tests|bench|docs)/[\w./-]+\.\w+)`", page.read_text()):
                assert (ROOT / name).exists(), f"{page.name} names {name}"


def drawn(name: str) -> ModuleType:
    """A script of docs/ that draws a figure."""
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures_of_the_pages_are_those_of_the_json():
    block, speed = drawn("block"), drawn("speed")
    ours, eager, compiled = (
        f"{sum(block.passes(way)):.0f}" for way in ("fastdit", "the seed's way", "the seed's way, torch.compile")
    )
    results, kernels = ((ROOT / "docs" / name).read_text() for name in ("results.md", "kernels.md"))
    assert f"| {ours} with our kernels; the seed's way {eager}, compiled {compiled} |" in results
    for op, bench in block.OPS.items():
        (forward, backward), (fused_forward, fused_backward) = block.baselines(bench)
        op = op.partition(" ")[0]
        assert re.search(rf"`{op}`.*\| {forward} / {backward} \| {fused_forward} / {fused_backward}\b", kernels), op
    seed, standard, *_ = (speed.ratios(*where) for where in speed.GROUPS.values())
    said = (seed["the seed's way"], seed["the seed's way, torch.compile"], standard["standard DiT"])
    for value, words in zip(said, ("the seed repository's way", "that compiled", "a DiT of standard modules"), strict=True):
        assert f"{value:.2f} × {words}" in results
    assert f"{said[0]:.2f} times as long in the seed repository's way, and {said[1]:.2f} times compiled" in " ".join(
        (ROOT / "README.md").read_text().split()
    )
    for module in (block, speed):
        assert module.draw().axes


def test_the_table_of_kernels_is_that_of_the_json():
    found = json.loads((ROOT / "bench" / "results" / "static.json").read_text())["rows"]
    rows = {r["op"]: r for r in found if r["arch"] == "sm_80" and r["width"] in (768, 3072)}
    assert all(k["spills"] == k["stack"] == k["fp64"] == 0 for r in found for k in r["kernels"])
    page = (ROOT / "docs" / "kernels.md").read_text()
    table = re.findall(r"^\| `(\w+)`(.*?),? forward / backward \| \d+ \| (.*) \| (.*) \| (.*) µs \|$", page, re.MULTILINE)
    assert len(table) == 6
    for op, kind, moved, instructions, bound in table:
        name = f"{op}{kind}".replace(" along sequences,", "1d").replace("K = ", "K=")
        pair = [rows[f"{name} {direction}"] for direction in ("forward", "backward")]
        assert moved == " / ".join(f"{r['bytes_per_element']:.2f} ({r['floor_bytes_per_element']})" for r in pair)
        assert instructions == " / ".join(f"{r['instructions_per_element']:.1f}" for r in pair)
        assert bound == " / ".join(f"{r['bound_us']['bytes']:.0f}" for r in pair)
        assert {r["bound_by"] for r in pair} == {"bytes"}
    for row in (rows["adamw_ema"], rows["adamw_ema with copies"]):
        assert f"| 36.0 (36) | {row['instructions_per_element']:.0f} | {row['bound_us']['bytes']:.0f} µs |" in page
    assert {r["bound_by"] for op, r in rows.items() if "gelu_dwconv K=5" in op} == {"issue"}


def test_the_table_of_busy_machines_is_that_of_the_json():
    found = json.loads((ROOT / "bench" / "results" / "bench_busy-cpu.json").read_text())["rows"]
    rates: dict[int, list[float]] = {}
    for row in found:
        rates.setdefault(row["GOMP_SPINCOUNT"], []).append(row["img_per_s"])
    page = (ROOT / "docs" / "results.md").read_text()
    said = re.findall(r"^\| \**(\d+)\b.*?\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert {int(spins): list(map(float, figures)) for spins, *figures in said} == rates
    ours, theirs = ([r["share_of_fair"] for r in found if r["GOMP_SPINCOUNT"] == n][1:] for n in (int(fastdit.SPINS), 300000))
    assert min(ours) >= 0.8
    assert "{:.2f} and {:.2f} of that were reached; with OpenMP's own count {:.2f} and {:.2f}".format(*ours, *theirs) in page


def test_the_readme_says_what_busy_processes_cost():
    found = json.loads((ROOT / "bench" / "results" / "bench_busy-cpu.json").read_text())["rows"]
    alone, one, four = (row["img_per_s"] for row in found if row["GOMP_SPINCOUNT"] == int(fastdit.SPINS))
    assert f"{one / alone:.2f} {four / alone:.2f}" == "0.50 0.29"
    assert "half of their rate alone, and beside four at 0.29 of it" in (ROOT / "README.md").read_text()


def test_the_lock_is_of_this_project():
    """`uv lock` makes it; uv refuses or changes one that is of other dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [ours] = [p for p in tomllib.loads((ROOT / "uv.lock").read_text())["package"] if p["name"] == "fastdit"]
    wanted = {d for ds in (project["dependencies"], *project["optional-dependencies"].values()) for d in ds}
    locked = {d["name"] + d.get("specifier", "") for d in ours["metadata"]["requires-dist"]}
    assert locked == {re.sub(r"[\s;].*|\[.*\]", "", d) for d in wanted}
    assert ours["version"] == project["version"]


def test_versions_agree():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE) == [version]
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == version
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert ".ci/run" in (ROOT / ".github" / "workflows" / "tests.yml").read_text()


def test_the_list_of_files_is_that_of_the_tree():
    spec = importlib.util.spec_from_file_location("docs_files", ROOT / "docs" / "files.py")
    assert spec
    assert spec.loader
    files = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(files)
    assert (ROOT / "docs" / "files.md").read_text() == files.page(), "run python docs/files.py"


def test_the_cats_are_those_of_the_json():
    found = json.loads((ROOT / "docs" / "cats.json").read_text())
    e, said = found["evaluation"], " ".join((ROOT / "README.md").read_text().split())
    minutes, seconds = divmod(round(found["wall_seconds"]), 60)
    assert f"after {found['images']:,} drawn cats: {minutes} min {seconds} s" in said
    assert f"Of {e['num']:,} samples KID is {e['kid']:.3f}, coverage {e['coverage']:.2f} and" in said
    assert f"image {e['nearest']:.1f}; held-out images get {e['kid_floor']:.3f}, {e['coverage_floor']:.2f} and" in said
    assert f"{e['nearest_floor']:.1f} ([figures]" in said
    row = f"{found['images']:,} images in {found['wall_seconds']:.0f} s in all, {found['img_per_s_median']:.0f} images/s"
    assert row in (ROOT / "docs" / "results.md").read_text()
