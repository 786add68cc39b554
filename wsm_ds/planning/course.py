"""How far a run had come at each checkpoint: in steps, in samples and in tokens.

The steps are always known. Samples and tokens come from the first of these that tells them for every checkpoint:

    samples   the model files (`wsm_ds.layouts.saved_counts`); `samples_seen` in the lines of RUN/job/steps.jsonl
    tokens    --tokens-per-step; --sequence-length; the model files; `tokens_seen` in RUN/job/steps.jsonl;
              `num_input_tokens_seen` in HF Trainer's trainer_state.json; samples times a length in the model files
"""

import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from wsm_ds.errors import BrokenCheckpoint, UnsupportedLayout, WindowError, few
from wsm_ds.filesystem.read_ahead import read_ahead
from wsm_ds.filesystem.small_files import read_small
from wsm_ds.layouts.frameworks import save_of
from wsm_ds.layouts.saved_counts import SavedCounts
from wsm_ds.layouts.saved_step import saved_counts
from wsm_ds.planning.recipe_options import Unit
from wsm_ds.planning.window_recipe import WindowRecipe
from wsm_ds.sizes import format_count

STEPS_FILE = "job/steps.jsonl"
TRAINER_STATE = "trainer_state.json"
MOST_RUNS, MOST_CHECKPOINTS = 8, 4096
"""How many files are remembered."""


@dataclass(frozen=True)
class Place:
    """A checkpoint's folder, its name for messages, and its step."""

    path: Path
    tag: str
    step: int


@dataclass(frozen=True)
class Course:
    """The counts at the checkpoints of a window, oldest first. Each list rises.

    Attributes:
        steps: optimizer steps since the beginning of the run.
        samples: None: not known.
        tokens: None: not known.
        missing: by unit that is not known: why, as the end of a sentence.
    """

    steps: tuple[int, ...]
    samples: tuple[int, ...] | None = None
    tokens: tuple[int, ...] | None = None
    missing: Mapping[str, str] = field(default_factory=dict)

    def known(self, unit: Unit) -> tuple[int, ...] | None:
        """The counts in a unit; None if they are not known."""
        counts: tuple[int, ...] | None = getattr(self, unit)
        return counts

    def required(self, unit: Unit) -> tuple[int, ...]:
        """The counts in a unit.

        Raises:
            WindowError: they are not known; the message says what to give.
        """
        counts = self.known(unit)
        if counts is None:
            raise unknown_counts(unit, self.missing.get(unit, "the files do not tell them"))
        return counts


def unknown_counts(unit: Unit, reason: str) -> WindowError:
    """The error for a window that is measured in a unit in which the run is not known.

    Args:
        unit: samples or tokens.
        reason: the end of a sentence.
    """
    advice = {
        "tokens": "Give --sequence-length (the tokens of a sample), or --tokens-per-step if the batch never changed.",
        "samples": "Measure the window in steps or tokens.",
    }
    return WindowError(f"the window is measured in {unit}, but {reason}. {advice[unit]}")


class CountReader:
    """Reads the counts of a run's checkpoints.

    Args:
        recipe: the run, and what the user says about tokens.
    """

    def __init__(self, recipe: WindowRecipe) -> None:
        self.recipe = recipe
        self._saved = cache(_saved)  # samples and tokens are in the same files

    def found(self, place: Place, unit: Unit) -> dict[str, int]:
        """What each source says of a checkpoint, by the source's name, the best source first."""
        if unit == "steps":
            return {"global_steps": place.step}
        counts = self._saved(place)
        line = self._recorded.get(place.step, {})
        samples = {"the model files": counts.samples, STEPS_FILE: line.get("samples_seen")}
        if unit == "samples":
            return _known(samples)
        of_samples = next((value for value in samples.values() if value is not None), None)
        per_step, length = self.recipe.tokens_per_step, self.recipe.sequence_length
        if per_step is not None:
            return {"--tokens-per-step": place.step * int(per_step)}
        if length is not None:
            return _known({"--sequence-length": _times(of_samples, length)})
        return _known(
            {
                "the model files": counts.tokens,
                STEPS_FILE: line.get("tokens_seen"),
                TRAINER_STATE: _trainer_tokens(place),
                "samples and sequence length": _times(of_samples, counts.sequence_length),
            }
        )

    def course(self, places: Sequence[Place]) -> Course:
        """The course of the run at the checkpoints of a window.

        Args:
            places: by rising step.

        Raises:
            WindowError: --tokens-per-step is given, and the samples of a step change in the window; or
                --sequence-length is given, and the samples are not known.
        """
        missing: dict[str, str] = {}
        deque(read_ahead(self._saved, places), maxlen=0)
        samples, tokens = self._rising(places, "samples", missing), self._rising(places, "tokens", missing)
        steps = tuple(place.step for place in places)
        if self.recipe.tokens_per_step is not None and samples is not None:
            _require_one_batch(places, samples)
        if self.recipe.sequence_length is not None and samples is None:
            raise WindowError(
                f"--sequence-length ({self.recipe.sequence_length}) gives the tokens of a sample, but "
                f"{missing['samples']}. Give --tokens-per-step instead."
            )
        return Course(steps, samples, tokens, missing)

    def _rising(self, places: Sequence[Place], unit: Unit, missing: dict[str, str]) -> tuple[int, ...] | None:
        """The counts from the first source that has all of them, rising; None, with a reason in `missing`."""
        found = [self.found(place, unit) for place in places]
        for source in found[-1]:
            if not all(source in values for values in found):
                continue
            counts = tuple(values[source] for values in found)
            falls = next((i for i, (older, newer) in enumerate(pairwise(counts)) if newer <= older), None)
            if falls is None:
                return counts
            missing.setdefault(
                unit,
                f"their counts in {source} do not rise: {counts[falls]} at {places[falls].tag}, {counts[falls + 1]} at "
                f"{places[falls + 1].tag}",
            )
        silent = [place.tag for place, values in zip(places, found, strict=True) if not values]
        missing.setdefault(unit, f"no file tells them for {few(silent or [place.tag for place in places])}")
        return None

    @cached_property
    def _recorded(self) -> Mapping[int, Mapping[str, int]]:
        path = self.recipe.run / STEPS_FILE
        try:
            status = path.stat()
            return _recorded_counts(path, status.st_size, status.st_mtime_ns)
        except OSError:
            return {}


