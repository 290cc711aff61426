"""Arrays: what is read is what was written, normalised; every batch against NumPy; and bad input in one line each."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from fastdit import config as C
from fastdit import encode
from fastdit.config import UserError
from fastdit.data import chunks, encoding, images, normaliser
from fastdit.data import pack as packs
from fastdit.recipes import RECIPES
from fastdit.runtime import rng
from fastdit.runtime.ranks import World
from fastdit.runtime.validation import fit

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, 1, CPU)
GRIDS = {"1d": (3, 16), "2d": (2, 4, 6), "3d": (2, 4, 3, 5)}
NUM = 41


def quiet(line: str) -> None:
    pass


def samples(shape: tuple[int, ...], num: int = NUM, seed: int = 0) -> dict[str, torch.Tensor]:
    """Samples of every part. What x holds in the padding is NaN."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(num, *shape, generator=g) * 3 + torch.arange(1.0, shape[0] + 1).view(-1, *[1] * (len(shape) - 1))
    length = torch.randint(1, shape[1] + 1, (num,), generator=g)
    length[0] = shape[1]
    for row, n in zip(x, length, strict=True):
        row[:, n:] = torch.nan
    condition = torch.randn(num, 5, generator=g) * torch.tensor([1.0, 2.0, 0.0, 100.0, 1e-3]) + 7
    return {"x": x, "condition": condition, "label": torch.randint(0, 4, (num,), generator=g), "length": length}


def settings(path: Path | str, packs_: Path, **data: object) -> C.Config:
    return C.replace(RECIPES["cats"], data={"path": str(path), "packs": str(packs_), **data}, model={"patch": 1})


def in_tensors(folder: Path, parts: dict[str, torch.Tensor], cuts: tuple[int, ...] = (7, 20)) -> Path:
    folder.mkdir()
    split = {name: torch.tensor_split(values, cuts) for name, values in parts.items()}
    for n in range(len(cuts) + 1):
        save_file({name: values[n].contiguous() for name, values in split.items()}, folder / f"{n}.safetensors")
    return folder


def in_parquet(file: Path, parts: dict[str, torch.Tensor], group: int = 10) -> Path:
    columns = {name: values.tolist() for name, values in parts.items()}
    pq.write_table(pa.table(columns), file, row_group_size=group)
    return file


