"""WSMLR: warm up, then a constant rate for ever. WSDLR: the same, then a decay; the baseline, and the branch.

The rate of optimizer update t (the first is t = 1), with T = warmup_num_steps:

    WSMLR   min + (peak - min) · t / T    while t < T, then peak
    WSDLR   the same up to t = S = decay_start_step, then  end + (peak - end) · d((t - S) / D)  for D updates,
            then the value of its last update

Both speak DeepSpeed's contract (`runtime/lr_schedules.py`, `runtime/engine.py:_take_model_step`) and torch's. They
set the rate once more right before the first update after they were made or something was loaded, through the
optimizer's own step hook, so that nothing that a loader put into the parameter groups is ever used. From then
on `step()` sets it, and DeepSpeed's VariableBatchSizeLR may scale what it set.
"""

import logging
import numbers
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

from wsm_ds.errors import CurveError, ScheduleError, few
from wsm_ds.schedules.curves import Curve, parse_curve

log = logging.getLogger(__name__)

STATE_VERSION = 1
Rates = float | list[float]
OnChange = Literal["refuse", "apply"]
IGNORED = ("total_num_steps", "verbose")
"""Parameters that HF and DeepSpeed fill in for their own schedules. A run that never decays has no total."""


def wsm_rate(update: int, *, peak: float, warmup_num_steps: int, minimum: float = 0.0) -> float:
    """The rate of optimizer update `update` >= 1: linear warmup, then `peak`.

    Example:
        >>> [wsm_rate(t, peak=4.0, warmup_num_steps=4) for t in (1, 2, 3, 4, 5, 10**9)]
        [1.0, 2.0, 3.0, 4.0, 4.0, 4.0]
    """
    if update >= warmup_num_steps:
        return peak
    return minimum + (peak - minimum) * update / warmup_num_steps


def wsd_rate(
    update: int,
    *,
    peak: float,
    warmup_num_steps: int,
    minimum: float = 0.0,
    decay_start_step: int,
    decay_num_steps: int,
    curve: Curve,
    end: float = 0.0,
) -> float:
    """The rate of optimizer update `update` >= 1 of a warmup-stable-decay schedule.

    Example:
        >>> linear = parse_curve("linear")
        >>> [wsd_rate(t, peak=4.0, warmup_num_steps=0, decay_start_step=2, decay_num_steps=4, curve=linear)
        ...  for t in (1, 2, 3, 4, 5, 6, 7)]
        [4.0, 4.0, 3.0, 2.0, 1.0, 0.0, 0.0]
    """
    if update <= decay_start_step:
        return wsm_rate(update, peak=peak, warmup_num_steps=warmup_num_steps, minimum=minimum)
    position = min((update - decay_start_step) / decay_num_steps, 1.0)
    return end + (peak - end) * float(curve(position))


