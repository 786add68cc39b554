"""Which learning rates are taken for one constant rate, and what is said of the others."""

import math

import pytest
from lazy import torch

from wsm_ds.planning.constant_rate import rate_words, same_rates


def recursive_linear_warmup(peak: float, start_factor: float, total_iters: int) -> float:
    """The rate at which torch's LinearLR ends."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=start_factor, total_iters=total_iters)
    for _ in range(total_iters):
        optimizer.step()
        schedule.step()
    rate: float = optimizer.param_groups[0]["lr"]
    return rate


def test_the_end_of_torchs_linear_warmup_is_the_peak_although_it_is_a_few_bits_off() -> None:
    settings: list[tuple[float, float, int]] = [
        (peak, start, total) for peak in (1e-2, 3e-4, 6e-4) for start in (0.1, 1 / 3) for total in (5, 10, 100, 1000)
    ]
    ends = [(peak, recursive_linear_warmup(peak, start, total)) for peak, start, total in settings]
    assert sum(peak != end for peak, end in ends) > len(ends) // 2
    assert all(same_rates([peak], [end]) for peak, end in ends)


@pytest.mark.parametrize(
    ("rates", "others", "expected"),
    [
        ([1e-2], [1e-2 * (1 + 9e-7)], True),
        ([1e-2], [1e-2 * (1 + 3e-6)], False),
        ([1e-2, 1e-3], [1e-2, 1e-3], True),
        ([1e-2, 1e-3], [1e-3, 1e-2], False),
        ([1e-2, 1e-2], [1e-2], True),
        ([1e-2, 1e-3], [1e-2], False),
        ([1e-2], [1e-2, 1e-3], False),
        ([1e-2, 1e-3], [1e-3, 1e-2, 1e-2], True),
        ([None], [None], True),
        ([None], [1e-2], False),
        ([1e-2, None], [1e-2, 1e-2], False),
        ([0.0], [0.0], True),
        ([0.0], [1e-300], False),
        ([], [], True),
    ],
)
def test_rates_are_compared_group_by_group_within_one_millionth(
    rates: list[float | None], others: list[float | None], expected: bool
) -> None:
    assert same_rates(rates, others) is expected


def test_rates_are_written_with_the_digits_that_are_compared() -> None:
    assert rate_words([float(torch.tensor(1e-2)), None, math.nan]) == "[0.01, None, nan]"