@lru_cache(MOST_RUNS)
def _recorded_counts(path: Path, *_: int) -> Mapping[int, Mapping[str, int]]:
    """`samples_seen` and `tokens_seen` in RUN/job/steps.jsonl, by step. A later line of a step replaces it.

    Args:
        path: the file.
        _: its size and time, which change when it changes.
    """
    recorded: dict[int, dict[str, int]] = {}
    with path.open(encoding="utf-8", errors="replace") as lines:
        for text in lines:
            if "tokens_seen" in text or "samples_seen" in text:
                line = _mapping(text)
                if isinstance(line.get("step"), int):
                    recorded[line["step"]] = _known({name: line.get(name) for name in ("samples_seen", "tokens_seen")})
    return recorded


def newest_counts(places: Sequence[Place], length: int, recipe: WindowRecipe) -> list[int]:
    """The counts, in the recipe's unit, at the checkpoints of the newest `length` tokens or samples, oldest first.

    Args:
        places: the checkpoints up to the newest of the window, by rising step.
        length: of the window.
        recipe: the run and the unit.

    Raises:
        WindowError: the counts are not known or do not rise; the run is shorter than `length`; or one checkpoint would
            stand for more than twice the longest interval between the others.
    """
    reader, unit, newest = CountReader(recipe), recipe.unit, places[-1]
    source, count = next(iter(reader.found(newest, unit).items()), ("", 0))
    if not source:
        raise unknown_counts(unit, f"no file tells them for {newest.tag}")
    flag = f"last_{unit} (--last-{unit})"
    if length > count:
        raise WindowError(
            f"{flag}: the newest {format_count(length)} {unit} were asked for, but at {newest.tag} the run has only "
            f"{format_count(count)}."
        )
    counts = [count]
    for i, place in reversed(list(enumerate(places[:-1]))):
        older = reader.found(place, unit).get(source)
        if older is None:
            raise unknown_counts(unit, f"{source} does not tell them for {place.tag}")
        if older >= counts[0]:
            later = places[i + 1].tag
            raise unknown_counts(unit, f"{source} has {older} at {place.tag} and {counts[0]} at {later}, a later one")
        if older <= count - length:
            break
        counts.insert(0, older)
    longest = max((newer - older for older, newer in pairwise(counts)), default=length)
    before = length - (count - counts[0])
    if before > 2 * longest:
        raise WindowError(
            f"{flag}: the newest {format_count(length)} {unit} begin {format_count(before)} before "
            f"{places[-len(counts)].tag}, their oldest checkpoint, and the others lie at most {format_count(longest)} "
            "apart. One checkpoint would stand for too much. Ask for "
            f"{format_count(count - counts[0] + longest)} or less, or choose the window by --last."
        )
    return counts


def _saved(place: Place) -> SavedCounts:
    try:
        return saved_counts(place.path)
    except (BrokenCheckpoint, UnsupportedLayout):
        return SavedCounts(place.step)


def _trainer_tokens(place: Place) -> int | None:
    """What HF Trainer has counted, with `include_num_input_tokens_seen`. It writes 0 without that option."""
    path = save_of(place.path).folder / TRAINER_STATE
    try:
        status = path.stat()
        return _trainer_state_tokens(path, status.st_size, status.st_mtime_ns)
    except (OSError, ValueError):
        return None


@lru_cache(MOST_CHECKPOINTS)
def _trainer_state_tokens(path: Path, *_: int) -> int | None:
    """The file also holds all logged losses, and a watch plans again and again."""
    return _known({"tokens": _mapping(read_small(path)).get("num_input_tokens_seen")}).get("tokens") or None


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _known(values: Mapping[str, Any]) -> dict[str, int]:
    """The whole numbers among values, by name."""
    return {
        name: int(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and value == int(value)
    }


def _times(samples: int | None, length: int | None) -> int | None:
    return None if samples is None or length is None else samples * length


def _require_one_batch(places: Sequence[Place], samples: Sequence[int]) -> None:
    """Raises WindowError if the samples of a step are not the same in the whole window."""
    rates = [
        (newer - older) / (places[i + 1].step - places[i].step) for i, (older, newer) in enumerate(pairwise(samples))
    ]
    if len(set(rates)) > 1:
        changed = next(i for i, rate in enumerate(rates) if rate != rates[0])
        raise WindowError(
            f"--tokens-per-step gives every step the same number of tokens, but the samples of a step change from "
            f"{rates[0]:g} to {rates[changed]:g} after {places[changed].tag}. Give --sequence-length instead."
        )
