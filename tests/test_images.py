"""Images by folder, parquet and dataset: decoded as Pillow and torchvision define, and no byte of them trusted."""

import contextlib
import io
import json
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from fastdit.config import DataConfig, UserError
from fastdit.data import decode, images, tables
from fastdit.data.source import Example, ImageSource

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (24, 20, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    """What `datasets` caches stays in the test's folder, and it does not ask the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png(n: int = 0) -> bytes:
    return encoded(Image.fromarray(np.roll(NOISE, n, axis=0)))


def png_of(chunks: list[tuple[bytes, bytes]]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def header(width: int, height: int, bits: int = 8, colour: int = 2) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)


# --- decoding ---


def test_modes_become_rgb_by_their_definitions():
    grey, alpha = NOISE[..., 0], NOISE[..., 1]
    rgba = np.dstack([NOISE, alpha])
    on_white = NOISE * (alpha[..., None] / 255) + 255 - alpha[..., None].astype(float)
    grey16 = RNG.integers(0, 65536, grey.shape, dtype=np.uint16)
    cases = {
        "grey": (Image.fromarray(grey), np.dstack([grey] * 3), 0),
        "bilevel": (Image.fromarray(grey > 127), np.dstack([(grey > 127) * 255] * 3), 0),
        "alpha": (Image.fromarray(rgba), on_white, 1),
        "16 bits": (Image.fromarray(grey16), np.dstack([grey16 / 257] * 3), 0.51),
        "palette": ((palette := Image.fromarray(NOISE).quantize(16)), np.asarray(palette.convert("RGB")), 0),
    }
    for name, (image, truth, tolerance) in cases.items():
        found = decode.decode(encoded(image))
        assert found.mode == "RGB", name
        assert np.abs(np.asarray(found).astype(float) - truth).max() <= tolerance, name


def test_a_transparent_palette_entry_is_white():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putpixel((1, 1), 1)
    found = np.asarray(decode.decode(encoded(image, transparency=0)))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[1, 1].tolist() == [200, 0, 0]


def test_cmyk_is_converted():
    image = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    assert np.abs(np.asarray(decode.decode(encoded(image, "TIFF"))).astype(int) - [0, 255, 255]).max() == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    """Against the eight rotations and reflections as the EXIF standard names them: where row 0 and column 0 are."""
    pixels = NOISE
    upright = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: pixels[::-1].transpose(1, 0, 2),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: pixels.transpose(1, 0, 2)[::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(np.asarray(decode.decode(encoded(Image.fromarray(pixels), exif=exif))), upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_does_not_lose_the_picture():
    data = encoded(Image.fromarray(NOISE), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\xff" * 40)
    assert decode.decode(data).size == (20, 24)


JPEG = encoded(Image.fromarray(NOISE), "JPEG")
CORRUPT = {
    "empty": b"",
    "text": b"no picture at all" * 9,
    "html saved as png": b"<!DOCTYPE html><html><body>404</body></html>",
    "zeros": bytes(4096),
    "png cut short": png()[:-400],
    "png header alone": png()[:33],
    "png with a wrong checksum": png()[:60] + b"\x00\x01\x02" + png()[63:],
    "png of no width": png_of([header(0, 5), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]),
    "png with broken data": png_of([header(8, 8), (b"IDAT", b"not zlib"), (b"IEND", b"")]),
    "png bomb of 2.5 gigapixels": png_of([header(50_000, 50_000), (b"IDAT", zlib.compress(bytes(10_000))), (b"IEND", b"")]),
    "png of 60 megapixels": png_of([header(60_000, 1_000), (b"IDAT", zlib.compress(bytes(10_000))), (b"IEND", b"")]),
    "png whose text is a bomb": png_of([header(8, 8), (b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 27))), (b"IEND", b"")]),
    "jpeg cut short": JPEG[: len(JPEG) // 2],
    "jpeg without a frame": JPEG[:2] + JPEG[-2:],
    "gif cut short": encoded(Image.fromarray(NOISE), "GIF")[:200],
    "webp cut short": encoded(Image.fromarray(NOISE), "WEBP")[:60],
    "bmp with a wild offset": (lambda b: b[:10] + b"\xff\xff\xff\x7f" + b[14:])(encoded(Image.fromarray(NOISE), "BMP")),
    "tiff with a wild directory": b"II*\0\xf0\xff\xff\x7f" + bytes(100),
    "tiff of floats": encoded(Image.fromarray(NOISE[..., 0].astype(np.float32)), "TIFF"),
    "ppm of letters": b"P6 ten ten 255\n" + bytes(300),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
}


@pytest.mark.parametrize("kind", CORRUPT)
def test_a_corrupt_image_is_a_reason_and_no_crash(kind):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the words are Pillow's)
        decode.decode(CORRUPT[kind])
    assert str(caught.value)
    assert "\n" not in str(caught.value)
    assert "BytesIO" not in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([png(), JPEG]),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=8),
    st.integers(1, 2000),
)
def test_bytes_changed_at_random_decode_or_are_refused(data, changes, length):
    broken = bytearray(data)
    for at, value in changes:
        broken[at % len(broken)] = value
    with contextlib.suppress(ValueError):  # and nothing else
        assert decode.decode(bytes(broken[:length])).mode == "RGB"


@pytest.mark.parametrize("size", [(32, 32), (16, 40), (24, 20), (7, 5)])
def test_resize_is_the_recipes_transform(size):
    image = Image.fromarray(RNG.integers(0, 256, (61, 47, 3), dtype=np.uint8))
    np.testing.assert_array_equal(decode.resize(image, size), np.asarray(transforms.Resize(size)(image)))


# --- crops ---


def circle(width: int, height: int, radius: int) -> Image.Image:
    """A black disc in the middle of a white picture."""
    y, x = np.mgrid[:height, :width] + 0.5
    disc = (x - width / 2) ** 2 + (y - height / 2) ** 2 < radius**2
    return Image.fromarray(np.where(disc, 0, 255).astype(np.uint8)).convert("RGB")


@pytest.mark.parametrize(("width", "height"), [(64, 256), (256, 64)])
def test_a_circle_stays_a_circle(width, height):
    """64×256 pictures of a disc of 48 pixels, at 32×32: 24 across and down, where the plain Resize makes it 24×6."""
    picture = circle(width, height, 24)
    for crop, expected in (("center", (24, 24)), ("none", (24, 6) if width < height else (6, 24))):
        dark = decode.fit(picture, (32, 32), crop, 0)[..., 0] < 128
        assert (dark.any(0).sum(), dark.any(1).sum()) == expected
    dark = decode.fit(picture, (32, 32), "center", 0)[..., 0] < 128
    y, x = np.mgrid[:32, :32] + 0.5
    assert (dark == ((x - 16) ** 2 + (y - 16) ** 2 < 12**2)).mean() > 0.98


def test_the_centre_crop_is_exact_where_nothing_is_resampled():
    """The short side is the crop's already, or twice it, which is halved by plain averages."""
    tall = RNG.integers(0, 256, (41, 20, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode.fit(Image.fromarray(tall), (20, 20), "center", 0), tall[10:30])
    wide = RNG.integers(0, 256, (40, 100, 3), dtype=np.uint8)
    averages = wide.reshape(20, 2, 50, 2, 3).astype(float).mean((1, 3))
    found = decode.fit(Image.fromarray(wide), (20, 20), "center", 0)
    assert np.abs(found - averages[:, 15:35]).max() <= 1  # Pillow rounds twice, after columns and after rows


@pytest.mark.parametrize("size", [(24, 20), (16, 40), (7, 5), (64, 64)])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_crops_have_the_size_whatever_the_picture(size, crop):
    for width, height in [(20, 24), (1, 1), (3, 200), (200, 3), (47, 61), (640, 480)]:
        assert decode.fit(Image.new("RGB", (width, height)), size, crop, 5).shape == (*size, 3)


def test_a_random_crop_follows_from_the_pictures_number():
    gradient = np.mgrid[:200, :300].transpose(1, 2, 0).astype(np.uint8)
    picture = Image.fromarray(np.dstack([gradient, gradient[..., :1]]))
    crops = [decode.fit(picture, (32, 32), "random", n) for n in range(40)]
    assert all(np.array_equal(decode.fit(picture, (32, 32), "random", n), crops[n]) for n in (0, 7, 39))
    assert len({crop.tobytes() for crop in crops}) == 40
    # Column 1 is x of the original: how much of the picture is seen, in pixels of it. The short side is 200.
    rows = np.array([int(crop[-1, 16, 0]) - int(crop[0, 16, 0]) for crop in crops])
    assert (rows > 0.74 * 200).all()
    assert (rows < 200).all()
    assert np.ptp(rows) > 20


def test_a_picture_too_narrow_to_crop_is_a_reason():
    with pytest.raises(ValueError, match="1×900000 pixels are too narrow to be cropped to 64×64"):
        decode.fit(Image.new("RGB", (1, 900_000)), (64, 64), "center", 0)


# --- what a path names ---


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (None, images.Origin("cats")),
        ("", images.Origin("cats")),
        ("{}/pictures", images.Origin("folder", "{}/pictures")),
        ("{}/x.parquet", images.Origin("parquet", "{}/x.parquet")),
        ("{}/pack", images.Origin("pack", "{}/pack")),
        ("huggan/cats", images.Origin("hub", "huggan/cats")),
        ("huggan/cats:test", images.Origin("hub", "huggan/cats", "test")),
        ("huggan/cats@v1.2", images.Origin("hub", "huggan/cats", "train", "v1.2")),
        ("a-b/c_d:train[:10%]@refs/convert/parquet", images.Origin("hub", "a-b/c_d", "train[:10%]", "refs/convert/parquet")),
    ],
)
def test_the_path_decides_the_source(tmp_path, path, expected):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "x.parquet").touch()
    (tmp_path / "pack").mkdir()
    for name in ("manifest.json", "data.bin"):
        (tmp_path / "pack" / name).touch()
    found = images.kind_of(path and path.format(tmp_path))
    assert found == expected._replace(path=expected.path.format(tmp_path))


