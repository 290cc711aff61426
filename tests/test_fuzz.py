"""Whatever may be given to a run: options, config files, manifests, checkpoints, weights, pictures. It works or is one line."""

import dataclasses
import hashlib
import io
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastdit_kernels.reference import REFERENCE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import fastdit
from fastdit import command
from fastdit import config as C
from fastdit.checkpoint import Checkpoints
from fastdit.config import UserError
from fastdit.data import decode
from fastdit.data import manifest as manifests
from fastdit.data import pack as packs
from fastdit.model import DiT
from fastdit.recipes import RECIPES
from fastdit.runtime.run import LIMIT, load_config, save_config
from fastdit.runtime.tensors import load_weights, save_weights
from fastdit.weights.folder import save_folder


def counts(few: int, full: int):
    """How many inputs CI tries, and how many `pytest -m soak` does."""
    return pytest.mark.parametrize("count", [few, pytest.param(full, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])])


def tried(count: int):
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=checks)


def one_line(error: ValueError, most: int = 700) -> None:
    text = str(error)
    assert text
    assert len(text) < most, text[:1000]
    assert "\n" not in text
    assert "Traceback" not in text


NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, 1, -1, 2**31, 2**63, 10**30, 1e308, 0.5]))
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3),
)
# Where and what a byte string is changed to, and where it ends.
CHANGES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6)
ENDS = st.one_of(st.none(), st.floats(0, 1))


def changed(data: bytes, changes: list[tuple[float, int]], end: float | None, within: int | None = None) -> bytes:
    """data with bytes changed, in its first `within`, and cut short."""
    found = bytearray(data)
    for place, value in changes:
        found[int(place * (min(within or len(found), len(found)) - 1))] = value
    return bytes(found if end is None else found[: int(end * len(found))])


