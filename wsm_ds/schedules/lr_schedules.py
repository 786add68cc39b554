"""The schedulers WSMLR and WSDLR, for DeepSpeed and for plain torch.

WSMLR warms up and then keeps a constant rate without end. WSDLR does the same and then decays: it is the baseline to
compare a merge with, and the branch that one trains from a stable checkpoint. `wsm_ds.schedules.rates` has the
formulas.

Both follow DeepSpeed's contract (`runtime/lr_schedules.py`, and `runtime/engine.py`, `_take_model_step`) and torch's.
They write the rates when they are made, after each load and after each update. They write them once more right before
the first update that follows a start or a load (`wsm_ds.schedules.optimizer_hooks`), so that no update uses rates that
a loader wrote into the parameter groups. Later rates are written once only, because DeepSpeed's VariableBatchSizeLR
scales them in place.
"""

import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LRScheduler

from wsm_ds.errors import CurveError, ScheduleError
from wsm_ds.schedules.curves import parse_curve
from wsm_ds.schedules.optimizer_hooks import OptimizerHooks, unwrapped
from wsm_ds.schedules.parameters import Rates, collapsed, peak_rates, rates_per_group, regrouped, update_count
from wsm_ds.schedules.rates import wsd_rate, wsm_rate
from wsm_ds.schedules.saved_state import STATE_VERSION, parameter_changes, updates_in_state

log = logging.getLogger(__name__)

OnChange = Literal["refuse", "apply"]
IGNORED = ("total_num_steps", "verbose")
"""Parameters that HF and DeepSpeed fill in for their own schedules. A run that never decays has no total."""