def test_a_folder_comes_before_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "huggan" / "cats").mkdir(parents=True)
    assert images.kind_of("huggan/cats").kind == "folder"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert images.kind_of("~/huggan").kind == "folder"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("pictures", "no such folder or file, and not the name of a hub dataset, OWNER/NAME"),
        ("/no/such/folder", "no such folder or file"),
        ("~/none", "no such folder or file"),
        ("a/b/c", "no such folder or file"),
        ("../x", "no such folder or file"),
        ("\x1b[31mred", r"--data\.path  \[31mred: no such folder"),
        ("{}/cat.png", "is one file, and neither parquet nor safetensors; name the folder it is in"),
    ],
)
def test_a_path_that_names_nothing_is_one_line(tmp_path, path, message):
    (tmp_path / "cat.png").touch()
    with pytest.raises(UserError, match=message) as caught:
        images.kind_of(path.format(tmp_path))
    assert str(caught.value).isprintable()


def test_a_path_alone_is_enough(tmp_path):
    write(tmp_path / "d", {"a/1.png": png(), "b/2.png": png(1)})
    parquet(tmp_path / "one.parquet", [{"bytes": png(), "path": None}] * 3, [0, 1, 1])
    assert images.open_images(DataConfig(path=str(tmp_path / "d"))).class_names == ("a", "b")
    assert images.open_images(DataConfig(path=str(tmp_path / "one.parquet"))).length == 3


