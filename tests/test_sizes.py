"""Counts of tokens as people write and read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsm_ds.errors import RecipeError
from wsm_ds.sizes import format_count, parse_count


@pytest.mark.parametrize(
    ("text", "count"),
    [("100B", 10**11), ("1.5T", 1_500_000_000_000), ("0.1B", 10**8), ("25 m", 25_000_000), ("8k", 8000),
     ("1_000_000", 10**6), ("2e9", 2 * 10**9), ("9007199254740993", 2**53 + 1), (7, 7)],
)  # fmt: skip
def test_a_count_is_exact(text: str | int, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "text", ["", "B", "-5", "1.5", "0.0001K", "1e99", "100GB", "9223372036854775808", "nan", "1__0"]
)
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"is not a (count|whole number)"):
        parse_count(text)


def test_a_truth_value_is_no_count() -> None:
    with pytest.raises(RecipeError, match="True is not a count"):
        parse_count(True)


@given(st.integers(0, 10**15))
def test_what_is_shown_is_the_count_to_three_digits(count: int) -> None:
    assert parse_count(format_count(count)) == pytest.approx(count, rel=0.005 if count >= 10_000 else 0)
