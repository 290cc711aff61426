"""Images read by number, wherever they come from: each is uint8 RGB of one size with a label, or has a reason why it is not.

A source yields rows, which are not decoded yet; `ImageSource` decodes them on threads.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from fastdit.data.decode import Pixels, decode, file_bytes, fit

MAX_CLASSES = 1 << 20  # a label above is taken for something else than a class


class Example(NamedTuple):
    """One image of a source, or the reason why there is none."""

    number: int
    name: str  # where it came from, for reports
    image: Pixels | None  # uint8 [H, W, 3]
    label: int | None
    reason: str = ""


class Row(NamedTuple):
    """One image before it is decoded: finished pixels, a picture, an encoded one, the file of one, or why there is none."""

    name: str
    content: Pixels | Image.Image | bytes | Path | str
    label: int | None


@dataclass(frozen=True)
class ImageSource:
    """Images 0 … length - 1, read in any order by any number of ranks."""

    name: str  # what it is, for reports and the pack's manifest
    length: int
    image_size: tuple[int, int]  # rows and columns every image gets
    labelled: bool
    class_names: tuple[str, ...]  # empty where unlabelled, or where classes are known by number only
    rows: Callable[[int, int], Iterator[Row]]
    threads: int = 1  # that decode
    crop: str = "none"  # how an image gets its size: see decode.fit
    revision: str = ""  # the commit of a hub dataset

    def read(self, start: int, stop: int) -> Iterator[Example]:
        """Images start … stop - 1 in order, decoded ahead by the threads."""
        pending: deque[Future[Example]] = deque()
        with ThreadPoolExecutor(self.threads) as pool:
            for number, row in enumerate(self.rows(start, stop), start):
                pending.append(pool.submit(self._example, number, row))
                if len(pending) > 4 * self.threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def _example(self, number: int, row: Row) -> Example:
        content, label = row.content, row.label
        if isinstance(content, str):
            return Example(number, row.name, None, None, content)
        if self.labelled and (label is None or not 0 <= label < (len(self.class_names) or MAX_CLASSES)):
            return Example(number, row.name, None, None, f"label {label} is not a class")
        try:
            if isinstance(content, Path):
                content = file_bytes(content)
            if isinstance(content, bytes):
                content = decode(content)
            if isinstance(content, Image.Image):
                content = fit(content, self.image_size, self.crop, number)
        except (ValueError, OSError) as error:
            return Example(number, row.name, None, None, str(error))
        return Example(number, row.name, content, label if self.labelled else None)
