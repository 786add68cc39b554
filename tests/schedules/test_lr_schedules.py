"""Rates with round numbers, and the torch side of the schedulers. What the optimizer used is what counts."""

from __future__ import annotations

import copy
import json
import pickle
from typing import TYPE_CHECKING, Any

import pytest
from lazy import torch

import wsm_ds
from wsm_ds.errors import ScheduleError
from wsm_ds.schedules.curves import parse_curve
from wsm_ds.schedules.rates import wsd_rate, wsm_rate

if TYPE_CHECKING:
    from recording_optimizer import Recorder


def optimizer(groups: int = 1, lr: float = 8.0, tensor: bool = False) -> Recorder:
    from recording_optimizer import Recorder

    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(groups)]
    return Recorder([{"params": [p], "lr": torch.tensor(lr) if tensor else lr} for p in parameters])


def train(recorder: Recorder, scheduler: wsm_ds.WSMLR, updates: int) -> list[float]:
    before = len(recorder.used)
    for _ in range(updates):
        recorder.step()
        scheduler.step()
    return [rates[0] for rates in recorder.used[before:]]


def test_the_warmup_reaches_the_peak_with_its_last_update_and_stays_for_ever() -> None:
    assert [wsm_rate(t, peak=8.0, warmup_num_steps=4) for t in range(1, 7)] == [2, 4, 6, 8, 8, 8]
    assert [wsm_rate(t, peak=8.0, warmup_num_steps=4, minimum=4.0) for t in range(1, 6)] == [5, 6, 7, 8, 8]
    assert wsm_rate(10**12, peak=8.0, warmup_num_steps=4) == 8.0


@pytest.mark.parametrize("steps", [0, 1])
def test_no_warmup_means_the_peak_from_the_first_update(steps: int) -> None:
    recorder = optimizer()
    assert train(recorder, wsm_ds.WSMLR(recorder, warmup_max_lr=8.0, warmup_num_steps=steps), 3) == [8, 8, 8]


def test_the_decay_starts_after_its_start_step_and_ends_with_its_last_update() -> None:
    common: dict[str, Any] = {"peak": 8.0, "warmup_num_steps": 2, "decay_start_step": 4, "decay_num_steps": 4}
    linear = [wsd_rate(t, **common, curve=parse_curve("linear")) for t in range(1, 11)]
    assert linear == [4, 8, 8, 8, 6, 4, 2, 0, 0, 0]
    floored = [wsd_rate(t, **common, curve=parse_curve("linear"), end=4.0) for t in range(4, 10)]
    assert floored == [8, 7, 6, 5, 4, 4]
    assert wsd_rate(5, **common, curve=parse_curve("1-sqrt")) == 4.0  # 1 - sqrt(1/4) of 8


@pytest.mark.parametrize("tensor", [False, True])
def test_the_optimizer_uses_the_formula_from_the_very_first_update(tensor: bool) -> None:
    recorder = optimizer(groups=2, tensor=tensor)
    scheduler = wsm_ds.WSMLR(recorder, warmup_max_lr=[8.0, 4.0], warmup_num_steps=4)
    assert scheduler.get_last_lr() == [2.0, 1.0]
    train(recorder, scheduler, 5)
    assert recorder.used == [[2, 1], [4, 2], [6, 3], [8, 4], [8, 4]]
    assert scheduler.get_last_lr() == [8.0, 4.0]
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    assert (scheduler.last_batch_iteration, scheduler.last_epoch) == (4, 5)


def test_the_peak_is_the_optimizers_own_rate_unless_given() -> None:
    recorder = optimizer(lr=3.0)
    assert train(recorder, wsm_ds.WSMLR(recorder, warmup_num_steps=3), 4) == [1, 2, 3, 3]


