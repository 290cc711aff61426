"""Pictures as files, and arrays with a picture of them: PNGs and grids, written aside so that no reader sees half of one."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid

from fastdit.config import plain
from fastdit.runtime.files import atomic
from fastdit.runtime.tensors import save_weights

PADDING = 2  # pixels between the pictures of a grid
CAPTIONED = 72  # pixels that a captioned picture is wide at least, so that a class's name fits below it
CAPTION = 14  # rows of a caption

CURVES = 8  # channels drawn as curves at most; more become a map, a row each
ROWS, COLUMNS = 64, 96  # of a picture of curves
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")


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


# --- arrays ---


def save(made: Tensor, path: Path, captions: Sequence[str] = (), beside: Mapping[str, Tensor] | None = None) -> Path:
    """Keep what sampling made: pictures as one grid at `path`, arrays as safetensors, `x` and what is beside it, with a plot.

    Returns the file that holds all of it.
    """
    if made.dtype == torch.uint8:
        save_grid(made, path, captions)
        return path
    save_grid(draw(made), path, captions)
    file = path.with_suffix(".safetensors")
    save_weights(file, {"x": made, **{name: part.contiguous() for name, part in (beside or {}).items()}})
    return file


def draw(x: Tensor) -> Tensor:
    """x [n, C, *size] on the CPU as uint8 [n, 3, rows, columns]: every channel on one scale over all n."""
    x = x.float().nan_to_num(0, 0, 0)
    rest = [0, *range(2, x.ndim)]
    low, high = x.amin(rest, keepdim=True), x.amax(rest, keepdim=True)
    unit = (x - low) / (high - low).clamp(min=1e-12)
    if x.ndim == 3 and x.shape[1] <= CURVES:
        return torch.stack([_curves(sample) for sample in unit])
    if x.ndim == 3:  # [n, C, L]: the first channel is the lowest row
        unit = unit.flip(1).unsqueeze(1)
    elif x.ndim == 5:
        unit = unit.movedim(2, 3).flatten(3)  # [n, C, rows, frames·columns]
    colours = unit if unit.shape[1] == 3 else unit[:, :1].expand(-1, 3, -1, -1)
    return (colours * 255).round().byte()


def _curves(sample: Tensor) -> Tensor:
    """[C, L] of 0 … 1 → uint8 [3, ROWS, COLUMNS]"""
    picture = Image.new("RGB", (COLUMNS, ROWS), "white")
    pen = ImageDraw.Draw(picture)
    last = max(sample.shape[1] - 1, 1)
    for channel, colour in zip(sample.tolist(), COLOURS, strict=False):
        points = [(2 + i / last * (COLUMNS - 5), (ROWS - 3) - value * (ROWS - 6)) for i, value in enumerate(channel)]
        pen.line(points if len(points) > 1 else points * 2, fill=colour, width=1)
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(ROWS, COLUMNS, 3).permute(2, 0, 1)
