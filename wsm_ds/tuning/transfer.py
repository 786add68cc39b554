"""best.yaml: the recommended merge as a recipe, which says where it comes from; and its way to another run.

What carries over from one run to another is how long the window is, in tokens or as a part of the run, and the shape of
the coefficients. The number of checkpoints does not: it says how often somebody saved. The best window of a larger
model is often another one, so the window and its two neighbours are tried there.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wsm_ds.errors import RecipeError, WindowError
from wsm_ds.layouts import find_checkpoints
from wsm_ds.layouts.order import in_order
from wsm_ds.planning.course import CountReader, Place
from wsm_ds.planning.recipe_errors import validation_sentences
from wsm_ds.planning.recipe_file import read_yaml
from wsm_ds.planning.window_recipe import make_window_recipe
from wsm_ds.sizes import format_count
from wsm_ds.tuning.candidates import Candidate
from wsm_ds.tuning.results import TuningResult

NEIGHBOURS = (0.5, 1.0, 2.0)
FEWEST = 2
"""Checkpoints of a window. One alone is the raw checkpoint, which is a candidate anyway."""


class TunedWindow(BaseModel):
    """What carries over to another run: the key `tuned` of best.yaml.

    Attributes:
        kind: "merge", or "raw" if nothing was better than the raw checkpoint.
        window_steps: duration in optimizer steps.
        window_tokens: None: not known.
        window_fraction: of the run that had passed at the window's end.
        curve: of the merge.
        spread: of the merge.
        metric: that decided.
        value: of the merge.
        run: the folder of the run.
        run_steps: of the run at the window's end.
        run_tokens: None: not known.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    kind: Literal["merge", "raw"]
    window_steps: float = Field(ge=0)
    window_tokens: float | None = Field(default=None, ge=0)
    window_fraction: float = Field(ge=0, le=1)
    curve: str = "linear"
    spread: str = "wsm"
    metric: str = ""
    value: float | None = None
    run: str = ""
    run_steps: float | None = None
    run_tokens: float | None = None


def recipe_text(candidate: Candidate, result: TuningResult) -> str:
    """Returns the content of best.yaml: the recipe of the recommended candidate.

    Args:
        candidate: the recommended one; a merge, or a raw checkpoint.
        result: of the tuning.
    """
    assert candidate.chosen is not None
    described = next(one for one in result.candidates if one.name == candidate.name)
    metric = described.metrics.get(result.metric)
    assert described.window is not None
    assert described.end is not None
    tuned = TunedWindow(
        kind="merge" if candidate.kind == "merge" else "raw",
        window_steps=described.window.steps,
        window_tokens=described.window.tokens,
        window_fraction=min(1.0, described.fraction or 0.0),
        curve=described.curve or "linear",
        spread=described.spread or "wsm",
        metric=result.metric,
        value=None if metric is None else metric.value,
        run=result.run,
        run_steps=described.end.steps,
        run_tokens=described.end.tokens,
    )
    recipe = candidate.chosen.recipe.model_dump(mode="json", exclude_unset=True)
    # The recipe names the run's newest checkpoint of that time, so that it gives the same merge when the run goes on.
    recipe = {key: value for key, value in recipe.items() if key not in ("run", "memory_budget", "threads") and value}
    content: dict[str, Any] = recipe | {"tuned": tuned.model_dump(exclude_none=True)}
    sentence = result.recommendation.sentence if result.recommendation else ""
    comment = [
        f"The recommendation of a tuning of {result.run}.",
        sentence,
        f"Window: {_window(tuned)}.",
        "Merge it:                wsm-ds merge RUN --recipe best.yaml --out MERGED",
        "At the newest end point: remove to_step." if "to_step" in recipe else "",
        "For another run:         wsm-ds tune OTHER_RUN --near best.yaml ...",
    ]
    return "".join(f"# {line}\n" for line in comment if line) + yaml.safe_dump(content, sort_keys=False)


