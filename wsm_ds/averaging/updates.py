"""Counts an engine's updates, and finds calls that were forgotten or made twice."""

from dataclasses import dataclass
from typing import Any

from wsm_ds.errors import TrainingError


@dataclass(frozen=True)
class Counts:
    """An engine's counters.

    Attributes:
        steps: `global_steps`: updates, with those that an overflow skipped.
        skipped: updates that an overflow skipped: they changed nothing.
        micro_steps: calls of `engine.step()`; always 0 for a PipelineEngine.
    """

    steps: int
    skipped: int
    micro_steps: int

    @classmethod
    def of(cls, engine: Any) -> "Counts":
        """Reads the counters."""
        return cls(int(engine.global_steps), int(engine.skipped_steps), int(engine.micro_steps))

    @property
    def applied(self) -> int:
        """Updates that changed the masters."""
        return self.steps - self.skipped


def made_since(seen: Counts, now: Counts) -> tuple[int, int]:
    """Returns the steps since a call of `update()`, and how many of them changed the masters: each 0 or 1.

    Args:
        seen: the counters at the last call.
        now: the counters at this call.

    Raises:
        TrainingError: the engine has made several steps since, or none; or a checkpoint was loaded. The message has
            both counts.
    """
    both = (
        f"update() has seen {seen.applied} updates (step {seen.steps}), the engine has made {now.applied} (step "
        f"{now.steps})"
    )
    if now == seen:
        raise TrainingError(f"{both}: it was called twice after one engine.step(). Call it once after each.")
    steps, applied = now.steps - seen.steps, now.applied - seen.applied
    if steps not in (0, 1) or applied not in (0, 1):
        raise TrainingError(
            f"{both}: a call was forgotten, so the mean would lack an update, or a checkpoint was loaded. Call "
            "update() after every engine.step(), and restart() after load_checkpoint()."
        )
    return steps, applied
