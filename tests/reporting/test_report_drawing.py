"""Drawings of any values: all places are finite and lie in the picture, and what is drawn is what was given."""

import math
import re
from xml.etree.ElementTree import Element, fromstring

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsm_ds.reporting.report.document import Bar, Dots, HeatMap, Level, Plot, Point, Row, Series
from wsm_ds.reporting.report.drawing.elements import clipped
from wsm_ds.reporting.report.drawing.figures import NARROW_PX, WIDE_PX, draw
from wsm_ds.reporting.report.drawing.scale import tick_words, ticks, without_far

WIDTHS = (WIDE_PX, NARROW_PX)
VALUES = st.floats(-1e6, 1e6, allow_subnormal=False).map(lambda value: round(value, 6))
ERRORS = st.none() | st.floats(0, 1e6)
COUNTS = st.integers(1, 10**13).map(float)
NAMES = st.text(min_size=1, max_size=60)
POINTS = st.builds(Point, COUNTS, VALUES, ERRORS, NAMES, st.sampled_from(["", "", "best", "recommended"]))
COLORS = st.sampled_from(["s0", "s1", "s2", "s3", "s4", "s5", "raw", "baseline"])


def numbers(svg: Element) -> list[float]:
    """All lengths of a drawing."""
    texts = [
        value
        for element in svg.iter()
        for name, value in element.attrib.items()
        if name in {"x", "y", "cx", "cy", "r", "d", "width", "height", "viewBox", "fill-opacity"}
    ]
    return [float(found) for text in texts for found in re.findall(r"nan|inf|-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", text)]


def drawn(figure: Plot | Dots | HeatMap | Bar, width: float) -> Element:
    svg = fromstring(draw(figure, width))
    assert all(math.isfinite(number) and abs(number) < 5000 for number in numbers(svg))
    right, bottom = map(float, svg.attrib["viewBox"].split()[2:])
    for circle in svg.iter("circle"):
        assert -1 <= float(circle.attrib["cx"]) <= right + 1
        assert -1 <= float(circle.attrib["cy"]) <= bottom + 1
    return svg


@given(
    st.lists(
        st.builds(
            Series,
            NAMES,
            st.lists(POINTS, min_size=1, max_size=8).map(lambda p: tuple(sorted(p, key=lambda one: one.x))),
            COLORS,
            st.sampled_from(["line", "points", "stems"]),
        ),
        min_size=1,
        max_size=4,
    ),
    st.lists(st.builds(Level, NAMES, VALUES, ERRORS, COLORS), max_size=2),
    st.booleans(),
    st.sampled_from(["less", "more", ""]),
    st.sampled_from(WIDTHS),
)
def test_a_plot_of_any_values_can_be_drawn(
    series: list[Series], levels: list[Level], is_log: bool, best: str, width: float
) -> None:
    distinct = len({point.x for one in series for point in one.points}) > 1
    plot = Plot("title", "x", "y", tuple(series), tuple(levels), is_log and distinct, best)  # type: ignore[arg-type]
    drawn(plot, width)


@given(
    st.lists(st.builds(Row, NAMES, VALUES, ERRORS, COLORS, st.sampled_from(["", "best"])), min_size=1, max_size=12),
    st.sampled_from(WIDTHS),
)
def test_dots_of_any_values_can_be_drawn(rows: list[Row], width: float) -> None:
    drawn(Dots("title", "x", tuple(rows)), width)


@given(st.lists(st.lists(st.none() | VALUES, min_size=3, max_size=3), min_size=1, max_size=5), st.sampled_from(WIDTHS))
def test_a_heat_map_of_any_values_can_be_drawn(cells: list[list[float | None]], width: float) -> None:
    cells[0][0] = 1.0
    heat = HeatMap("t", "x", "y", ("a", "b", "c"), ("r",) * len(cells), tuple(map(tuple, cells)), "less")
    svg = drawn(heat, width)
    assert len([rect for rect in svg.iter("rect") if "cell" in rect.attrib["class"]]) == 3 * len(cells)


@given(st.lists(st.tuples(NAMES, st.floats(1e-3, 1e6), NAMES), min_size=1, max_size=6), st.sampled_from(WIDTHS))
def test_the_shares_of_a_bar_fill_it(parts: list[tuple[str, float, str]], width: float) -> None:
    svg = drawn(Bar("title", tuple(parts)), width)
    shares = [float(rect.attrib["width"]) for rect in svg.iter("rect")]
    assert sum(shares) == pytest.approx(width - 16, abs=0.1)


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(2, 10))
def test_ticks_are_few_round_and_inside(low: float, extent: float, most: int) -> None:
    high = low + extent
    if high - low < 1e-9 * abs(low) + 1e-9:
        return
    found = ticks(low, high, most)
    assert 1 <= len(found) <= most
    assert all(low - 1e-6 * (high - low) <= tick <= high + 1e-6 * (high - low) for tick in found)
    assert len(set(tick_words(found))) == len(found)


def test_the_better_cell_is_the_darker_one() -> None:
    heat = HeatMap("t", "x", "y", ("a", "b"), ("r",), ((3.0, 2.0),), "less")
    shades = [float(rect.attrib["fill-opacity"]) for rect in drawn(heat, WIDE_PX).iter("rect")]
    assert shades[1] > shades[0]
    more = HeatMap("t", "x", "y", ("a", "b"), ("r",), ((3.0, 2.0),), "more")
    shades = [float(rect.attrib["fill-opacity"]) for rect in drawn(more, WIDE_PX).iter("rect")]
    assert shades[0] > shades[1]


def test_a_diverged_value_is_an_arrow_with_its_value_and_the_others_keep_their_room() -> None:
    losses = [3.1, 3.2, 3.15, 3.3, 11.25]
    points = tuple(Point(float(x), y) for x, y in enumerate(losses))
    svg = drawn(Plot("t", "x", "y", (Series("a", points, "s0"),)), WIDE_PX)
    places = [float(circle.attrib["cy"]) for circle in svg.iter("circle")][1:]  # the first is the legend's
    assert len(places) == 4
    assert max(places) - min(places) > 150
    assert "11.25" in [text.text for text in svg.iter("text")]


def test_far_values_are_those_on_the_worse_side() -> None:
    assert without_far([3.1, 3.2, 3.15, 1.0], "less") == [3.1, 3.2, 3.15, 1.0]
    assert without_far([0.5, 0.51, 0.52, 0.01], "more") == [0.5, 0.51, 0.52]
    assert without_far([2.0, 2.0, 2.0, 2.5], "less") == [2.0, 2.0, 2.0]


def test_labels_of_places_tell_them_apart() -> None:
    assert tick_words([19_250, 19_500, 19_750]) == ["19.25K", "19.5K", "19.75K"]
    assert tick_words([4.194304e9, 8.388608e9, 3.3554432e10]) == ["4.19B", "8.39B", "33.6B"]


def test_a_long_name_keeps_both_ends() -> None:
    words = clipped("last128-cosine-qam@200000", 98)
    assert len(words) == 14
    assert words.startswith("last128")
    assert words.endswith("200000")