# --- folders ---


def write(root: Path, files: dict[str, bytes]) -> DataConfig:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return DataConfig(path=str(root), image_size=(24, 20))


def by_name(data: DataConfig, split: str = "train") -> ImageSource:
    """As a data set of the hub is opened, which `datasets` does for a folder, too."""
    return tables.open_hub(data, data.path, split, "", 2)


def read(source: ImageSource) -> list[Example]:
    return list(source.read(0, source.length))


def test_class_folders_become_labels_in_sorted_order(tmp_path):
    files = {f"{kind}/{deep}{n}.png": png(n) for kind in ("tabby", "black") for deep in ("", "more/") for n in range(3)}
    source = images.open_images(write(tmp_path / "d", files | {"tabby/notes.txt": b"", "tabby/.hidden.png": b""}), threads=2)
    assert source.class_names == ("black", "tabby")
    found = read(source)
    assert [e.name for e in found] == sorted(files)
    assert [e.number for e in found] == list(range(12))
    assert [e.label for e in found] == [0] * 6 + [1] * 6
    for example in found:
        np.testing.assert_array_equal(example.image, np.roll(NOISE, int(example.name[-5]), axis=0))
    for start, stop in [(0, 5), (5, 6), (6, 99)]:  # any stretch alone is that stretch of the whole
        assert [e.name for e in source.read(start, stop)] == sorted(files)[start:stop]