def layered(rates: list[float], **options: Any) -> Recorder:
    """An optimizer that gives each of its groups a rate of its own, as layer-wise decay and muP do."""
    from recording_optimizer import Recorder

    return Recorder([{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": rate} for rate in rates], **options)


@pytest.mark.parametrize("peak", [8.0, 1.0, 8.0 * (1 + 1e-8), None])
def test_groups_of_different_rates_keep_them_as_peaks_if_the_number_is_one_of_them(peak: float | None) -> None:
    recorder = layered([8.0, 4.0, 1.0])
    train(recorder, wsm_ds.WSMLR(recorder, warmup_max_lr=peak, warmup_num_steps=4), 5)
    assert recorder.used == [[2, 1, 0.25], [4, 2, 0.5], [6, 3, 0.75], [8, 4, 1], [8, 4, 1]]


def test_a_number_that_is_none_of_the_groups_different_rates_is_refused_with_both() -> None:
    words = r"warmup_max_lr is the number 2, .* rates, \[8\.0, 4\.0, 1\.0\], and none of them is 2\. .*or give a list"
    with pytest.raises(ScheduleError, match=words):
        wsm_ds.WSMLR(layered([8.0, 4.0, 1.0]), warmup_max_lr=2.0)
    given = wsm_ds.WSMLR(layered([8.0, 4.0, 1.0]), warmup_max_lr=[2.0, 2.0, 2.0], warmup_num_steps=0)
    assert given.get_last_lr() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("rates", [[3.0], [3.0, 3.0], [3.0, 3.0 * (1 + 1e-8)]])
def test_a_number_is_the_peak_of_groups_that_have_one_common_rate(rates: list[float]) -> None:
    scheduler = wsm_ds.WSMLR(layered(rates), warmup_max_lr=8.0, warmup_num_steps=0)
    assert scheduler.get_last_lr() == [8.0] * len(rates)


@pytest.mark.parametrize("scheduler_first", [True, False])
def test_groups_of_different_rates_resume_inside_the_warmup_with_their_own_peaks(scheduler_first: bool) -> None:
    first = layered([8.0, 4.0])
    scheduler = wsm_ds.WSMLR(first, warmup_max_lr=8.0, warmup_num_steps=4)
    train(first, scheduler, 2)
    second = layered([8.0, 4.0])
    if not scheduler_first:  # its groups then have the rates of the third update
        second.load_state_dict(first.state_dict())
    resumed = wsm_ds.WSMLR(second, warmup_max_lr=8.0, warmup_num_steps=4)
    if scheduler_first:
        second.load_state_dict(first.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    train(second, resumed, 3)
    assert second.used == [[6, 3], [8, 4], [8, 4]]


def test_a_run_whose_groups_had_one_rate_does_not_get_two_at_a_resume() -> None:
    before = wsm_ds.WSMLR(layered([8.0, 8.0]), warmup_max_lr=8.0)
    now = wsm_ds.WSMLR(layered([8.0, 4.0]), warmup_max_lr=8.0)
    with pytest.raises(ScheduleError, match=r"8\.0 in the checkpoint, \[8\.0, 4\.0\] in the configuration"):
        now.load_state_dict(before.state_dict())


def test_step_takes_whatever_callers_pass_and_counts_one_update() -> None:
    recorder = optimizer()
    scheduler = wsm_ds.WSMLR(recorder, warmup_max_lr=8.0, warmup_num_steps=8)
    for arguments, options in (((), {}), ((1024,), {}), ((), {"increment": 64}), ((), {"epoch": 7}), ((3, 4), {})):
        recorder.step()
        scheduler.step(*arguments, **options)
    assert [rates[0] for rates in recorder.used] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("order", ["scheduler first", "optimizer first"])
@pytest.mark.parametrize("updates", [0, 2, 6])
def test_resume_is_exact_whichever_state_is_loaded_first(order: str, updates: int) -> None:
    first = optimizer()
    scheduler = wsm_ds.WSMLR(first, warmup_max_lr=8.0, warmup_num_steps=4)
    train(first, scheduler, updates)
    state = json.loads(json.dumps(scheduler.state_dict()))  # plain data
    saved = copy.deepcopy(first.state_dict())
    rest = train(first, scheduler, 4)
    second = optimizer()
    resumed = wsm_ds.WSMLR(second, warmup_max_lr=8.0, warmup_num_steps=4)
    loads = [lambda: resumed.load_state_dict(state), lambda: second.load_state_dict(saved)]
    for load in loads if order == "scheduler first" else reversed(loads):
        load()
    assert resumed.get_last_lr() == [rest[0]] == [group["lr"] for group in second.param_groups]
    assert train(second, resumed, 4) == rest


def test_a_rate_that_was_put_into_the_groups_by_somebody_else_is_not_used() -> None:
    recorder = optimizer()
    scheduler = wsm_ds.WSMLR(recorder, warmup_max_lr=8.0, warmup_num_steps=0)
    recorder.param_groups[0]["lr"] = 99.0
    assert train(recorder, scheduler, 1) == [8]


def test_a_group_that_is_stepped_alone_gets_its_own_rate() -> None:
    recorder = optimizer(groups=2)
    scheduler = wsm_ds.WSMLR(recorder, warmup_max_lr=[8.0, 4.0], warmup_num_steps=0)
    groups = recorder.param_groups
    for group in groups:  # as ZeRO 1 and 2 do
        recorder.param_groups = [group]
        recorder.step()
    recorder.param_groups = groups
    scheduler.step()
    assert recorder.used == [[8.0], [4.0]]


def test_a_group_that_nobody_knows_gets_the_common_rate_or_is_refused() -> None:
    for peak, outcome in (([8.0, 8.0], [[8.0]]), ([8.0, 4.0], None)):
        recorder = optimizer(groups=2)
        scheduler = wsm_ds.WSMLR(recorder, warmup_max_lr=peak, warmup_num_steps=0)
        recorder.param_groups = [dict(recorder.param_groups[1])]
        if outcome is None:
            with pytest.raises(ScheduleError, match="groups were replaced"):
                recorder.step()
        else:
            recorder.step()
            assert recorder.used == outcome
        assert scheduler.get_last_lr() == peak


def test_changed_parameter_groups_keep_a_common_rate() -> None:
    first = optimizer(groups=1)
    scheduler = wsm_ds.WSMLR(first, warmup_max_lr=8.0, warmup_num_steps=4)
    train(first, scheduler, 2)
    second = optimizer(groups=3)
    resumed = wsm_ds.WSMLR(second, warmup_max_lr=8.0, warmup_num_steps=4)
    resumed.load_state_dict(scheduler.state_dict())
    train(second, resumed, 1)
    assert second.used == [[6, 6, 6]]
    second.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0})
    train(second, resumed, 2)
    assert second.used[-1] == [8, 8, 8, 8]


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"warmup_max_lr": 4.0}, r"warmup_max_lr: 8\.0 in the checkpoint, 4\.0 in the configuration"),
        ({"warmup_num_steps": 6}, r"warmup_num_steps: 4 in the checkpoint, 6 in the configuration"),
        ({"warmup_min_lr": 1.0}, r"warmup_min_lr: 0\.0 in the checkpoint, 1\.0 in the configuration"),
    ],
)
def test_a_changed_schedule_is_refused_with_both_values_or_applied_at_once(
    parameters: dict[str, Any], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = optimizer()
    scheduler = wsm_ds.WSMLR(first, warmup_max_lr=8.0, warmup_num_steps=4)
    train(first, scheduler, 2)
    changed = {"warmup_max_lr": 8.0, "warmup_num_steps": 4} | parameters
    with pytest.raises(ScheduleError, match=words):
        wsm_ds.WSMLR(optimizer(), **changed).load_state_dict(scheduler.state_dict())
    second = optimizer()
    resumed = wsm_ds.WSMLR(second, **changed, on_change="apply")
    resumed.load_state_dict(scheduler.state_dict())
    assert "continues with changed parameters" in caplog.text
    assert train(second, resumed, 1) == [resumed.rate(0, 3)]
    assert resumed.rate(0, 3) != scheduler.rate(0, 3)


@pytest.mark.parametrize(
    ("state", "updates"),
    [
        ({"last_batch_iteration": 5}, 6),  # DeepSpeed's WarmupLR after six updates
        ({"last_batch_iteration": -1}, 0),
        ({"last_epoch": 6, "_step_count": 7, "base_lrs": [1.0], "_last_lr": [1.0]}, 6),  # torch after six updates
    ],
)
def test_states_of_other_schedulers_are_gone_on_from(state: dict[str, Any], updates: int) -> None:
    recorder = optimizer()
    scheduler = wsm_ds.WSMLR(recorder, warmup_max_lr=8.0, warmup_num_steps=8)
    scheduler.load_state_dict(state)
    assert scheduler.num_updates == updates
    assert train(recorder, scheduler, 1) == [updates + 1]


def test_a_torch_schedulers_own_count_is_understood() -> None:
    recorder = optimizer()
    torch_scheduler = torch.optim.lr_scheduler.StepLR(recorder, 100)
    for _ in range(3):
        recorder.step()
        torch_scheduler.step()
    scheduler = wsm_ds.WSMLR(optimizer(), warmup_max_lr=8.0, warmup_num_steps=8)
    scheduler.load_state_dict(torch_scheduler.state_dict())
    assert scheduler.num_updates == 3


def test_a_count_of_samples_is_refused_with_what_to_do() -> None:
    with pytest.raises(ScheduleError, match=r"counts samples.*last_batch_iteration"):
        wsm_ds.WSMLR(optimizer()).load_state_dict({"num_steps": 4096, "max_lr": 1.0})


def test_no_saved_state_keeps_the_count_that_was_given(caplog: pytest.LogCaptureFixture) -> None:
    recorder = optimizer()
    scheduler = wsm_ds.WSMLR(recorder, warmup_max_lr=8.0, warmup_num_steps=8, last_batch_iteration=3)
    scheduler.load_state_dict(None)
    assert "continues with update 5" in caplog.text
    assert train(recorder, scheduler, 1) == [5]


def test_a_decay_branches_from_a_stable_state_and_refuses_to_start_in_the_past() -> None:
    first = optimizer()
    stable = wsm_ds.WSMLR(first, warmup_max_lr=8.0, warmup_num_steps=2)
    train(first, stable, 6)
    decay: dict[str, Any] = {"decay_num_steps": 4, "decay_curve": "linear", "warmup_max_lr": 8.0, "warmup_num_steps": 2}
    second = optimizer()
    branch = wsm_ds.WSDLR(second, decay_start_step=6, **decay)
    branch.load_state_dict(stable.state_dict())
    assert train(second, branch, 5) == [6, 4, 2, 0, 0]
    with pytest.raises(ScheduleError, match="constant until update 6, the configuration decays since 5"):
        wsm_ds.WSDLR(optimizer(), decay_start_step=5, **decay).load_state_dict(stable.state_dict())
    with pytest.raises(ScheduleError, match="decays since update 6, this schedule never decays"):
        wsm_ds.WSMLR(optimizer(), warmup_max_lr=8.0, warmup_num_steps=2).load_state_dict(branch.state_dict())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda o: wsm_ds.WSMLR(o, warmup_steps=3), r"no parameter warmup_steps; it has warmup_min_lr \(0\)"),
        (lambda o: wsm_ds.WSMLR(o, warmup_type="log"), 'only a "linear" warmup'),
        (lambda o: wsm_ds.WSMLR(o, warmup_num_steps=-1), "warmup_num_steps is -1"),
        (lambda o: wsm_ds.WSMLR(o, warmup_num_steps=2.5), r"warmup_num_steps is 2\.5"),  # type: ignore[arg-type]
        (lambda o: wsm_ds.WSMLR(o, warmup_max_lr=float("nan")), "warmup_max_lr is nan"),
        (lambda o: wsm_ds.WSMLR(o, warmup_max_lr="auto"), "warmup_max_lr is 'auto'"),  # type: ignore[arg-type]
        (lambda o: wsm_ds.WSMLR(o, warmup_max_lr=[1.0, 2.0]), "2 values for 1 parameter groups"),
        (lambda o: wsm_ds.WSMLR(o, warmup_min_lr=9.0, warmup_max_lr=8.0), "warmup_min_lr 9 is above warmup_max_lr 8"),
        (lambda o: wsm_ds.WSMLR(o, on_change="ignore"), "on_change is 'ignore'"),  # type: ignore[arg-type]
        (lambda o: wsm_ds.WSMLR(o, last_batch_iteration="auto"), "last_batch_iteration is 'auto'"),  # type: ignore[arg-type]
        (lambda o: wsm_ds.WSDLR(o, decay_start_step=9, decay_num_steps=1, decay_curve="steep"), "decay_curve: unknown"),
        (lambda o: wsm_ds.WSMLR(torch.nn.Linear(1, 1)), "Linear is neither a torch optimizer"),
        (lambda o: wsm_ds.WSDLR(o), "needs decay_start_step"),
        (lambda o: wsm_ds.WSDLR(o, decay_start_step=9, decay_num_steps=0), "decay_num_steps is 0"),
        (
            lambda o: wsm_ds.WSDLR(
                o, decay_start_step=9, decay_num_steps=1, warmup_num_steps=1, warmup_max_lr=2, decay_min_lr=3
            ),
            r"decay_min_lr 3 is above the peak .* \[2\.0\]",
        ),
        (lambda o: wsm_ds.WSDLR(o, decay_start_step=9, decay_num_steps=1), "inside the warmup of 1000"),
    ],
)
def test_wrong_parameters_are_named(make: Any, words: str) -> None:
    with pytest.raises(ScheduleError, match=words):
        make(optimizer())