def places(tree: Any, prefix: tuple = ()) -> list[tuple]:
    """The path to everything in a JSON value."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [prefix, *(path for key, value in items for path in places(value, (*prefix, key)))]


def replaced(tree: Any, path: tuple, value: Any) -> Any:
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = replaced(tree[path[0]], path[1:], value)
    return copy


def trees(whole: Any) -> st.SearchStrategy:
    """A JSON value with one to three things in it replaced, by junk or by each other, or one gone or new."""
    paths = places(whole)

    def change(tree: Any, path: tuple, junk: Any, kind: str) -> Any:
        try:
            if kind == "remove" and path:
                parent = tree
                for key in path[:-1]:
                    parent = parent[key]
                copy = dict(parent) if isinstance(parent, dict) else list(parent)
                del copy[path[-1]]
                return replaced(tree, path[:-1], copy)
            return replaced(tree, path, junk)
        except (KeyError, IndexError, TypeError):  # an earlier change took the place away
            return tree

    steps = st.lists(
        st.tuples(st.sampled_from(paths), JSON, st.sampled_from(["replace", "replace", "remove"])), min_size=1, max_size=3
    )

    def apply(steps: list) -> Any:
        tree = whole
        for path, junk, kind in steps:
            tree = change(tree, path, junk, kind)
        return tree

    return steps.map(apply)


# --- configs ---

OPTIONS = sorted(command._option_names(C.Config))
VALUES = st.one_of(
    NUMBERS.map(str),
    st.text(max_size=12),
    st.sampled_from(["", "-", "--", "nan", "inf", "../x", "true", "None", "auto", "\0", "é", "1e400"]),
)


@counts(60, 1_500)
def test_command_lines(count, tmp_path, monkeypatch, soaked):
    monkeypatch.chdir(tmp_path)

    @tried(count)
    @given(
        st.lists(st.tuples(st.sampled_from(OPTIONS), st.lists(VALUES, max_size=2), st.booleans()), max_size=3),
        st.lists(VALUES, max_size=1),
    )
    def check(options, stray):
        argv = [recipe for recipe in stray if not recipe.startswith("-h")]
        for name, values, joined in options:
            argv += [f"--{name}={','.join(values)}"] if joined else [f"--{name}", *values]
        try:
            config = command.parse(argv, "train.py", "Train a DiT.")
        except UserError as error:
            one_line(error)
            return
        save_config(config, tmp_path / "config.json")
        assert load_config(tmp_path / "config.json") == config
        (tmp_path / "config.json").unlink()

    check()
    assert list(tmp_path.iterdir()) == []
    soaked("fuzz: command lines", tried=count, tracebacks=0)


@counts(150, 5_000)
def test_config_files(count, tmp_path, soaked):
    path = tmp_path / "config.json"
    whole = json.loads(json.dumps(dataclasses.asdict(RECIPES["cats-256"])))

    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            assert isinstance(load_config(path), C.Config)
        except UserError as error:
            one_line(error)

    tried(count)(given(trees(whole))(lambda tree: check(json.dumps(tree).encode())))()
    data = json.dumps(whole).encode()
    tried(count)(given(CHANGES, ENDS)(lambda changes, end: check(changed(data, changes, end))))()
    tried(count // 3)(given(st.binary(max_size=64))(check))()
    check(b"[" * 100_000)
    check(b" " * (LIMIT + 1))
    soaked("fuzz: config.json", tried=2 * count + count // 3, tracebacks=0)


# --- packs ---


@pytest.fixture
def pack(tmp_path) -> Path:
    rows = np.arange(4 * 3 * 5 * 5, dtype=np.uint8).tobytes()
    labels = np.arange(4, dtype=np.int64).tobytes()
    manifest = packs.Manifest(
        format=packs.FORMAT,
        dataset="four",
        transform="none",
        vae="",
        vae_revision="",
        count=4,
        shape=[3, 5, 5],
        dtype="uint8",
        scale=1.0,
        shift=0.0,
        labelled=True,
        num_classes=4,
        class_names=["a", "b", "c", "d"],
        chunks=[[3, hashlib.sha256(rows[: 3 * 75]).hexdigest()], [1, hashlib.sha256(rows[3 * 75 :]).hexdigest()]],
        labels_sha256=hashlib.sha256(labels).hexdigest(),
        skipped=[["x", "why"]],
    )
    folder = tmp_path / "pack"
    folder.mkdir()
    (folder / "data.bin").write_bytes(rows + labels)
    (folder / "manifest.json").write_bytes(manifests.write(manifest))
    return folder


@counts(150, 5_000)
def test_pack_manifests(count, pack, soaked):
    path = pack / "manifest.json"
    data = path.read_bytes()
    works = [0]

    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            opened = packs.Pack(pack, torch.device("cpu"), 0)
            x0, y, *_ = opened.batch(2, 5)
            opened.close()
            assert x0.shape[0] == 5
            assert y is None or y.shape == (5,)
            works[0] += 1
        except UserError as error:
            one_line(error)

    whole = json.loads(data)
    check(data)
    check(json.dumps(whole | {"dataset": "a\nb", "class_names": ["", "é", "e", "e"], "skipped": [["", "\0"]]}).encode())
    assert works == [2]  # names and reasons may be anything
    tried(count)(given(trees(whole))(lambda tree: check(json.dumps(tree).encode())))()
    tried(count)(given(CHANGES, ENDS)(lambda changes, end: check(changed(data, changes, end))))()
    check(b"[" * 100_000)
    path.unlink()
    path.symlink_to(pack / "data.bin")
    with pytest.raises(UserError):
        packs.read_manifest(pack)
    soaked("fuzz: manifests of packs", tried=2 * count, tracebacks=0)


# --- checkpoints ---


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    run = Checkpoints(tmp_path / "checkpoints", 3)
    run.save(64, tensors(1.0), {"global_batch": 16}, {"w": torch.ones(3)})
    run.wait()
    return tmp_path / "checkpoints" / "000000000064"


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {
        "model.w": torch.full((3, 5), value),
        "step.w": torch.full((1,), value),
        "ema.w": torch.full((2, 2), value, dtype=torch.bfloat16),
    }


def load(folder: Path) -> bool:
    """Whether a folder of checkpoints loads; if not, it says so in a line, and no tensor has changed."""
    here = tensors(7.0)
    said: list[str] = []
    try:
        Checkpoints(folder, 3, say=said.append).load(here)
    except UserError as error:
        one_line(error)
        assert all("\n" not in line for line in said)
        assert all((t == 7).all() for t in here.values())
        return False
    return True


def forge(inside: Path) -> None:
    """Make sizes and hashes right again, as whoever changed the files could."""
    files = sorted(str(p.relative_to(inside)) for p in inside.rglob("*") if p.is_file() and p.name != "SHA256SUMS")
    with_sizes = {n: (inside / n).stat().st_size for n in files if n != "checkpoint.json"}
    about = inside / "checkpoint.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"files": with_sizes}))
    lines = [f"{hashlib.sha256((inside / n).read_bytes()).hexdigest()}  {n}\n" for n in files]
    (inside / "SHA256SUMS").write_text("".join(lines))


SHARD = "shards/00000-of-00001.safetensors"


@counts(100, 3_000)
@pytest.mark.parametrize("name", ["SHA256SUMS", "checkpoint.json", SHARD])
def test_changed_checkpoints_never_load(count, checkpoint, name, soaked):
    path = checkpoint / name
    data = path.read_bytes()

    @tried(count)
    @given(CHANGES, ENDS)
    def check(changes, end):
        path.write_bytes(found := changed(data, changes, end))
        assert load(checkpoint.parent) == (found == data)

    check()
    soaked(f"fuzz: {name} changed", tried=count, tracebacks=0, loaded=0)


@counts(150, 3_000)
def test_forged_shards(count, checkpoint, soaked):
    """The hashes fit, the header is anybody's."""
    path = checkpoint / SHARD
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    forge(checkpoint)
    assert load(checkpoint.parent)

    def check(data: bytes) -> None:
        path.write_bytes(data)
        forge(checkpoint)
        load(checkpoint.parent)

    def with_header(tree: Any) -> bytes:
        encoded = json.dumps(tree).encode()
        return len(encoded).to_bytes(8, "little") + encoded + data[8 + size :]

    tried(count)(given(CHANGES, ENDS)(lambda changes, end: check(changed(data, changes, end, within=8 + size))))()
    tried(count)(given(trees(header))(lambda tree: check(with_header(tree))))()
    offsets = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
    about = header["__metadata__"]

    def with_offsets(tree: Any) -> bytes:
        return with_header(header | {"__metadata__": about | {"DCP_SHARDING_INFO": json.dumps(tree)}})

    tried(count)(given(trees(offsets))(lambda tree: check(with_offsets(tree))))()
    soaked("fuzz: forged shards", tried=3 * count, tracebacks=0)