def test_a_flat_folder_has_no_labels_and_num_images_takes_the_first(tmp_path):
    data = write(tmp_path / "d", {f"{n}.png": png(n) for n in range(5)})
    source = images.open_images(DataConfig(path=data.path, image_size=(8, 8), num_images=3))
    assert not source.labelled
    assert [(e.name, e.label) for e in read(source)] == [("0.png", None), ("1.png", None), ("2.png", None)]
    assert read(source)[0].image.shape == (8, 8, 3)


def test_corrupt_files_are_named_with_their_reasons(tmp_path):
    files = {f"{n:02d}.png": data for n, data in enumerate([*CORRUPT.values(), png()])}
    found = read(images.open_images(write(tmp_path / "d", files), threads=2))
    assert [e.image is None for e in found] == [True] * len(CORRUPT) + [False]
    assert all(e.reason for e in found[:-1])


def test_links_are_not_followed_out_of_the_folder(tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "s.png").write_bytes(png())
    data = write(tmp_path / "d", {"a.png": png()})
    (tmp_path / "d" / "out.png").symlink_to(tmp_path / "secret" / "s.png")
    (tmp_path / "d" / "within.png").symlink_to(tmp_path / "d" / "a.png")
    (tmp_path / "d" / "folder").symlink_to(tmp_path / "secret")
    (tmp_path / "d" / "round.png").symlink_to(tmp_path / "d" / "round.png")
    (tmp_path / "d" / "there.png").symlink_to(tmp_path / "d" / "back.png")
    (tmp_path / "d" / "back.png").symlink_to(tmp_path / "d" / "there.png")
    (tmp_path / "d" / "gone.png").symlink_to(tmp_path / "d" / "nothing.png")
    assert [(e.name, e.reason) for e in read(images.open_images(data))] == [
        ("a.png", ""),
        ("back.png", "a link that leads nowhere"),
        ("gone.png", "a link that leads nowhere"),
        ("out.png", "a link out of the folder"),
        ("round.png", "a link that leads nowhere"),
        ("there.png", "a link that leads nowhere"),
        ("within.png", ""),
    ]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no such folder"),
        ({"readme.txt": b"hello"}, "no image .* and no parquet file"),
        ({"a.png": png(), "tabby/b.png": png()}, "beside class folders such as 'tabby'"),
        ({"a.png": png(), "b.parquet": b""}, "both parquet files and images"),
        ({"a.parquet": b"PAR1 is not enough"}, "--data.path"),
    ],
)
def test_folders_that_cannot_work_are_one_line(tmp_path, files, message):
    data = write(tmp_path / "d", files)
    with pytest.raises(UserError, match=message) as caught:
        images.open_images(data)
    assert "\n" not in str(caught.value)


# --- parquet and datasets ---


def parquet(path: Path, rows: list[dict | None], labels: list[int | None] | None, **columns) -> None:
    image = pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    columns = {"image": image} | ({} if labels is None else {"label": pa.array(labels, pa.int64())}) | columns
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=3)


@pytest.fixture
def shards(tmp_path) -> Path:
    for shard in range(2):
        rows = [{"bytes": png(5 * shard + n), "path": None} for n in range(5)]
        parquet(tmp_path / "d" / f"{shard}.parquet", rows, [shard, 0, 3, 1, 2])
    return tmp_path / "d"


@pytest.mark.parametrize("source", ["folder", "hub"])
def test_parquet_by_folder_and_by_dataset(shards, source):
    data = DataConfig(path=str(shards), image_size=(24, 20))
    opened = images.open_images(data, threads=2) if source == "folder" else by_name(data)
    assert opened.labelled
    for _ in range(2):
        found = read(opened)
        assert [e.label for e in found] == [0, 0, 3, 1, 2, 1, 0, 3, 1, 2]
        for n, example in enumerate(found):
            np.testing.assert_array_equal(example.image, np.roll(NOISE, n, axis=0))
    later = list(opened.read(7, 9))  # a stretch that another rank reads
    assert [(e.number, e.label) for e in later] == [(7, 3), (8, 1)]


