"""The evaluator "command": any program that prints, or writes, the figures that it has measured as JSON."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from typing_extensions import override

from wsm_ds.errors import RecipeError, few
from wsm_ds.evaluation.evaluation import Metric, Subject
from wsm_ds.evaluation.evaluator import MeasurementFailed, Result
from wsm_ds.evaluation.external import ExternalEvaluator
from wsm_ds.evaluation.programs import filled, hashes_of, run_program, words_of
from wsm_ds.filesystem.small_files import read_small

VALUE = "value"
"""The metric of a program that prints a plain number."""
METHOD = 1


class CommandEvaluator(ExternalEvaluator):
    """Measures with a program.

    Attributes:
        command: its line; no shell runs it. `{}` stands for the folder of the model, `{out}` for an empty folder where
            it may write. The folder of the model is also in the variable WSM_MODEL.
        metrics: paths of the values in its JSON, such as "results.arc.acc". The first one is what models are compared
            by. Empty: it prints one number.
        errors: paths of the standard errors, one for each metric, or none.
        maximize: whether more is better.
        result: the JSON file that it writes, with the same stand-ins; None: the last line that it prints is the JSON.
        version: of what it measures, if neither the command nor the files that it names tell a change.
    """

    kind: Literal["command"] = "command"
    command: str = Field(min_length=1)
    metrics: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    maximize: bool = False
    result: str | None = None
    version: str = ""

    @property
    @override
    def main_metric(self) -> str:
        return self.metrics[0] if self.metrics else VALUE

    @override
    def content(self) -> dict[str, Any]:
        words = words_of(self.command)
        return self.model_dump(include={"kind", "metrics", "errors", "maximize", "result", "version"}) | {
            "method": METHOD,
            "words": words,
            "files": hashes_of(words),
        }

    @override
    def details(self) -> dict[str, Any]:
        return {"command": self.command}

    @override
    def require_ready(self) -> None:
        if self.errors and len(self.errors) != len(self.metrics):
            raise RecipeError(f"`errors` has {len(self.errors)} paths for {len(self.metrics)} metrics.")
        if self.result is not None and not self.metrics:
            raise RecipeError(f"`metrics` must say which values of {self.result} are the metrics.")
        super().require_ready()

    @override
    def attempt(self, folder: Path, subject: Subject, place: Path) -> Result:
        out = place / "out"
        out.mkdir()
        words = filled(words_of(self.command), folder, out)
        printed = run_program(words, place, self.timeout_s, {"WSM_MODEL": str(folder), "WSM_NAME": subject.name})
        if self.result is None:
            source, data = "the last line that it printed", last_line(printed)
        else:
            source = filled([self.result], folder, out)[0]
            data = json_file(Path(source))
        if not self.metrics:
            return Result(metrics={VALUE: Metric(value=_number(data, VALUE, source), maximize=self.maximize)})
        metrics = {}
        for number, path in enumerate(self.metrics):
            error = _number(value_at(data, self.errors[number], source), path, source) if self.errors else None
            value = _number(value_at(data, path, source), path, source)
            metrics[path] = Metric(value=value, error=error, maximize=self.maximize)
        return Result(metrics=metrics)


def last_line(printed: Path) -> Any:
    """The JSON in the last line of a program's output that is not empty.

    Raises:
        MeasurementFailed: there is none.
    """
    lines = printed.read_text(errors="replace").strip().splitlines()
    if not lines:
        raise MeasurementFailed("the program printed nothing; its last line must be a number, or JSON")
    try:
        return json.loads(lines[-1])
    except (ValueError, RecursionError) as error:
        raise MeasurementFailed(
            f"the last line that it printed is neither a number nor JSON: {lines[-1][:80]}"
        ) from error


def json_file(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        MeasurementFailed: it is missing, or is no JSON.
    """
    try:
        return json.loads(read_small(path))
    except FileNotFoundError as error:
        raise MeasurementFailed(f"the program did not write {path}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise MeasurementFailed(f"{path} cannot be read as JSON: {error}") from error


def value_at(data: Any, path: str, source: str) -> Any:
    """The value at a path in JSON: keys and indices between dots. A key may itself have dots.

    Args:
        data: plain data.
        path: such as "results.arc.acc".
        source: where the data come from, for the message.

    Raises:
        MeasurementFailed: there is no such value; names some that are there.
    """
    for value in _values_at(data, path.split(".")):
        return value
    numbers = few(sorted(_numbers(data)), 8) or "no number at all"
    raise MeasurementFailed(f"the metric {path} is not in {source}, which has {numbers}")


def _values_at(data: Any, parts: list[str]) -> Iterator[Any]:
    if not parts:
        yield data
    elif isinstance(data, list) and parts[0].isdecimal() and int(parts[0]) < len(data):
        yield from _values_at(data[int(parts[0])], parts[1:])
    elif isinstance(data, dict):
        for count in range(len(parts), 0, -1):
            key = ".".join(parts[:count])
            if key in data:
                yield from _values_at(data[key], parts[count:])


def _numbers(data: Any, path: str = "") -> Iterator[str]:
    """The paths of all numbers in plain data."""
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from _numbers(value, f"{path}.{key}" if path else str(key))
    elif isinstance(data, int | float) and not isinstance(data, bool):
        yield path or VALUE


def _number(value: Any, path: str, source: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MeasurementFailed(f"{path} in {source} is not a number but {json.dumps(value)[:80]}")
    if not math.isfinite(value):
        raise MeasurementFailed(f"{path} in {source} is {value}")
    return float(value)
