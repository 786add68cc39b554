"""States of one value per element are told from scalars, tables and codes by all flat tensors together."""

from typing import Any

import pytest

from wsm_ds.dtypes import BY_NAME
from wsm_ds.layouts.optimizer_states import LARGEST_TABLE, FlatStates, forms_of, is_plain
from wsm_ds.outputs.resharding.placeholders import placeholder


def flats(name: str, *rows: tuple[tuple[int, ...], int], dtype: str = "fp32") -> list[FlatStates]:
    """Flat tensors with one state each, from rows (shape of the state, elements of the flat tensor)."""
    return [FlatStates({name: placeholder(BY_NAME[dtype], shape)}, numel) for shape, numel in rows]


@pytest.mark.parametrize(
    ("states", "is_element_wise"),
    [
        (flats("exp_avg", ((8,), 8)), True),
        (flats("exp_avg", ((1,), 1)), True),
        (flats("mine", ((8,), 8), ((6,), 6)), True),
        (flats("mine", ((8,), 8)), False),
        (flats("mine", ((8,), 8), ((8,), 8)), False),
        (flats("mine", ((LARGEST_TABLE + 1,), LARGEST_TABLE + 1)), True),
        (flats("qmap1", ((256,), 256), ((256,), 512)), False),
        (flats("exp_avg", ((8,), 8), ((), 6)), False),
        (flats("exp_avg", ((2, 4), 8)), False),
        (flats("exp_avg", ((8,), 8), dtype="uint8"), False),
        (flats("exp_avg", ((8,), 8), dtype="int8"), False),
        (flats("exp_avg", ((10,), 8)), False),
    ],
)
def test_a_state_is_one_value_per_element_only_if_all_flat_tensors_agree(
    states: list[FlatStates], is_element_wise: bool
) -> None:
    forms = forms_of(states)
    (name,) = states[0].states
    assert (name in forms.element_wise) is is_element_wise
    assert (name in forms.indivisible) is not is_element_wise


@pytest.mark.parametrize(
    "states",
    [
        flats("step", ((), 8), ((), 1)),
        flats("step", ((1,), 1)),
        flats("mine", ((), 1)),
        flats("mine", ((1,), 1), ((1,), 8)),
        flats("exp_avg_sq", ((), 8), ((), 6)),
        [FlatStates({"step": 3, "betas": [0.9, 0.99], "name": "a", "nothing": None}, 8)],
        [],
    ],
)
def test_one_value_for_a_whole_flat_tensor_is_neither_cut_nor_refused(states: list[FlatStates]) -> None:
    forms = forms_of(states)
    assert (forms.element_wise, forms.indivisible) == (frozenset(), {})


def test_a_vector_of_one_element_beside_a_flat_tensor_of_one_element_is_refused_unless_its_name_is_known() -> None:
    assert "table of this length" in forms_of(flats("mine", ((1,), 1))).indivisible["mine"]


def test_a_list_that_contains_itself_is_no_plain_value() -> None:
    endless: list[Any] = []
    endless.append(endless)
    assert not is_plain(endless)
    assert is_plain([[1, {"a": None}], "b"])
