"""The mean of an engine's masters over every update of a slot: an interval between multiples of `every` steps."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from wsm_ds.averaging.averages import Average, Rule, RunningMean
from wsm_ds.averaging.masters import find_masters
from wsm_ds.averaging.swapping import swapped
from wsm_ds.averaging.updates import Counts, made_since
from wsm_ds.errors import RecipeError

log = logging.getLogger(__name__)


class SlotMeans:
    """Averages the masters of a running engine, rank by rank, without a gather.

    A slot ends at every multiple of `every` steps, however often the run was interrupted before. Make it after
    `deepspeed.initialize` and after a checkpoint is loaded.

    Args:
        engine: DeepSpeed's, PipelineEngine too.
        every: steps of a slot.
        sample: updates between two samples of the masters; `every` is a multiple of it.
        device: where the averages are: None for the device of the masters, or "cpu".
        averages: further averages by name, over all samples from now on, each in a buffer of its own.

    Attributes:
        mean: of the slot that has not ended.
        averages: the further averages, by name.
        first: the first step of this slot.

    Ranks: all.

    Memory: 8 bytes a master on each rank for the mean, 4 for each further average.

    Raises:
        RecipeError: the engine's masters cannot be averaged (see `find_masters`), or a number is not valid.
    """

    def __init__(
        self,
        engine: Any,
        *,
        every: int,
        sample: int = 1,
        device: str | None = None,
        averages: Mapping[str, Rule] | None = None,
    ) -> None:
        if every < 1 or sample < 1 or every % sample:
            raise RecipeError(f"every ({every}) must be a multiple of sample ({sample}), and both at least 1.")
        self.engine, self.masters = engine, find_masters(engine)
        self.every, self.sample = every, sample
        self.mean = RunningMean(device)
        self.averages = {name: Average(rule, device) for name, rule in (averages or {}).items()}
        self.restart()

    def restart(self) -> None:
        """Forgets what this slot has seen, and begins it anew at the engine's step. Call it after `load_checkpoint`."""
        self.counts = Counts.of(self.engine)
        self.first, self.updates = self.counts.steps + 1, 0
        self.mean.take()

    def update(self) -> None:
        """Takes part in an update. Call it once after every `engine.step()`, or `train_batch()` of a PipelineEngine.

        After a micro-batch that makes no update, and after a step that an overflow skipped, nothing is averaged.

        Raises:
            TrainingError: it was forgotten after an `engine.step()`, or called twice. The message has both counts.
        """
        now = Counts.of(self.engine)
        steps, applied = made_since(self.counts, now)
        self.counts = now
        if applied:
            self.updates += 1
            if now.steps % self.sample == 0:
                self._take_sample()
        if steps and now.steps % self.every == 0:
            self.end_slot()

    def _take_sample(self) -> None:
        masters = self.masters.tensors()
        self.mean.add(masters)
        for average in self.averages.values():
            average.add(masters, self.sample)

    def end_slot(self) -> None:
        """Ends the slot at the engine's step, before its multiple of `every` if need be.

        A slot without an update goes on.
        """
        if self.updates == 0:
            return
        if self.mean.count == 0:  # shorter than the distance of two samples: its end stands for it
            self.mean.add(self.masters.tensors())
        self.mean.take()
        self.first, self.updates = self.counts.steps + 1, 0

    @contextmanager
    def swapped_in(self, average: str | None = None) -> Iterator[None]:
        """While the context runs, the module computes with an average; afterwards every bit is as it was before.

        Only evaluate in it, between two updates. Random states, modes (train, eval) and buffers are put back, after an
        error too.

        Args:
            average: a name in `averages`; None: the mean of the slot that has not ended.

        Ranks: all. ZeRO-1 and 2 gather the weights twice.

        Raises:
            RecipeError: there is no such average, or it has no sample yet.
            TrainingError: micro-batches are accumulated now, or the engine was trained in the context.
        """
        with swapped(self.engine, self.masters, self._values(average)):
            yield

    def _values(self, name: str | None) -> Iterator[Any]:
        if name is not None and name not in self.averages:
            raise RecipeError(f"average: there is no {name!r}; there are: {', '.join(self.averages) or 'none'}.")
        chosen: Average | RunningMean = self.mean if name is None else self.averages[name]
        if chosen.count == 0:
            raise RecipeError(f"{'this slot' if name is None else name} has no sample yet (step {self.counts.steps}).")
        return chosen.values()
