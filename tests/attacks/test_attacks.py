"""Short rounds of the attacks in this folder. docs/guarantees.md has the figures of the last long ones."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest
from attacks import flip_bits, hostile_pickles


@pytest.mark.parametrize(("run", "options"), [("w2_s2_bf16", {}), ("w2_s3_bf16", {"optimizer_states": "drop"})])
def test_a_damaged_file_is_refused_or_its_damage_is_not_in_the_output(
    runs: Path, run: str, options: dict[str, str]
) -> None:
    rounds = flip_bits.attack(runs / run, count=60, seed=3, options=options)
    assert [turn for turn in rounds if turn.end in flip_bits.BAD] == []
    ends = collections.Counter((turn.place, turn.end) for turn in rounds)
    assert ends["the pickle", "refused"] == ends["cut", "refused"] == 10
    assert ends["a tensor", "refused"] > 0


def test_a_hostile_pickle_is_refused_or_names_only_what_is_harmless(runs: Path) -> None:
    ends = hostile_pickles.attack(runs / "w2_s2_bf16", count=48, seed=5)
    assert [turn for turn in ends if turn[0] in hostile_pickles.BAD] == []
    assert {end for end, _ in ends} == {"accepted", "refused"}
