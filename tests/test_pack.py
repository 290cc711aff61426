"""Packs: each batch against its definition in fp64, both ways of reading bit-equal, and files that lie refused by name."""

import hashlib
import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdit.config import RankError, UserError
from fastdit.data import manifest as manifests
from fastdit.data import pack as packs
from fastdit.runtime import rng

CPU = torch.device("cpu")
SEED = 3


def build(path: Path, rows: torch.Tensor, labels: list[int] | None, *, scale: float = 1.0, shift: float = 0.0) -> Path:
    """A pack made by hand, in chunks of 4 rows. Moments if the rows are bf16, else pixels."""
    path.mkdir()
    latent = rows.dtype == torch.bfloat16
    content = rows.contiguous().view(torch.uint8).numpy().reshape(len(rows), -1)
    label_bytes = b"" if labels is None else np.array(labels, np.int64).tobytes()
    manifest = packs.Manifest(
        format=packs.FORMAT,
        dataset="by hand",
        transform="none",
        vae="tiny" if latent else "",
        vae_revision="",
        count=len(rows),
        shape=list(rows.shape[1:]),
        dtype="bfloat16" if latent else "uint8",
        scale=scale,
        shift=shift,
        labelled=labels is not None,
        num_classes=max(labels) + 1 if labels else 0,
        class_names=[],
        chunks=[[len(c), hashlib.sha256(c.tobytes()).hexdigest()] for c in np.split(content, range(4, len(rows), 4))],
        labels_sha256=hashlib.sha256(label_bytes).hexdigest() if labels else "",
        skipped=[["a.png", "empty"]],
    )
    (path / "data.bin").write_bytes(content.tobytes() + label_bytes)
    (path / "manifest.json").write_bytes(manifests.write(manifest))
    return path


NUM = 37
LABELS = [n % 5 for n in range(NUM)]


@pytest.fixture
def moments() -> torch.Tensor:
    values = torch.randn(NUM, 2, 6, 3, 5, generator=torch.Generator().manual_seed(0)) * 3
    values[0, :, 3:] = 90.0  # log-variances beyond what is clamped
    values[1, :, 3:] = -90.0
    return values.bfloat16()


