"""What all evaluators have: an identity, a description, and the frame of an evaluation."""

import datetime
import hashlib
import json
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from wsm_ds import __version__
from wsm_ds.distributed.ranks import Ranks
from wsm_ds.evaluation.evaluation import Blocks, Evaluation, Metric, Subject
from wsm_ds.planning.recipe_options import StrPath


class MeasurementFailed(Exception):
    """One model could not be measured. It becomes the `failure` of its evaluation, and costs that model alone."""


class Result(BaseModel):
    """What a measurement gives.

    Attributes:
        metrics: by name.
        blocks: of a loss.
        details: for people, such as the device.
    """

    metrics: dict[str, Metric]
    blocks: Blocks | None = None
    details: dict[str, Any] = {}


class Evaluator(BaseModel):
    """Measures models. Frozen data, made from flags or YAML.

    Attributes:
        kind: "loss", "generate", "command" or "lm-eval".
    """

    # A field may be called `model_args`: pydantic before 2.10 warns of names that begin like its own methods.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    PACKAGES: ClassVar[tuple[str, ...]] = ()
    """Whose versions are recorded."""

    def content(self) -> dict[str, Any]:
        """All that decides the result besides the model, as plain data. Reads the held-out data, if there are any."""
        raise NotImplementedError

    def details(self) -> dict[str, Any]:
        """What people want to know about it, beside kind and identity, as plain data."""
        return {}

    def require_ready(self) -> None:
        """Checks all that can be checked without a model.

        Raises:
            EvaluationError: data, or a program, cannot be used.
            RecipeError: options contradict each other.
        """
        self.identity()

    def measure_folder(self, folder: StrPath, subject: Subject, ranks: Ranks | None = None) -> Evaluation:
        """Measures the model in a folder.

        Args:
            folder: of the weights.
            subject: what it is.
            ranks: that share the work; None: this process alone.
        """
        raise NotImplementedError

    @property
    def main_metric(self) -> str:
        """The name of the metric that models are compared by."""
        raise NotImplementedError

    def identity(self) -> str:
        """SHA-256 of all that decides the result besides the model. Evaluations that share it can be compared."""
        text = json.dumps(self.content(), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What an evaluation says of its evaluator."""
        return {"kind": self.content()["kind"], "identity": self.identity()} | self.details()

    def evaluation(self, subject: Subject, began_s: float, outcome: "Result | MeasurementFailed") -> Evaluation:
        """The record of a measurement that ends now.

        Args:
            subject: what was measured.
            began_s: when it began, `time.monotonic()`.
            outcome: what it gave.
        """
        failure = str(outcome) if isinstance(outcome, MeasurementFailed) else None
        result = outcome if isinstance(outcome, Result) else Result(metrics={})
        return Evaluation(
            subject=subject,
            evaluator=self.describe() | result.details,
            metrics=result.metrics,
            blocks=result.blocks,
            seconds=round(time.monotonic() - began_s, 3),
            at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            versions=versions_of(("numpy", *self.PACKAGES)),
            failure=failure,
        )


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """The versions of installed packages, and of this one."""
    found = {"wsm_ds": __version__}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
