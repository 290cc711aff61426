"""What an op accepts, and the one line it says otherwise."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["MAX_WIDTH", "STREAM_DTYPES", "require"]

STREAM_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_WIDTH = 8192  # a row lives in one program's registers

Layout = Literal["contiguous", "unit last stride"]


def require(
    op: str,
    name: str,
    tensor: Tensor,
    dims: str,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    layout: Layout = "contiguous",
) -> None:
    """Raise ValueError unless tensor has this shape, one of these dtypes, this device and this layout.

    `dims` names the expected shape as the op's docstring does, such as "[B, T, D]". "unit last stride" leaves every other
    stride free, so that a view of a packed projection needs no copy.
    """
    laid_out = tensor.is_contiguous() if layout == "contiguous" else tensor.shape[-1:] == (1,) or tensor.stride()[-1:] == (1,)
    if (
        tuple(tensor.shape) == tuple(shape)
        and tensor.dtype in dtypes
        and tensor.device == device
        and (laid_out or tensor.numel() == 0)
    ):
        return
    was, *allowed = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, *dtypes))
    raise ValueError(
        f"{op}: {name} has shape {list(tensor.shape)}, strides {list(tensor.stride())}, {was} on {tensor.device};"
        f" expected {dims} = {list(shape)}, {layout}, {' or '.join(allowed)} on {device}"
    )


def require_stream(op: str, name: str, tensor: Tensor, dims: str) -> None:
    """Raise ValueError unless tensor is a contiguous stream of three dimensions whose last is between 1 and MAX_WIDTH wide."""
    if tensor.ndim != 3 or not 1 <= tensor.shape[-1] <= MAX_WIDTH:
        width = dims.strip("[]").split(", ")[-1]
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, expected {dims} with {width} from 1 to {MAX_WIDTH}")
    require(op, name, tensor, dims, tensor.shape, STREAM_DTYPES, tensor.device)