@pytest.fixture
def latent_pack(tmp_path, moments) -> Path:
    return build(tmp_path / "latents", moments, LABELS, scale=0.18215, shift=0.25)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (NUM, 3, 4, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pixel_pack(tmp_path, pixels) -> Path:
    return build(tmp_path / "pixels", pixels, LABELS)


def places(first: int, count: int) -> list[int]:
    return [rng.order(SEED, n // NUM, NUM)[n % NUM].item() for n in range(first, first + count)]


def mirrored(first: int, count: int) -> list[bool]:
    return (rng.uniform((), SEED, "flip", first, count, CPU) < 0.5).tolist()


# --- batches ---


@pytest.mark.parametrize(("first", "count"), [(0, 1), (5, 16), (30, 20), (37, 37), (1_000_003, 9), (20, 120)])
def test_latents_are_drawn_from_their_moments_as_in_fp64(latent_pack, moments, first, count):
    x0, y, *_ = packs.Pack(latent_pack, CPU, SEED).batch(first, count)
    eps = rng.normal((3, 3, 5), SEED, "posterior", first, count, CPU).double()
    rows = torch.stack([moments[i, int(f)] for i, f in zip(places(first, count), mirrored(first, count), strict=True)]).double()
    mean, logvar = rows[:, :3], rows[:, 3:].clamp(-30, 20)
    truth = (mean + torch.exp(logvar / 2) * eps - 0.25) * 0.18215
    assert x0.dtype == torch.float32
    # Three fp32 roundings, each relative to the largest term.
    terms = (mean.abs() + torch.exp(logvar / 2) * eps.abs() + 0.25) * 0.18215
    assert ((x0.double() - truth).abs() <= 4 * 2**-24 * terms).all()
    assert y.tolist() == [LABELS[i] for i in places(first, count)]


@pytest.mark.parametrize(("first", "count"), [(0, 1), (30, 20), (20, 120)])
def test_pixels_are_mirrored_and_normalised_exactly(pixel_pack, pixels, first, count):
    x0, y, *_ = packs.Pack(pixel_pack, CPU, SEED).batch(first, count)
    for image, i, flip in zip(x0, places(first, count), mirrored(first, count), strict=True):
        truth = pixels[i].double() / 127.5 - 1
        assert torch.equal(image, (truth.flip(-1) if flip else truth).float())
    assert y.tolist() == [LABELS[i] for i in places(first, count)]


def test_without_hflip_nothing_is_mirrored(pixel_pack, latent_pack, pixels, moments):
    x0, *_ = packs.Pack(pixel_pack, CPU, SEED, hflip=False).batch(0, NUM)
    assert torch.equal(x0, (pixels[places(0, NUM)].double() / 127.5 - 1).float())
    pack = packs.Pack(latent_pack, CPU, SEED, hflip=False)
    assert (pack._pick(0, 200) % 2 == 0).all()


def test_every_epoch_sees_every_image_once_and_draws_it_anew(latent_pack):
    pack = packs.Pack(latent_pack, CPU, SEED)
    epochs = [pack.batch(e * NUM, NUM) for e in range(3)]
    assert all(sorted(y.tolist()) == sorted(LABELS) for _, y, *_ in epochs)
    orders = [places(e * NUM, NUM) for e in range(3)]
    assert all(sorted(order) == list(range(NUM)) for order in orders)
    assert orders[0] != orders[1]
    same = {i: [x0[order.index(i)] for (x0, *_), order in zip(epochs, orders, strict=True)] for i in range(2, NUM)}
    assert not any(torch.equal(draws_of[0], draws_of[1]) for draws_of in same.values())


def test_half_the_images_are_mirrored(pixel_pack):
    share = (packs.Pack(pixel_pack, CPU, SEED)._pick(0, 20_000) % 2).double().mean().item()
    assert abs(share - 0.5) < 4 * 0.5 / 20_000**0.5


@pytest.mark.parametrize("kind", ["latent_pack", "pixel_pack"])
@pytest.mark.parametrize("device_gib", [16.0, 0.0])
def test_any_number_of_ranks_sees_the_same_images(kind, device_gib, request):
    path = request.getfixturevalue(kind)
    whole = packs.Pack(path, CPU, SEED).batch(0, 96)
    for world in (1, 2, 4):
        batch = 24 // world
        ranks = [packs.Pack(path, CPU, SEED, device_gib=device_gib, stride=24) for _ in range(world)]
        seen = [pack.batch(step * 24 + rank * batch, batch) for step in range(4) for rank, pack in enumerate(ranks)]
        assert torch.equal(torch.cat([b.x0 for b in seen]), whole.x0)
        assert torch.equal(torch.cat([b.y for b in seen]), whole.y)
        for pack in ranks:
            pack.close()


@pytest.mark.parametrize("kind", ["latent_pack", "pixel_pack"])
@pytest.mark.parametrize("stride", [0, 8, 5])
def test_reading_ahead_gives_the_same_bits_whatever_is_asked_next(kind, stride, request):
    path = request.getfixturevalue(kind)
    resident, ahead = packs.Pack(path, CPU, SEED), packs.Pack(path, CPU, SEED, device_gib=0.0, stride=stride)
    assert resident.resident
    assert not ahead.resident
    calls = [(n, 8) for n in range(0, 120, 8)] + [(500, 8), (508, 8), (508, 8), (3, 8), (11, 5), (16, 5), (0, 90)]
    for first, count in calls:
        for a, b in zip(resident.batch(first, count)[:2], ahead.batch(first, count)[:2], strict=True):
            assert torch.equal(a, b)
    ahead.close()


def test_the_next_batches_are_read_before_they_are_asked_for(pixel_pack, monkeypatch):
    pack = packs.Pack(pixel_pack, CPU, SEED, device_gib=0.0, stride=8)
    read, asked = packs.Pack._read, []
    monkeypatch.setattr(packs.Pack, "_read", lambda self, first, count: asked.append(first) or read(self, first, count))
    pack.batch(0, 8)
    for future in list(pack._ahead.values()):
        future.result()
    assert asked == [0, 8, 16, 24]
    pack.batch(8, 8)
    for future in list(pack._ahead.values()):
        future.result()
    assert asked == [0, 8, 16, 24, 32]
    pack.close()


def test_waiting_for_data_is_counted_and_work_ahead_is_not(pixel_pack, monkeypatch):
    pack, read = packs.Pack(pixel_pack, CPU, SEED, device_gib=0.0, stride=8), packs.Pack._read
    monkeypatch.setattr(packs.Pack, "_read", lambda self, *batch: time.sleep(0.1) or read(self, *batch))
    pack.batch(0, 8)
    assert 0.1 <= pack.waited_s < 0.2
    time.sleep(0.5)
    before = pack.waited_s
    pack.batch(8, 8)
    assert pack.waited_s - before < 0.05
    pack.close()


def test_closing_ends_the_thread(pixel_pack):
    before = threading.active_count()
    for _ in range(10):
        pack = packs.Pack(pixel_pack, CPU, SEED, device_gib=0.0, stride=8)
        pack.batch(0, 8)
        pack.close()
    assert threading.active_count() == before


def test_an_unlabelled_pack_gives_no_labels(tmp_path, pixels):
    assert packs.Pack(build(tmp_path / "p", pixels, None), CPU, SEED).batch(0, 4).y is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["latent_pack", "pixel_pack"])
def test_on_a_gpu_both_ways_agree_and_neither_waits_for_it(kind, request):
    path, gpu = request.getfixturevalue(kind), torch.device("cuda")
    resident, ahead = packs.Pack(path, gpu, SEED), packs.Pack(path, gpu, SEED, device_gib=0.0, stride=8)
    truth = packs.Pack(path, CPU, SEED)
    for pack in (resident, ahead):
        pack.batch(0, 8)
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = [(resident.batch(n, 8), ahead.batch(n, 8)) for n in range(8, 200, 8)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for n, (a, b) in zip(range(8, 200, 8), batches, strict=True):
        assert torch.equal(a.x0, b.x0)
        assert torch.equal(a.y.cpu(), truth.batch(n, 8).y)
        assert torch.equal(a.y, b.y)
    ahead.close()


@pytest.mark.parametrize("num", [1, 3])
def test_a_batch_larger_than_the_pack_sees_images_again(tmp_path, pixels, num):
    pack = packs.Pack(build(tmp_path / "few", pixels[:num], LABELS[:num]), CPU, SEED, hflip=False)
    x0, y, *_ = pack.batch(5 * num, 8 * num)
    assert sorted(y.tolist()) == sorted(LABELS[:num] * 8)
    for epoch in range(8):
        assert sorted(y[epoch * num : (epoch + 1) * num].tolist()) == sorted(LABELS[:num])
    assert torch.equal(x0, (pixels[y].double() / 127.5 - 1).float())


# --- what a pack is ---


def test_the_identity_says_what_changed(tmp_path, pixels, moments):
    def identity(name: str, rows, labels, **fields) -> dict[str, str]:
        path = build(tmp_path / name, rows, labels, scale=0.5)
        file = path / "manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
        return packs.identity(packs.read_manifest(path))

    names = ["black", "grey", "red", "tabby", "white"]
    first = identity("first", pixels, LABELS, class_names=names)
    assert packs.changes(first, identity("same", pixels, LABELS, class_names=names, dataset="moved", skipped=[])) == []
    assert packs.changes(first, identity("fewer", pixels[:-1], LABELS[:-1], class_names=names)) == ["images: 37 before, 36 now"]
    other = pixels.clone()
    other[0, 0, 0, 0] ^= 1
    assert packs.changes(first, identity("other", other, LABELS, class_names=names)) == [
        "the pictures, their labels or their order"
    ]
    relabelled = identity("labels", pixels, [*LABELS[:-1], 0], class_names=names)
    assert packs.changes(first, relabelled) == ["the pictures, their labels or their order"]
    [line] = packs.changes(first, identity("six", pixels, [*LABELS[:-1], 5], class_names=[*names, "yellow"]))
    assert line == "classes: 5 (black, grey, red, tabby, white) before, 6 (black, grey, red, tabby, white, yellow) now"
    latents = identity("latents", moments, LABELS, vae_sha256="a" * 64, vae="x", class_names=names)
    another = identity("another", moments, LABELS, vae_sha256="b" * 64, vae="x", class_names=names)
    moved = identity("moved", moments, LABELS, vae_sha256="a" * 64, vae="y/z", class_names=names)
    assert packs.changes(latents, moved) == []
    assert packs.changes(latents, another) == [f"VAE: {'a' * 16} before, {'b' * 16} now"]
    pinned = identity("pinned", pixels, LABELS, class_names=names, revision="1" * 40)
    assert packs.changes(first, pinned) == [f"hub revision: none before, {'1' * 40} now"]
    cropped = identity("cropped", pixels, LABELS, class_names=names, transform="centre crop")
    assert packs.changes(first, cropped) == ["transform: none before, centre crop now"]


@pytest.mark.parametrize("before", [{}, {"images": 5, "classes": None}, {"images": "\x1b[31m" * 400}])
def test_an_identity_from_elsewhere_is_printable(pixel_pack, before):
    lines = packs.changes(before, packs.identity(packs.read_manifest(pixel_pack)))
    assert lines
    assert all(line.isprintable() and len(line) < 1000 for line in lines)


# --- files that lie ---


def test_a_pack_of_another_length_is_refused_by_name(latent_pack):
    file = latent_pack / "data.bin"
    whole = file.read_bytes()
    for length in [0, 1, 8, len(whole) // 2, len(whole) - 8, len(whole) - 1, len(whole) + 1]:
        file.write_bytes((whole + b"x")[:length])
        with pytest.raises(UserError, match=rf"data\.bin: {length:,} bytes, expected {len(whole):,}; delete"):
            packs.Pack(latent_pack, CPU, SEED)
    file.unlink()
    with pytest.raises(UserError, match=r"data\.bin: 0 bytes"):
        packs.Pack(latent_pack, CPU, SEED)


@pytest.mark.parametrize("device_gib", [16.0, 0.0])
def test_a_pack_cut_short_under_a_run_is_one_line(pixel_pack, device_gib):
    """Of a mapped file, the same would be a SIGBUS."""
    pack = packs.Pack(pixel_pack, CPU, SEED, device_gib=device_gib, stride=8)
    pack.batch(0, 8)
    os.truncate(pixel_pack / "data.bin", 10)
    with pytest.raises(RankError, match=rf"^{pixel_pack}/data\.bin was cut short while it was being read$"):
        pack.batch(8, 72)
    pack.close()


def test_a_pack_replaced_under_a_run_is_read_on(pixel_pack):
    pack, truth = packs.Pack(pixel_pack, CPU, SEED), packs.Pack(pixel_pack, CPU, SEED).batch(8, 50)
    (pixel_pack / "data.bin").unlink()
    assert torch.equal(pack.batch(8, 50).x0, truth.x0)


def test_an_open_pack_lets_its_file_go(pixel_pack):
    def opened() -> int:
        return sum(
            os.readlink(f"/proc/self/fd/{fd}").startswith(str(pixel_pack))
            for fd in os.listdir("/proc/self/fd")
            if os.path.islink(f"/proc/self/fd/{fd}")
        )

    pack = packs.Pack(pixel_pack, CPU, SEED)
    assert opened() == 1
    del pack
    assert opened() == 0


def test_every_flipped_bit_is_found(latent_pack):
    file = latent_pack / "data.bin"
    whole = file.read_bytes()
    packs.verify(latent_pack)
    for at in np.random.default_rng(0).integers(0, 8 * len(whole), 60):
        broken = bytearray(whole)
        broken[at // 8] ^= 1 << at % 8
        file.write_bytes(broken)
        row = at // 8 // (2 * 6 * 3 * 5 * 2)
        where = (
            "the labels are damaged" if row >= NUM else f"rows {row // 4 * 4} to {min(row // 4 * 4 + 3, NUM - 1)} are damaged"
        )
        with pytest.raises(UserError, match=where):
            packs.Pack(latent_pack, CPU, SEED)


def test_labels_outside_their_range_are_refused(tmp_path, pixels):
    for bad in (-1, 5):
        path = build(tmp_path / str(bad), pixels, [*LABELS[:-1], bad])
        manifest = json.loads((path / "manifest.json").read_text()) | {"num_classes": 5}
        (path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match=r"labels outside 0 … 4"):
            packs.Pack(path, CPU, SEED)


MANIFESTS = {
    "format": [0, 2, "1", True, None],
    "dataset": [3, None, []],
    "vae": ["", 4, None],
    "count": [0, -1, 36, 38, 37.0, "37", True, 1 << 70],
    "shape": [
        [],
        [2, 6, 3],
        [2, 6, 3, 5, 1],
        [1, 6, 3, 5],
        [2, 5, 3, 5],
        [2, 6, -3, -5],
        [2, 6, 3, 5.0],
        [2, 6, 3, 1 << 40],
        "2653",
        None,
    ],
    "dtype": ["uint8", "float32", "object", "__class__", None],
    "scale": [0.0, -1.0, float("nan"), float("inf"), 1, "1"],
    "shift": [float("nan"), "0", None],
    "labelled": [False, 1, "yes"],
    "num_classes": [0, -5, 5.0],
    "class_names": [["one"], [1, 2, 3, 4, 5], "abcde", {}],
    "chunks": [[], [[37]], [[37, "zz"]], [[-1, "0" * 64], [38, "0" * 64]], [["37", "0" * 64]], [37], [[37, 5]], "x"],
    "labels_sha256": ["", "../" * 21 + "x", 5],
    "skipped": [[["a"]], [["a", 5]], ["ab"], "x"],
}


OPTIONAL = {
    "revision": [5, None],
    "vae_sha256": ["x", 5, "A" * 64],
    "latents_mean": [[0.0], [0.0, 1.0, float("nan")], ["0", 0.0, 0.0], 0.0],
    "latents_std": [[1.0], [1, 1, 1], {}],
    "condition": [1, -1, True],  # of arrays alone, as those below
    "lengths": [True, 1],
    "normaliser": [
        {"kind": "mean_std", "x": {"offset": [0.0], "scale": [1.0]}},
        {"kind": "min_max", "x": {"offset": [0.0] * 3, "scale": [1.0] * 3}},
        {"kind": "mean_std", "x": {"offset": [0.0] * 3, "scale": [1.0, 0.0, 1.0]}},
        [],
    ],
    "beside_sha256": ["a" * 64, 5],
    "other": [1],
}


@pytest.mark.parametrize("field", OPTIONAL)
def test_an_optional_field_with_a_wrong_value_is_refused(latent_pack, field):
    file = latent_pack / "manifest.json"
    good = json.loads(file.read_text())
    for value in OPTIONAL[field]:
        file.write_text(json.dumps({**good, field: value}))
        with pytest.raises(UserError, match=r"manifest\.json: not the manifest of a pack"):
            packs.read_manifest(latent_pack)


def test_a_manifest_of_the_time_before_the_optional_fields_is_read(latent_pack):
    file = latent_pack / "manifest.json"
    old = {k: v for k, v in json.loads(file.read_text()).items() if k not in OPTIONAL}
    file.write_text(json.dumps(old))
    manifest = packs.read_manifest(latent_pack)
    assert (manifest.revision, manifest.vae_sha256) == ("", "")
    assert json.loads(manifests.write(manifest)) == old


@pytest.mark.parametrize("field", MANIFESTS)
def test_a_manifest_with_a_wrong_field_is_refused(latent_pack, field):
    file = latent_pack / "manifest.json"
    good = json.loads(file.read_text())
    for value in MANIFESTS[field]:
        file.write_text(json.dumps(good | {field: value}))
        with pytest.raises(
            UserError, match=r"manifest\.json: not the manifest of a pack|data\.bin: .* bytes, expected"
        ) as caught:
            packs.Pack(latent_pack, CPU, SEED)
        assert "\n" not in str(caught.value)
    del good[field]
    file.write_text(json.dumps(good))
    with pytest.raises(UserError, match="fields differ"):
        packs.Pack(latent_pack, CPU, SEED)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"pack"', "{}", "[" * 100_000, "\x00\xff", '{"format": 1e999}'])
def test_what_is_no_manifest_at_all_is_refused(latent_pack, text):
    (latent_pack / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="not the manifest of a pack"):
        packs.Pack(latent_pack, CPU, SEED)


def test_data_that_links_elsewhere_is_refused(latent_pack, tmp_path):
    (latent_pack / "data.bin").rename(tmp_path / "elsewhere")
    (latent_pack / "data.bin").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"data\.bin: 0 bytes"):
        packs.Pack(latent_pack, CPU, SEED)