def test_class_labels_keep_their_names(tmp_path):
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["tabby", "black"])})
    rows = {"picture": [{"bytes": png(n), "path": None} for n in range(3)], "kind": [1, 0, -1]}
    (tmp_path / "d").mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "d" / "train.parquet")
    data = DataConfig(path=str(tmp_path / "d"), image_column="picture", label_column="kind", image_size=(24, 20))
    source = by_name(data)
    assert source.class_names == ("tabby", "black")
    assert [(e.label, e.reason) for e in read(source)] == [(1, ""), (0, ""), (None, "label -1 is not a class")]


def test_a_rows_path_is_never_opened(tmp_path):
    (tmp_path / "secret.png").write_bytes(png())
    places = [str(tmp_path / "secret.png"), f"file://{tmp_path}/secret.png", "../secret.png", "http://127.0.0.1:9/x.png"]
    places += [f"zip://secret.png::{tmp_path}/x.zip", f"hf://datasets/a/b@main/{tmp_path}", "/dev/zero"]
    rows = [{"bytes": None, "path": place} for place in places]
    rows += [None, {"bytes": b"", "path": places[0]}, {"bytes": png(), "path": places[0]}]
    parquet(tmp_path / "d" / "x.parquet", rows, None)
    found = read(images.open_images(DataConfig(path=str(tmp_path / "d"))))
    assert [e.image is None for e in found] == [True] * (len(rows) - 1) + [False]
    assert {e.reason for e in found[:-1]} == {"no image bytes in the row; files it names are not opened"}


def test_strings_are_classes_in_sorted_order(tmp_path):
    rows = [{"bytes": png(n), "path": None} for n in range(5)]
    parquet(tmp_path / "d" / "x.parquet", rows, None, label=["tabby", "black", None, "tabby", "Persian"])
    source = images.open_images(DataConfig(path=str(tmp_path / "d"), image_size=(24, 20)))
    assert source.class_names == ("Persian", "black", "tabby")
    assert [(e.label, e.reason) for e in read(source)] == [
        (2, ""),
        (1, ""),
        (None, "label None is not a class"),
        (2, ""),
        (0, ""),
    ]