def _window(tuned: TunedWindow) -> str:
    if tuned.kind == "raw":
        return "none, the raw checkpoint"
    tokens = "" if tuned.window_tokens is None else f", {format_count(tuned.window_tokens)} tokens"
    return f"{round(tuned.window_steps, 2):g} steps{tokens}, {tuned.window_fraction:.2%} of the run"


def read_tuned(path: Path) -> TunedWindow:
    """Reads what best.yaml says of another run's window.

    Args:
        path: the file.

    Raises:
        RecipeError: it cannot be read, or no tuning has written it.
    """
    content = read_yaml(path)
    if not isinstance(content, dict) or not isinstance(content.get("tuned"), dict):
        raise RecipeError(f"--near {path} does not say how long its window is: give the best.yaml of a tuning.")
    try:
        return TunedWindow(**content["tuned"])
    except ValidationError as error:
        faults = validation_sentences(error, TunedWindow.model_fields)
        raise RecipeError(f"--near {path}: `tuned` is not what a tuning writes: {faults}") from error


def near(path: Path, run: Path, tokens_per_step: str | None, sequence_length: int | None) -> dict[str, list[str]]:
    """Windows, curves and spreads to try in a run, by another run's best.yaml.

    Args:
        path: the best.yaml.
        run: the folder of this run.
        tokens_per_step: see `WindowRecipe`.
        sequence_length: see `WindowRecipe`.

    Returns:
        "windows", "curves" and "spreads" of a `TuningRequest`.

    Raises:
        RecipeError, WindowError: see `read_tuned` and `windows_near`.
    """
    tuned = read_tuned(path)
    dated = [one for one in in_order(find_checkpoints(run)) if one.step is not None]
    recipe = make_window_recipe(run=run, last=1, tokens_per_step=tokens_per_step, sequence_length=sequence_length)
    places = [Place(one.checkpoint.path, one.checkpoint.tag, one.step) for one in dated if one.step is not None]
    course = CountReader(recipe).course(places)
    windows = windows_near(tuned, course.steps, course.tokens)
    return {"windows": list(windows), "curves": [tuned.curve], "spreads": [tuned.spread]}


def windows_near(tuned: TunedWindow, steps: Sequence[int], tokens: Sequence[int] | None) -> tuple[str, ...]:
    """The windows to try in another run: of the same length, and its two neighbours.

    The length is meant in tokens and as a part of the run. Where these differ, both are tried.

    Args:
        tuned: of the other run.
        steps: of this run's checkpoints, rising.
        tokens: counts at these checkpoints; None: not known.

    Returns:
        Numbers of checkpoints, as texts, rising.

    Raises:
        WindowError: this run has too few checkpoints.
    """
    if tuned.kind == "raw" or tuned.window_fraction == 0:
        raise WindowError("--near: in that tuning no merge was better than the raw checkpoint. Give --windows instead.")
    counts = [float(count) for count in (tokens or steps)]
    lengths = [tuned.window_fraction * counts[-1]]
    if tokens is not None and tuned.window_tokens:
        lengths.append(tuned.window_tokens)
    wanted = {_checkpoints(counts, factor * length) for length in lengths for factor in NEIGHBOURS}
    usable = sorted(count for count in wanted if count >= FEWEST)
    if not usable:
        raise WindowError(
            f"--near: the window, {_window(tuned)}, and one twice as long hold fewer than {FEWEST} of this run's "
            f"checkpoints (steps {steps[0]} to {steps[-1]}). Save more often, or give --windows."
        )
    return tuple(map(str, usable))


def _checkpoints(counts: Sequence[float], length: float) -> int:
    """Number of newest checkpoints whose window is nearest to a length; each stands for the interval before it."""
    spans = [
        counts[-1] - count
        for count in [*counts[-2::-1], max(0.0, 2 * counts[0] - counts[1] if len(counts) > 1 else 0.0)]
    ]
    return 1 + min(range(len(spans)), key=lambda at: abs(spans[at] - length))
