"""Checks the values that a ds_config or a script gives to a scheduler, and the numbers of a saved state."""

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

from wsm_ds.errors import ScheduleError

RATE_TOLERANCE = 1e-6
"""Relative difference up to which two rates are the same one (the rate of a float32 tensor differs by up to 6e-8)."""
Rates = float | list[float]
"""One rate for all parameter groups, or a list with one rate for each group."""


def update_count(name: str, value: Any) -> int:
    """Returns `value` as a number of optimizer updates.

    Raises:
        ScheduleError: `value` is not a whole number of 0 or more; names `name` and the value.

    Example:
        >>> update_count("warmup_num_steps", 1e3)
        1000
    """
    if not _is_finite_number(value) or int(value) != value:
        raise ScheduleError(f"{name} is {value!r}; it is a whole number of updates, 0 or more.")
    return int(value)


def rates_per_group(name: str, value: Any, groups: int) -> list[float]:
    """Returns one learning rate for each parameter group.

    Args:
        name: the parameter's name, for the error message.
        value: one number for all groups, or a list, array or tensor with one number for each group.
        groups: number of parameter groups.

    Raises:
        ScheduleError: the list's length is not `groups`, or a rate is not a number of 0 or more; names `name`.

    Example:
        >>> rates_per_group("warmup_max_lr", 0.5, 3)
        [0.5, 0.5, 0.5]
    """
    plain = value.tolist() if hasattr(value, "tolist") else value  # a torch tensor, a numpy array
    rates = list(plain) if isinstance(plain, Iterable) and not isinstance(plain, str) else [plain] * groups
    if len(rates) != groups:
        raise ScheduleError(f"{name} has {len(rates)} values for {groups} parameter groups.")
    for rate in rates:
        if not _is_finite_number(rate):
            raise ScheduleError(f"{name} is {value!r}; a learning rate is a number, 0 or more.")
    return [float(rate) for rate in rates]


def peak_rates(value: Any, own_rates: Sequence[float]) -> list[float]:
    """Returns the peak of each parameter group, from `warmup_max_lr` and the rates that the optimizer was made with.

    A number that is the rate of one of the groups is the whole configuration's rate, so every group keeps its own. Any
    other number is for groups with one common rate: it does not say what becomes of different ones.

    Args:
        value: `warmup_max_lr`: None, one number, or one number for each group.
        own_rates: the rates that the optimizer gave its groups.

    Raises:
        ScheduleError: the number is the rate of none of the groups, which have different ones (both are named, and
            the ways out); or as `rates_per_group`.

    Example:
        >>> peak_rates(4.0, [2.0, 2.0]), peak_rates(4.0, [4.0, 0.5]), peak_rates([8.0, 1.0], [4.0, 0.5])
        ([4.0, 4.0], [4.0, 0.5], [8.0, 1.0])
    """
    peaks = rates_per_group("warmup_max_lr", list(own_rates) if value is None else value, len(own_rates))
    is_one_number = isinstance(value, numbers.Real) or getattr(value, "ndim", None) == 0  # a tensor of no dimensions
    if not is_one_number or all(_is_close(rate, own_rates[0]) for rate in own_rates):
        return peaks
    if any(_is_close(rate, peaks[0]) for rate in own_rates):
        return rates_per_group("the optimizer's lr", list(own_rates), len(own_rates))
    raise ScheduleError(
        f"warmup_max_lr is the number {peaks[0]:g}, but the optimizer gave its {len(own_rates)} parameter groups "
        f"different rates, {list(own_rates)}, and none of them is {peaks[0]:g}. Leave warmup_max_lr out, and each "
        f"group warms up to its own rate; or give a list, one rate for each group: [{peaks[0]:g}, …]."
    )


def _is_close(rate: float, other: float) -> bool:
    return math.isclose(rate, other, rel_tol=RATE_TOLERANCE)


def collapsed(rates: list[float]) -> Rates:
    """Returns one number if all groups have the same rate, so that a saved state also fits other groups.

    Example:
        >>> collapsed([0.5, 0.5]), collapsed([0.5, 0.25])
        (0.5, [0.5, 0.25])
    """
    return rates[0] if len(set(rates)) == 1 else list(rates)


def regrouped(name: str, rates: list[float], old_indices: Sequence[int | None]) -> list[float]:
    """Returns the rates after parameter groups were added or removed.

    Args:
        name: the parameter's name, for the error message.
        rates: one rate for each of the old groups.
        old_indices: for each of the new groups, its index among the old ones; None for an added group.

    Raises:
        ScheduleError: a group was added and the old groups have different rates, so the new rate is unknown.

    Example:
        >>> regrouped("warmup_max_lr", [8.0, 4.0, 2.0], [0, 2])
        [8.0, 2.0]
        >>> regrouped("warmup_max_lr", [8.0, 8.0], [0, 1, None])
        [8.0, 8.0, 8.0]
    """
    if None not in old_indices:
        return [rates[index] for index in old_indices if index is not None]
    return rates_per_group(name, collapsed(rates), len(old_indices))


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 <= float(value) < float("inf")