@counts(150, 3_000)
def test_forged_checkpoint_json(count, checkpoint, soaked):
    path = checkpoint / "checkpoint.json"
    whole = json.loads(path.read_text())
    sums = (checkpoint / "SHA256SUMS").read_text()

    @tried(count)
    @given(trees(whole))
    def check(tree):
        path.write_text(json.dumps(tree))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        (checkpoint / "SHA256SUMS").write_text(re.sub(r"[0-9a-f]{64}(?=  checkpoint)", digest, sums))
        load(checkpoint.parent)

    check()
    soaked("fuzz: forged checkpoint.json", tried=count, tracebacks=0)


@counts(100, 5_000)
def test_manifests_of_checkpoints(count, checkpoint, soaked):
    """SHA256SUMS of any lines: names climb, repeat, name what is not there."""
    path = checkpoint / "SHA256SUMS"
    lines = path.read_text().splitlines()
    names = st.one_of(
        st.text(max_size=20), st.sampled_from(["../x", "/etc/passwd", "shards/../x", ".", "checkpoint.json", SHARD])
    )
    hashes = st.one_of(st.sampled_from([line[:64] for line in lines]), st.text("0123456789abcdef", min_size=60, max_size=66))
    any_line = st.one_of(st.sampled_from(lines), st.tuples(hashes, names).map("  ".join))

    @tried(count)
    @given(st.lists(any_line, max_size=5))
    def check(found):
        path.write_bytes("".join(f"{line}\n" for line in found).encode("utf-8", "surrogatepass"))
        assert load(checkpoint.parent) == (sorted(found) == sorted(lines))

    check()
    soaked("fuzz: any SHA256SUMS", tried=count, tracebacks=0)


