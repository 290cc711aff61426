"""The normaliser: against NumPy in fp64, both ways, added up in parts, and files that lie refused."""

import json

import numpy as np
import pytest
import torch

from fastdit.config import UserError
from fastdit.data.normaliser import FILE, Affine, Moments, Normaliser


def channels(num: int = 1000) -> torch.Tensor:
    """[num, 4]: a plain channel, one far from 0, one tiny, one that never changes."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(num, 4, generator=g, dtype=torch.float64)
    return x * torch.tensor([2.0, 1.0, 1e-9, 0.0]) + torch.tensor([0.5, 1e6, 0.0, -3.0])


def moments(x: torch.Tensor, cuts: list[int]) -> Moments:
    found = None
    for part in torch.tensor_split(x, cuts):
        found = Moments.of(part) if found is None else found.plus(Moments.of(part))
        found = Moments.from_list(json.loads(json.dumps(found.to_list())))  # as it goes through a chunk's file
    assert found is not None
    return found


@pytest.mark.parametrize("cuts", [[], [1], [1, 500, 999]])
def test_mean_and_deviation_are_those_of_the_whole(cuts):
    x = channels()
    offset, scale = moments(x, cuts).affine("mean_std")
    np.testing.assert_allclose(offset, x.numpy().mean(0), rtol=1e-12, atol=1e-24)
    np.testing.assert_allclose(scale[:3], x.numpy().std(0)[:3], rtol=1e-9)
    assert scale[3] == 1.0


def test_min_max_reaches_from_minus_one_to_one():
    x = channels()
    affine = moments(x, [10]).affine("min_max")
    found = affine.normalise(x)
    torch.testing.assert_close(found.amin(0), torch.tensor([-1.0, -1.0, -1.0, 0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.amax(0), torch.tensor([1.0, 1.0, 1.0, 0.0]), atol=1e-6, rtol=0)


def test_physical_units_come_back():
    affine = Affine((0.5, -3.0), (2.0, 0.125))
    x = torch.randn(5, 2, 7, 3)
    stored = affine.normalise(x)
    torch.testing.assert_close(stored[:, 1], (x[:, 1] + 3.0) / 0.125)
    torch.testing.assert_close(affine.physical(stored), x)
    with pytest.raises(UserError, match=r"^an array of 5×3; the normaliser is for \[B, 2, …\]$"):
        affine.normalise(torch.zeros(5, 3))


def test_it_is_kept_beside_weights(tmp_path):
    assert Normaliser.read(tmp_path) is None
    for normaliser in (
        Normaliser("min_max", Affine((0.1,), (0.2,))),
        Normaliser("mean_std", Affine((1.0, 2.0), (3.0, 4.0)), Affine((5.0,), (6.0,))),
    ):
        normaliser.write(tmp_path)
        assert Normaliser.read(tmp_path) == normaliser


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 100_000,
        '{"kind": "mean_std"}',
        '{"kind": "other", "x": {"offset": [0], "scale": [1]}}',
        '{"kind": "mean_std", "x": {"offset": [0], "scale": [0]}}',
        '{"kind": "mean_std", "x": {"offset": [0], "scale": [1, 1]}}',
        '{"kind": "mean_std", "x": {"offset": [NaN], "scale": [1]}}',
        '{"kind": "mean_std", "x": {"offset": [true], "scale": [1]}}',
        '{"kind": "mean_std", "x": {"offset": [0], "scale": [1]}, "condition": 3}',
        '{"kind": "mean_std", "x": {"offset": [0], "scale": [1]}, "more": {}}',
    ],
)
def test_a_file_that_lies_is_one_line(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError, match=r"normaliser\.json: not a normaliser \(") as error:
        Normaliser.read(tmp_path)
    assert "\n" not in str(error.value)