class WSMLR(LRScheduler):
    """Linear warmup, then a constant rate for ever; no total number of steps.

    A subclass of torch's LRScheduler for `isinstance` checks (accelerate, Lightning), but not of its
    initialisation, which would step once and patch the optimizer.

    Args:
        optimizer: a torch optimizer, or DeepSpeed's or accelerate's wrapper of one.
        warmup_min_lr: the rate that the warmup starts from (at t = 0), one for all parameter groups or one each.
        warmup_max_lr: the peak, likewise; if not given the groups' own `initial_lr`, which every scheduler leaves
            there, else their `lr`.
        warmup_num_steps: T, in optimizer updates; 0 and 1 mean no warmup.
        warmup_type: "linear" only; here for configs that say so.
        last_batch_iteration: updates made before, less one, as in DeepSpeed; for a run whose checkpoint has no
            scheduler state to load.
        on_change: what to do if a loaded state was made with other parameters: "refuse" or "apply" the new ones.

    Raises:
        ScheduleError: a parameter is unknown or out of range; the message lists the valid ones.

    Loading: after `engine.load_checkpoint` the next update uses the rate that an uninterrupted run would have used,
    with or without optimizer states. Where DeepSpeed is told not to restore the scheduler
    (`load_lr_scheduler_states=False`, `load_module_only=True`) the warmup begins anew, at its first update.

    Counting: one update per call of `step()`, as DeepSpeed calls it: never for an update that its fp16 or bf16
    optimizer skipped. With a GradScaler of your own call it only if the scale did not fall. DeepSpeed's torch_autocast
    with float16 does not know of skipped updates and counts them.
    """

    _extra_parameters: tuple[str, ...] = ()
    _step_count = 0  # accelerate adds to torch's own counter; nothing here reads it

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
        self.warmup_num_steps = _count("warmup_num_steps", warmup_num_steps)
        own = [float(group.get("initial_lr", group["lr"])) for group in groups]
        for group, rate in zip(groups, own, strict=True):
            group.setdefault("initial_lr", rate)
        self.min_lrs = _per_group("warmup_min_lr", warmup_min_lr, len(groups))
        self.max_lrs = _per_group("warmup_max_lr", own if warmup_max_lr is None else warmup_max_lr, len(groups))
        for low, high in zip(self.min_lrs, self.max_lrs, strict=True):
            if low > high:
                raise ScheduleError(f"warmup_min_lr {low:g} is above warmup_max_lr {high:g}.")
        self.on_change = on_change
        self.base_lrs = list(self.max_lrs)
        self.num_updates = _updates_of({"last_batch_iteration": last_batch_iteration})
        self._positions: dict[int, int] = {}
        self._attach()
        self._apply()

    def rate(self, group: int, update: int) -> float:
        """The rate of parameter group number `group` in optimizer update `update` >= 1."""
        return wsm_rate(
            update, peak=self.max_lrs[group], warmup_num_steps=self.warmup_num_steps, minimum=self.min_lrs[group]
        )

    def get_lr(self) -> list[float]:
        """The rates of the next update, one for each parameter group."""
        return [self.rate(group, self.num_updates + 1) for group in range(len(self.max_lrs))]

    def get_last_lr(self) -> list[float]:
        """The rates that the parameter groups hold now: those of the next update."""
        return list(self._last_lr)

    @property
    def last_batch_iteration(self) -> int:
        """DeepSpeed's count: updates made, less one."""
        return self.num_updates - 1

    @property
    def last_epoch(self) -> int:
        """torch's count: updates made."""
        return self.num_updates

    def step(self, last_batch_iteration: int | None = None, *_: Any, **__: Any) -> None:
        """One more update was made. DeepSpeed calls it after every update that was not skipped.

        Whatever else callers pass (Megatron's `increment`, an epoch, DeepSpeed's train_batch_size) is not a number of
        updates and is ignored; but `step(0)` before the first update says that there was none (VariableBatchSizeLR).

        Raises:
            ScheduleError: another optimizer made the update than the one that this scheduler is bound to.
        """
        if last_batch_iteration != 0 or self.num_updates > 0:
            self._refuse_foreign()
            self.num_updates += 1
        self._apply()
        self._is_dirty = False

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and strings: the count and the parameters that made the rates."""
        return {
            "version": STATE_VERSION,
            "scheduler": type(self).__name__,
            "last_batch_iteration": self.last_batch_iteration,
            **self._parameters(),
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Goes on from a saved state: our own, or DeepSpeed's WarmupLR's and its kin, or a torch scheduler's.

        None, from a checkpoint that was saved without a scheduler, keeps the count that `last_batch_iteration` set.

        Raises:
            ScheduleError: the state counts something else than updates, or was made with other parameters and
                `on_change` is "refuse" (both values are named).
        """
        if state is None:
            log.warning(
                "the checkpoint holds no scheduler state: %s goes on from update %d. If the run is further, set "
                "last_batch_iteration in the scheduler's params.",
                type(self).__name__,
                self.num_updates + 1,
            )
            return
        updates = _updates_of(state)
        self._check_changes(state, updates)
        self.num_updates = updates
        self._apply()

    def _parameters(self) -> dict[str, Any]:
        return {
            "warmup_min_lr": _collapsed(self.min_lrs),
            "warmup_max_lr": _collapsed(self.max_lrs),
            "warmup_num_steps": self.warmup_num_steps,
        }

    def _check_changes(self, state: Mapping[str, Any], updates: int) -> None:
        is_warm = updates >= max(self.warmup_num_steps, state.get("warmup_num_steps", 0))
        irrelevant = ("warmup_min_lr", "warmup_num_steps") if is_warm else ()  # no later rate depends on them
        changes = [
            f"{name}: {state[name]} in the checkpoint, {value} in the configuration"
            for name, value in self._parameters().items()
            if name in state and state[name] != value and name not in irrelevant
        ]
        changes += self._decay_changes(state, updates)
        if not changes:
            return
        if self.on_change == "refuse":
            raise ScheduleError(
                f"{type(self).__name__} was saved with other parameters: {'; '.join(changes)}. Restore them, or set "
                '"on_change": "apply" in the scheduler\'s params to go on with the configuration\'s.'
            )
        log.warning("%s goes on with changed parameters: %s", type(self).__name__, "; ".join(changes))

    def _decay_changes(self, state: Mapping[str, Any], updates: int) -> list[str]:
        start = state.get("decay_start_step")
        if start is not None and updates > start:
            return [f"decay_start_step: the checkpoint's rate decays since update {start}, this schedule never decays"]
        return []

    def _attach(self) -> None:
        """Hooks into the optimizer; a scheduler that is dropped lets go of it."""
        owner = weakref.ref(self)

        def before_step(optimizer: Any, *_: Any) -> None:
            scheduler = owner()
            if scheduler is None:
                return
            scheduler._made_update = True
            if scheduler._is_dirty:
                scheduler._write(optimizer.param_groups)

        def after_load(_: Any) -> None:
            scheduler = owner()
            if scheduler is not None:
                scheduler._apply()

        def after_any_step(*_: Any) -> None:
            scheduler = owner()
            if scheduler is not None:
                scheduler._other_made_update = True

        self._made_update = self._other_made_update = False
        self.optimizer.register_step_pre_hook(before_step)
        self.optimizer.register_load_state_dict_post_hook(after_load)
        self._watch = register_optimizer_step_post_hook(after_any_step)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_watch", "_positions")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy of an optimizer has neither the hooks nor the group dicts of the original.
        self.__dict__.update(state)
        self._positions = {}
        self._attach()
        self._apply()

    def _refuse_foreign(self) -> None:
        """At the first step only: an update was made, but not by the optimizer that this scheduler is bound to.

        That nobody stepped is no proof: a GradScaler may have skipped it, ZenFlow and SuperOffload step in another
        process. Nor is it where gradients wait in the bound optimizer: a GAN's other half may have stepped.
        """
        self._watch.remove()
        if self._made_update or not self._other_made_update:
            return
        if any(p.grad is not None for group in self.optimizer.param_groups for p in group["params"]):
            return
        raise ScheduleError(
            f"{type(self).__name__} was stepped, but the optimizer it is bound to made no update: it is bound to "
            f"another optimizer ({type(self.optimizer).__name__}) than the one that trains. Give deepspeed.initialize "
            "the class or a function optimizer -> scheduler, or name it in the ds_config: these are bound rightly."
        )

    def _apply(self) -> None:
        """Writes the next update's rates into all parameter groups."""
        groups = self.optimizer.param_groups
        if len(groups) != len(self.max_lrs):
            self._resize(groups)
        self._positions = {id(group): number for number, group in enumerate(groups)}
        self._last_lr = self.get_lr()
        self._write(groups)
        self._is_dirty = True

    def _resize(self, groups: list[dict[str, Any]]) -> None:
        """Parameter groups were added or removed: each keeps its rates, a new one takes those that all share."""
        kept = [self._positions.get(id(group)) for group in groups]
        self.min_lrs = _resized("warmup_min_lr", self.min_lrs, kept)
        self.max_lrs = _resized("warmup_max_lr", self.max_lrs, kept)
        self.base_lrs = list(self.max_lrs)

    def _write(self, groups: list[dict[str, Any]]) -> None:
        """Sets the rates of `groups`: all of them, or the one that ZeRO 1 and 2 leave visible while they step.

        A group is known by identity (`stage_1_and_2.py:2969` narrows the list), an unknown one by its place in a full
        list.

        Raises:
            ScheduleError: a group is neither, and the groups' rates differ.
        """
        is_full, is_common = len(groups) == len(self._last_lr), len(set(self._last_lr)) == 1
        for place, group in enumerate(groups):
            number = self._positions.get(id(group), 0 if is_common else place if is_full else None)
            if number is None:
                raise ScheduleError("the optimizer's parameter groups were replaced one by one; which has which rate?")
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(self._last_lr[number])
            else:
                group["lr"] = self._last_lr[number]

    def _refuse_unknown(self, others: Mapping[str, Any]) -> None:
        unknown = [name for name in others if name not in IGNORED]
        if unknown:
            valid = ("warmup_min_lr (0)", "warmup_max_lr (the optimizer's lr)", "warmup_num_steps (1000)",
                     'on_change ("refuse")', "last_batch_iteration (-1)", *self._extra_parameters)  # fmt: skip
            raise ScheduleError(
                f"{type(self).__name__} has no parameter {', '.join(unknown)}; it has {', '.join(valid)}."
            )


