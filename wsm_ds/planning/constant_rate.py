"""Checks that a window was trained at one constant learning rate: a merge emulates a decay from a constant rate."""

import math
from collections.abc import Callable, Sequence

from wsm_ds.errors import WindowError, few
from wsm_ds.layouts import Layout
from wsm_ds.planning.slots import is_of_means

RATE_TOLERANCE = 1e-6
"""Relative difference up to which two rates are the same one.

torch's recursive schedulers end their warmup a few bits beside the peak, and a float32 rate differs from the float64
that it was made of by up to 6e-8.
"""
Rates = Sequence[float | None]


def check_constant_rate(layouts: Sequence[Layout], allow: Sequence[str], warn: Callable[..., None]) -> None:
    """Checks warmup and learning rates of a window.

    Args:
        layouts: the checkpoints, by rising step.
        allow: checks to skip: "warmup", "lr-change".
        warn: logs that the rates of some parameter groups are not in the files.

    Raises:
        WindowError: the window begins in the warmup; or a parameter group's rate changes in it, or is not finite. The
            message names the checkpoints and all rates.
    """
    oldest, warmup = layouts[0], layouts[-1].warmup_num_steps
    # A slot mean begins before the step at which it was written, and is a merge even if it is alone.
    is_mean = is_of_means(layouts)
    first = oldest.snapshot.first if is_mean and oldest.snapshot is not None else oldest.step
    if "warmup" not in allow and warmup is not None and first < warmup:
        told = (
            f"{oldest.tag} ({'from step' if is_mean else 'step'} {first}) lies inside the warmup of {warmup} steps; a "
            "merge emulates a decay from a constant rate"
        )
        if len(layouts) > 1:
            raise WindowError(f"{told}. Start the window later, or pass --allow warmup.")
        if is_mean:
            warn("%s", told)
    if "lr-change" in allow:
        return
    _check_slots(layouts, warmup if "warmup" in allow else None, warn)
    if len(layouts) < 2:
        return
    for layout in layouts:
        if any(rate is not None and not math.isfinite(rate) for rate in layout.learning_rates):
            raise WindowError(
                f"{layout.tag} was saved with the learning rates {rate_words(layout.learning_rates)}, one of which is "
                "not finite. Choose a window without it, or pass --allow lr-change."
            )
    changed = [layout for layout in layouts if not same_rates(layout.learning_rates, oldest.learning_rates)]
    if changed:
        raise WindowError(
            f"the learning rate changes inside the window: {rate_words(oldest.learning_rates)} at {oldest.tag}, "
            f"{rate_words(changed[0].learning_rates)} at {changed[0].tag}. Choose a window of constant rate, or pass "
            "--allow lr-change."
        )
    if None in oldest.learning_rates:
        warn(
            "%s: the optimizer computes its own learning rates (%s), as Adafactor with relative_step does. The files "
            "do not say whether they were constant from %s to %s; a merge emulates a decay from a constant rate.",
            oldest.path.parent,
            rate_words(oldest.learning_rates),
            oldest.tag,
            layouts[-1].tag,
        )


def _check_slots(layouts: Sequence[Layout], allowed_warmup: int | None, warn: Callable[..., None]) -> None:
    """Raises WindowError if the rate changed within a slot of the window; of one slot alone it is only said."""
    slots = [(layout.tag, layout.snapshot) for layout in layouts if layout.snapshot and layout.snapshot.kind == "mean"]
    changed = [tag for tag, slot in slots if not slot.is_constant_rate and slot.first >= (allowed_warmup or 0)]
    if not changed:
        return
    told = (
        f"the learning rate changed within the steps of {few(changed)}; a merge emulates a decay from a constant rate"
    )
    if len(layouts) > 1:
        raise WindowError(f"{told}. Choose later slots, or pass --allow lr-change.")
    warn("%s", told)


def same_rates(rates: Rates, others: Rates) -> bool:
    """Whether two checkpoints have the same rates, within `RATE_TOLERANCE`.

    With equally many groups each group's rates are compared. If groups were split or joined, each rate must occur in
    both checkpoints. None is equal to None alone.

    Example:
        >>> same_rates([0.1, None], [0.1 * (1 + 1e-9), None]), same_rates([0.1, 0.2], [0.2, 0.1])
        (True, False)
        >>> same_rates([0.1, 0.1], [0.1])
        True
    """
    if len(rates) == len(others):
        return all(map(_is_same, rates, others))
    return all(any(_is_same(rate, other) for other in others) for rate in rates) and all(
        any(_is_same(rate, other) for rate in rates) for other in others
    )


def _is_same(rate: float | None, other: float | None) -> bool:
    if rate is None or other is None:
        return rate is other
    return math.isclose(rate, other, rel_tol=RATE_TOLERANCE)


def rate_words(rates: Rates) -> str:
    """Returns the rates of all groups as a text; digits that the tolerance does not look at are left out.

    Example:
        >>> rate_words([0.00999999977, None])
        '[0.01, None]'
    """
    return "[" + ", ".join("None" if rate is None else f"{rate:.7g}" for rate in rates) + "]"
