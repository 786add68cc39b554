"""Leaves optimizer states out of a checkpoint (`optimizer_states: drop`), with the counters that belong to them."""

from typing import Any

SCHEDULE_FREE = {"k": 0, "weight_sum": 0.0, "lr_max": -1.0}
"""Counters in a schedule-free optimizer's parameter groups, as they begin (`schedulefree/adamw_schedulefree.py:64`)."""


def drop_states(state: dict[str, Any]) -> None:
    """Empties the base optimizer's state, and resets counters that are kept in parameter groups.

    Args:
        state: an optimizer file's `optimizer_state_dict`, or stage 0's `optimizer`; it is changed.
    """
    base: Any = state.get("base_optimizer_state", state.get("optimizer_state_dict", state))
    if isinstance(base, list):
        # An elastic checkpoint has a list with an entry per group, and the step beside it
        # (`runtime/zero/stage_1_and_2.py:3382`); a new optimizer state starts from step 0.
        for entry in base:
            entry.clear()
        if "base_optimizer_state_step" in state:
            state["base_optimizer_state_step"] = 0
        return
    base["state"].clear()
    base["param_groups"][:] = map(fresh_group, base["param_groups"])


def fresh_group(group: dict[str, Any]) -> dict[str, Any]:
    """Returns an entry of `param_groups` as it is before the first update.

    A counter that went on would switch off the correction of the bias of fresh moments, whose first updates would then
    be many times too large.

    Args:
        group: the entry: hyper-parameters, and counters of some optimizers.
    """
    fresh = {name: value for name, value in group.items() if name != "step"}
    if "train_mode" in group:  # schedule-free
        return fresh | {name: value for name, value in SCHEDULE_FREE.items() if name in group}
    if "d0" in group and "k" in group:  # Prodigy, D-Adaptation
        fresh["k"] = 0
    return fresh