@counts(150, 5_000)
def test_weights(count, tmp_path, soaked):
    path = tmp_path / "w.safetensors"
    save_weights(path, tensors(1.0))
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")

    @tried(count)
    @given(CHANGES, ENDS)
    def check(changes, end):
        path.write_bytes(changed(data, changes, end, within=8 + size))
        try:
            load_weights(path)
        except UserError as error:
            one_line(error)

    check()
    soaked("fuzz: weights", tried=count, tracebacks=0)


# --- files made to harm ---

HUGE = 99_000_000  # the safetensors package itself takes up to 100 MB


def safetensors(header: bytes, data: bytes = b"", size: int | None = None) -> bytes:
    return (len(header) if size is None else size).to_bytes(8, "little") + header + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def two(**second: Any) -> bytes:
    """A header of two tensors of four numbers, the second as it is given."""
    return json.dumps({"a": entry([4], 0, 16), "b": entry([4], 16, 32) | second}).encode()


AGAIN = two()[:-1] + b', "a": ' + json.dumps(entry([4], 0, 16)).encode() + b"}"
HOSTILE = {
    "a header said to be huge": (safetensors(b"{}", size=HUGE), "99000000 bytes; at most 16777216 are believable"),
    "a huge header": (safetensors(b"{" + b" " * HUGE + b"}"), "99000002 bytes; at most 16777216 are believable"),
    "a header of 2^63 bytes": (safetensors(b"{}", size=1 << 63), "are believable"),
    "overlapping tensors": (safetensors(two(data_offsets=[8, 24]), bytes(24)), "not a readable safetensors file"),
    "one tensor twice": (safetensors(AGAIN, bytes(32)), "two entries"),
    "the same bytes twice": (safetensors(two(data_offsets=[0, 16]), bytes(16)), "not a readable safetensors file"),
    "a gap": (safetensors(two(data_offsets=[32, 48]), bytes(48)), "not a readable safetensors file"),
    "bytes beyond the end": (safetensors(two(data_offsets=[16, 1 << 40], shape=[1 << 38]), bytes(32)), "not a readable"),
    "bytes left over": (safetensors(two(), bytes(64)), "not a readable safetensors file"),
    "a shape that overflows": (safetensors(two(shape=[1 << 62, 1 << 62]), bytes(32)), "not a readable safetensors file"),
    "a negative shape": (safetensors(two(shape=[-4]), bytes(32)), "not a readable safetensors file"),
    "an unknown dtype": (safetensors(two(dtype="F33"), bytes(32)), "not a readable safetensors file"),
    "a nested header": (safetensors(b"[" * 100_000), "not a readable safetensors file"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_weights_are_a_line_within_seconds(tmp_path, checkpoint, name):
    """As a file of weights, and as a checkpoint's shard whose hashes fit."""
    data, said = HOSTILE[name]
    path = tmp_path / "w.safetensors"
    path.write_bytes(data)
    start = time.perf_counter()
    with pytest.raises(UserError, match=re.escape(said)) as error:
        load_weights(path)
    one_line(error.value)
    (checkpoint / SHARD).write_bytes(data)
    forge(checkpoint)
    assert not load(checkpoint.parent)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value):
    """From a folder of weights, and from a checkpoint whose hashes fit: here by the name of the tensor."""
    config = C.replace(RECIPES["cats"], model={"patch": 8, "depth": 1, "width": 32, "num_heads": 2})
    model = DiT(config.model, REFERENCE)
    model.init_weights(0)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights["blocks.0.attn.qkv.weight"][3, 1] = value
    save_folder(tmp_path / "folder", weights, config)
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.qkv\.weight holds numbers that are not finite"):
        fastdit.load(tmp_path / "folder")


# --- pictures ---


@counts(25, 700)
@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it then reads all the same
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_pictures(count, kind, soaked):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 31, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    data = buffer.getvalue()

    @tried(count)
    @given(CHANGES, ENDS, st.sampled_from([64, 512, None]))
    def check(changes, end, within):
        try:
            image = decode.decode(changed(data, changes, end, within))
        except ValueError as error:
            one_line(error, 300)
            return
        assert image.mode == "RGB"
        assert image.width * image.height <= decode.MAX_PIXELS

    check()
    soaked(f"fuzz: {kind}", tried=count, tracebacks=0)
