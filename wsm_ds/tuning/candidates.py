"""The candidates of a tuning: merges of a grid, raw checkpoints, and folders that the user names."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Literal

import numpy as np

from wsm_ds.evaluation.evaluation import Subject, SubjectSource
from wsm_ds.evaluation.models import source_of
from wsm_ds.evaluation.subjects import subject_of_folder
from wsm_ds.loading import ChosenWindow, choose_windows
from wsm_ds.planning.course import Course
from wsm_ds.planning.figures import Amount, WindowFigures, window_figures
from wsm_ds.planning.window import Window
from wsm_ds.tuning.request import TuningRequest
from wsm_ds.tuning.results import CandidateResult, Span


@dataclass(frozen=True, eq=False)
class Candidate:
    """A model that a tuning considers.

    Attributes:
        name: unique in the tuning, and a folder's name.
        kind: see `CandidateResult`.
        subject: what its evaluations say that they are of.
        chosen: its recipe and window; None for a baseline.
        folder: of its weights; None for all but baselines.
        is_newest: whether it is the newest raw checkpoint.
    """

    name: str
    kind: Literal["merge", "raw", "baseline"]
    subject: Subject
    chosen: ChosenWindow | None = None
    folder: Path | None = None
    is_newest: bool = False

    @property
    def figures(self) -> WindowFigures | None:
        """Those of the window; None for a baseline."""
        return None if self.chosen is None else self.chosen.window.figures

    def described(self) -> CandidateResult:
        """What is known of it without a measurement."""
        if self.chosen is None or self.figures is None:
            return CandidateResult(name=self.name, kind=self.kind)
        figures, window, is_merge = self.figures, self.chosen.window, self.kind == "merge"
        duration = figures.duration if is_merge else Amount(0.0, tokens=None if figures.end.tokens is None else 0.0)
        in_tokens = duration.tokens is not None and bool(figures.end.tokens)
        return CandidateResult(
            name=self.name,
            kind=self.kind,
            end=_span(figures.end),
            window=_span(duration),
            fraction=_ratio(duration.tokens, figures.end.tokens)
            if in_tokens
            else _ratio(duration.steps, figures.end.steps),
            curve=self.chosen.recipe.curve if is_merge else None,
            spread=(self.chosen.recipe.spread or "wsm") if is_merge else None,
            steps=tuple(layout.step for layout in window.layouts),
            tokens=window.course.tokens,
            coefficients=tuple(window.coefficients.tolist()),
            mean_age=_span(figures.mean_age),
            deviation=None if figures.deviation is None else _span(figures.deviation),
            ess=figures.ess,
        )


def _span(amount: Amount) -> Span:
    return Span(steps=amount.steps, tokens=amount.tokens)


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def candidates_of(request: TuningRequest) -> tuple[Candidate, ...]:
    """Finds the candidates. Reads the metadata of the checkpoints of all windows.

    The order is that of the measurement: what the others are compared with, then the merges, those first that are most
    unlike each other, then the checkpoints of the longest window one by one. Merges that are the same are there once.

    Args:
        request: of the tuning.

    Raises:
        WsmError: a window cannot be merged, or a baseline is no folder of weights; nothing was computed.
    """
    baselines = [
        Candidate(name, "baseline", _with_model(request, subject_of_folder(folder, name)), folder=folder)
        for name, folder in request.baselines.items()
    ]
    ends: tuple[int | None, ...] = request.ends or (None,)
    grid = list(product(ends, request.spreads, request.curves, _middle_first(request.windows)))
    recipes = [request.recipe(window, curve, spread, end) for end, spread, curve, window in grid]
    chosen = [_pinned(one) for one in choose_windows(recipes)]
    merges: dict[str, Candidate] = {}
    for one, (end, spread, curve, window) in zip(chosen, grid, strict=True):
        name = _name(window, curve, spread, end)
        if len(one.window.layouts) > 1:
            merges.setdefault(one.identity(), Candidate(name, "merge", subject_of(request, name, one), one))
    newest, *older = _singles(request, chosen)
    return (newest, *baselines, *merges.values(), *older)


def _pinned(chosen: ChosenWindow) -> ChosenWindow:
    """The same window, whatever newer checkpoints the run gets meanwhile."""
    newest = chosen.window.layouts[-1].step
    return ChosenWindow(chosen.recipe.model_copy(update={"to_step": newest}), chosen.window)


def subject_of(request: TuningRequest, name: str, chosen: ChosenWindow) -> Subject:
    """What an evaluation of a sum of checkpoints is of.

    Args:
        request: of the tuning.
        name: of the candidate.
        chosen: the sum.
    """
    sources = tuple(
        SubjectSource(tag=layout.tag, step=layout.step, coefficient=coefficient)
        for layout, coefficient in zip(chosen.window.layouts, chosen.window.coefficients.tolist(), strict=True)
    )
    kind: Literal["checkpoint", "merge"] = "checkpoint" if len(sources) == 1 else "merge"
    run = str(request.run.resolve())
    return _with_model(request, Subject(name=name, kind=kind, identity=chosen.identity(), path=run, sources=sources))


def _with_model(request: TuningRequest, subject: Subject) -> Subject:
    """A subject whose identity also tells what the weights go into: the model's config, code and tokenizer."""
    source = None if request.model is None else source_of(request.model)
    files = [*([] if source is None else [source]), *request.include]
    contents = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]
    spec = None if source is not None and source.suffix == ".json" else request.model
    text = json.dumps([subject.identity, spec, contents, request.rename])
    return subject.model_copy(update={"identity": hashlib.sha256(text.encode()).hexdigest()})


