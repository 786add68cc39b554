"""Sends what was measured to TensorBoard, Weights & Biases or trackio, on an axis of its own.

Evaluations arrive late and out of order: a merge of step 4000 may be measured when training has reached step 6000. So
nothing here uses the steps of a training's own logging. Every point is sent once; a file remembers which were.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from wsm_ds.errors import RecipeError, TrackingFailed
from wsm_ds.filesystem.durable import append_line
from wsm_ds.filesystem.small_files import read_small
from wsm_ds.tuning.results import CandidateResult, TuningResult

PREFIX = "wsm"
"""Names of metrics begin with it: they do not mix with those of the training."""


@dataclass(frozen=True)
class TrackedPoint:
    """A measured value at its place in the run.

    Attributes:
        series: "raw", or what merges have in common, such as "last 8, linear".
        step: optimizer step of the newest checkpoint.
        tokens: at that step; None: not known.
        metric: name of the metric.
        value: of the metric.
    """

    series: str
    step: int
    tokens: int | None
    metric: str
    value: float

    @property
    def key(self) -> str:
        """SHA-256 of the point, in hex."""
        content = [self.series, self.step, self.tokens, self.metric, self.value]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def name(self) -> str:
        """Name of the metric of this series, where all series are in one place."""
        return f"{PREFIX}/{self.metric}/{self.series}"


class Tracker(Protocol):
    """Takes points. Each call is complete when it returns."""

    def send(self, points: Sequence[TrackedPoint]) -> None:
        """Sends points, ordered by their steps."""


def tracked_points(result: TuningResult) -> list[TrackedPoint]:
    """Returns all measured values that have a place in the run, by rising step.

    Args:
        result: a tuning, or evaluations in this form. Folders without a manifest have no place: they are left out.
    """
    points = [
        TrackedPoint(_series(candidate), round(candidate.end.steps), _whole(candidate.end.tokens), name, metric.value)
        for candidate in result.candidates
        if candidate.end is not None and candidate.kind != "baseline"
        for name, metric in candidate.metrics.items()
    ]
    return sorted(points, key=lambda point: point.step)


def _whole(tokens: float | None) -> int | None:
    return None if tokens is None else round(tokens)


def _series(candidate: CandidateResult) -> str:
    if candidate.kind == "raw":
        return "raw"
    words = [f"last {len(candidate.steps)}", candidate.curve or "other coefficients"]
    words += [candidate.spread] if candidate.spread not in (None, "wsm") else []
    return ", ".join(str(word) for word in words)


def send_new(points: Iterable[TrackedPoint], tracker: Tracker, sent: Path) -> int:
    """Sends the points that were not sent before.

    If the process is killed between sending and remembering, the points are sent again.

    Args:
        points: by rising step.
        tracker: takes them.
        sent: the file that remembers the points; it is made if it is missing.

    Returns:
        Number of points that were sent.

    Raises:
        TrackingFailed: the tracker did not take the points.
        OSError: the file cannot be read or written.
    """
    known = set(read_small(sent).split()) if sent.exists() else set()
    new = [point for point in points if point.key not in known]
    if new:
        try:
            tracker.send(new)
        except Exception as error:  # a tracker's package has its own errors, and those of its network
            reason = f"{type(error).__name__}: {error}".rstrip(".")
            raise TrackingFailed(
                f"{type(tracker).__name__} did not take the values: {reason}. The report is written. "
                "Run the same command again: it sends what was not sent."
            ) from error
        sent.parent.mkdir(parents=True, exist_ok=True)
        append_line(sent, "\n".join(point.key for point in new))
    return len(new)


class TensorBoard:
    """Writes event files: one folder for each series, so TensorBoard draws raw and merged in one picture.

    The step of an event is the number of tokens where it is known, else the optimizer step.

    Args:
        folder: the log directory.

    Raises:
        RecipeError: the package tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        _module("tensorboard", "tensorboard.summary.writer.event_file_writer")
        self.folder = folder

    def send(self, points: Sequence[TrackedPoint]) -> None:
        """Adds an event file to the folder of each series."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        for series in dict.fromkeys(point.series for point in points):
            folder = self.folder / series.replace(os.sep, "_")
            folder.mkdir(parents=True, exist_ok=True)
            # Two files of one process within a second would have one name (EventFileWriter._general_file_writer).
            number = len(list(folder.iterdir()))
            writer = EventFileWriter(str(folder), filename_suffix=f".{number}")
            for point in points:
                if point.series == series:
                    value = Summary.Value(tag=f"{PREFIX}/{point.metric}", simple_value=point.value)
                    step = point.step if point.tokens is None else point.tokens
                    writer.add_event(Event(step=step, summary=Summary(value=[value])))
            writer.close()


class WeightsAndBiases:
    """Logs to a run of its own in a project, which is continued by the next call.

    Args:
        project: the project; W&B's environment variables say where, and whether online.
        name: of the run.

    Raises:
        RecipeError: the package wandb is not installed.
    """

    def __init__(self, project: str, name: str) -> None:
        self.wandb: Any = _module("wandb")
        self.project, self.name = project, name

    def send(self, points: Sequence[TrackedPoint]) -> None:
        """Logs one row for each step, with steps and tokens as axes."""
        identity = hashlib.sha256(f"{self.project}\n{self.name}".encode()).hexdigest()[:16]
        with self.wandb.init(project=self.project, name=self.name, id=identity, resume="allow") as run:
            has_tokens = all(point.tokens is not None for point in points)
            axes = (f"{PREFIX}/step", f"{PREFIX}/tokens")
            for axis in axes:
                run.define_metric(axis, hidden=True)
            for name in dict.fromkeys(point.name for point in points):
                # W&B drops values whose own step goes back; on an axis that is a metric they may.
                run.define_metric(name, step_metric=axes[1] if has_tokens else axes[0])
            for row in _rows(points):
                run.log(row)


class Trackio:
    """Logs to a run of its own in a project of trackio, which is continued by the next call.

    Args:
        project: the project; trackio's environment variables say where.
        name: of the run.

    Raises:
        RecipeError: the package trackio is not installed.
    """

    def __init__(self, project: str, name: str) -> None:
        self.trackio: Any = _module("trackio")
        self.project, self.name = project, name

    def send(self, points: Sequence[TrackedPoint]) -> None:
        """Logs one row for each step."""
        # trackio prints how to open its page. The command's own output is for programs.
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            self.trackio.init(project=self.project, name=self.name, resume="allow")
            for row in _rows(points):
                self.trackio.log(row, step=row[f"{PREFIX}/step"])
            self.trackio.finish()


def _rows(points: Sequence[TrackedPoint]) -> Iterator[dict[str, float]]:
    """What is logged at once: all values of a step."""
    rows: dict[tuple[int, int | None], dict[str, float]] = {}
    for point in points:
        row = rows.setdefault((point.step, point.tokens), {f"{PREFIX}/step": point.step})
        row |= {} if point.tokens is None else {f"{PREFIX}/tokens": point.tokens}
        row[point.name] = point.value
    yield from rows.values()


def _module(package: str, name: str = "") -> ModuleType:
    from importlib import import_module

    try:
        return import_module(name or package)
    except ImportError as error:
        raise RecipeError(
            f"`{package}` needs the package {package} ({error}): pip install 'wsm_ds[{package}]', or leave it out."
        ) from error
