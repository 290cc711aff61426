"""FID, KID, precision and recall on Inception's features, as published: by torch-fidelity, which downloads the network once."""

import importlib.util
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastdit.config import UserError
from fastdit.data.images import ImageSource

# Ours, and torch-fidelity's. The KID has a name of its own, so that nobody compares it with the offline metric's.
NAMES = {
    "fid": "frechet_inception_distance",
    "inception_kid": "kernel_inception_distance_mean",
    "precision": "precision",
    "recall": "recall",
}


def require() -> None:
    """Raise UserError, one line, where torch-fidelity is not installed."""
    if importlib.util.find_spec("torch_fidelity") is None:
        raise UserError("FID, KID, precision and recall need torch-fidelity: pip install 'fastdit[eval]', or --metric offline")


class Real(Dataset[Tensor]):
    """Images of a source, chosen by a list of numbers. In place of an image that cannot be decoded it gives the next one."""

    def __init__(self, source: ImageSource, numbers: Sequence[int]):
        self.source, self.numbers = source, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> Tensor:
        if not 0 <= place < len(self):
            raise IndexError(place)
        for step in range(self.source.length):
            n = (self.numbers[place] + step) % self.source.length
            for example in self.source.read(n, n + 1):
                if example.image is not None:
                    return torch.from_numpy(example.image).permute(2, 0, 1)
        raise UserError(f"{self.source.name}: no image of it can be decoded")

    def __getitems__(self, places: list[int]) -> list[Tensor]:
        """A batch, decoded by all cores."""
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            return list(pool.map(self.__getitem__, places))


def fidelity(made: Dataset[Tensor], real: Dataset[Tensor], device: torch.device, batch: int) -> dict[str, float]:
    """The figures of uint8 images [3, H, W] made against real ones. Raises UserError, one line.

    Precision and recall on Inception's features too, as the ADM suite has them; torch-fidelity alone would take VGG's.
    """
    from torch_fidelity import calculate_metrics

    sizes = [len(made), len(real)]  # type: ignore[arg-type]
    try:
        values: dict[str, Any] = calculate_metrics(
            input1=made,
            input2=real,
            cuda=device.type == "cuda",
            batch_size=batch,
            fid=True,
            kid=True,
            prc=True,
            feature_extractor="inception-v3-compat",
            kid_subset_size=min(1000, *sizes),
            save_cpu_ram=True,  # no matrix of all distances: for 50,000 pictures there would be three of 10 GB each
            cache=False,
            verbose=False,
        )
    except (OSError, AssertionError, ValueError) as error:  # of the download, and of what it is given
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"torch-fidelity: {reason}; --metric offline needs no download") from None
    return {ours: float(values[theirs]) for ours, theirs in NAMES.items()}
