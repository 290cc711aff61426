"""One encoded picture → RGB pixels of the size that a run trains on.

Every byte is untrusted. A picture is decoded from memory, in a known format and up to a known size, and nothing is executed.
"""

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fastdit.config import plain
from fastdit.runtime import rng

Pixels = NDArray[np.uint8]

MAX_PIXELS = 50_000_000  # of one picture; a PNG of 172 kB can ask for 675 MB
MAX_BYTES = 1 << 29  # of one encoded file
# Not all that Pillow can open: its EPS plugin, for one, runs Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"}

# What a crop does, as a pack's manifest says it.
TRANSFORMS = {
    "none": "upright RGB on white; resized bilinear, antialiased; [0, 255] to [-1, 1]",
    "center": "upright RGB on white; short side resized by halves, then bicubic; centre crop; [0, 255] to [-1, 1]",
    "random": "upright RGB on white; short side resized by halves, then bicubic, to 1 to 1.25 of the crop; "
    "random crop by picture number; [0, 255] to [-1, 1]",
}
LARGEST = 1.25  # short side over the crop's, at most, under "random": the crop shows at least 0.8 of it

# Pillow only warns of a picture of 90 Mpx or more; `decode` refuses it at MAX_PIXELS, before a pixel is decoded.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def decode(data: bytes) -> Image.Image:
    """An upright RGB picture from an encoded file's bytes, transparency on white. Raises ValueError saying why it cannot be."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}×{image.height} pixels; at most {MAX_PIXELS:,} are decoded")
            image.load()
            return rgb(_upright(image))
    except Image.UnidentifiedImageError:
        raise ValueError("empty" if not data else "not an image in a known format") from None
    except Exception as error:  # Pillow's plugins raise almost anything on corrupt bytes
        raise ValueError(plain(" ".join(str(error).split()), 200) or type(error).__name__) from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a picture with broken EXIF is still a picture
        return image


def rgb(image: Image.Image) -> Image.Image:
    """Any Pillow picture as RGB: 16-bit grey rounded to 8 bits, transparency on white. Raises ValueError for other ranges."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"grey values from {grey.min()} to {grey.max()}; 8 and 16 bits are decoded")
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def file_bytes(path: Path) -> bytes:
    """The content of one picture's file. Raises ValueError above MAX_BYTES, or OSError."""
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES:,} bytes")
    return data


def fit(image: Image.Image, size: tuple[int, int], crop: str, number: int) -> Pixels:
    """An RGB picture at `size`, rows and columns → uint8 [H, W, 3]. Raises ValueError for a picture too narrow to crop.

    crop "center": the short side is resized and the middle is kept, as DiT prepares its data (center_crop_arr of ADM,
    arXiv 2105.05233). "random": a window of 0.8 to 1 of the short side, anywhere (random_crop_arr of ADM); which one follows
    from the picture's number alone, so that it is the same in every run and on any number of ranks. "none": all of the
    picture, whatever its aspect ratio.
    """
    if crop == "none":
        return resize(image, size)
    rows, columns = size
    if crop == "center":
        covered = _cover(image, rows, columns)
        top, left = (covered.height - rows) // 2, (covered.width - columns) // 2
    else:
        size_of, down, right = torch.rand(3, generator=rng.generator("cpu", 0, "crop", number)).tolist()
        scale = 1 + (LARGEST - 1) * size_of
        covered = _cover(image, round(rows * scale), round(columns * scale))
        top, left = int(down * (covered.height - rows + 1)), int(right * (covered.width - columns + 1))
    return np.array(covered.crop((left, top, left + columns, top + rows)))


def _cover(image: Image.Image, rows: int, columns: int) -> Image.Image:
    """The picture in its aspect ratio, as small as it can be with at least so many rows and columns."""
    while image.height >= 2 * rows and image.width >= 2 * columns:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(rows / image.height, columns / image.width)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_PIXELS:
        raise ValueError(f"{image.width}×{image.height} pixels are too narrow to be cropped to {columns}×{rows}")
    return image.resize((width, height), Image.Resampling.BICUBIC)


def resize(image: Image.Image, size: tuple[int, int]) -> Pixels:
    """uint8 [H, W, 3] by torchvision's Resize: bilinear, antialiased, the aspect ratio not kept."""
    from torchvision.transforms.v2 import functional  # here: it takes seconds to import, and the embedded cats need none of it

    return np.array(functional.resize(image, list(size), antialias=True))
