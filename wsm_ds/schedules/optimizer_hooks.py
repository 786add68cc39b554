"""Keeps a scheduler's rates in the parameter groups of its optimizer, with torch's optimizer hooks.

A scheduler writes `group["lr"]`, and others overwrite it before the optimizer reads it: DeepSpeed loads a universal
checkpoint's rates straight into the groups, after it has loaded the scheduler (`runtime/base_optimizer.py`). So the
rates are written once more by a hook that runs right before the optimizer's step.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from wsm_ds.errors import ScheduleError


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside the wrappers of DeepSpeed and accelerate.

    Args:
        optimizer: a torch optimizer, or an object whose `optimizer` attribute leads to one.

    Raises:
        ScheduleError: there is no torch optimizer; names the type of `optimizer`.
    """
    inner = optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, torch.optim.Optimizer):
        raise ScheduleError(f"{type(optimizer).__name__} is neither a torch optimizer nor a wrapper of one.")
    return inner


class OptimizerHooks:
    """Writes the rates of one scheduler into the parameter groups of one optimizer.

    The optimizer keeps only weak references to this object. When the scheduler that owns it is deleted, the hooks
    do nothing.

    Args:
        optimizer: the torch optimizer, unwrapped.
        after_load: method to call when the optimizer has loaded a state, which replaces its groups. Held weakly.

    Attributes:
        optimizer: the torch optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, after_load: Callable[[], None]) -> None:
        self.optimizer = optimizer
        self._rates: list[float] = []
        self._indices: dict[int, int] = {}  # id of a group's dict → the group's index
        self._must_rewrite = False
        self._made_update = self._other_made_update = False
        self._register(weakref.WeakMethod(after_load))

    def _register(self, after_load: weakref.WeakMethod[Callable[[], None]]) -> None:
        owner = weakref.ref(self)

        def before_step(optimizer: Any, *_: Any) -> None:
            hooks = owner()
            if hooks is None:
                return
            hooks._made_update = True
            if hooks._must_rewrite:
                hooks._write(optimizer.param_groups)

        def after_load_state(_: Any) -> None:
            method = after_load()
            if method is not None:
                method()

        def after_any_step(*_: Any) -> None:
            hooks = owner()
            if hooks is not None:
                hooks._other_made_update = True

        self.optimizer.register_step_pre_hook(before_step)
        self.optimizer.register_load_state_dict_post_hook(after_load_state)
        # A global hook of torch: it also sees optimizers that this object does not know.
        self._any_step_hook = register_optimizer_step_post_hook(after_any_step)

    def old_indices(self) -> list[int | None]:
        """Each group's index when the rates were last set; None for a new group."""
        return [self._indices.get(id(group)) for group in self.optimizer.param_groups]

    def set_rates(self, rates: Sequence[float], *, must_rewrite: bool) -> None:
        """Writes one rate into each parameter group.

        Args:
            rates: one for each group of the optimizer.
            must_rewrite: whether to write them once more right before the next step of the optimizer.
        """
        groups = self.optimizer.param_groups
        self._indices = {id(group): index for index, group in enumerate(groups)}
        self._rates = list(rates)
        self._must_rewrite = must_rewrite
        self._write(groups)

    def is_wrong_optimizer(self) -> bool:
        """Whether another optimizer made the first update, so that the scheduler is bound to the wrong one.

        That this optimizer made no step is no proof. A GradScaler may have skipped it, and ZenFlow and SuperOffload
        step in another process. If this optimizer's gradients exist, it is one of several that train, as in a GAN.
        """
        self._any_step_hook.remove()
        if self._made_update or not self._other_made_update:
            return False
        return all(p.grad is None for group in self.optimizer.param_groups for p in group["params"])

    def _write(self, groups: list[dict[str, Any]]) -> None:
        """Sets the rates of all groups, or of the single group that ZeRO 1 and 2 leave in the list while they step.

        ZeRO narrows the list (`runtime/zero/stage_1_and_2.py`, `_optimizer_step`), so a group is known by identity.
        A dict that is new in a full list is known by its index.

        Raises:
            ScheduleError: a group is known by neither, and the groups have different rates.
        """
        is_full, is_common = len(groups) == len(self._rates), len(set(self._rates)) == 1
        for index, group in enumerate(groups):
            known = self._indices.get(id(group), 0 if is_common else index if is_full else None)
            if known is None:
                raise ScheduleError(
                    "the optimizer's parameter groups were replaced one by one, and they have different learning "
                    "rates: it is unknown which group has which. Make the scheduler after the groups are final."
                )
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(self._rates[known])
            else:
                group["lr"] = self._rates[known]
