"""A dataset of one's own as a source of images: any torch Dataset of (image, label) pairs, or of images alone."""

import operator
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from fastdit.config import UserError, plain
from fastdit.data.decode import rgb
from fastdit.data.source import ImageSource, Row


class Dataset(Protocol):
    """What is needed of a torch.utils.data.Dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def open_dataset(
    dataset: Dataset, image_size: tuple[int, int], crop: str, class_names: Sequence[str] | None, threads: int
) -> ImageSource:
    """A source whose rows are the dataset's items; its classes' names are those given, else its `classes` (torchvision's).

    Raises UserError where it has no length or no items, or where an item is neither an image nor an image and a label.
    """
    name = plain(type(dataset).__name__)
    try:
        length = len(dataset)
    except TypeError:
        raise UserError(f"{name} has no length; a pack is made of a dataset whose items are numbered") from None
    if not length:
        raise UserError(f"{name} is empty")
    names = tuple(map(str, class_names if class_names is not None else getattr(dataset, "classes", None) or ()))
    labelled = _parts(dataset[0], names, name)[1] is not None

    def rows(start: int, stop: int) -> Iterator[Row]:
        for i in range(start, min(stop, length)):
            image, label = _parts(dataset[i], names, f"item {i} of {name}")
            try:
                yield Row(f"item {i}", as_picture(image), label)
            except ValueError as error:
                yield Row(f"item {i}", plain(error), label)

    return ImageSource(name, length, image_size, labelled, names if labelled else (), rows, threads, crop)


def _parts(item: Any, names: Sequence[str], where: str) -> tuple[Any, int | None]:
    """An item's image, and the number of its class or None where it has none."""
    if not isinstance(item, tuple | list):
        return item, None
    if len(item) != 2:
        raise UserError(f"{where} has {len(item)} parts; it must be an image, or an image and its label")
    image, label = item
    if isinstance(label, str) and label in names:
        return image, names.index(label)
    try:
        return image, operator.index(label)
    except TypeError:
        what = f"the label {label!r}" if isinstance(label, str) else f"a label of type {type(label).__name__}"
        raise UserError(f"{where} has {plain(what, 80)}; it must be a whole number, or one of class_names") from None


def as_picture(image: Any) -> Image.Image:
    """An RGB picture from a Pillow picture, an array or a tensor. Raises ValueError saying why it is none.

    Arrays are [H, W] or [H, W, C], tensors [H, W] or [C, H, W] as in torchvision, with 1, 3 or 4 channels; their values are
    uint8, or floating-point numbers from 0 to 1.
    """
    if isinstance(image, Image.Image):
        return rgb(image)
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image  # NumPy has no bf16
        array = (image.movedim(0, -1) if image.ndim == 3 else image).numpy()
    elif isinstance(image, np.ndarray):
        array = image
    else:
        raise ValueError(f"a {type(image).__name__} is no picture")
    if array.ndim not in (2, 3) or not array.size or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ValueError(f"an array of {'×'.join(map(str, array.shape))} is no picture of 1, 3 or 4 channels")
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):  # NaN too
            raise ValueError(f"floating-point pixels from {array.min():g} to {array.max():g}; they must be from 0 to 1")
        array = np.rint(array.astype(np.float64) * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"pixels of type {array.dtype}; uint8 and floating point from 0 to 1 are packed")
    return rgb(Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else np.ascontiguousarray(array)))
