"""The embedded cats: composed as full-size drawings would be, all different, the held-out ones shared with no training set."""

import importlib.util
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdit.config import UserError
from fastdit.data import cats


@pytest.fixture(scope="module")
def small() -> cats.Cats:
    return cats.Cats(20_000, 32)


def digests(images: np.ndarray) -> set[bytes]:
    return {sha256(image.tobytes()).digest() for image in images}


@pytest.mark.parametrize("size", [32, 64])
def test_layers_are_composed_as_in_fp64_from_the_full_drawings(size):
    """Shrinking first costs at most two of 255 levels against fp64 sums of the same premultiplied 1024² layers."""
    root = Path(importlib.util.find_spec("robohash").submodule_search_locations[0], "sets", "set4")
    folders = sorted(root.glob("0*"))
    some = cats.Cats(6, size)
    for parts, image in zip(some.cats, some.images(0, 6), strict=True):
        truth = np.full((size, size, 3), 255.0)
        for folder, n in zip(folders, parts, strict=True):
            layer = np.asarray(Image.open(next(folder.glob(f"{n:03d}#*"))).convert("RGBA")).astype(np.float64)
            layer[..., :3] *= layer[..., 3:] / 255
            layer = layer.reshape(size, 1024 // size, size, 1024 // size, 4).mean(axis=(1, 3))
            truth = layer[..., :3] + truth * (1 - layer[..., 3:] / 255)
        assert np.abs(image - truth).max() <= 2


def test_twenty_thousand_differ_in_their_pixels(small):
    images = small.images(0, 20_000)
    assert images.shape == (20_000, 32, 32, 3)
    assert len(digests(images)) == 20_000
    assert np.bincount(small.labels(0, 20_000), minlength=15).min() > 1_000


def test_the_same_cats_every_time_and_fewer_are_the_first_of_more(small):
    np.testing.assert_array_equal(cats.Cats(300, 32, threads=2).images(0, 300), small.images(0, 300))
    np.testing.assert_array_equal(small.images(150, 153), small.images(0, 300)[150:153])


def test_no_look_and_no_picture_of_any_cat_is_on_both_sides():
    """All 324,000 combinations are composed."""
    sides = []
    for held_out in (False, True):
        side = cats.Cats(1, 32, held_out)
        rest = cats.Cats.__new__(cats.Cats)
        rest.layers, rest.cats = side.layers, cats.combinations(held_out)
        seen: set[bytes] = set()
        for start in range(0, len(rest.cats), cats.CHUNK):
            seen |= digests(rest.images(start, start + cats.CHUNK))
        sides.append((seen, {tuple(row) for row in rest.cats[:, [0, 1, 2, 4]].tolist()}, len(rest.cats)))
    (pictures, looks, num), (held_pictures, held_looks, held_num) = sides
    assert num + held_num == 324_000
    assert not pictures & held_pictures
    assert not looks & held_looks
    assert len(pictures) > 250_000
    assert len(held_pictures) > 35_000


def test_a_label_is_the_colour_one_sees(small):
    """The median colour of the forehead of cats is nearest the one its label's name says."""
    named = {
        **{"green": (160, 220, 80), "charcoal": (85, 85, 85), "pink": (240, 100, 150), "blue": (125, 175, 245)},
        **{"cream": (250, 245, 205), "maroon": (130, 60, 70), "red": (245, 100, 90), "brown": (130, 90, 70)},
        **{"yellow": (255, 220, 90), "orange": (255, 160, 70)},
    }
    labels, images = np.array(small.labels(0, 3_000)), small.images(0, 3_000)
    for name in named:
        seen = np.median(images[labels == cats.COLOURS.index(name), 6:9, 15:20].reshape(-1, 3), axis=0)
        assert min(named, key=lambda n: np.linalg.norm(np.array(named[n]) - seen)) == name


def test_more_cats_than_there_are_is_an_error():
    with pytest.raises(UserError, match=r"--data.num_images 50000: there are \d+ distinct cats"):
        cats.Cats(50_000, 32, held_out=True)


def test_no_code_of_robohash_runs(small):
    assert "robohash" not in sys.modules