def _singles(request: TuningRequest, chosen: Sequence[ChosenWindow]) -> list[Candidate]:
    """The raw checkpoints of the longest window, and the newest of every window; the newest of all first."""
    longest = max(chosen, key=lambda one: (len(one.window.layouts), one.window.layouts[-1].step))
    windows = {layout.step: (one.window, at) for one in chosen for at, layout in [(-1, one.window.layouts[-1])]}
    windows |= {layout.step: (longest.window, at) for at, layout in enumerate(longest.window.layouts)}
    newest_step = max(windows)
    singles = []
    for step in sorted(windows, reverse=True):
        window = _alone(*windows[step])
        tag = window.layouts[0].tag
        one = ChosenWindow(request.recipe_of_tag(tag), window)
        name = f"step{step}"
        singles.append(Candidate(name, "raw", subject_of(request, name, one), one, is_newest=step == newest_step))
    return singles


def _alone(window: Window, at: int) -> Window:
    """One checkpoint of a window, as it is."""
    at %= len(window.layouts)
    course, one = window.course, slice(at, at + 1)
    course = Course(
        course.steps[one],
        course.samples[one] if course.samples else None,
        course.tokens[one] if course.tokens else None,
    )
    alone = np.ones(1)
    return replace(
        window,
        layouts=window.layouts[one],
        coefficients=alone,
        course=course,
        figures=window_figures(course, alone),
    )


def _name(window: str, curve: str, spread: str, end: int | None) -> str:
    words = [f"last{window}", curve.replace(":", ""), *([spread.replace(":", "")] if spread != "wsm" else [])]
    return "-".join([*words, *([f"to{end}"] if end is not None else [])])


def _middle_first(windows: Sequence[str]) -> list[str]:
    """The middle one, then the outermost ones, then what lies between: what a tuning that is cut short knows best."""
    order, gaps = [len(windows) // 2], [0, len(windows) - 1]
    order += [at for at in gaps if at not in order]
    while len(order) < len(windows):
        known = sorted(order)
        begin, end = max(pairwise(known), key=lambda pair: pair[1] - pair[0])
        order.append((begin + end) // 2)
    return [windows[at] for at in order]
