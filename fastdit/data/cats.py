"""The default recipe's images: drawn cats, composed from the layers that the package `robohash` carries. Class = colour.

The drawings are by David Revoy (CC-BY-4.0); here they are resized and recombined. 15 bodies, 10 furs, 15 eyes, 10 mouths and
16 accessories give 324,000 combinations. Some of them give the same pixels; one of those is kept.
"""

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastdit.config import UserError
from fastdit.runtime import rng

# The fifteen bodies in `robohash`'s order.
COLOURS = (
    *("maroon", "green", "charcoal", "mauve", "red", "sand", "pink", "brown"),
    *("blue", "yellow", "ochre", "grey", "caramel", "cream", "orange"),
)
LAYERS = (15, 10, 15, 10, 16)  # bodies, furs, eyes, mouths, accessories
FURS = (0, 1, 2, 3, 4, 5, 7, 8, 9)  # 2 and 6 are both blank
HELD_OUT = 8  # one look in so many is kept for evaluation
CHUNK = 128  # cats composed at once: their pixels stay in the cache


class Cats:
    """`num` cats of size×size pixels, no two equal; those held out share no picture with those that are not.

    The run's seed does not change which cats there are. A look is a body, fur, eyes and accessory. Whole looks are held out: a
    cat that differs from a training cat by its mouth alone, which a scarf may hide, would not be new.
    """

    def __init__(self, num: int, size: int, held_out: bool = False, threads: int = 1) -> None:
        self.layers = _layers(size, threads)
        self.cats = combinations(held_out)
        seen: set[bytes] = set()
        chosen: list[int] = []
        for start in range(0, len(self.cats), CHUNK):
            for i, image in enumerate(self.images(start, start + CHUNK), start):
                digest = blake2b(image.tobytes(), digest_size=16).digest()
                if digest not in seen:
                    seen.add(digest)
                    chosen.append(i)
            if len(chosen) >= num:
                break
        else:
            raise UserError(f"--data.num_images {num}: there are {len(chosen)} distinct cats of this size")
        self.cats = self.cats[chosen[:num]]

    def images(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Cats start … stop - 1 on white, uint8 [num, size, size, 3]."""
        return _compose(self.layers, self.cats[start:stop])

    def labels(self, start: int, stop: int) -> list[int]:
        """Their colours."""
        return self.cats[start:stop, 0].tolist()


def combinations(held_out: bool) -> NDArray[np.int64]:
    """Every cat of one side of the split, shuffled: body, fur, eyes, mouth, accessory, [num, 5]."""
    bodies, _, eyes, mouths, accessories = LAYERS
    looks = rng.order(0, 0, bodies * len(FURS) * eyes * accessories).numpy()
    kept = len(looks) // HELD_OUT
    looks = looks[:kept] if held_out else looks[kept:]
    order = rng.order(0, 1, len(looks) * mouths).numpy()
    body, fur, eye, accessory = np.unravel_index(looks[order // mouths], (bodies, len(FURS), eyes, accessories))
    return np.stack([body, np.array(FURS)[fur], eye, order % mouths, accessory], axis=1)


def _layers(size: int, threads: int) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Per kind of layer (colour, cover), each [num, size, size, 3]: over a picture p, a layer gives colour + cover·p.

    Colours are multiplied by alpha before they are shrunk; otherwise edges would take on the colour of transparent pixels.
    """
    spec = importlib.util.find_spec("robohash")  # finds the drawings without running the package
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the embedded cats are composed from the package robohash; pip install robohash==2.0")
    root = Path(spec.submodule_search_locations[0]) / "sets" / "set4"
    folders = [sorted(folder.glob("*.png"), key=lambda p: int(p.name[:3])) for folder in sorted(root.glob("0*"))]
    if tuple(map(len, folders)) != LAYERS:
        raise UserError(f"{root} does not hold the drawings of robohash 2.0; pip install robohash==2.0")

    def shrink(path: Path) -> NDArray[np.float32]:
        with Image.open(path, formats=("PNG",)) as layer:
            return np.asarray(layer.convert("RGBA").convert("RGBa").reduce(layer.width // size), np.float32)

    with ThreadPoolExecutor(threads) as pool:
        kinds = [np.stack(list(pool.map(shrink, paths))) for paths in folders]
    return [(np.ascontiguousarray(kind[..., :3]), np.repeat(1 - kind[..., 3:] / 255, 3, axis=-1)) for kind in kinds]


def _compose(layers: list[tuple[NDArray[np.float32], NDArray[np.float32]]], cats: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Layers [num, 5], composed over white in their order → uint8 [num, size, size, 3]."""
    image = np.full((len(cats), *layers[0][0].shape[1:]), 255, np.float32)
    for (colour, cover), choice in zip(layers, cats.T, strict=True):
        image *= cover[choice]
        image += colour[choice]
    return (image + 0.5).astype(np.uint8)