def valid(x: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """bool, like x [N, C, L, …]: what is no padding."""
    inside = torch.arange(x.shape[2]) < length[:, None]
    return inside.view(len(x), 1, -1, *[1] * (x.ndim - 3)).expand_as(x)


def expected(parts: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """x and condition as NumPy normalises them in fp64; padding is zero."""
    x, inside = parts["x"].double(), valid(parts["x"], parts["length"])
    out = torch.zeros_like(x)
    for c in range(x.shape[1]):
        values = x[:, c][inside[:, c]].numpy()
        out[:, c][inside[:, c]] = torch.from_numpy((values - values.mean()) / values.std())
    k = parts["condition"].double().numpy()
    std = k.std(0)
    std[2] = 1
    return out, torch.from_numpy((k - k.mean(0)) / std)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", ["safetensors", "parquet"])
def test_a_pack_holds_what_was_written_normalised(tmp_path, grid, kind):
    parts = samples(GRIDS[grid])
    path = in_tensors(tmp_path / "own", parts) if kind == "safetensors" else in_parquet(tmp_path / "own.parquet", parts)
    pack = encoding.open_pack(settings(path, tmp_path / "packs"), ALONE, quiet)
    m = pack.manifest
    assert (m.arrays, m.count, m.image_shape, m.condition, m.lengths) == (True, NUM, GRIDS[grid], 5, True)
    assert (m.labelled, m.num_classes) == (True, 4)
    places = rng.order(0, 0, NUM)
    batch = pack.batch(0, NUM)
    x, condition = expected(parts)
    torch.testing.assert_close(batch.x0.double(), x[places], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(batch.condition.double(), condition[places], atol=1e-4, rtol=1e-4)
    assert torch.equal(batch.y, parts["label"][places])
    assert torch.equal(batch.length, parts["length"][places])
    own = normaliser.Normaliser.from_dict(m.normaliser)
    inside = valid(batch.x0, batch.length)
    torch.testing.assert_close(own.x.physical(batch.x0)[inside], parts["x"][places][inside])
    torch.testing.assert_close(own.condition.physical(batch.condition), parts["condition"][places])


def test_both_kinds_of_file_make_the_same_data(tmp_path):
    parts = samples(GRIDS["1d"])
    one = encoding.ensure(settings(in_tensors(tmp_path / "own", parts), tmp_path / "packs"), ALONE, quiet)
    two = encoding.ensure(settings(in_parquet(tmp_path / "own.parquet", parts), tmp_path / "packs"), ALONE, quiet)
    assert one != two
    assert (one / "data.bin").read_bytes() == (two / "data.bin").read_bytes()


def test_min_max_stays_within_one(tmp_path):
    parts = samples(GRIDS["2d"])
    own = in_tensors(tmp_path / "own", parts)
    batch = encoding.open_pack(settings(own, tmp_path / "packs", normaliser="min_max"), ALONE, quiet).batch(0, NUM)
    assert batch.x0.abs().max() == 1
    assert batch.condition.abs().max() == 1


def test_parts_may_be_absent(tmp_path):
    own = in_tensors(tmp_path / "own", {"x": torch.randn(NUM, 2, 8)})
    pack = encoding.open_pack(settings(own, tmp_path / "packs"), ALONE, quiet)
    batch = pack.batch(3, 5)
    assert batch[1:] == (None, None, None)
    assert (pack.manifest.labelled, pack.manifest.condition, pack.manifest.lengths) == (False, 0, False)


def test_the_network_follows_from_the_arrays(tmp_path):
    own = in_tensors(tmp_path / "own", samples(GRIDS["1d"]))
    config = settings(own, tmp_path / "packs")
    manifest = packs.read_manifest(encoding.ensure(config, ALONE, quiet))
    for kind, clipped in (("mean_std", False), ("min_max", True)):
        fitted = fit(config, *manifest.fits[:3], kind)
        m = fitted.model
        assert (m.input_size, m.channels, m.num_classes, m.condition) == ((16,), 3, 4, 5)
        assert (fitted.data.kind, fitted.data.normaliser, fitted.diffusion.clip_x0) == ("arrays", kind, clipped)
    with pytest.raises(UserError, match=r"^--model.patch 3 does not divide the network's input of 16$"):
        fit(C.replace(config, model={"patch": 3}), *manifest.fits)
    with pytest.raises(UserError, match=r"^--data.vae vae: an autoencoder is for pictures, and the data are arrays$"):
        fit(C.replace(config, data={"vae": "vae"}), *manifest.fits)


@pytest.mark.parametrize("device_gib", [16.0, 0.0])
def test_any_number_of_ranks_sees_the_same_arrays(tmp_path, device_gib):
    path = encoding.ensure(settings(in_tensors(tmp_path / "own", samples(GRIDS["3d"])), tmp_path / "packs"), ALONE, quiet)
    whole = packs.Pack(path, CPU, 3).batch(0, 96)
    for world in (1, 2, 4):
        batch = 24 // world
        ranks = [packs.Pack(path, CPU, 3, device_gib=device_gib, stride=24) for _ in range(world)]
        seen = [pack.batch(step * 24 + rank * batch, batch) for step in range(4) for rank, pack in enumerate(ranks)]
        for part, values in zip(zip(*seen, strict=True), whole, strict=True):
            assert torch.equal(torch.cat(part), values)
        for pack in ranks:
            pack.close()


def _encode(own: str, folder: str) -> str:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return str(encoding.ensure(settings(own, Path(folder)), World(rank, size, rank, size, CPU), quiet))


def test_ranks_and_kills_change_no_byte(tmp_path, run_ranks, monkeypatch):
    own = in_tensors(tmp_path / "own", samples(GRIDS["2d"], 1000), cuts=(300, 301, 900))
    whole = encoding.ensure(settings(own, tmp_path / "one"), ALONE, quiet)
    [two, same] = run_ranks(2, _encode, str(own), str(tmp_path / "two"))
    assert two == same
    write, written = chunks.write, []

    def killed(path: Path, blocks, sync: bool = True) -> None:
        written.append(path)
        if len(written) == 6:  # its data are there, its commit is not
            raise KeyboardInterrupt
        write(path, blocks, sync)

    with monkeypatch.context() as patch:
        patch.setattr(chunks, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            encoding.ensure(settings(own, tmp_path / "three"), ALONE, quiet)
    said: list[str] = []
    three = encoding.ensure(settings(own, tmp_path / "three"), ALONE, said.append)
    assert "; 2 of 4 chunks are there already" in said[0]
    for name in ("data.bin", "manifest.json"):
        assert (whole / name).read_bytes() == Path(two, name).read_bytes() == (three / name).read_bytes()


def test_few_bad_rows_are_skipped_counted_and_named(tmp_path):
    parts = samples(GRIDS["1d"], 300)
    parts["x"][5, 1, 0] = torch.nan
    parts["condition"][210, 3] = torch.inf
    own = in_tensors(tmp_path / "own", parts, cuts=(200,))
    path = encoding.ensure(settings(own, tmp_path / "packs"), ALONE, quiet)
    manifest = packs.read_manifest(path)
    assert manifest.skipped == [
        ["row 5 of 0.safetensors", "x has NaN, infinite or huge numbers"],
        ["row 10 of 1.safetensors", "condition has NaN, infinite or huge numbers"],
    ]
    assert manifest.count == 298
    text = "\n".join(encode.report(path))
    assert "298 samples of" in text
    assert "skipped: 2 (" in text
    assert "condition: 5 numbers; lengths given; normalised by mean_std" in text


BAD = {
    "nan": (
        lambda p: p["x"].__setitem__((3, 1, 0), torch.nan),
        "'row 3 of 0.safetensors': x has NaN, infinite or huge numbers",
    ),
    "long": (lambda p: p["length"].__setitem__(9, 17), "'row 2 of 1.safetensors': length 17, expected 1 … 16"),
    "short": (lambda p: p["length"].__setitem__(9, 0), "'row 2 of 1.safetensors': length 0, expected 1 … 16"),
    "label": (lambda p: p["label"].__setitem__(0, -1), "'row 0 of 0.safetensors': label -1 is not a class"),
    "condition": (lambda p: p["condition"].__setitem__((40, 0), torch.nan), "'row 20 of 2.safetensors': condition has NaN"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_rows_are_one_line_that_names_file_and_row(tmp_path, what):
    parts = samples(GRIDS["1d"])
    spoil, said = BAD[what]
    spoil(parts)
    own = in_tensors(tmp_path / "own", parts)
    with pytest.raises(UserError, match=r"^1 of 41 samples cannot be used; 1\.0% are allowed") as error:
        encoding.ensure(settings(own, tmp_path / "packs"), ALONE, quiet)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def refused(path: Path, tmp_path: Path) -> str:
    with pytest.raises(UserError) as error:
        encoding.ensure(settings(path, tmp_path / "packs"), ALONE, quiet)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "packs").exists() or not list((tmp_path / "packs").glob("*/manifest.json"))
    return str(error.value)


FILES = {
    "no x": ({"y": torch.zeros(3, 2, 4)}, r"has no tensor 'x'; its tensors: y$"),
    "flat": ({"x": torch.zeros(3, 2)}, r"x is 3×2; it must be samples × channels × a grid of 1 to 3 dimensions$"),
    "deep": ({"x": torch.zeros(3, 1, 1, 1, 1, 1)}, r"x is 3×1×1×1×1×1; it must be"),
    "condition": (
        {"x": torch.zeros(3, 2, 4), "condition": torch.zeros(2, 5)},
        r"condition is 2×5; beside this x it must be 3 × K$",
    ),
    "length": ({"x": torch.zeros(3, 2, 4), "length": torch.zeros(3, 1)}, r"length is 3×1; beside this x it must be 3$"),
    "empty": ({"x": torch.zeros(0, 2, 4)}, r"own has no rows$"),
    "complex": ({"x": torch.zeros(3, 2, 4, dtype=torch.complex64)}, r"x is complex"),
}


@pytest.mark.parametrize("what", FILES)
def test_a_file_of_another_form_is_one_line(tmp_path, what):
    tensors, said = FILES[what]
    assert re.search(said, refused(in_tensors(tmp_path / "own", tensors, cuts=()), tmp_path))


def test_files_that_differ_are_named(tmp_path):
    own = in_tensors(tmp_path / "own", {"x": torch.zeros(3, 2, 4), "condition": torch.zeros(3, 5)}, cuts=())
    for other, said in (
        (
            {"x": torch.zeros(3, 2, 5), "condition": torch.zeros(3, 5)},
            r"b\.safetensors: x of one sample is 2×5, but 2×4 in .*/0",
        ),
        (
            {"x": torch.zeros(3, 2, 4), "condition": torch.zeros(3, 6)},
            r"numbers of a condition: 6, but 5 in .*/0\.safetensors$",
        ),
        ({"x": torch.zeros(3, 2, 4)}, r"numbers of a condition: 0, but 5 in"),
    ):
        save_file(other, own / "b.safetensors")
        assert re.search(said, refused(own, tmp_path))


def test_a_damaged_file_is_one_line(tmp_path):
    own = in_tensors(tmp_path / "own", samples(GRIDS["1d"]), cuts=())
    file = own / "0.safetensors"
    whole = file.read_bytes()
    for content in (b"", whole[:-1], b"\xff" * 100, whole[: len(whole) // 2]):
        file.write_bytes(content)
        assert re.search(r"0\.safetensors: not a readable safetensors file \(", refused(own, tmp_path))
    table = in_parquet(tmp_path / "own.parquet", samples(GRIDS["1d"]))
    content = table.read_bytes()
    table.write_bytes(content[: len(content) // 2] + content[-8:])
    assert "parquet" in refused(table, tmp_path)


PARQUETS = {
    "ragged": ([[[1.0, 2.0], [3.0]]], r"own\.parquet: row 0 has ragged, empty or missing lists$"),
    "flat": ([[1.0, 2.0]], r"x is 1×2; it must be samples × channels × a grid of 1 to 3 dimensions$"),
    "words": ([[["a"]]], r"own\.parquet: row 0 has ragged, empty or missing lists$"),
    "numbers": ([1.0], r"column 'x' holds double; it must hold lists of numbers$"),
    "later": ([[[1.0, 2.0]], [[1.0]]], r"'row 1 of own\.parquet': x of 1×1, expected 1×2"),
    "null": ([[[1.0, 2.0]], None], r"'row 1 of own\.parquet': x is ragged, empty or missing"),
}


@pytest.mark.parametrize("what", PARQUETS)
def test_a_parquet_of_another_form_is_one_line(tmp_path, what):
    rows, said = PARQUETS[what]
    pq.write_table(pa.table({"x": rows}), tmp_path / "own.parquet")
    assert re.search(said, refused(tmp_path / "own.parquet", tmp_path))


def test_pictures_and_arrays_do_not_stand_in_for_each_other(tmp_path):
    own = in_tensors(tmp_path / "own", samples(GRIDS["1d"]))
    config = settings(own, tmp_path / "packs")
    packed = encoding.ensure(config, ALONE, quiet)
    for path, said in ((own, "holds arrays, and no pictures"), (packed, "is a pack of arrays, and holds no pictures")):
        with pytest.raises(UserError, match=said):
            images.open_images(C.replace(config, data={"path": str(path)}).data)
    assert encoding.open_pack(C.replace(config, data={"path": str(packed)}), ALONE, quiet).manifest.count == NUM


def test_a_link_to_a_file_elsewhere_is_not_followed(tmp_path):
    own = in_tensors(tmp_path / "own", samples(GRIDS["1d"]), cuts=())
    other = in_tensors(tmp_path / "other", {"x": torch.zeros(3, 9, 9)}, cuts=())
    (own / "z.safetensors").symlink_to(other / "0.safetensors")
    path = encoding.ensure(settings(own, tmp_path / "packs"), ALONE, quiet)
    assert packs.read_manifest(path).count == NUM


def test_damage_beside_the_rows_is_found(tmp_path):
    path = encoding.ensure(settings(in_tensors(tmp_path / "own", samples(GRIDS["1d"])), tmp_path / "packs"), ALONE, quiet)
    file = path / "data.bin"
    whole = file.read_bytes()
    packs.verify(path)
    file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(UserError, match=r"data\.bin: the conditions or lengths are damaged; delete"):
        packs.Pack(path, CPU, 0)


def test_what_a_pack_is_says_its_condition_and_normaliser(tmp_path):
    def identity(name: str, **data: object) -> dict[str, str]:
        own = in_tensors(tmp_path / name, samples(GRIDS["1d"]))
        return packs.identity(packs.read_manifest(encoding.ensure(settings(own, tmp_path / "packs", **data), ALONE, quiet)))

    first = identity("first")
    assert packs.changes(first, identity("same")) == []
    assert packs.changes(first, identity("scaled", normaliser="min_max")) == ["the arrays, their labels or their order"]
    assert packs.changes(first, identity("unlabelled", label_column=None))[0] == "classes: 4 before, 0 now"


FIELDS = {
    "condition": [0, 4, -1, 5.0],
    "lengths": [False],
    "normaliser": [{}, {"kind": "mean_std", "x": {"offset": [0.0], "scale": [1.0]}}, None],
    "beside_sha256": ["", "x"],
    "shape": [[3], [3, 16, 1, 1, 1], [2, 24]],
    "dtype": ["uint8", "float16", "bfloat16"],
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_manifest_that_lies_is_refused(tmp_path, field):
    path = encoding.ensure(settings(in_tensors(tmp_path / "own", samples(GRIDS["1d"])), tmp_path / "packs"), ALONE, quiet)
    file = path / "manifest.json"
    good = json.loads(file.read_text())
    for value in FIELDS[field]:
        file.write_text(json.dumps({**good, field: value}))
        with pytest.raises(UserError, match=r"manifest\.json: not the manifest of a pack|expected"):
            packs.Pack(path, CPU, 0)


def test_lengths_beyond_the_grid_in_a_pack_are_refused(tmp_path):
    path = encoding.ensure(settings(in_tensors(tmp_path / "own", samples(GRIDS["1d"])), tmp_path / "packs"), ALONE, quiet)
    m, data = packs.open_data(path)
    content = bytearray((path / "data.bin").read_bytes())
    content[data.lengths_start : data.lengths_start + 8] = np.int64(17).tobytes()
    (path / "data.bin").write_bytes(content)
    beside = packs.hashlib.sha256(content[data.conditions_start :]).hexdigest()
    file = path / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "beside_sha256": beside}))
    assert m.lengths
    with pytest.raises(UserError, match=r"data\.bin: lengths outside 1 … 16; delete"):
        packs.Pack(path, CPU, 0)
