"""How close pictures are to real ones, by features and by pixels, without a download.

No figure here is comparable with a published FID or KID, which read Inception's features of thousands of images. One figure
alone misleads: a network that repeats fifteen training images has a better KID than most that were trained. So there are four:
KID of the features, sliced-Wasserstein distance of the pixels, coverage, and the distance to the nearest training image. Each
stands beside the floor, which is what real held-out images get.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastdit.quality import features
from fastdit.quality.features import Network, shrink
from fastdit.runtime.rng import generator

DIRECTIONS = 512  # that pixels are projected on
NEIGHBOURS = 5  # arXiv 2002.09797
BLOCK = 1024  # rows of a matrix of distances held at once


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
    distances = []
    for part in x.flatten(1).split(BLOCK):
        part = part.float()
        best, where = torch.full((len(part),), torch.inf, device=x.device), torch.zeros(len(part), dtype=torch.long)
        where = where.to(x.device)
        for start in range(0, len(many), BLOCK):
            block = many[start : start + BLOCK].float()
            distance, index = (block.square().sum(1) - 2 * part @ block.T).min(1)
            where = torch.where(distance < best, index + start, where)
            best = torch.minimum(distance, best)
        # Recompute the smallest distance: the difference of squares above loses its digits.
        distances.append((part - many[where].float()).square().mean(1).sqrt())
    return torch.cat(distances)


class Scores(NamedTuple):
    """The figures of a set of pictures."""

    kid: float
    swd: float
    coverage: float
    nearest: float | None  # the median; None where the real images are the training images themselves


class Judge:
    """Scores pictures against `real` images; `others`, as many and as real, give the floor. All uint8 [n, C, H, W].

    training: the images trained on, shrunk. held_out: whether real and others are none of them. against: what they are.
    """

    def __init__(
        self,
        real: Tensor,
        others: Tensor,
        training: Tensor,
        *,
        held_out: bool,
        against: str = "",
        device: torch.device | str = "cpu",
        network: Network | None = None,
    ):
        self.against, self.device = against, torch.device(device)
        self.network = network or features.load_network(self.device)
        self.features = features.features(self.network, real, self.device)
        self.pixels = shrink(real).to(self.device)
        self.training = shrink(training).to(self.device)
        self.num = len(real)
        floor = self.score(others)
        self.floor = floor if held_out else floor._replace(nearest=None)

    def score(self, pictures: Tensor) -> Scores:
        """The figures of the first `num` pictures: coverage and sliced-Wasserstein distance depend on how many there are."""
        pictures = pictures[: self.num]
        vectors, pixels = features.features(self.network, pictures, self.device), shrink(pictures).to(self.device)
        return Scores(
            kid(vectors, self.features),
            sliced_wasserstein(pixels, self.pixels),
            coverage(vectors, self.features),
            nearest(pixels, self.training).median().item(),
        )