class WSDLR(WSMLR):
    """WSMLR up to update `decay_start_step`, then a decay over `decay_num_steps` updates.

    The baseline for a merge, and the branch that one takes from a stable checkpoint: a WSMLR state loads as it is.

    Args:
        decay_start_step: S, the last update at the peak; the step of the checkpoint that the branch starts from.
        decay_num_steps: D >= 1, in updates.
        decay_curve: as in `wsm_ds.schedules.curves` ("1-sqrt", "linear", "cosine", …).
        decay_min_lr: the rate that d = 0 stands for.
        optimizer, parameters: the others are WSMLR's.
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
        self.decay_start_step = _count("decay_start_step", decay_start_step)
        self.decay_num_steps = _count("decay_num_steps", decay_num_steps)
        if self.decay_num_steps < 1:
            raise ScheduleError("decay_num_steps is 0; it is at least 1. WSMLR is the schedule without a decay.")
        (self.decay_min_lr,) = _per_group("decay_min_lr", decay_min_lr, 1)
        try:
            self.curve = parse_curve(str(decay_curve))
        except CurveError as error:
            raise ScheduleError(f"decay_curve: {error}") from error
        super().__init__(optimizer, **parameters)
        if self.decay_start_step < self.warmup_num_steps:
            raise ScheduleError(
                f"decay_start_step {decay_start_step} lies inside the warmup of {self.warmup_num_steps} updates."
            )

    def rate(self, group: int, update: int) -> float:
        """The rate of parameter group number `group` in optimizer update `update` >= 1."""
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

    def _decay_changes(self, state: Mapping[str, Any], updates: int) -> list[str]:
        if "decay_start_step" not in state and updates > self.decay_start_step:
            return [f"decay_start_step: the checkpoint's rate is constant until update {updates}, the configuration "
                    f"decays since {self.decay_start_step}"]  # fmt: skip
        return []


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's or accelerate's wrappers.

    Raises:
        ScheduleError: there is none.
    """
    inner = optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, torch.optim.Optimizer):
        raise ScheduleError(f"{type(optimizer).__name__} is neither a torch optimizer nor a wrapper of one.")
    return inner