def test_an_optimizer_that_computes_its_own_rate_is_refused() -> None:
    from transformers import Adafactor

    with pytest.raises(ScheduleError, match=r"Adafactor has no learning rate \(lr=None\).*relative_step=False"):
        wsm_ds.WSMLR(Adafactor([torch.nn.Parameter(torch.zeros(2))]), warmup_max_lr=1.0)


def test_a_scheduler_of_another_optimizer_is_noticed_at_its_first_step() -> None:
    trained, foreign = optimizer(), optimizer()
    scheduler = wsm_ds.WSMLR(foreign, warmup_num_steps=2)
    trained.step()
    with pytest.raises(ScheduleError, match="bound to another optimizer"):
        scheduler.step()


def test_steps_without_any_update_are_counted_not_taken_for_a_foreign_optimizer() -> None:
    scheduler = wsm_ds.WSMLR(optimizer(), warmup_max_lr=8.0, warmup_num_steps=4)
    rates = []
    for _ in range(5):  # as one does to plot a schedule
        rates += scheduler.get_last_lr()
        scheduler.step()
    assert rates == [2, 4, 6, 8, 8]


def test_an_update_that_a_grad_scaler_skips_first_is_not_taken_for_a_foreign_optimizer() -> None:
    recorder = optimizer()
    scheduler = wsm_ds.WSMLR(recorder, warmup_max_lr=8.0, warmup_num_steps=4)
    scaler = torch.amp.GradScaler("cpu")
    for factor in (float("inf"), 1.0, 1.0):
        recorder.zero_grad()
        scaler.scale(recorder.param_groups[0]["params"][0].sum() * factor).backward()
        before = scaler.get_scale()
        scaler.step(recorder)
        scaler.update()
        if scaler.get_scale() >= before:
            scheduler.step()
    assert recorder.used == [[2], [4]]
    scheduler.step()  # without the question above it is counted, as torch's own schedulers do, but not refused
    assert scheduler.num_updates == 3


