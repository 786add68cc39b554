"""The evaluator "lm-eval": benchmarks of the lm-evaluation-harness, run as a program of its own.

It is not imported: it may live in another environment, and a crash of it costs one model. `lm-eval run` ends with 0
when it could not save its results, so it is the file that counts. The file's place and keys are those of version 0.4.13
(`lm_eval/loggers/evaluation_tracker.py`).
"""

import math
import shlex
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from typing_extensions import override

from wsm_ds.errors import EvaluationError, RecipeError, few
from wsm_ds.evaluation.commands import json_file
from wsm_ds.evaluation.evaluation import Metric, Subject
from wsm_ds.evaluation.evaluator import MeasurementFailed, Result
from wsm_ds.evaluation.external import ExternalEvaluator
from wsm_ds.evaluation.programs import hashes_of, require_program, run_program
from wsm_ds.evaluation.subjects import CONFIG

SCORE = "score"
"""The mean over the tasks of each one's first metric."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
METHOD = 1


class LmEvalEvaluator(ExternalEvaluator):
    """Measures benchmarks with `lm-eval run`.

    Attributes:
        tasks: names of tasks or groups.
        metric: what models are compared by, "TASK/METRIC" as in the evaluation; None: "score", the mean over the tasks
            of each one's first metric.
        dtype: in which the model computes.
        backend: lm-eval's --model, such as "hf" or "vllm".
        model_args: more of lm-eval's --model_args, "key=value,key=value".
        batch_size: lm-eval's --batch_size.
        num_fewshot: examples before each question; None: the task's own number.
        limit: questions of each task; None: all.
        include_path: a folder with task files of one's own.
        device: lm-eval's --device; None: its own choice.
        arguments: more of lm-eval's flags, a line.
        program: the program, or a line such as "python -m lm_eval".
    """

    kind: Literal["lm-eval"] = "lm-eval"
    tasks: tuple[str, ...] = Field(min_length=1)
    metric: str | None = None
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    backend: str = "hf"
    model_args: str = ""
    batch_size: str = "auto"
    num_fewshot: int | None = Field(default=None, ge=0)
    limit: int | None = Field(default=None, ge=1)
    include_path: Path | None = None
    device: str | None = None
    arguments: str = ""
    program: str = "lm-eval"

    @property
    @override
    def main_metric(self) -> str:
        return self.metric or SCORE

    @override
    def content(self) -> dict[str, Any]:
        names = {"kind", "tasks", "metric", "dtype", "backend", "model_args", "num_fewshot", "limit", "arguments"}
        files = sorted(self.include_path.rglob("*")) if self.include_path is not None else []
        base = self.include_path or Path()
        hashes = {Path(name).relative_to(base).as_posix(): value for name, value in hashes_of(map(str, files)).items()}
        return self.model_dump(include=names) | {"method": METHOD, "files": hashes}

    @override
    def details(self) -> dict[str, Any]:
        return {"tasks": self.tasks, "limit": self.limit, "num_fewshot": self.num_fewshot}

    @override
    def require_ready(self) -> None:
        words = self._program()
        require_program(words[0], "Install it (pip install lm-eval), or set PATH.")
        if self.include_path is not None and not self.include_path.is_dir():
            raise EvaluationError(f"`include_path` {self.include_path} is not a folder.")
        super().require_ready()

    @override
    def attempt(self, folder: Path, subject: Subject, place: Path) -> Result:
        self._require_model(folder)
        out = place / "out"
        out.mkdir()
        run_program(self.words(folder, out), place, self.timeout_s, {"TOKENIZERS_PARALLELISM": "false"})
        files = sorted(out.rglob("results_*.json"))
        if not files:
            raise MeasurementFailed("lm-eval ended without an error, and wrote no results_*.json; see its stderr")
        data = json_file(files[-1])
        metrics = metrics_of(data, files[-1])
        if self.metric is None:
            metrics = {SCORE: _score(data, metrics, self.tasks)} | metrics
        elif self.metric not in metrics:
            raise MeasurementFailed(f"the metric {self.metric} is not among those of lm-eval: {few(metrics, 8)}")
        keys = ("versions", "n-samples", "n-shot", "task_hashes", "lm_eval_version")
        return Result(metrics=metrics, details={key: data[key] for key in keys if key in data})

    def words(self, folder: Path, out: Path) -> list[str]:
        """The command line.

        Args:
            folder: of the model.
            out: where lm-eval writes.
        """
        from wsm_ds.dtypes import BY_NAME

        model_args = [f"pretrained={folder}", f"dtype={BY_NAME[self.dtype].torch_name}", self.model_args]
        flags: dict[str, Any] = {
            "--model": self.backend,
            "--model_args": ",".join(filter(None, model_args)),
            "--tasks": ",".join(self.tasks),
            "--batch_size": self.batch_size,
            "--num_fewshot": self.num_fewshot,
            "--limit": self.limit,
            "--include_path": self.include_path,
            "--device": self.device,
            "--output_path": out,
        }
        given = [str(word) for flag, value in flags.items() if value is not None for word in (flag, value)]
        return [*self._program(), "run", *given, "--log_samples", *_split(self.arguments)]

    def _program(self) -> list[str]:
        return _split(self.program) or ["lm-eval"]

    def _require_model(self, folder: Path) -> None:
        if not (folder / CONFIG).is_file():
            raise MeasurementFailed(
                f"{folder} has no {CONFIG}, which lm-eval needs; add it when merging: --include {CONFIG}"
            )
        if "tokenizer=" not in self.model_args and not any((folder / name).is_file() for name in TOKENIZERS):
            raise MeasurementFailed(
                f"{folder} has no tokenizer, which lm-eval needs; add its files when merging by --include, or give "
                "`model_args` tokenizer=FOLDER"
            )


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise RecipeError(f"{text!r} cannot be split into words: {error}.") from error


def metrics_of(data: Any, path: Path) -> dict[str, Metric]:
    """The metrics in lm-eval's results, by "TASK/METRIC", or "TASK/METRIC,FILTER" if a filter is named.

    Args:
        data: its JSON.
        path: the file, for messages.

    Raises:
        MeasurementFailed: there are none.
    """
    metrics = {}
    try:
        for task, values in (data.get("groups", {}) | data["results"]).items():
            directions = data.get("higher_is_better", {}).get(task) or {}
            for key, value in values.items():
                name, comma, kept = key.partition(",")
                is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
                if not comma or name.endswith("_stderr") or not is_number:
                    continue
                error = values.get(f"{name}_stderr,{kept}")
                metrics[f"{task}/{name}" + (f",{kept}" if kept != "none" else "")] = Metric(
                    value=float(value),
                    error=float(error) if isinstance(error, int | float) and math.isfinite(error) else None,
                    maximize=bool(directions.get(name, True)),
                )
    except (AttributeError, KeyError, TypeError) as error:
        raise MeasurementFailed(f"{path} is not what lm-eval writes: {type(error).__name__} {error}") from error
    if not metrics:
        raise MeasurementFailed(f"{path} holds no metric")
    return metrics


def _score(data: Any, metrics: dict[str, Metric], tasks: tuple[str, ...]) -> Metric:
    """The mean of the first metric of each task.

    Raises:
        MeasurementFailed: a task has no metric, or more is better for some tasks alone.
    """
    firsts = {}
    for task in tasks:
        first = next((name for name in metrics if name.rpartition("/")[0] == task), None)
        if first is None:
            raise MeasurementFailed(f"lm-eval gives no metric of {task}, but of {few(metrics, 8)}")
        firsts[first] = metrics[first]
    if len({metric.maximize for metric in firsts.values()}) > 1:
        raise MeasurementFailed(f"a mean of {few(firsts)} says nothing: more is better for some alone; give `metric`")
    errors = [metric.error for metric in firsts.values()]
    known = [error for error in errors if error is not None]
    return Metric(
        value=math.fsum(metric.value for metric in firsts.values()) / len(firsts),
        error=math.hypot(*known) / len(firsts) if len(known) == len(errors) else None,
        maximize=next(iter(firsts.values())).maximize,
    )
