"""One attempt of a training run: started, resumed, interrupted, extended."""

import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wsm_ds.distributed.launcher import process_group_ranks
from wsm_ds.errors import RecipeError, TrainingError, few
from wsm_ds.training import checkpoints, interruption, resharding
from wsm_ds.training.compilation import prepare_compilation
from wsm_ds.training.heartbeat import Heartbeat
from wsm_ds.training.job import JobFolder, begin_attempt, given_attempt, is_done, mark_done, require_current
from wsm_ds.training.process_groups import find_ranks, start_process_groups
from wsm_ds.training.random_states import load_random_states, seed_random_states

log = logging.getLogger(__name__)
CONSTANTS = "wsm_training"
"""The key of the client state under which a run's constants are saved."""


class TrainingJob:
    """What a training script needs to be killed at any moment and started again; see the package's example.

    Args:
        run: the run's folder, on storage that all ranks see.
        until_step: updates after which the run is done. Started again with more, it goes on.
        save_every: checkpoints at its multiples (and after a signal, at whatever step that is).
        seed: decides the random states of a new run, and of ranks that the resumed checkpoint did not have.
        collective_timeout_s: after which a collective whose other ranks do not come fails. It must be longer than a
            save takes.
        constants: plain data that the run must be resumed with, such as what decides the order of the batches.

    Attributes:
        attempt: the number of this start.
        is_done: whether an earlier attempt has reached `until_step`, so that nothing is left to do.
        client_state: what was given to `steps` when the checkpoint that it resumed from was saved.
        exit_code: of the program: 0 done, 75 saved after an interruption and to be started again, else 1.

    Ranks: all.

    Raises:
        Superseded: WSM_ATTEMPT is not the newest attempt.
        TrainingError: RUN/job/stop is there.
        StaleLock, RecipeError: see `prepare_compilation`, `find_ranks`.
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
    ) -> None:
        if until_step < 1 or save_every < 1:
            raise RecipeError(f"until_step ({until_step}) and save_every ({save_every}) must be at least 1.")
        self.job, self.until_step, self.save_every = JobFolder(run), until_step, save_every
        self.constants = {"seed": seed} | (constants or {})
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
        """Loads the newest complete checkpoint, if there is one; returns the number of updates made so far.

        The checkpoint is rewritten first where it is of another number of ranks or another stage. The scheduler and
        the count of samples come back with it, and random states of each rank; with another number of ranks, and for a
        new run, those follow from seed, step and rank.

        Ranks: all; rank 0 chooses.

        Raises:
            BrokenCheckpoint: there are checkpoints, and none is complete.
            UnsupportedLayout, InsufficientCapacity: it is of another form and cannot be rewritten.
            TrainingError: the checkpoint was saved with other `constants`.
        """
        import deepspeed.comm as dist

        wanted = resharding.shape_of_engine(engine)
        chosen = self.ranks.decide(lambda: self._choose(wanted))
        if chosen is None:
            seed_random_states(self.constants["seed"], 0, self.rank)
            return 0
        source = Path(chosen["path"])
        if chosen["reshard"]:
            out = resharding.resharded_folder(self.job, source.name, wanted)
            resharding.reshard_together(source, wanted, out, process_group_ranks())
            self._load(engine, out, None)
            dist.barrier()
            self.ranks.decide(lambda: resharding.remove_resharded(self.job))
        else:
            self._load(engine, source.parent, source.name)
        has_states = chosen["world_size"] == wanted.world_size and load_random_states(source, self.rank)
        if not has_states:
            seed_random_states(self.constants["seed"], engine.global_steps, self.rank)
        return int(engine.global_steps)

    def steps(self, engine: Any, client_state: dict[str, Any] | None = None) -> Iterator[int]:
        """Yields the number of each update to be made, from 1, in a loop whose body makes it.

        It resumes first. After each step it beats, writes what `record` was given, saves on the grid, after a
        signal and when somebody has made RUN/job/stop, and ends the loop where all ranks have to stop.

        Args:
            engine: DeepSpeed's. The body makes one update, `engine.step()` at the accumulation boundary.
            client_state: plain data to be saved with each checkpoint.

        Ranks: all.

        Raises:
            Superseded: another attempt has been started.
            TrainingError: the loop's body made no update, or several.
        """
        first = self.resume(engine) + 1
        heartbeat = Heartbeat(
            self.job, attempt=self.attempt, rank=self.rank, world_size=self.world_size, step=first - 1
        )
        saved = {**(client_state or {}), CONSTANTS: self.constants}
        # only now: while it starts up, a process is to be ended by a signal at once
        interrupted = interruption.Interruption()
        try:
            for step in range(first, self.until_step + 1):
                began_s = time.monotonic()
                yield step
                if engine.global_steps != step:
                    raise TrainingError(f"step {step} ended with {engine.global_steps} updates; make one each time.")
                heartbeat.reached(step)
                if heartbeat.stop_is_asked:
                    interrupted.ask(f"{self.job.stop} is there")
                is_interrupted = interrupted.agreed()
                self._write_line(step, time.monotonic() - began_s)
                if step % self.save_every == 0 or step == self.until_step or is_interrupted:
                    checkpoints.save_checkpoint(engine, self.job, self.attempt, self.ranks, saved)
                if is_interrupted and step < self.until_step:
                    log.warning("saved at step %d and stopping: %s", step, interrupted.received or "another rank")
                    self.exit_code = interruption.EXIT_CODE
                    return
            self.ranks.decide(lambda: mark_done(self.job, max(self.until_step, first - 1), self.attempt))
            self.exit_code = 0
        finally:
            heartbeat.stop()

    def record(self, **values: float) -> None:
        """What the line of this step in RUN/job/steps.jsonl says beside its time. Rank 0's values count."""
        self.values = values

    def close(self) -> int:
        """Ends the process groups when all ranks are here (rank 0 holds the store); returns `exit_code`. Ranks: all."""
        import torch.distributed

        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        return self.exit_code

    def _begin(self) -> tuple[int, bool]:
        done = is_done(self.job, self.until_step)
        if self.job.stop.exists() and not done:  # before a new attempt supersedes one that saves just now
            raise TrainingError(f"{self.job.stop} is there; remove it to go on.")
        attempt = given_attempt() or begin_attempt(self.job)
        require_current(self.job, attempt)
        checkpoints.remove_older_attempts(self.job, attempt)
        return attempt, done

    def _choose(self, wanted: resharding.Shape) -> dict[str, Any] | None:
        layout = checkpoints.newest_complete(self.job.run)
        if layout is None:
            log.warning("%s holds no checkpoint: a new run", self.job.run)
            return None
        saved = resharding.shape_of_layout(layout)
        log.warning(
            "resuming from %s (%s)%s", layout.path, saved.words, "" if saved == wanted else f" as {wanted.words}"
        )
        resharding.remove_resharded(self.job, but=resharding.resharded_folder(self.job, layout.path.name, wanted))
        return {
            "path": str(layout.path),
            "world_size": saved.world_size,
            "reshard": saved != wanted and wanted.stage > 0,
        }

    def _load(self, engine: Any, root: Path, tag: str | None) -> None:
        path, self.client_state = engine.load_checkpoint(str(root), tag=tag)
        if path is None:
            raise TrainingError(f"DeepSpeed loaded nothing from {root}.")
        saved = self.client_state.get(CONSTANTS, {})
        unlike = [
            f"{name} {saved[name]!r}, now {self.constants.get(name)!r}"
            for name in saved
            if saved[name] != self.constants.get(name)
        ]
        if unlike:
            raise TrainingError(f"{path} was saved with {few(unlike)}; these must not change in a run.")

    def _write_line(self, step: int, seconds: float) -> None:
        if self.rank == 0:
            line = {"attempt": self.attempt, "step": step} | self.values
            line |= {"seconds": round(seconds, 4), "world_size": self.world_size}
            with self.job.steps.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
