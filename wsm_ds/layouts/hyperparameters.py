"""Learning rates and warmup of a saved run. They show whether checkpoints were saved at one constant rate."""

import sys
from typing import Any

from wsm_ds.errors import BrokenCheckpoint, brief
from wsm_ds.torchfile import Tensor, TorchFile

WARMUP_SCHEDULERS = ("WSMLR", "WSDLR", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
MOST_UPDATES = 1 << 53


def parameter_groups(optim: TorchFile) -> Any:
    """The optimizer's `param_groups`, as an optimizer file of ZeRO 1 to 3 has them.

    They are under `base_optimizer_state` in stages 1 and 2 (`runtime/zero/stage_1_and_2.py:3358`) and under
    `optimizer_state_dict` in stage 3 (`runtime/zero/stage3.py:3431`). Elastic checkpoints hold a list instead.
    """
    state = optim.tree["optimizer_state_dict"]
    base = state.get("base_optimizer_state") or state.get("optimizer_state_dict")
    return base if isinstance(base, list) else (base or {}).get("param_groups", [])


def learning_rates(file: TorchFile, groups: Any) -> tuple[float | None, ...]:
    """The learning rate of each parameter group; None for a group without one.

    An optimizer that computes its own rate saves None, as transformers' Adafactor with `relative_step` does.

    Args:
        file: the file that holds `groups`.
        groups: `param_groups` of a torch optimizer.

    Raises:
        BrokenCheckpoint: a rate is neither a number nor None.
    """
    return tuple(_rate(file, group.get("lr")) for group in groups if isinstance(group, dict))


def _rate(file: TorchFile, value: Any) -> float | None:
    """A group's rate: a number, or a tensor of one element (torch's `capturable` optimizers)."""
    if value is None:
        return None
    if isinstance(value, Tensor) and value.numel == 1 and value.dtype.is_floating:
        # `capturable=True` keeps the rate on the device, so torch saves it as a tensor.
        return file.number(value)
    if isinstance(value, float) or (isinstance(value, int) and abs(value) <= sys.float_info.max):
        return float(value)
    raise BrokenCheckpoint(f"{file.path}: a parameter group has the learning rate {brief(value)}, not a number.")


def is_train_mode(groups: Any) -> bool | None:
    """Which weights a schedule-free optimizer left in the model; None for other optimizers.

    Args:
        groups: `param_groups` of a torch optimizer.

    Returns:
        True for those of training (y), False after `optimizer.eval()`: the averaged ones (x).
    """
    modes = [group["train_mode"] for group in groups if isinstance(group, dict) and "train_mode" in group]
    return bool(modes[0]) if modes else None


def warmup_num_steps(model: dict[str, Any]) -> int | None:
    """Updates of the warmup, from the saved scheduler or else from the saved ds_config; None if neither has it.

    DeepSpeed's own schedulers save only the count of updates (`runtime/lr_schedules.py`, `state_dict`).
    """
    saved = model.get("lr_scheduler") or {}
    if not isinstance(saved, dict):
        return None
    if "warmup_num_steps" in saved:
        return _updates(saved["warmup_num_steps"])
    config = model.get("ds_config")
    scheduler = config.get("scheduler") if isinstance(config, dict) else None
    if not isinstance(scheduler, dict) or scheduler.get("type") not in WARMUP_SCHEDULERS:
        return None
    params = scheduler.get("params")
    return _updates(params.get("warmup_num_steps")) if isinstance(params, dict) else None


def _updates(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and abs(value) < MOST_UPDATES else None