def test_captions_are_not_taken_for_classes(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_NAMES", 3)
    parquet(tmp_path / "d" / "x.parquet", [{"bytes": png(), "path": None}] * 4, None, label=["a", "b", "c", "d"])
    with pytest.raises(UserError, match=r"column 'label' has 4 different strings, and at most 3 can be classes"):
        images.open_images(DataConfig(path=str(tmp_path / "d")))


def test_a_label_no_table_of_classes_could_hold_is_a_reason(tmp_path):
    rows = [{"bytes": png(n), "path": None} for n in range(3)]
    parquet(tmp_path / "d" / "x.parquet", rows, None, label=pa.array([2**64 - 1, 5, 2**20], pa.uint64()))
    found = read(images.open_images(DataConfig(path=str(tmp_path / "d"))))
    reasons = ["label 18446744073709551615 is not a class", "", "label 1048576 is not a class"]
    assert [e.reason for e in found] == reasons


NO_PICTURES = {
    "numbers": pa.array([1, 2]),
    "strings": pa.array(["a.png", "/etc/passwd"]),
    "lists of numbers": pa.array([[1, 2], [3, 4]]),
    "lists of lists": pa.array([[[1, 2]], [[3, 4]]]),
    "nested": pa.array([{"a": {"bytes": b"x"}}] * 2),
    "a struct without bytes": pa.array([{"path": "x"}] * 2),
    "bytes that are numbers": pa.array([{"bytes": 5}] * 2),
}


@pytest.mark.parametrize("kind", NO_PICTURES)
def test_a_column_of_no_pictures_is_refused(tmp_path, kind):
    (tmp_path / "d").mkdir()
    pq.write_table(pa.table({"image": NO_PICTURES[kind]}), tmp_path / "d" / "x.parquet")
    with pytest.raises(UserError, match=r"column 'image' holds .*, not encoded pictures") as caught:
        images.open_images(DataConfig(path=str(tmp_path / "d")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["another type", "no such column", "not parquet", "cut short", "broken pages"])
def test_the_parquet_file_at_fault_is_named(shards, damage):
    file = shards / "1.parquet"
    whole = file.read_bytes()
    if damage == "another type":
        pq.write_table(pa.table({"image": [1, 2], "label": [0, 1]}), file)
    elif damage == "no such column":
        pq.write_table(pa.table({"photo": [b"x"], "label": [0]}), file)
    elif damage == "not parquet":
        file.write_bytes(b"PAR1 is not enough")
    elif damage == "cut short":
        file.write_bytes(whole[: len(whole) // 2])
    else:
        file.write_bytes(whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :])
    with pytest.raises(UserError, match=rf"--data\.path {file}: ") as caught:
        images.open_images(DataConfig(path=str(shards)))
    assert "\n" not in str(caught.value)


def test_the_only_column_of_pictures_may_have_any_name(tmp_path):
    (tmp_path / "d").mkdir()
    pq.write_table(pa.table({"label": [4, 0], "photo": [png(0), png(1)]}), tmp_path / "d" / "x.parquet")
    found = read(images.open_images(DataConfig(path=str(tmp_path / "d"), image_size=(24, 20))))
    np.testing.assert_array_equal(found[1].image, np.roll(NOISE, 1, axis=0))
    assert [e.label for e in found] == [4, 0]
    for columns, said in (({"a": [png()], "b": [png()]}, "several columns"), ({"a": [5], "b": ["x"]}, "no column")):
        pq.write_table(pa.table(columns), tmp_path / "d" / "x.parquet")
        with pytest.raises(UserError, match=f"has no column 'image', and {said} of pictures; its columns: a, b$"):
            images.open_images(DataConfig(path=str(tmp_path / "d")))


def test_binary_columns_are_pictures(tmp_path):
    (tmp_path / "d").mkdir()
    pq.write_table(pa.table({"image": [png(0), png(1)]}), tmp_path / "d" / "x.parquet")
    found = read(images.open_images(DataConfig(path=str(tmp_path / "d"), image_size=(24, 20))))
    np.testing.assert_array_equal(found[1].image, np.roll(NOISE, 1, axis=0))


@pytest.mark.parametrize("kind", ["float", "absent", "missing"])
def test_columns_that_are_no_labels_leave_images_unlabelled(tmp_path, kind):
    columns = {"float": {"label": [0.5, 1.5]}, "absent": {}, "missing": {}}[kind]
    parquet(
        tmp_path / "d" / "x.parquet", [{"bytes": png(), "path": None}] * 2, [0, None] if kind == "missing" else None, **columns
    )
    found = read(images.open_images(DataConfig(path=str(tmp_path / "d"))))
    if kind == "missing":
        assert [(e.label, e.reason) for e in found] == [(0, ""), (None, "label None is not a class")]
    else:
        assert [(e.label, e.reason) for e in found] == [(None, "")] * 2


def test_a_dataset_with_code_of_its_own_is_refused_unrun(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "d.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match=r"--data\.path"):
        by_name(DataConfig(path=str(tmp_path / "d")))
    assert not (tmp_path / "ran").exists()


def test_datasets_that_cannot_be_had_are_one_line(shards):
    cases = {
        "no such folder, and not loaded from the hub": DataConfig(path="nobody/none"),
        "has no held-out images": DataConfig(path=str(shards)),
    }
    with pytest.raises(UserError, match='"validation"'):
        by_name(DataConfig(path=str(shards)), "validation")
    for message, data in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            images.open_images(data, held_out="held-out" in message)
        assert "\n" not in str(caught.value)


def test_without_a_label_column_there_are_no_classes(shards, tmp_path):
    flat = write(tmp_path / "e", {"a/1.png": png(), "b/2.png": png(1)}).path
    for path in (str(shards), flat):
        source = images.open_images(DataConfig(path=path, label_column=None))
        assert (source.labelled, source.class_names) == (False, ())
        assert {e.label for e in read(source)} == {None}


def test_cats_are_a_source_like_any_other():
    source = images.open_images(DataConfig(num_images=300))
    whole = read(source)
    assert len(whole) == source.length == 300
    assert source.class_names[3] == "mauve"
    assert json.dumps([e.label for e in whole])  # plain integers
    for example, again in zip(source.read(127, 131), whole[127:131], strict=True):
        assert (example.number, example.label) == (again.number, again.label)
        np.testing.assert_array_equal(example.image, again.image)
    held_out = read(images.open_images(DataConfig(num_images=200), held_out=True))
    assert not {e.image.tobytes() for e in whole} & {e.image.tobytes() for e in held_out}
