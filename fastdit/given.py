"""What the network is told of each sample beside x and t: its class, a condition, its length. Each may be absent."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdit.config import ModelConfig, UserError


class Given(NamedTuple):
    """Of B samples."""

    y: Tensor | None = None  # int64 [B], the classes; number num_classes is the null class
    condition: Tensor | None = None  # fp32 [B, K]; a row of NaN is the null condition
    length: Tensor | None = None  # int64 [B], along the first axis of x; what is beyond is padding

    @staticmethod
    def of(given: "Given | Tensor | None") -> "Given":
        """Labels alone, as most callers have them, or all of it."""
        return given if isinstance(given, Given) else Given(given)

    @property
    def beside(self) -> dict[str, Tensor]:
        """What is there beside classes, by the network's names for it."""
        return {name: part for name, part in self._asdict().items() if name != "y" and part is not None}

    def each(self, function: Callable[[Tensor], Tensor]) -> "Given":
        """The function of each part that is there."""
        return Given(*(None if part is None else function(part) for part in self))

    def some(self, start: int, count: int) -> "Given":
        """Samples start … start + count - 1."""
        return self.each(lambda part: part[start : start + count])

    def null(self, num_classes: int) -> "Given":
        """The same samples without class and condition."""
        return self._replace(
            y=None if self.y is None else torch.full_like(self.y, num_classes),
            condition=None if self.condition is None else torch.full_like(self.condition, torch.nan),
        )

    def twice(self, num_classes: int) -> "Given":
        """Of 2·B samples: these, then the same without class and condition."""
        pairs = zip(self, self.null(num_classes), strict=True)
        return Given(*(None if a is None or b is None else torch.cat([a, b]) for a, b in pairs))

    def told(self, num_classes: int) -> Tensor | None:
        """Which samples have their class or condition, bool [B]; None where there is neither."""
        if self.y is not None:
            return self.y != num_classes
        return None if self.condition is None else ~self.condition.isnan().any(1)


def asked(config: ModelConfig, num: int, y: Tensor | None, condition: Any = None, length: Any = None) -> Given:
    """What a user asks of `num` samples: one condition [K] and one length for all, or one of each a sample. Raises UserError.

    A model with a null condition takes that one where none is asked for.
    """
    if condition is not None:
        condition = torch.as_tensor(condition, dtype=torch.float32, device="cpu")
        condition = condition.expand(num, -1) if condition.ndim == 1 or condition.shape[:1] == (1,) else condition
    elif config.condition and config.class_dropout:
        condition = torch.full((num, config.condition), torch.nan)
    if length is not None:
        length = torch.as_tensor(length, dtype=torch.int64, device="cpu")
        length = length.expand(num) if length.numel() == 1 else length
    given = Given(y, condition, length)
    check(given, config, num)
    return given


def check(given: Given, config: ModelConfig, count: int) -> None:
    """Raise UserError where what a user gave for `count` samples is not what the model takes. Waits for the device."""
    y, condition, length = given
    if (y is None) == (config.num_classes > 0):
        raise UserError(f"the model has {config.num_classes} classes, and {'none is' if y is None else 'classes are'} given")
    if condition is None and config.condition:
        raise UserError(f"the model needs a condition of {config.condition} numbers for each sample")
    if condition is not None:
        if condition.ndim != 2 or condition.shape != (count, config.condition):
            shape = "×".join(map(str, condition.shape))
            raise UserError(f"conditions of {shape} numbers; the model takes {count}×{config.condition} for {count} samples")
        null = condition.isnan().any(1)
        if condition.isinf().any() or (null.any() and not config.class_dropout):
            raise UserError("a condition holds numbers that are not finite")
    if length is not None:
        most = config.input_size[0]
        if length.shape != (count,) or length.min() < 1 or length.max() > most:
            raise UserError(f"lengths of {length.tolist()[:8]}; expected {count}, each from 1 to {most}")
