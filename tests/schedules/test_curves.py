"""Decay curves: their values, their texts, and the errors of wrong ones."""

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsm_ds.errors import CurveError
from wsm_ds.schedules.curves import Curve, curve_from_points, curve_from_values, named_curve, parse_curve

TEXTS = ["linear", "cosine", "1-sqrt", "power:2", "inverse-sqrt:0.1", "exponential:0.1", "ema:0.1"]
TEXTS += ["table:0=1,0.25=0.5,1=0"]
FRACTIONS = st.floats(0.0, 1.0)
RATIOS = st.floats(1e-300, 1.0, exclude_max=True)

relaxed = settings(deadline=None)


@pytest.mark.parametrize(
    ("text", "start", "quarter", "end"),
    [
        ("linear", 1.0, 0.75, 0.0),
        ("cosine", 1.0, (1 + 0.5**0.5) / 2, 0.0),
        ("1-sqrt", 1.0, 0.5, 0.0),
        ("power:2", 1.0, 0.9375, 0.0),
        ("power:0.5", 1.0, 0.5, 0.0),
        ("inverse-sqrt:0.5", 1.0, 1.75**-0.5, 0.5),
        ("exponential:0.0625", 1.0, 0.5, 0.0625),
        ("table:1,0.5,0", 1.0, 0.75, 0.0),
        ("table:0=1,0.5=0.2,1=0.1", 1.0, 0.6, 0.1),
    ],
)
def test_a_curve_has_its_values_at_the_start_a_quarter_and_the_end(
    text: str, start: float, quarter: float, end: float
) -> None:
    curve = parse_curve(text)
    assert curve(0.0) == start
    assert curve(0.25) == pytest.approx(quarter, rel=1e-15)
    assert curve(1.0) == pytest.approx(end, rel=1e-15)


def test_ema_starts_at_one_minus_its_ratio_and_ends_at_zero() -> None:
    curve = parse_curve("ema:0.0625")
    assert curve(0.0) == 0.9375
    assert curve(0.5) == pytest.approx(0.75, rel=1e-15)
    assert curve(1.0) == 0.0


@pytest.mark.parametrize("text", TEXTS)
def test_a_curve_gives_a_float64_scalar_for_a_float_and_an_array_for_an_array(text: str) -> None:
    curve = parse_curve(text)
    positions = np.linspace(0.0, 1.0, 33)
    values = curve(positions)
    assert values.dtype == np.float64
    assert values.shape == (33,)
    scalar = curve(0.25)
    assert isinstance(scalar, np.float64)
    assert scalar == pytest.approx(values[8], rel=1e-15)
    assert curve(positions.reshape(3, 11)).shape == (3, 11)


@given(st.sampled_from(TEXTS), FRACTIONS, FRACTIONS)
@relaxed
def test_no_curve_rises_or_leaves_the_unit_interval(text: str, a: float, b: float) -> None:
    curve = parse_curve(text)
    earlier, later = curve(min(a, b)), curve(max(a, b))
    assert 1.0 >= earlier >= later - 1e-15
    assert later >= 0.0


@given(st.sampled_from(["inverse-sqrt", "exponential"]), RATIOS)
@relaxed
def test_curves_with_a_final_ratio_run_from_one_to_it(name: str, ratio: float) -> None:
    curve = named_curve(name, ratio)
    assert curve(0.0) == 1.0
    assert curve(1.0) == pytest.approx(ratio, rel=1e-12)


@given(st.floats(1e-3, 1.0, exclude_max=True), FRACTIONS)
@relaxed
def test_inverse_sqrt_is_its_textbook_formula(ratio: float, s: float) -> None:
    expected = 1.0 / np.sqrt(1.0 + (1.0 / ratio**2 - 1.0) * s)
    assert named_curve("inverse-sqrt", ratio)(s) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("text", TEXTS)
def test_a_curve_survives_its_text_and_pickle(text: str) -> None:
    curve = parse_curve(text)
    assert str(curve) == text
    assert parse_curve(str(curve)) == curve
    restored = pickle.loads(pickle.dumps(curve))
    assert restored == curve
    assert restored(0.3) == curve(0.3)


@given(st.sampled_from(["power", "inverse-sqrt", "exponential", "ema"]), RATIOS)
@relaxed
def test_any_parameter_survives_the_text(name: str, parameter: float) -> None:
    curve = named_curve(name, parameter)
    assert parse_curve(str(curve)) == curve


