"""The mean of many samples, with and without the compiled loop, and the weights of the other averages."""

from typing import Any

import pytest
import torch

import wsm_ds
from wsm_ds.averaging import averages
from wsm_ds.averaging.averages import Anchored, Average, Ema, RunningMean
from wsm_ds.engine.arithmetic import kernel
from wsm_ds.errors import RecipeError


def samples(count: int, numel: int = 3000) -> torch.Tensor:
    """A walk whose first elements begin at zero, as biases do."""
    generator = torch.Generator().manual_seed(count)
    start = torch.randn(numel, generator=generator)
    start[: numel // 3] = 0
    return start + (0.01 * torch.randn(count, numel, generator=generator)).cumsum(0)


@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("count", [1, 2, 7, 40, 500])
def test_a_mean_is_within_one_ulp_of_the_float64_mean(
    count: int, is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_compiled and not hasattr(kernel(), "wsm_add_to_means"):
        pytest.skip("the kernel is not built")
    if not is_compiled:
        monkeypatch.setattr(averages, "kernel", lambda: None)
    monkeypatch.setattr(averages, "LEAST_SHARE", 700)
    walk, mean = samples(count), RunningMean()
    for sample in walk:
        mean.add([sample])
    largest = walk.abs().amax(0)
    ulp = (torch.nextafter(largest, torch.tensor(float("inf"))) - largest).double()
    (before,) = mean.values()
    (after,) = mean.take()
    assert torch.equal(before, after)
    assert ((after.double() - walk.double().mean(0)).abs() <= ulp).all()
    assert mean.count == 0


def test_a_mean_in_one_part_is_refined_as_soon_as_there_is_memory() -> None:
    walk, mean = samples(60), RunningMean()
    for number, sample in enumerate(walk):
        mean.add([sample], may_refine=number > 4)
    (value,) = mean.take()
    assert torch.allclose(value.double(), walk.double().mean(0), rtol=0, atol=1e-6)


def test_an_anchored_mean_is_the_merge_of_its_curve() -> None:
    walk = samples(25).double()
    for power, curve in ((0.5, "1-sqrt"), (1.0, "linear"), (2.0, "power:2")):
        average = Average(Anchored(power))
        for sample in walk:
            average.add([sample.float()])
        expected = (torch.from_numpy(wsm_ds.merge_coefficients(curve, n=25)) @ walk).float()
        assert torch.allclose(next(average.values()), expected, rtol=0, atol=2e-6), curve


def test_an_ema_halves_the_weight_of_a_sample_in_its_half_life_and_goes_on_from_its_state() -> None:
    def run(average: Average, values: Any) -> None:
        for value in values:
            average.add([torch.tensor([value])])

    one = Average(Ema(4.0))
    run(one, [1.0] + [0.0] * 4)
    assert next(one.values()).item() == pytest.approx(0.5)
    other = Average(Ema(4.0))
    other.restore(one.state())
    run(one, [0.0] * 4)
    run(other, [0.0] * 4)
    assert next(one.values()).item() == next(other.values()).item() == pytest.approx(0.25)
    with pytest.raises(RecipeError, match="the saved average is Ema"):
        Average(Anchored(0.5)).restore(one.state())
    with pytest.raises(RecipeError, match="half_life must be a number of updates above 0, found 0"):
        Ema(0)
