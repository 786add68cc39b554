"""Fits how the time of a plan grows with ranks, tensors and checkpoints."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.plan_material import Run

TERMS: dict[str, Callable[[int, int, int], int]] = {
    "a command's start": lambda k, w, t: 1,
    "a checkpoint": lambda k, w, t: k,
    "a tensor of a checkpoint": lambda k, w, t: k * t,
    "a rank of a checkpoint": lambda k, w, t: k * w,
    "a tensor of a rank of a checkpoint": lambda k, w, t: k * w * t,
}
"""What costs time, and how often a plan of `k` checkpoints of `w` ranks and `t` tensors has it."""
GRID = [Run("", ranks, count, layers) for ranks in (32, 128, 512) for layers in (2, 20, 80) for count in (1, 4)]
"""The runs that the law is fitted to; their kind is to be filled in."""


@dataclass(frozen=True)
class Law:
    """Seconds of each term of TERMS.

    Attributes:
        seconds: by name.
        largest_error: of the fitted runs, the largest difference from the measured time, as a part of it.
    """

    seconds: dict[str, float]
    largest_error: float

    def of(self, checkpoints: int, ranks: int, tensors: int) -> float:
        """Returns the seconds of a plan.

        Args:
            checkpoints: in the window.
            ranks: of each.
            tensors: of the model.
        """
        return sum(s * TERMS[name](checkpoints, ranks, tensors) for name, s in self.seconds.items())

    def __str__(self) -> str:
        parts = [f"{_shown(s)} for {name}" for name, s in self.seconds.items() if s]
        return f"{', '.join(parts)}; off by {self.largest_error:.0%} at most"


def fitted(measured: Sequence[tuple[Run, float]]) -> Law:
    """Fits the law by least squares of the relative errors. No term is negative: such a term is left out.

    Args:
        measured: runs, and the seconds of their plans.
    """
    seconds = np.array([s for _, s in measured])
    names = list(TERMS)
    while True:
        counts = [[TERMS[name](run.checkpoints, run.ranks, run.tensors) for name in names] for run, _ in measured]
        matrix = np.array(counts, dtype=float) / seconds[:, None]
        scales = np.linalg.norm(matrix, axis=0)
        found = np.linalg.lstsq(matrix / scales, np.ones(len(seconds)), rcond=None)[0] / scales
        if (found >= 0).all():
            break
        del names[int(np.argmin(found * scales))]
    by_name = dict.fromkeys(TERMS, 0.0) | dict(zip(names, found.tolist(), strict=True))
    return Law(by_name, float(np.abs(matrix @ found - 1).max()))


def _shown(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds / 1e-6:.2f} us"