def test_the_other_half_of_a_gan_is_no_foreign_optimizer() -> None:
    generator, discriminator = optimizer(), optimizer()
    schedulers = [wsm_ds.WSMLR(half, warmup_max_lr=8.0, warmup_num_steps=4) for half in (generator, discriminator)]
    for half in (generator, discriminator):
        half.param_groups[0]["params"][0].grad = torch.ones(2)
    generator.step()  # a GradScaler skips the discriminator's
    for scheduler in schedulers:
        scheduler.step()
    assert train(generator, schedulers[0], 1) == [4]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))])
@pytest.mark.parametrize("updates", [0, 2])
def test_a_copy_schedules_its_own_optimizer(copied: Any, updates: int) -> None:
    recorder = optimizer()
    scheduler = wsm_ds.WSMLR(recorder, warmup_max_lr=8.0, warmup_num_steps=8)
    train(recorder, scheduler, updates)
    twin = copied(scheduler)
    twin.optimizer.used = []
    twin.optimizer.param_groups[0]["lr"] = 99.0
    assert train(twin.optimizer, twin, 2) == [updates + 1, updates + 2]
    assert scheduler.num_updates == updates
    assert train(recorder, scheduler, 1) == [updates + 1]


def test_a_peak_that_is_not_given_is_the_one_before_any_scheduler() -> None:
    recorder = optimizer(lr=8.0)
    train(recorder, wsm_ds.WSMLR(recorder, warmup_num_steps=4), 1)
    loaded = optimizer(lr=8.0)
    loaded.load_state_dict(recorder.state_dict())
    for there in (recorder, loaded):
        assert wsm_ds.WSMLR(there, warmup_num_steps=4).get_last_lr() == [2.0]