@given(st.lists(FRACTIONS, min_size=1, max_size=20))
@relaxed
def test_any_table_survives_the_text_and_goes_through_its_values(tail: list[float]) -> None:
    values = [1.0, *sorted(tail, reverse=True)]
    curve = curve_from_values(values)
    assert parse_curve(str(curve)) == curve
    positions = np.array([i / len(tail) for i in range(len(values))])
    np.testing.assert_allclose(curve(positions), values, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("mean", "linear"),
        ("minus-sqrt", "1-sqrt"),
        ("one_minus_sqrt", "1-sqrt"),
        (" Inverse_Sqrt:1e-1 ", "inverse-sqrt:0.1"),
        ("ema", "ema:0.1"),
        ("power:2.0", "power:2"),
        ("table:1,0.5,0", "table:0=1,0.5=0.5,1=0"),
    ],
)
def test_aliases_defaults_and_spellings_lead_to_one_canonical_text(text: str, canonical: str) -> None:
    assert str(parse_curve(text)) == canonical
    assert parse_curve(text) == parse_curve(canonical)


def test_a_curve_of_ones_own_is_called_with_its_parameters() -> None:
    curve = Curve("two stairs", (0.5, 0.25), lambda s, edge, low: np.where(s < edge, 1.0, low))
    assert [curve(0.25), curve(0.5)] == [1.0, 0.25]
    assert str(curve) == "two stairs:0.5,0.25"


def test_a_wrong_name_lists_every_curve_with_its_parameters_and_defaults() -> None:
    with pytest.raises(CurveError) as caught:
        parse_curve("lineer")
    assert str(caught.value) == (
        "unknown decay curve 'lineer' (did you mean 'linear'?); valid curves: linear, cosine, 1-sqrt, "
        "power:P (0 < P < inf), inverse-sqrt:R (0 < R < 1), exponential:R (0 < R < 1), "
        "ema[:R] (0 < R < 1, default 0.1), table:S=D,S=D,… or table:D,D,…; aliases: mean = linear, "
        "minus-sqrt = 1-sqrt, one-minus-sqrt = 1-sqrt"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown decay curve ''; valid"),
        ("1sqrt", r"unknown decay curve '1sqrt' \(did you mean '1-sqrt'\?\)"),
        ("power", r"'power' takes one parameter, found none; write power:P \(0 < P < inf\)"),
        ("ema:0.1,0.2", r"'ema' takes one parameter, found 2: 0\.1, 0\.2"),
        ("linear:1", r"'linear' takes no parameter, found 1: 1\.0"),
        ("power:0", r"'power': 0\.0 is out of range"),
        ("power:inf", "'power': inf is out of range"),
        ("ema:1", r"'ema': 1\.0 is out of range; write ema\[:R\]"),
        ("exponential:nan", "'exponential': nan is out of range"),
        ("inverse-sqrt:-0.1", r"-0\.1 is out of range"),
        ("power:half", "'power:half': expected a number, found 'half'"),
        ("linear:", "'linear:': expected a number, found ''"),
        ("table", r"at least the points s = 0 and s = 1, found 0 point\(s\)"),
        ("table:1", r"found 1 point\(s\)"),
        ("table:0=1,0.5", "either points s=d or values d, not both"),
        ("table:0=1=2,1=0", "either points s=d or values d, not both"),
        ("table:1,0.2,0.3,0", r"table point 2: d must not rise, found 0\.3 after 0\.2"),
        ("table:0=1,0.5=0.5,0.5=0.2,1=0", r"table point 2: s must rise, found 0\.5 after 0\.5"),
        ("table:1,nan,0", r"table point 1: s and d must be within \[0, 1\], found s = 0\.5, d = nan"),
        ("table:1,-0.1", r"table point 1: .*found s = 1\.0, d = -0\.1"),
        ("table:2,0", r"table point 0: .*found s = 0\.0, d = 2\.0"),
        ("table:0.9,0", r"must start at s = 0 with d = 1 .*found \(0\.0, 0\.9\)"),
        ("table:0.1=1,1=0", "must start at s = 0 with d = 1"),
        ("table:0=1,0.9=0", r"end at s = 1, found .*\(0\.9, 0\.0\)"),
    ],
)
def test_a_wrong_text_is_told_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(CurveError, match=message):
        parse_curve(text)


@pytest.mark.parametrize("points", [[(0, 1, 2), (1, 0)], [0.0, 1.0], [("a", 1), (1, 0)]])
def test_a_table_that_is_no_list_of_pairs_is_refused(points: Any) -> None:
    with pytest.raises(CurveError, match="a table is a list of pairs of numbers"):
        curve_from_points(points)


@pytest.mark.parametrize("s", [-1e-9, 1.0 + 1e-9, float("nan")])
def test_a_curve_refuses_a_position_outside_the_decay(s: float) -> None:
    with pytest.raises(CurveError, match=r"curve 1-sqrt is defined on 0 <= s <= 1, found s = "):
        parse_curve("1-sqrt")(s)
    with pytest.raises(CurveError, match=r"found s = "):
        parse_curve("1-sqrt")(np.array([0.5, s]))
