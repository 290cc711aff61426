"""A dataset of one's own: what its items may be, and that its pack holds them and trains."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from fastdit.config import UserError, replace
from fastdit.data import encoding, own
from fastdit.data import pack as packs
from fastdit.recipes import RECIPES
from fastdit.runtime.ranks import World
from fastdit.runtime.validation import validate

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
PIXELS = np.random.default_rng(0).integers(0, 256, (10, 16, 16, 3), dtype=np.uint8)


class Pictures(Dataset):
    """Ten pictures in three classes, as whatever `change` makes of an array."""

    def __init__(self, change=Image.fromarray, label=int):
        self.change, self.label = change, label

    def __len__(self) -> int:
        return 10

    def __getitem__(self, n: int):
        return self.change(PIXELS[n]), self.label(n % 3)


IMAGES = {
    "Pillow": Image.fromarray,
    "array": lambda pixels: pixels,
    "strided array": lambda pixels: pixels[:, ::-1].copy()[:, ::-1],
    "tensor": lambda pixels: torch.from_numpy(pixels).permute(2, 0, 1),
    "tensor of ToTensor": lambda pixels: torch.from_numpy(pixels).permute(2, 0, 1) / 255,
    "array of floats": lambda pixels: pixels / 255,
    "opaque": lambda pixels: np.dstack([pixels, np.full((16, 16), 255, np.uint8)]),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_images_of_any_kind_are_packed_as_they_are(tmp_path, kind):
    path = encoding.pack_dataset(Pictures(IMAGES[kind]), tmp_path / "mine", image_size=(16, 16))
    assert path == tmp_path / "mine"
    manifest = packs.verify(path)
    assert (manifest.count, manifest.num_classes, manifest.class_names, manifest.skipped) == (10, 3, [], [])
    labels = np.array([n % 3 for n in range(10)], np.int64)
    assert (path / "data.bin").read_bytes() == PIXELS.transpose(0, 3, 1, 2).tobytes() + labels.tobytes()
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("kind", ["[H, W]", "[1, H, W]", "[H, W, 1]", "bf16 from 0 to 1"])
def test_grey_images_have_one_channel(tmp_path, kind):
    change = {
        "[H, W]": lambda pixels: pixels[..., 0],
        "[1, H, W]": lambda pixels: torch.from_numpy(pixels[..., :1]).permute(2, 0, 1),
        "[H, W, 1]": lambda pixels: pixels[..., :1],
        "bf16 from 0 to 1": lambda pixels: (torch.from_numpy(pixels[..., 0] >> 7)).bfloat16(),
    }[kind]
    manifest = packs.verify(encoding.pack_dataset(Pictures(change), tmp_path / "mine", image_size=(16, 16)))
    assert manifest.shape == [1, 16, 16]
    truth = PIXELS[..., 0] // 128 * 255 if kind.startswith("bf16") else PIXELS[..., 0]
    assert (tmp_path / "mine" / "data.bin").read_bytes()[: truth.size] == truth.tobytes()


@pytest.mark.parametrize("label", [int, np.int64, torch.tensor, lambda n: np.array(n), lambda n: "abc"[n]])
def test_labels_are_whole_numbers_or_names(tmp_path, label):
    path = encoding.pack_dataset(Pictures(label=label), tmp_path / "mine", (16, 16), class_names=["a", "b", "c"])
    assert packs.verify(path).class_names == ["a", "b", "c"]
    pack = packs.Pack(path, ALONE.device, 0)
    assert pack.labels.tolist() == [n % 3 for n in range(10)]


def test_a_datasets_own_classes_are_kept(tmp_path):
    dataset = Pictures()
    dataset.classes = ["bag", "coat", "dress"]
    assert packs.read_manifest(encoding.pack_dataset(dataset, tmp_path / "mine")).class_names == ["bag", "coat", "dress"]


def test_images_alone_have_no_labels(tmp_path):
    class Alone(Pictures):
        def __getitem__(self, n: int):
            return super().__getitem__(n)[0]

    for n, dataset in enumerate([Alone(), TensorDataset(torch.from_numpy(PIXELS).permute(0, 3, 1, 2))]):
        if n:  # a tuple of one part is neither
            with pytest.raises(UserError, match="TensorDataset has 1 parts; it must be an image, or an image and its label"):
                encoding.pack_dataset(dataset, tmp_path / str(n))
        else:
            assert not packs.read_manifest(encoding.pack_dataset(dataset, tmp_path / str(n))).labelled


def test_images_are_cropped(tmp_path):
    wide = Pictures(lambda pixels: np.hstack([pixels * 0, pixels, pixels * 0]))
    path = encoding.pack_dataset(wide, tmp_path / "mine", image_size=(16, 16))
    assert (path / "data.bin").read_bytes()[: PIXELS.size] == PIXELS.transpose(0, 3, 1, 2).tobytes()


def test_the_pack_is_what_a_run_is_given(tmp_path):
    path = encoding.pack_dataset(Pictures(), tmp_path / "mine", image_size=(32, 32))
    config = replace(RECIPES["cats"], data={"path": str(path)}, model={"num_classes": 3})
    validate(config)
    x0, y, *_ = encoding.open_pack(config, ALONE, lambda line: None).batch(0, 10)
    assert x0.shape == (10, 3, 32, 32)
    assert sorted(y.tolist()) == sorted(n % 3 for n in range(10))


BAD = {
    "no picture": (lambda pixels: "a.png", "a str is no picture"),
    "two channels": (lambda pixels: pixels[..., :2], "an array of 16×16×2 is no picture of 1, 3 or 4 channels"),
    "channels first": (lambda pixels: pixels.transpose(2, 0, 1), "an array of 3×16×16 is no picture of 1, 3 or 4 channels"),
    "normalised": (lambda pixels: pixels / 127.5 - 1, "floating-point pixels from -1 to 1; they must be from 0 to 1"),
    "not finite": (lambda pixels: pixels * np.nan, "floating-point pixels from nan to nan"),
    "whole numbers": (lambda pixels: pixels.astype(np.int64), "pixels of type int64"),
    "empty": (lambda pixels: pixels[:0], "an array of 0×16×3"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_image_is_a_reason(tmp_path, kind):
    change, reason = BAD[kind]
    with pytest.raises(ValueError, match=reason):
        own.as_picture(change(PIXELS[0]))
    with pytest.raises(UserError, match=r"10 of 10 images cannot be used.*'item 0'"):
        encoding.pack_dataset(Pictures(change), tmp_path / "mine")


def test_what_is_no_dataset_is_one_line(tmp_path):
    class Endless(IterableDataset):
        def __iter__(self):
            return iter(PIXELS)

    class Empty(Pictures):
        def __len__(self):
            return 0

    (tmp_path / "there").mkdir()
    for dataset, folder, message in [
        (Endless(), "mine", "Endless has no length"),
        (Empty(), "mine", "Empty is empty"),
        (Pictures(), "there", "there is there already; a pack is made in a new folder"),
        (Pictures(label=str), "mine", "Pictures has the label '0'; it must be a whole number, or one of class_names"),
        (Pictures(label=lambda n: n / 2), "mine", "has a label of type float"),
    ]:
        with pytest.raises(UserError, match=message):
            encoding.pack_dataset(dataset, tmp_path / folder)
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_an_error_of_the_dataset_is_its_own(tmp_path):
    class Broken(Pictures):
        def __getitem__(self, n: int):
            return 1 / 0 if n == 7 else super().__getitem__(n)

    with pytest.raises(ZeroDivisionError):
        encoding.pack_dataset(Broken(), tmp_path / "mine")
    encoding.pack_dataset(Pictures(), tmp_path / "mine")  # nothing of the first try is in the way
    assert packs.verify(tmp_path / "mine").count == 10