def test_a_group_that_deepspeed_drops_takes_its_rate_along() -> None:
    recorder = optimizer(groups=3)
    scheduler = wsm_ds.WSMLR(recorder, warmup_max_lr=[8.0, 4.0, 2.0], warmup_num_steps=2)
    del recorder.param_groups[1]  # an empty one, runtime/engine.py:2348
    train(recorder, scheduler, 2)
    assert recorder.used == [[4, 1], [8, 2]]


def test_a_change_that_no_later_rate_depends_on_is_not_refused() -> None:
    first = optimizer()
    scheduler = wsm_ds.WSMLR(first, warmup_max_lr=8.0, warmup_num_steps=4)
    train(first, scheduler, 6)
    for steps in (2, 6):  # HF's "auto" computes it from max_steps
        second = optimizer()
        resumed = wsm_ds.WSMLR(second, warmup_max_lr=8.0, warmup_min_lr=1.0, warmup_num_steps=steps)
        resumed.load_state_dict(scheduler.state_dict())
        assert train(second, resumed, 1) == [8]
    with pytest.raises(ScheduleError, match="warmup_num_steps: 4 in the checkpoint, 7 in the configuration"):
        wsm_ds.WSMLR(optimizer(), warmup_max_lr=8.0, warmup_num_steps=7).load_state_dict(scheduler.state_dict())


def test_a_decay_that_starts_in_the_past_is_refused_for_other_schedulers_states_too() -> None:
    branch = wsm_ds.WSDLR(optimizer(), warmup_num_steps=2, decay_start_step=5, decay_num_steps=10)
    with pytest.raises(ScheduleError, match="constant until update 10, the configuration decays since 5"):
        branch.load_state_dict({"last_batch_iteration": 9})


@pytest.mark.parametrize(
    "state", [{"last_batch_iteration": None}, {"last_epoch": "7"}, {"last_epoch": 3, "num_bad_epochs": 0}, {}]
)
def test_a_state_without_a_count_of_updates_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(ScheduleError):
        wsm_ds.WSMLR(optimizer()).load_state_dict(state)


def test_a_scheduler_that_was_dropped_lets_go_of_the_optimizer() -> None:
    recorder = optimizer()
    dropped = wsm_ds.WSMLR(recorder, warmup_max_lr=8.0, warmup_num_steps=0)
    del dropped
    recorder.param_groups[0]["lr"] = 5.0
    recorder.step()
    assert recorder.used == [[5.0]]