class WSMLR(LRScheduler):
    """Linear warmup, then a constant rate without end; there is no total number of steps.

    It is a subclass of torch's LRScheduler for `isinstance` checks (accelerate, Lightning), but it does not call
    torch's `__init__`, which would step once and patch the optimizer.

    Loading: after `engine.load_checkpoint` the next update uses the rate that an uninterrupted run would have used,
    with or without optimizer states. Where DeepSpeed is told not to restore the scheduler
    (`load_lr_scheduler_states=False`, `load_module_only=True`) the warmup starts again at its first update.

    Counting: one update for each call of `step()`. DeepSpeed does not call it for an update that its fp16 or bf16
    optimizer skipped. With a GradScaler of your own, call it only if the scale did not fall. DeepSpeed's
    torch_autocast with float16 does not know of skipped updates and counts them.

    Args:
        optimizer: a torch optimizer, or a wrapper of one by DeepSpeed or accelerate.
        warmup_min_lr: the rate that the warmup starts from (at t = 0); one for all parameter groups or one for each.
        warmup_max_lr: the peak; a number, or a list with one for each parameter group. Default: the groups'
            `initial_lr`, which every scheduler leaves there, or else their `lr`. If the optimizer gave its groups
            different rates, a number must be one of them, and every group keeps its own rate as its peak.
        warmup_num_steps: T, in optimizer updates; 0 and 1 mean no warmup.
        warmup_type: only "linear"; it exists for configurations that name it.
        last_batch_iteration: updates made so far, minus one, as DeepSpeed counts. For a run whose checkpoint has no
            scheduler state.
        on_change: what to do if a loaded state was saved with other parameters: "refuse", or "apply" the new ones.
        **others: parameters that Hugging Face and DeepSpeed fill in for all schedules (`IGNORED`).

    Attributes:
        optimizer: the torch optimizer, without wrappers.
        num_updates: optimizer updates made so far.
        min_lrs: the rate at t = 0 of each parameter group.
        max_lrs: the peak of each parameter group.
        base_lrs: the same, under torch's name.

    Raises:
        ScheduleError: a parameter is unknown or out of range (names it, and the valid ones); or the groups have
            different rates and `warmup_max_lr` is a number that is none of them (names all rates).
    """

    _extra_parameters: tuple[str, ...] = ()
    _step_count = 0  # accelerate adds to torch's counter (accelerate/scheduler.py); nothing here reads it

    def __init__(
        self,
        optimizer: Any,
        warmup_min_lr: Rates = 0.0,
        warmup_max_lr: Rates | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "linear",
        last_batch_iteration: int = -1,
        on_change: OnChange = "refuse",
        **others: Any,
    ) -> None:
        self._refuse_unknown(others)
        if warmup_type != "linear":
            raise ScheduleError(f'warmup_type is {warmup_type!r}; {type(self).__name__} has only a "linear" warmup.')
        if on_change not in ("refuse", "apply"):
            raise ScheduleError(f'on_change is {on_change!r}; it is "refuse" or "apply".')
        self.optimizer = unwrapped(optimizer)
        groups = self.optimizer.param_groups
        self.warmup_num_steps = update_count("warmup_num_steps", warmup_num_steps)
        initial_lrs = [_own_rate(self.optimizer, group) for group in groups]
        for group, rate in zip(groups, initial_lrs, strict=True):
            # torch's schedulers leave their peak here; a scheduler that is made later starts from it.
            group.setdefault("initial_lr", rate)
        self.min_lrs = rates_per_group("warmup_min_lr", warmup_min_lr, len(groups))
        self.max_lrs = peak_rates(warmup_max_lr, initial_lrs)
        for low, high in zip(self.min_lrs, self.max_lrs, strict=True):
            if low > high:
                raise ScheduleError(f"warmup_min_lr {low:g} is above warmup_max_lr {high:g}.")
        self.on_change = on_change
        self.base_lrs = list(self.max_lrs)
        self.num_updates = updates_in_state({"last_batch_iteration": last_batch_iteration})
        self._hooks = OptimizerHooks(self.optimizer, self._apply)
        self._apply()

    def rate(self, group: int, update: int) -> float:
        """The rate of one parameter group in one update.

        Args:
            group: the group's index in the optimizer's list.
            update: the update's number, from 1.
        """
        return wsm_rate(
            update, peak=self.max_lrs[group], warmup_num_steps=self.warmup_num_steps, minimum=self.min_lrs[group]
        )

    def get_lr(self) -> list[float]:
        """The rates of the next update, one for each parameter group."""
        return [self.rate(group, self.num_updates + 1) for group in range(len(self.max_lrs))]

    def get_last_lr(self) -> list[float]:
        """The rates that were written into the parameter groups last: those of the next update."""
        return list(self._last_lr)

    @property
    def last_batch_iteration(self) -> int:
        """DeepSpeed's count: updates made so far, minus one."""
        return self.num_updates - 1

    @property
    def last_epoch(self) -> int:
        """torch's count: updates made so far."""
        return self.num_updates

    def step(self, last_batch_iteration: int | None = None, *_: Any, **__: Any) -> None:
        """Counts one update and writes the rates of the next. DeepSpeed calls it after each update it did not skip.

        Args:
            last_batch_iteration: ignored, except that 0 before the first update counts none: VariableBatchSizeLR
                calls `step(0)` when it is made. Other values mean different things to different callers (an epoch,
                DeepSpeed's train_batch_size).
            *_: ignored.
            **__: ignored (Megatron's `increment`).

        Raises:
            ScheduleError: the first update was made by an optimizer that this scheduler is not bound to.
        """
        if last_batch_iteration != 0 or self.num_updates > 0:
            self._refuse_wrong_optimizer()
            self.num_updates += 1
        self._apply(must_rewrite=False)

    def state_dict(self) -> dict[str, Any]:
        """Returns plain numbers and strings: the count of updates and the parameters that the rates depend on."""
        return {
            "version": STATE_VERSION,
            "scheduler": type(self).__name__,
            "last_batch_iteration": self.last_batch_iteration,
            **self._parameters(),
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Continues from a saved state.

        Args:
            state: the state of a WSMLR or WSDLR, of DeepSpeed's WarmupLR and its subclasses, or of a torch scheduler.
                None comes from a checkpoint that was saved without a scheduler; it keeps the present count.

        Raises:
            ScheduleError: the state counts something else than updates, or it was saved with other parameters and
                `on_change` is "refuse" (both values are named).
        """
        if state is None:
            log.warning(
                "the checkpoint holds no scheduler state: %s continues with update %d. If the run has made more "
                "updates, set last_batch_iteration in the scheduler's params.",
                type(self).__name__,
                self.num_updates + 1,
            )
            return
        updates = updates_in_state(state)
        self._accept_changes(parameter_changes(state, self._parameters(), updates))
        self.num_updates = updates
        self._apply()

    def _parameters(self) -> dict[str, Any]:
        return {
            "warmup_min_lr": collapsed(self.min_lrs),
            "warmup_max_lr": collapsed(self.max_lrs),
            "warmup_num_steps": self.warmup_num_steps,
        }

    def _accept_changes(self, changes: list[str]) -> None:
        if not changes:
            return
        if self.on_change == "refuse":
            raise ScheduleError(
                f"{type(self).__name__} was saved with other parameters: {'; '.join(changes)}. Restore them, or set "
                '"on_change": "apply" in the scheduler\'s params to continue with those of the configuration.'
            )
        log.warning("%s continues with changed parameters: %s", type(self).__name__, "; ".join(changes))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_hooks"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copied optimizer has neither the hooks nor the group dicts of the original.
        self.__dict__.update(state)
        self._hooks = OptimizerHooks(self.optimizer, self._apply)
        self._apply()

    def _apply(self, must_rewrite: bool = True) -> None:
        """Writes the next update's rates into all parameter groups."""
        if len(self.optimizer.param_groups) != len(self.max_lrs):
            # DeepSpeed removes groups without parameters after the scheduler was made (runtime/engine.py).
            old_indices = self._hooks.old_indices()
            self.min_lrs = regrouped("warmup_min_lr", self.min_lrs, old_indices)
            self.max_lrs = regrouped("warmup_max_lr", self.max_lrs, old_indices)
            self.base_lrs = list(self.max_lrs)
        self._last_lr = self.get_lr()  # VariableBatchSizeLR reads torch's private name
        self._hooks.set_rates(self._last_lr, must_rewrite=must_rewrite)

    def _refuse_wrong_optimizer(self) -> None:
        if self._hooks.is_wrong_optimizer():
            raise ScheduleError(
                f"{type(self).__name__} was stepped, but the optimizer it is bound to made no update: it is bound to "
                f"another optimizer ({type(self.optimizer).__name__}) than the one that trains. Give "
                "deepspeed.initialize the class or a function optimizer -> scheduler, or name the scheduler in the "
                "ds_config: then DeepSpeed binds it to the right one."
            )

    def _refuse_unknown(self, others: Mapping[str, Any]) -> None:
        unknown = [name for name in others if name not in IGNORED]
        if unknown:
            valid = ("warmup_min_lr (0)", "warmup_max_lr (the optimizer's lr)", "warmup_num_steps (1000)",
                     'on_change ("refuse")', "last_batch_iteration (-1)", *self._extra_parameters)  # fmt: skip
            raise ScheduleError(
                f"{type(self).__name__} has no parameter {', '.join(unknown)}; it has {', '.join(valid)}."
            )


def _own_rate(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> float:
    """The rate that the optimizer was made with, of one parameter group."""
    rate = group.get("initial_lr", group["lr"])
    if rate is None:
        raise ScheduleError(
            f"{type(optimizer).__name__} has no learning rate (lr=None): it computes its own, and a scheduler would "
            "change nothing. Give it a rate (for Adafactor: lr=…, relative_step=False), or train without a scheduler."
        )
    return float(rate)


class WSDLR(WSMLR):
    """WSMLR up to update `decay_start_step`, then a decay over `decay_num_steps` updates.

    It is the baseline for a merge, and the branch that one trains from a stable checkpoint: it loads the state of a
    WSMLR as it is.

    Args:
        optimizer: as for WSMLR.
        decay_start_step: S, the last update at the peak: the step of the checkpoint that the branch starts from.
        decay_num_steps: D >= 1, the duration of the decay in updates.
        decay_curve: a text for `wsm_ds.schedules.curves.parse_curve` ("1-sqrt", "linear", "cosine", …).
        decay_min_lr: the rate where d = 0; one for all parameter groups.
        **parameters: those of WSMLR.

    Raises:
        ScheduleError: a parameter is missing, unknown or out of range; names it.
    """

    _extra_parameters = ("decay_start_step", "decay_num_steps", 'decay_curve ("1-sqrt")', "decay_min_lr (0)")

    def __init__(
        self,
        optimizer: Any,
        *,
        decay_start_step: int | None = None,
        decay_num_steps: int | None = None,
        decay_curve: str = "1-sqrt",
        decay_min_lr: float = 0.0,
        **parameters: Any,
    ) -> None:
        if decay_start_step is None or decay_num_steps is None:
            raise ScheduleError("WSDLR needs decay_start_step (the last update at the peak) and decay_num_steps.")
        self.decay_start_step = update_count("decay_start_step", decay_start_step)
        self.decay_num_steps = update_count("decay_num_steps", decay_num_steps)
        if self.decay_num_steps < 1:
            raise ScheduleError("decay_num_steps is 0; it is at least 1. WSMLR is the schedule without a decay.")
        (self.decay_min_lr,) = rates_per_group("decay_min_lr", decay_min_lr, 1)
        try:
            self.curve = parse_curve(str(decay_curve))
        except CurveError as error:
            raise ScheduleError(f"decay_curve: {error}") from error
        super().__init__(optimizer, **parameters)
        if self.decay_start_step < self.warmup_num_steps:
            raise ScheduleError(
                f"decay_start_step {decay_start_step} lies inside the warmup of {self.warmup_num_steps} updates."
            )
        if self.decay_min_lr > min(self.max_lrs):
            raise ScheduleError(
                f"decay_min_lr {self.decay_min_lr:g} is above the peak of a parameter group, whose rate would rise; "
                f"the peaks are {self.max_lrs}."
            )

    def rate(self, group: int, update: int) -> float:
        """The rate of one parameter group in one update.

        Args:
            group: the group's index in the optimizer's list.
            update: the update's number, from 1.
        """
        return wsd_rate(
            update,
            peak=self.max_lrs[group],
            warmup_num_steps=self.warmup_num_steps,
            minimum=self.min_lrs[group],
            decay_start_step=self.decay_start_step,
            decay_num_steps=self.decay_num_steps,
            curve=self.curve,
            end=self.decay_min_lr,
        )

    def _parameters(self) -> dict[str, Any]:
        return super()._parameters() | {
            "decay_start_step": self.decay_start_step,
            "decay_num_steps": self.decay_num_steps,
            "decay_curve": str(self.curve),
            "decay_min_lr": self.decay_min_lr,
        }
