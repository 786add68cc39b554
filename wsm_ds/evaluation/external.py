"""What evaluators that run a program have in common: attempts, kept output, one run for all ranks."""

import shutil
import tempfile
import time
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field
from typing_extensions import override

from wsm_ds.distributed.ranks import Ranks
from wsm_ds.evaluation.evaluation import Evaluation, Subject
from wsm_ds.evaluation.evaluator import Evaluator, MeasurementFailed, Result
from wsm_ds.planning.recipe_options import StrPath


class ExternalEvaluator(Evaluator):
    """Measures models with a program.

    Attributes:
        timeout_s: seconds that one attempt may take; None: any time.
        retries: attempts after a failed one.
        keep: folder in which the output of every attempt is kept, NAME-IDENTITY/attempt1; None: it is not kept.
    """

    timeout_s: float | None = Field(default=None, gt=0)
    retries: int = Field(default=0, ge=0)
    keep: Path | None = None

    @abstractmethod
    def attempt(self, folder: Path, subject: Subject, place: Path) -> Result:
        """Measures once.

        Args:
            folder: of the model.
            subject: what it is.
            place: an empty folder for what the program prints and writes.

        Raises:
            MeasurementFailed: there is no result.
        """

    @override
    def measure_folder(self, folder: StrPath, subject: Subject, ranks: Ranks | None = None) -> Evaluation:
        """Measures the model in a folder.

        Ranks: all; rank 0 runs the program, and every rank gets its result.

        Args:
            folder: of the model.
            subject: what it is.
            ranks: None: this process alone.
        """
        self.require_ready()
        made = (ranks or Ranks()).decide(lambda: self._measured(Path(folder), subject).model_dump(mode="json"))
        return Evaluation.model_validate(made)

    def _measured(self, folder: Path, subject: Subject) -> Evaluation:
        began_s = time.monotonic()
        outcome: Result | MeasurementFailed = MeasurementFailed("it was not tried")
        with self._place(subject) as place:
            for number in range(1, self.retries + 2):
                attempt = place / f"attempt{number}"
                attempt.mkdir(parents=True)
                try:
                    result = self.attempt(folder.resolve(), subject, attempt)
                    outcome = result.model_copy(update={"details": result.details | {"attempts": number}})
                    break
                except MeasurementFailed as error:
                    outcome = error
        return self.evaluation(subject, began_s, outcome)

    @contextmanager
    def _place(self, subject: Subject) -> Iterator[Path]:
        """The folder of all attempts: kept, and emptied of an earlier measurement, or a temporary one."""
        if self.keep is None:
            with tempfile.TemporaryDirectory(prefix="wsm-evaluate-") as folder:
                yield Path(folder)
            return
        name = "".join(c if c.isalnum() or c in "._-" else "-" for c in subject.name)
        place = self.keep / f"{name}-{subject.identity[:8]}-{self.identity()[:8]}"
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        place.mkdir(parents=True)
        yield place
