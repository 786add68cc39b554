"""Reads the saved states of schedulers: our own, and those that a run may have used before.

| scheduler | count in its state | after four updates |
|---|---|---|
| WSMLR, WSDLR, DeepSpeed's WarmupLR and its subclasses | `last_batch_iteration`, from -1 | 3 |
| torch's schedulers | `last_epoch`, from 0 | 4 |
| Megatron's OptimizerParamScheduler | `num_steps`, in samples | cannot be converted |

Only the count is taken from a foreign state. The rates come from the configuration.
"""

from collections.abc import Mapping
from typing import Any

from wsm_ds.errors import ScheduleError, few
from wsm_ds.schedules.parameters import update_count

STATE_VERSION = 1
"""Version of our own state. A state without a version is a foreign one."""


def updates_in_state(state: Mapping[str, Any]) -> int:
    """Returns how many optimizer updates were made when a scheduler saved its state.

    Args:
        state: what the scheduler's `state_dict` returned.

    Raises:
        ScheduleError: the state is of a newer version (named), or holds no count of updates (its keys are named).

    Example:
        >>> updates_in_state({"last_batch_iteration": 3}), updates_in_state({"last_epoch": 4})
        (4, 4)
    """
    if state.get("version", STATE_VERSION) != STATE_VERSION:
        raise ScheduleError(f"the scheduler state has version {state['version']}; this wsm_ds reads {STATE_VERSION}.")
    if "last_batch_iteration" in state:
        count = state["last_batch_iteration"]
        return 0 if count == -1 else update_count("last_batch_iteration", count) + 1
    # torch's ReduceLROnPlateau has a last_epoch too, but it counts calls with a metric.
    if "last_epoch" in state and "num_bad_epochs" not in state:
        return update_count("last_epoch", state["last_epoch"])
    raise ScheduleError(
        f"the scheduler state has the keys {few(sorted(map(str, state)))}; none of them counts optimizer updates "
        "(Megatron's counts samples). Load the checkpoint with load_lr_scheduler_states=False, and set "
        "last_batch_iteration in the scheduler's params to the number of updates made so far, minus one."
    )


def parameter_changes(state: Mapping[str, Any], parameters: Mapping[str, Any], updates: int) -> list[str]:
    """Returns the differences between a saved and a configured schedule that change the rates.

    Args:
        state: the saved state, our own or a foreign one. A parameter that it does not hold is not compared.
        parameters: the configured scheduler's parameters, by the names that its state uses.
        updates: updates made so far. A difference of the warmup does not count when both warmups are over.

    Returns:
        One text for each difference, with both values; empty if the run can go on.

    Example:
        >>> parameter_changes({"warmup_max_lr": 8.0}, {"warmup_max_lr": 4.0, "warmup_num_steps": 2}, updates=3)
        ['warmup_max_lr: 8.0 in the checkpoint, 4.0 in the configuration']
    """
    is_warm = updates >= max(parameters["warmup_num_steps"], state.get("warmup_num_steps", 0))
    without_effect = ("warmup_min_lr", "warmup_num_steps") if is_warm else ()
    changes = [
        f"{name}: {state[name]} in the checkpoint, {value} in the configuration"
        for name, value in parameters.items()
        if name in state and state[name] != value and name not in without_effect
    ]
    return changes + _decay_change(state.get("decay_start_step"), parameters.get("decay_start_step"), updates)


def _decay_change(saved_start: int | None, start: int | None, updates: int) -> list[str]:
    """A decay that only one of the two schedules has, and that began before this update."""
    if saved_start is not None and start is None and updates > saved_start:
        return [f"decay_start_step: the checkpoint's rate decays since update {saved_start}, "
                "this schedule never decays"]  # fmt: skip
    if saved_start is None and start is not None and updates > start:
        return [f"decay_start_step: the checkpoint's rate is constant until update {updates}, "
                f"the configuration decays since {start}"]  # fmt: skip
    return []
