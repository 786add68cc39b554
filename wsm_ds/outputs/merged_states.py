"""Which optimizer states a merged checkpoint may hold: those that can be summed, and those that fit merged weights."""

from collections.abc import Sequence

from wsm_ds.errors import UnsupportedLayout, few
from wsm_ds.layouts import Layout
from wsm_ds.layouts.optimizer_states import MERGEABLE, WEIGHTS


def require_mergeable(layouts: Sequence[Layout]) -> None:
    """Checks that weighted sums of all optimizer states mean something (`optimizer_states: merge`).

    Args:
        layouts: the checkpoints that are merged.

    Raises:
        UnsupportedLayout: a state holds no value per element, or is not known to be a moment or a weight. The message
            names the states and what they hold.
    """
    for layout in layouts:
        if layout.has_nameless_states:
            raise UnsupportedLayout(
                f"{layout.path}: a stage 0 checkpoint in fp32 does not say which optimizer state belongs to which "
                "parameter, if there are several parameter groups. Carry or drop the states (--optimizer-states)."
            )
        problems = dict(layout.indivisible_states)
        for name in layout.state_names:
            if name not in MERGEABLE:
                problems.setdefault(name, "not known to be a mean of gradients or of their squares")
        if problems:
            words = few(f"{name} ({problem})" for name, problem in problems.items())
            raise UnsupportedLayout(
                f"{layout.path} holds optimizer states that cannot be merged: {words}. Take the newest checkpoint's "
                "(--optimizer-states carry), or leave them out (--optimizer-states drop)."
            )


def require_carriable(layouts: Sequence[Layout]) -> None:
    """Checks that the newest checkpoint's states fit weights that are merged from several (`optimizer_states: carry`).

    Args:
        layouts: the checkpoints that are merged, by rising step.

    Raises:
        UnsupportedLayout: a state holds weights, from which the optimizer would go back to the newest checkpoint's. The
            message names it.
    """
    weights = [name for name in layouts[-1].state_names if name in WEIGHTS]
    if weights and len(layouts) > 1:
        raise UnsupportedLayout(
            f"{layouts[-1].path}: the optimizer states {few(weights)} are weights, from which the optimizer computes "
            "the next ones (schedule-free, Lookahead). The newest checkpoint's do not fit merged weights. Merge them, "
            "too (--optimizer-states merge), or leave them out (--optimizer-states drop)."
        )
