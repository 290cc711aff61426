"""Grids hold what they are given, in colour and in grey."""

import pytest
import torch
from PIL import Image

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
