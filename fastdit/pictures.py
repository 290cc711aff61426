"""Pictures as files: PNGs and grids of them, in colour or grey, written aside first so that no reader sees half of one."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid

from fastdit.config import plain
from fastdit.runtime.files import atomic

PADDING = 2  # pixels between the pictures of a grid
CAPTIONED = 72  # pixels that a captioned picture is wide at least, so that a class's name fits below it
CAPTION = 14  # rows of a caption


def save_grid(images: Tensor, path: Path, captions: Sequence[str] = ()) -> None:
    """Write uint8 [n, C, rows, columns], C 1 or 3, as one PNG, about as wide as high.

    captions: one for each picture, below it; small pictures are then enlarged by a whole factor.
    """
    columns = max(1, round(len(images) ** 0.5))
    if captions:
        factor = -(-CAPTIONED // images.shape[3])
        images = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        images = F.pad(images, (0, 0, 0, CAPTION), value=255)
    grid = picture(make_grid(images, nrow=columns, padding=PADDING, pad_value=255))
    pen = ImageDraw.Draw(grid)
    rows, width = images.shape[2:]
    for i, caption in enumerate(captions):
        row, column = divmod(i, columns)
        text = plain(caption)
        while pen.textlength(text) > width:
            text = text[:-1]
        pen.text((PADDING + column * (width + PADDING), (row + 1) * (rows + PADDING) - CAPTION), text, fill="black")
    _save(grid, path)


def save_png(image: Tensor, path: Path) -> None:
    """Write one picture, uint8 [C, rows, columns], C 1 or 3."""
    _save(picture(image), path)


def picture(image: Tensor) -> Image.Image:
    pixels = image.permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as file:
        image.save(file, format="PNG")
