"""Charts: what is drawn is where it should be, the document is whole, and no name can break out of it."""

import math
import re
from xml.etree import ElementTree

import pytest

from fastdit.quality import charts
from fastdit.quality.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Line

NAMESPACE = "{http://www.w3.org/2000/svg}"


def drawn(svg: str) -> list[list[tuple[float, float]]]:
    """The polylines' points."""
    lines = ElementTree.fromstring(svg).iter(f"{NAMESPACE}polyline")
    return [[tuple(map(float, p.split(","))) for p in line.get("points").split()] for line in lines]


def test_points_lie_where_their_values_are():
    [line] = drawn(charts.svg([Chart("loss", [Line("loss", [(0, 10.0), (50, 20.0), (100, 30.0)])])]))
    assert [x for x, _ in line] == pytest.approx([LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT], abs=0.06)
    assert [y for _, y in line] == pytest.approx([HEIGHT - BOTTOM, (TOP + HEIGHT - BOTTOM) / 2, TOP], abs=0.06)


def test_a_logarithmic_axis_has_equal_ratios_at_equal_distances():
    [line] = drawn(charts.svg([Chart("loss", [Line("loss", [(1, 0.1), (2, 1.0), (3, 10.0)])], logarithmic=True)]))
    (_, a), (_, b), (_, c) = line
    assert a - b == pytest.approx(b - c, abs=0.15)
    assert a > b > c
    [flat] = drawn(charts.svg([Chart("loss", [Line("loss", [(1, 0.0), (2, 1.0)])], logarithmic=True)]))  # 0 has no logarithm
    assert all(math.isfinite(y) for _, y in flat)


@pytest.mark.parametrize("values", [[3.0], [2.0, 2.0], [0.0, 0.0], [-1e-9, 1e9], [1e-12, 2e-12], [-5.0, -2.0]])
@pytest.mark.parametrize("logarithmic", [False, True])
def test_any_values_stay_inside(values, logarithmic):
    points = [(i * 1000, v) for i, v in enumerate(values)]
    [line] = drawn(charts.svg([Chart("x", [Line("x", points)], logarithmic)]))
    assert all(LEFT - 0.1 <= x <= WIDTH - RIGHT + 0.1 and TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1 for x, y in line)


def test_what_is_no_number_is_left_out_and_long_lines_are_averaged():
    nan = [(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0)]
    assert charts.thin(nan) == [(0, 1.0), (3, 2.0)]
    long = [(float(i), float(i % 2)) for i in range(10 * charts.POINTS)]
    thinned = charts.thin(long)
    assert len(thinned) == charts.POINTS
    assert all(y == 0.5 for _, y in thinned)
    assert drawn(charts.svg([Chart("none", [Line("none", [(1, math.nan)])])])) == []


def test_names_cannot_break_out():
    evil = '</text><script>alert(1)</script>"&'
    svg = charts.svg([Chart(evil, [Line(evil, [(0, 1), (1, 2)]), Line("b", [(0, 2), (1, 1)])], x_name=evil)])
    root = ElementTree.fromstring(svg)
    assert not list(root.iter(f"{NAMESPACE}script"))
    assert [t.text for t in root.iter(f"{NAMESPACE}text")].count(evil) == 3


def test_charts_without_points_take_no_room():
    one = Chart("a", [Line("a", [(0, 1), (1, 2)])])
    empty = Chart("b", [Line("b", [])])
    assert charts.svg([empty, one]) == charts.svg([one])
    root = ElementTree.fromstring(charts.svg([one] * 5))
    assert (root.get("width"), root.get("height")) == (str(2 * WIDTH), str(3 * HEIGHT))
    assert ElementTree.fromstring(charts.svg([])) is not None


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.13, 0.19), (-3, 1e6), (1e-8, 5e-8), (0, 60_000)])
def test_ticks_are_round_and_few_and_enclose(low, high):
    found = charts.ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 8
    step = found[1] - found[0]
    assert re.fullmatch(r"[125](\.0*)?e[+-]\d+", f"{step:.6e}")


@pytest.mark.parametrize(("low", "high"), [(0.013, 0.9), (1, 1), (2e-5, 3e4), (0.2, 0.5)])
def test_decades_enclose(low, high):
    found = charts.decades(low, high)
    assert found[0] <= low * (1 + 1e-9)
    assert found[-1] >= high * (1 - 1e-9)


def test_numbers_are_short():
    assert [charts.number(x) for x in (0, 250_000, 1_500_000, 0.02, 12, 2e9)] == ["0", "250k", "1.5M", "0.02", "12", "2G"]
