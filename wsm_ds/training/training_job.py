"""One attempt of a training run: it starts or resumes the run, saves, and ends when it is done or asked to stop."""

import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsm_ds.distributed.launcher import process_group_ranks
from wsm_ds.errors import RecipeError, TrainingError, few
from wsm_ds.training import checkpoints, interruption, resharding
from wsm_ds.training.compilation import prepare_compilation
from wsm_ds.training.heartbeat import Heartbeat
from wsm_ds.training.job import JobFolder, begin_attempt, exported_attempt, is_done, mark_done, require_current
from wsm_ds.training.process_groups import find_ranks, start_process_groups
from wsm_ds.training.random_states import load_random_states, seed_random_states

if TYPE_CHECKING:
    from wsm_ds.averaging import SlotMeans

log = logging.getLogger(__name__)
CONSTANTS = "wsm_training"
"""The key of a run's constants in the client state that DeepSpeed saves."""


class TrainingJob:
    """Makes a training script safe to kill at any moment and to start again; see the package's example.

    It starts the process groups. Make it before `deepspeed.initialize`.

    Args:
        run: the run's folder, on storage that all ranks see.
        until_step: number of updates after which the run is done. A later start with a larger number extends the run.
        save_every: in updates: checkpoints are saved at its multiples, after the last update, and after a signal.
        seed: decides the random states of a new run, and of ranks that the resumed checkpoint did not have.
        collective_timeout_s: a collective fails after this time if the other ranks do not take part. It must be longer
            than a save takes.
        constants: plain data that must not change in a run, such as what decides the order of the batches. It is saved
            with each checkpoint and compared when the run is resumed.
        slot_every: in updates: the mean of the masters over each such slot appears in RUN/snapshots, see
            `wsm_ds.averaging.SlotMeans`. Each checkpoint ends its slot. None: as the ds_config says,
            `"wsm_ds": {"slot_every": N}`, or no slots.
        slot_sample: updates between two samples of a slot.

    Attributes:
        attempt: the number of this start, from 1.
        is_done: whether an earlier attempt has reached `until_step` already. `steps` then yields nothing.
        rank: of this process.
        world_size: number of ranks.
        client_state: the `client_state` that `steps` saved with the checkpoint from which this attempt resumed.
        slots: the means of the slots, while `steps` runs; None without slots.
        exit_code: what the program should exit with: 0 if the run is done, 75 if it saved after a signal and should be
            started again, else 1.

    Ranks: all.

    Raises:
        Superseded: WSM_ATTEMPT is not the newest attempt.
        TrainingError: RUN/job/stop exists.
        StaleLock: a dead process holds a lock of torch's compiler, for which this start would wait without end.
        RecipeError: a number is below 1, or the launcher has set only some of RANK, WORLD_SIZE and the like.
    """

    def __init__(
        self,
        run: Path,
        *,
        until_step: int,
        save_every: int,
        seed: int = 0,
        collective_timeout_s: float = 600.0,
        constants: dict[str, Any] | None = None,
        slot_every: int | None = None,
        slot_sample: int = 1,
    ) -> None:
        if until_step < 1 or save_every < 1:
            raise RecipeError(f"until_step ({until_step}) and save_every ({save_every}) must be at least 1.")
        self.job, self.until_step, self.save_every = JobFolder(run), until_step, save_every
        self.constants = {"seed": seed} | (constants or {})
        self.slot_every, self.slot_sample = slot_every, slot_sample
        self.slots: SlotMeans | None = None
        find_ranks()
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        prepare_compilation()
        start_process_groups(collective_timeout_s)
        self.ranks = process_group_ranks(timeout_s=collective_timeout_s)
        self.attempt, self.is_done = self.ranks.decide(self._begin)
        self.client_state: dict[str, Any] = {}
        self.exit_code = 0 if self.is_done else 1
        self.values: dict[str, Any] = {}

    def resume(self, engine: Any) -> int:
        """Loads the newest complete checkpoint, if there is one. `steps` calls it.

        A checkpoint of another number of ranks or another ZeRO stage is rewritten first. The checkpoint restores the
        scheduler, the count of samples and each rank's random states. In a new run, and after a change of the number
        of ranks, the random states follow from the seed, the step and the rank.

        Args:
            engine: DeepSpeed's.

        Returns:
            The number of updates made so far.

        Ranks: all; rank 0 chooses the checkpoint.

        Raises:
            BrokenCheckpoint: the run has checkpoints, and none is complete.
            UnsupportedLayout, InsufficientCapacity: the checkpoint needs to be rewritten, and cannot be.
            TrainingError: the checkpoint was saved with other `constants`.
        """
        import deepspeed.comm as dist

        target = resharding.form_of_engine(engine)
        choice = self.ranks.decide(lambda: self._choose(target))
        if choice is None:
            seed_random_states(self.constants["seed"], 0, self.rank)
            return 0
        source = Path(choice["path"])
        if choice["reshard"]:
            out = resharding.resharded_folder(self.job, source.name, target)
            resharding.reshard_together(source, target, out, process_group_ranks())
            self._load(engine, out, None)
            dist.barrier()
            self.ranks.decide(lambda: resharding.remove_resharded(self.job))
        else:
            self._load(engine, source.parent, source.name)
        has_states = choice["world_size"] == target.world_size and load_random_states(source, self.rank)
        if not has_states:
            seed_random_states(self.constants["seed"], engine.global_steps, self.rank)
        return int(engine.global_steps)

    def steps(self, engine: Any, client_state: dict[str, Any] | None = None) -> Iterator[int]:
        """Yields the number of each update that is still to be made, up to `until_step`; the loop's body makes it.

        It resumes the run first. After each update it writes the heartbeat and the line of `record`, and saves where a
        checkpoint is due. The loop ends early, after a save, if a signal came or if somebody made RUN/job/stop.

        Args:
            engine: DeepSpeed's. The loop's body makes one update: `engine.step()` at the accumulation boundary.
            client_state: plain data to save with each checkpoint.

        Yields:
            The number of the update, counted from 1 in the whole run.

        Ranks: all. After each update it holds an all-reduce of one number, so that all ranks stop at the same one.

        Raises:
            Superseded: another attempt was started after this one.
            TrainingError: the loop's body made no update, or several.
        """
        first = self.resume(engine) + 1
        heartbeat = Heartbeat(
            self.job, attempt=self.attempt, rank=self.rank, world_size=self.world_size, step=first - 1
        )
        saved_state = {**(client_state or {}), CONSTANTS: self.constants}
        self.slots = self._begin_slots(engine, saved_state)
        # Not earlier: while a process starts up, a signal must end it at once (see Interruption).
        interruption_state = interruption.Interruption()
        try:
            for step in range(first, self.until_step + 1):
                began_s = time.monotonic()
                yield step
                _require_one_update(engine, step)
                if self.slots is not None:
                    self.slots.update()
                heartbeat.reached(step)
                if heartbeat.stop_is_requested:
                    interruption_state.request_stop(f"{self.job.stop} exists")
                is_interrupted = interruption_state.is_requested_on_any_rank()
                self._write_line(step, time.monotonic() - began_s)
                if step % self.save_every == 0 or step == self.until_step or is_interrupted:
                    if self.slots is not None:
                        self.slots.end_slot()  # so that nothing of it has to be saved
                    checkpoints.save_checkpoint(engine, self.job, self.attempt, self.ranks, saved_state)
                if is_interrupted and step < self.until_step:
                    log.warning("saved at step %d and stopping: %s", step, interruption_state.reason or "another rank")
                    self.exit_code = interruption.EXIT_CODE
                    return
            self.ranks.decide(lambda: mark_done(self.job, max(self.until_step, first - 1), self.attempt))
            self.exit_code = 0
        finally:
            heartbeat.stop()
            if self.slots is not None:
                self.slots.close()

    def _begin_slots(self, engine: Any, client_state: dict[str, Any]) -> "SlotMeans | None":
        if self.slot_every is None and "wsm_ds" not in (engine.config or {}):
            return None
        from wsm_ds.averaging import SlotMeans

        return SlotMeans(
            engine,
            self.job.run,
            every=self.slot_every,
            sample=self.slot_sample,
            client_state=lambda: client_state,
            may_publish=lambda: require_current(self.job, self.attempt),
        )

    def record(self, **values: float) -> None:
        """Adds values to the line of this step in RUN/job/steps.jsonl.

        Args:
            values: by name, such as `loss=2.5`.

        Ranks: rank 0's values are written; calls on other ranks do nothing.
        """
        self.values = values

    def close(self) -> int:
        """Waits for all ranks, and ends the process groups.

        Rank 0 holds the store at which the ranks meet. If it left first, the others would fail.

        Returns:
            The `exit_code` for the program.

        Ranks: all.
        """
        import torch.distributed

        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        return self.exit_code

    def _begin(self) -> tuple[int, bool]:
        done = is_done(self.job, self.until_step)
        if self.job.stop.exists() and not done:  # checked first: a new attempt would supersede one that still saves
            raise TrainingError(f"{self.job.stop} exists; remove it to continue.")
        attempt = exported_attempt() or begin_attempt(self.job)
        require_current(self.job, attempt)
        checkpoints.remove_older_attempts(self.job, attempt)
        return attempt, done

    def _choose(self, target: resharding.EngineForm) -> dict[str, Any] | None:
        layout = checkpoints.newest_complete(self.job.run)
        if layout is None:
            log.warning("%s holds no checkpoint: a new run", self.job.run)
            return None
        form = resharding.form_of_layout(layout)
        log.warning("resuming from %s (%s)%s", layout.path, form, "" if form == target else f" as {target}")
        resharding.remove_resharded(self.job, keep=resharding.resharded_folder(self.job, layout.path.name, target))
        return {
            "path": str(layout.path),
            "world_size": form.world_size,
            "reshard": form != target and target.stage > 0,
        }

    def _load(self, engine: Any, root: Path, tag: str | None) -> None:
        path, self.client_state = engine.load_checkpoint(str(root), tag=tag)
        if path is None:
            raise TrainingError(f"DeepSpeed loaded nothing from {root}.")
        constants = self.client_state.get(CONSTANTS, {})
        differences = [
            f"{name} {constants[name]!r}, now {self.constants.get(name)!r}"
            for name in constants
            if constants[name] != self.constants.get(name)
        ]
        if differences:
            raise TrainingError(f"{path} was saved with {few(differences)}; these must not change in a run.")

    def _write_line(self, step: int, seconds: float) -> None:
        if self.rank == 0:
            line = {"attempt": self.attempt, "step": step} | self.values
            line |= {"seconds": round(seconds, 4), "world_size": self.world_size}
            with self.job.steps.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _require_one_update(engine: Any, step: int) -> None:
    if engine.global_steps != step:
        raise TrainingError(
            f"step {step} ended with {engine.global_steps} updates in all; the loop's body must make one. "
            f"With this configuration that takes {engine.gradient_accumulation_steps()} micro-batches, each with "
            "its own backward() and step()."
        )
