"""The mean of an engine's masters over every update of a slot: an interval between multiples of `every` steps."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from wsm_ds.averaging.averages import Average, Rule, RunningMean, copies
from wsm_ds.averaging.masters import Tensors, find_masters
from wsm_ds.averaging.read_back import merged_slots
from wsm_ds.averaging.snapshot_files import require_files, snapshot_files
from wsm_ds.averaging.snapshot_folder import SnapshotFolder
from wsm_ds.averaging.swapping import swapped
from wsm_ds.averaging.updates import Counts, made_since
from wsm_ds.errors import RecipeError
from wsm_ds.layouts.snapshot import Snapshot

log = logging.getLogger(__name__)


class SlotMeans:
    """Averages the masters of a running engine, rank by rank, without a gather, and writes each slot's mean.

    A slot ends at every multiple of `every` steps, however often the run was interrupted before. Its mean appears as
    RUN/snapshots/global_stepN, a checkpoint of masters alone, which a thread writes while the training goes on. Make it
    after `deepspeed.initialize` and after a checkpoint is loaded: snapshots of later steps are then of a future that is
    trained again, and are moved to RUN/job/unusable.

    Args:
        engine: DeepSpeed's, PipelineEngine too.
        run: the run's folder, on storage that all ranks see; None: nothing is written.
        every: steps of a slot; None: as the ds_config says, `"wsm_ds": {"slot_every": N}`.
        sample: updates between two samples of the masters; `every` is a multiple of it.
        device: where the averages are: None for the device of the masters, or "cpu".
        kind: "mean" of each slot, or "point": the masters at its end.
        averages: further averages by name, over all samples from now on, each in a buffer of its own, in memory only.
        client_state: returns plain data to write into the model files, as for `engine.save_checkpoint`.
        may_publish: called before a snapshot appears; if it raises an error, the snapshot does not appear.

    Attributes:
        mean: of the slot that has not ended.
        averages: the further averages, by name.
        first: the first step of this slot.

    Ranks: all.

    Memory: on each rank 8 bytes a master for the mean, 4 of them while a snapshot is being written, which has 4; and 4
    for each further average. With "point" 4 while a snapshot is being written.

    Raises:
        RecipeError: the engine's masters cannot be averaged (see `find_masters`) or written, a number is not valid, or
            RUN/snapshots holds a file `latest`.
    """

    counts: Counts
    first: int
    updates: int
    rates: list[float]
    next_rates: list[float]
    is_constant_rate: bool

    def __init__(
        self,
        engine: Any,
        run: str | Path | None,
        *,
        every: int | None = None,
        sample: int = 1,
        device: str | None = None,
        kind: Literal["mean", "point"] = "mean",
        averages: Mapping[str, Rule] | None = None,
        client_state: Callable[[], Mapping[str, Any]] = dict,
        may_publish: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine, self.masters = engine, find_masters(engine)
        self.every, self.sample, self.kind = slot_length(engine, every), sample, kind
        if self.every < 1 or sample < 1 or self.every % sample:
            raise RecipeError(f"every ({self.every}) must be a multiple of sample ({sample}), and both at least 1.")
        self.device, self.client_state = device, client_state
        self.mean = RunningMean(device)
        self.averages = {name: Average(rule, device) for name, rule in (averages or {}).items()}
        self.folder: SnapshotFolder | None = None
        if run is not None:
            require_files(engine)
            self.folder = SnapshotFolder(Path(run), may_publish)
        self.restart()

    def restart(self) -> None:
        """Forgets what this slot has seen, and begins it anew at the engine's step. Call it after `load_checkpoint`.

        Ranks: all.
        """
        self.counts = Counts.of(self.engine)
        self._begin_slot()
        self.mean.take()
        if self.folder is not None:
            self.folder.begin_at(self.counts.steps)

    def update(self) -> None:
        """Takes part in an update. Call it once after every `engine.step()`, or `train_batch()` of a PipelineEngine.

        After a micro-batch that makes no update, and after a step that an overflow skipped, nothing is averaged.

        Raises:
            TrainingError: it was forgotten after an `engine.step()`, or called twice. The message has both counts. Or
                a snapshot could not be written, for another reason than a full disk.
        """
        if self.folder is not None:
            self.folder.writer.raise_error()
        now = Counts.of(self.engine)
        steps, applied = made_since(self.counts, now)
        self.counts = now
        if applied:
            self.updates += 1
            self.is_constant_rate &= self.next_rates == self.rates
            if now.steps % self.sample == 0:
                self._take_sample()
        # After a step, the optimizer has the rates of the next one.
        self.next_rates = _rates(self.engine)
        if steps and now.steps % self.every == 0:
            self.end_slot()

    def _begin_slot(self) -> None:
        self.first, self.updates = self.counts.steps + 1, 0
        self.rates = self.next_rates = _rates(self.engine)
        self.is_constant_rate = True

    def _take_sample(self) -> None:
        masters = self.masters.tensors()
        if self.kind == "mean":
            # While a snapshot is written, it has the memory of the mean's second part.
            self.mean.add(masters, may_refine=self.folder is None or not self.folder.writer.is_busy)
        for average in self.averages.values():
            average.add(masters, self.sample)

    def end_slot(self) -> None:
        """Ends the slot at the engine's step, before its multiple of `every` if need be, and begins to write its mean.

        Call it before each full checkpoint: then nothing has to be saved to go on from it. A slot without an update
        goes on.

        Raises:
            TrainingError: an earlier snapshot could not be written, for another reason than a full disk.
        """
        if self.updates == 0:
            return
        if self.folder is not None:
            self.folder.writer.wait()
        count, values = self._taken()
        if self.folder is not None:
            self._write(values, count)
        self._begin_slot()

    def _taken(self) -> tuple[int, Tensors]:
        """The number of samples and the values of the slot that ends. The padding of partitions becomes zero."""
        if self.mean.count == 0:  # a point, or shorter than the distance of two samples: its end stands for it
            count, values = 1, copies(self.masters.tensors(), self.device)
        else:
            count, values = self.mean.count, self.mean.take()
        for number, begin, end in self.masters.paddings():
            values[number].view(-1)[begin:end].zero_()
        return count, values

    def _write(self, values: Tensors, count: int) -> None:
        assert self.folder is not None
        last = self.counts.steps
        snapshot = Snapshot(
            kind=self.kind,
            first=self.first,
            last=last,
            updates=self.updates,
            count=count,
            sample=self.sample,
            is_constant_rate=self.is_constant_rate,
        )
        files = snapshot_files(self.engine, values, snapshot.to_json(), self.client_state())
        self.folder.writer.begin(f"global_step{last}", files)

    def close(self) -> None:
        """Waits until the last snapshot is written. The slot that has not ended is not.

        Raises:
            TrainingError: it could not be written, for another reason than a full disk.
        """
        if self.folder is not None:
            self.folder.writer.wait()

    @contextmanager
    def swapped_in(
        self, average: str | None = None, *, last: int | None = None, curve: str = "linear"
    ) -> Iterator[None]:
        """While the context runs, the module computes with an average; afterwards every bit is as it was before.

        Only evaluate in it, between two updates. Random states, modes (train, eval) and buffers are put back, after an
        error too.

        Args:
            average: a name in `averages`; None: the mean of the slot that has not ended.
            last: instead of it, the merge of the newest N snapshots. Each rank reads its own files.
            curve: the decay curve of that merge.

        Ranks: all. ZeRO-1 and 2 gather the weights twice.

        Raises:
            RecipeError: there is no such average, or it has no sample yet; or there are not N snapshots in a row.
            TrainingError: micro-batches are accumulated now, or the engine was trained in the context.
        """
        with swapped(self.engine, self.masters, self._values(average) if last is None else self._merged(last, curve)):
            yield

    def _merged(self, last: int, curve: str) -> Iterator[Any]:
        if self.folder is None:
            raise RecipeError(f"last={last} reads snapshots, and none are written: run is None.")
        return merged_slots(self.engine, self.masters, self.folder.newest(last), curve)

    def _values(self, name: str | None) -> Iterator[Any]:
        if name is not None and name not in self.averages:
            raise RecipeError(f"average: there is no {name!r}; there are: {', '.join(self.averages) or 'none'}.")
        chosen: Average | RunningMean = self.mean if name is None else self.averages[name]
        if chosen.count == 0:
            raise RecipeError(f"{'this slot' if name is None else name} has no sample yet (step {self.counts.steps}).")
        return chosen.values()


def _rates(engine: Any) -> list[float]:
    return [float(group["lr"]) for group in engine.optimizer.param_groups if "lr" in group]


def slot_length(engine: Any, every: int | None) -> int:
    """The steps of a slot: as asked for, or as the ds_config says.

    Raises:
        RecipeError: neither says it, or the config has a value that is no number of steps.
    """
    if every is not None:
        return every
    settings = (engine.config or {}).get("wsm_ds") or {}
    value = settings.get("slot_every") if isinstance(settings, dict) else None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RecipeError(
            f'give every=N, or "wsm_ds": {{"slot_every": N}} in the ds_config, which has "wsm_ds": {settings!r}.'
        )
    return value
