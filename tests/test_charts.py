"""Charts: what is shown is where it should be, the document is whole, and no name can break out of it."""

import math
from xml.etree import ElementTree

import pytest

from fastdit.quality import charts
from fastdit.quality.charts import Chart, Line

pytest.importorskip("matplotlib")

NAMESPACE = "{http://www.w3.org/2000/svg}"


def axes_of(*shown: Chart):
    return charts.figure(shown).axes


def test_points_and_bands_lie_where_their_values_are():
    points = [(0, 10.0), (50, 20.0), (100, 30.0)]
    [axes] = axes_of(Chart("loss", [Line("loss", points, band=[(9, 11), (18, 22), (27, 33)]), Line("b", points, dashed=True)]))
    first, second = axes.get_lines()
    assert list(zip(*first.get_data(), strict=True)) == points
    assert (first.get_linestyle(), second.get_linestyle()) == ("-", "--")
    [band] = axes.collections
    corners = {tuple(map(float, corner)) for corner in band.get_paths()[0].vertices}
    assert corners >= {(0, 9), (0, 11), (50, 18), (50, 22), (100, 27), (100, 33)}
    low, high = axes.get_ylim()
    assert low <= 9 < 33 <= high


@pytest.mark.parametrize(("values", "scale"), [([0.1, 1.0, 10.0], "log"), ([0.0, 1.0], "linear"), ([-1.0, 1.0], "linear")])
def test_an_axis_is_logarithmic_where_it_can_be(values, scale):
    points = [(1 + i, v) for i, v in enumerate(values)]
    [axes] = axes_of(Chart("loss", [Line("loss", points)], logarithmic=True, x_logarithmic=True))
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", scale)


@pytest.mark.parametrize("values", [[3.0], [2.0, 2.0], [0.0, 0.0], [-1e-9, 1e9], [1e-12, 2e-12], [-5.0, -2.0], [1e-99, 1e99]])
@pytest.mark.parametrize("logarithmic", [False, True])
def test_any_values_are_inside(values, logarithmic):
    chart = Chart("x", [Line("x", [(i * 1000, v) for i, v in enumerate(values)])], logarithmic)
    ElementTree.fromstring(charts.svg([chart]))
    [axes] = axes_of(chart)
    low, high = axes.get_ylim()
    assert low <= min(values) <= max(values) <= high


def test_what_is_no_number_is_left_out_and_long_lines_are_averaged():
    nan = [(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0)]
    assert charts.thin(nan) == [(0, 1.0), (3, 2.0)]
    long = [(float(i), float(i % 2)) for i in range(10 * charts.POINTS)]
    thinned = charts.thin(long)
    assert len(thinned) == charts.POINTS
    assert all(y == 0.5 for _, y in thinned)
    assert axes_of(Chart("none", [Line("none", [(1, math.nan)])])) == []


def test_names_cannot_break_out():
    evil = '</text><script>alert(1)</script>"& $x_1$'
    svg = charts.svg([Chart(evil, [Line(evil, [(0, 1), (1, 2)]), Line("b", [(0, 2), (1, 1)])], x_name=evil)])
    root = ElementTree.fromstring(svg)
    assert not list(root.iter(f"{NAMESPACE}script"))
    assert [t.text for t in root.iter(f"{NAMESPACE}text")].count(evil) == 3


def test_charts_without_points_take_no_room_and_the_text_is_always_the_same():
    one = Chart("a", [Line("a", [(0, 1), (1, 2)])])
    empty = Chart("b", [Line("b", [])])
    assert charts.svg([empty, one]) == charts.svg([one])
    assert ElementTree.fromstring(charts.svg([])) is not None
    sizes = [ElementTree.fromstring(charts.svg([one] * n)) for n in (1, 5)]
    width, height = (tuple(float(root.get(side).removesuffix("pt")) for root in sizes) for side in ("width", "height"))
    assert (width[1], height[1]) == pytest.approx((2 * width[0], 3 * height[0]))


def test_a_png_is_one():
    assert charts.png([Chart("a", [Line("a", [(0, 1), (1, 2)])])]).startswith(b"\x89PNG")
