"""Averages of engines that train for real, against the float64 averages of every update."""

from typing import Any

import pytest
from averaging.engines import TWO_RANKS
from deepspeed_runs import launch

STEPS = 12


def started(tmp_path_factory: pytest.TempPathFactory, do: str, **more: Any) -> dict[str, list[dict[str, Any]]]:
    jobs = [{"do": do, "steps": STEPS, **more, **job} for job in TWO_RANKS.values()]
    ranks = launch(jobs, world_size=2, folder=tmp_path_factory.mktemp(do), worker="averaging_worker.py")
    return dict(zip(TWO_RANKS, map(list, zip(*ranks, strict=True)), strict=True))


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return started(tmp_path_factory, "average")


@pytest.fixture(scope="module")
def swapped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return started(tmp_path_factory, "swap", evaluates=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return started(tmp_path_factory, "swap", evaluates=False)


@pytest.mark.parametrize("name", TWO_RANKS)
def test_averages_are_those_of_exactly_the_applied_updates(
    name: str, averaged: dict[str, list[dict[str, Any]]]
) -> None:
    for rank in averaged[name]:
        assert rank["count"] == rank["applied"]
        assert (rank["applied"] < STEPS) == ("overflows" in name)
        assert rank["applied"] > 3
        assert rank["errors"]["mean"] <= 1.0, rank
        assert rank["errors"]["1-sqrt"] <= 4.0, rank  # one fp32 buffer: the roundings add up
        assert rank["errors"]["ema"] <= 4.0, rank


@pytest.mark.parametrize("name", TWO_RANKS)
def test_an_evaluation_of_the_mean_leaves_every_bit_as_it_was(
    name: str, swapped: dict[str, list[dict[str, Any]]], undisturbed: dict[str, list[dict[str, Any]]]
) -> None:
    for disturbed, other in zip(swapped[name], undisturbed[name], strict=True):
        assert sum(evaluation["distance"] > 0 for evaluation in disturbed["evaluations"]) >= 2
        assert disturbed["same"]
        assert disturbed["losses"] == other["losses"]
        assert disturbed["state"] == other["state"]
    losses = [[evaluation["mean"] for evaluation in rank["evaluations"]] for rank in swapped[name]]
    assert losses[0] == losses[1]
