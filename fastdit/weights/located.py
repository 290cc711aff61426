"""What is known of a model's weights once they are found: where they lie, and what goes with them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fastdit.config import Config
from fastdit.data.normaliser import Normaliser


class Located(NamedTuple):
    """A model's weights, and what is known of them."""

    weights: Path  # safetensors
    config: Config  # of the run that trained them
    home: Path  # where what is made of them goes: the run's folder, or the folder of the file
    images_seen: int | None  # None where no checkpoint says
    class_names: Sequence[str] = ()  # of classes 0, 1, …; empty: without classes, or not known
    latents_by: str = ""  # beginning of the SHA-256 of the autoencoder that made its latents; empty: none, or not known
    normaliser: Normaliser | None = None  # of a model of arrays, or of latents normalised per channel: to their units and back