def _updates_of(state: Mapping[str, Any]) -> int:
    """Updates made, from the state of this or another scheduler.

    DeepSpeed counts from -1 (`last_batch_iteration` is 3 after four updates), torch from 0 (`last_epoch` is 4).
    """
    if state.get("version", STATE_VERSION) != STATE_VERSION:
        raise ScheduleError(f"the scheduler state has version {state['version']}; this wsm_ds reads {STATE_VERSION}.")
    if "last_batch_iteration" in state:
        started = state["last_batch_iteration"]
        return 0 if started == -1 else _count("last_batch_iteration", started) + 1
    if "last_epoch" in state and "num_bad_epochs" not in state:  # ReduceLROnPlateau counts metrics, not updates
        return _count("last_epoch", state["last_epoch"])
    raise ScheduleError(
        f"a scheduler state with {few(sorted(map(str, state)))} does not count optimizer updates (Megatron's counts "
        "samples). Load the checkpoint with load_lr_scheduler_states=False, and set last_batch_iteration in the "
        "scheduler's params to the updates made so far, less one."
    )


def _count(name: str, value: Any) -> int:
    if not _is_rate(value) or int(value) != value:
        raise ScheduleError(f"{name} is {value!r}; it is a whole number of updates, 0 or more.")
    return int(value)


def _is_rate(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 <= float(value) < float("inf")


def _per_group(name: str, value: Any, groups: int) -> list[float]:
    plain = value.tolist() if isinstance(value, torch.Tensor) else value
    listed = list(plain) if isinstance(plain, Iterable) and not isinstance(plain, str) else [plain] * groups
    if len(listed) != groups:
        raise ScheduleError(f"{name} has {len(listed)} values for {groups} parameter groups.")
    for rate in listed:
        if not _is_rate(rate):
            raise ScheduleError(f"{name} is {value!r}; a learning rate is a number, 0 or more.")
    return [float(rate) for rate in listed]


def _resized(name: str, rates: list[float], kept: list[int | None]) -> list[float]:
    """The rates of the groups that were at the places `kept`; None is a new group."""
    if None not in kept:
        return [rates[place] for place in kept if place is not None]
    return _per_group(name, _collapsed(rates), len(kept))


def _collapsed(rates: list[float]) -> Rates:
    """One number if all groups share it, so that a state fits other parameter groups too."""
    return rates[0] if len(set(rates)) == 1 else list(rates)
