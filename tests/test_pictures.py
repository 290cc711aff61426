"""Grids hold what they are given, in colour and in grey."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastdit import pictures


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_holds_every_picture_in_order(tmp_path, channels):
    images = torch.randint(0, 256, (7, channels, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pictures.save_grid(images, tmp_path / "new" / "grid.png")
    with Image.open(tmp_path / "new" / "grid.png") as grid:
        for i, image in enumerate(images):
            row, column = divmod(i, 3)
            box = (2 + column * 8, 2 + row * 6, 8 + column * 8, 6 + row * 6)
            assert grid.crop(box).tobytes() == image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy().tobytes()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["grid.png"]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_a_single_picture_keeps_its_channels(tmp_path, channels, mode):
    image = torch.arange(channels * 20, dtype=torch.uint8).view(channels, 4, 5)
    pictures.save_png(image, tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as found:
        assert (found.mode, found.size) == (mode, (5, 4))
        assert found.tobytes() == image.permute(1, 2, 0).contiguous().numpy().tobytes()


def test_a_caption_stays_in_its_cell_and_on_one_line(tmp_path):
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    pictures.save_grid(images, tmp_path / "a.png", ["a very long name of a class\nand \x1b[31m more" * 3, ""])
    with Image.open(tmp_path / "a.png") as grid:
        assert grid.size == (72 + 4, 2 * (72 + 14 + 2) + 2)
        second = grid.crop((0, 2 + 72 + 14 + 2 + 72, 76, 2 * (72 + 14 + 2))).convert("L")
        assert second.getextrema() == (255, 255)


def test_arrays_are_drawn_as_curves_maps_and_frames(tmp_path):
    rng = torch.Generator().manual_seed(0)
    curves = pictures.draw(torch.randn(3, 4, 16, generator=rng))
    assert (curves.shape, curves.dtype) == ((3, 3, pictures.ROWS, pictures.COLUMNS), torch.uint8)
    assert all((picture != 255).any() for picture in curves)
    bands = torch.arange(20.0).view(1, 20, 1) + torch.arange(6.0)
    drawn = pictures.draw(torch.cat([bands, bands * 0]))  # every band from 0 to its own largest
    assert drawn.shape == (2, 3, 20, 6)
    assert (drawn[0, 0, :, -1] == 255).all()
    assert not drawn[1].any()
    clip = torch.rand(2, 3, 5, 4, 6, generator=rng)
    frames = pictures.draw(clip).unflatten(3, (5, 6)).movedim(3, 2)
    least, most = clip.amin((0, 2, 3, 4), keepdim=True), clip.amax((0, 2, 3, 4), keepdim=True)
    assert (frames.float() / 255 - (clip - least) / (most - least)).abs().max() <= 0.5 / 255 + 1e-6
    assert pictures.draw(torch.full((1, 1, 1), torch.nan)).shape == (1, 3, pictures.ROWS, pictures.COLUMNS)

    kept = pictures.save(clip, tmp_path / "clip.png", beside={"length": torch.tensor([5, 2])})
    assert kept == tmp_path / "clip.safetensors"
    assert torch.equal(load_file(kept)["x"], clip)
    assert load_file(kept)["length"].tolist() == [5, 2]
    assert (tmp_path / "clip.png").is_file()
