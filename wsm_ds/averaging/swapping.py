"""Lets an engine's module compute with other weights for a while, and puts every bit back.

The masters and the optimizer's states are never touched. What is kept meanwhile is this rank's part of the 16-bit
weights, the buffers, the random states and the modes of the modules.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from wsm_ds.averaging.masters import Masters
from wsm_ds.errors import TrainingError


@contextmanager
def swapped(engine: Any, masters: Masters, values: Iterable[Any]) -> Iterator[None]:
    """While the context runs, the module's weights are `values` in their own dtype.

    Args:
        engine: DeepSpeed's, between two updates.
        masters: the engine's.
        values: instead of the masters, one for one.

    Ranks: all. In ZeRO-1 and 2 it gathers the weights twice, as two updates do.

    Memory: this rank's part of the weights once more, and the buffers.

    Raises:
        TrainingError: micro-batches of an update are accumulated now; or the engine was trained in the context.
    """
    _require_boundary(engine)
    before = _counts(engine)
    with _kept_states(engine):
        masters.prepare()
        kept = [weight.detach().clone() for weight in masters.weights()]
        try:
            _write(masters, values)
            yield
        finally:
            masters.prepare()
            _write(masters, kept)
    if _counts(engine) != before:
        raise TrainingError(
            f"the engine was trained while its weights were swapped: {before[0]} updates before, {_counts(engine)[0]} "
            "after. Only evaluate in the context."
        )


def _write(masters: Masters, values: Iterable[Any]) -> None:
    import torch

    with torch.no_grad():
        for weight, value in zip(masters.weights(), values, strict=True):
            weight.data.copy_(value.view_as(weight))
        masters.publish()


def _counts(engine: Any) -> tuple[int, int]:
    return int(engine.global_steps), int(engine.micro_steps)


def _require_boundary(engine: Any) -> None:
    steps = engine.gradient_accumulation_steps()
    if accumulated := engine.micro_steps % steps:
        raise TrainingError(
            f"{accumulated} of {steps} micro-batches of the next update are accumulated. "
            "Swap the weights after the engine.step() that makes the update."
        )


@contextmanager
def _kept_states(engine: Any) -> Iterator[None]:
    """Puts random states, modes and buffers back, whatever happens in the context."""
    import torch

    modes = [(module, module.training) for module in engine.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in engine.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    restore_random_states = _random_states()
    try:
        yield
    finally:
        for module, is_training in modes:
            module.training = is_training
        for module, name, buffer, kept in buffers:
            if not torch.equal(buffer, kept):  # a view that repeats its elements cannot be written, nor be changed
                buffer.data.copy_(kept)
            module._buffers[name] = buffer
        restore_random_states()


def _random_states() -> Callable[[], None]:
    """Returns what restores the states of Python, numpy, torch, the accelerator and DeepSpeed's tracker."""
    import torch
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.activation_checkpointing.checkpointing import get_cuda_rng_tracker

    accelerator, tracker = get_accelerator(), get_cuda_rng_tracker()
    on_device = accelerator.get_rng_state() if accelerator.device_name() != "cpu" else None
    python, numbers, on_cpu, tracked = (
        random.getstate(),
        np.random.get_state(),
        torch.get_rng_state(),
        tracker.get_states(),
    )

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numbers)
        torch.set_rng_state(on_cpu)
        if on_device is not None:
            accelerator.set_rng_state(on_device)
        tracker.set_states(tracked)

    return restore
