"""Candidates as folders of safetensors, for programs that load a model from a folder."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wsm_ds.distributed.ranks import Ranks
from wsm_ds.errors import BrokenCheckpoint, InsufficientCapacity
from wsm_ds.evaluation.evaluator import MeasurementFailed
from wsm_ds.layouts.frameworks import MANIFEST
from wsm_ds.loading import DATA_ERRORS
from wsm_ds.merge_planning import plan_windows
from wsm_ds.merging import run_plan
from wsm_ds.planning.recipe import MergeRecipe
from wsm_ds.planning.window_recipe import validated
from wsm_ds.publishing.identity import is_same_merge
from wsm_ds.publishing.manifest import description, read_manifest
from wsm_ds.publishing.staging_folder import discard
from wsm_ds.sizes import format_size
from wsm_ds.tuning.candidates import Candidate
from wsm_ds.tuning.request import TuningRequest


class Exports:
    """The exported models of a tuning, in OUT/models, each in a folder with the candidate's name.

    Args:
        request: of the tuning.
        ranks: of the tuning. Rank 0 exports.
    """

    def __init__(self, request: TuningRequest, ranks: Ranks) -> None:
        self.request, self.ranks = request, ranks
        self.folder = request.out / "models"

    @property
    def kept_at_once(self) -> int:
        """How many models stay at most."""
        if self.request.keep == "all":
            return 1 << 30
        return self.request.finalists + 1 if self.request.keep == "finalists" else 1

    def require_room(self, candidates: list[Candidate]) -> None:
        """Checks that the models that stay fit into `disk_room`.

        Args:
            candidates: of the tuning.

        Raises:
            InsufficientCapacity: they do not.
        """
        sizes = [_nbytes(candidate) for candidate in candidates if candidate.chosen is not None]
        need, room = max(sizes, default=0) * min(len(sizes), self.kept_at_once), self.request.disk_room
        if room is not None and need > int(room):
            raise InsufficientCapacity(
                f"`disk_room` ({format_size(int(room))}) is too small: the exported models need {format_size(need)}. "
                "Raise it, or keep fewer of them (--keep best, --finalists)."
            )

    @contextmanager
    def of(self, candidate: Candidate, *, stays: bool) -> Iterator[Path]:
        """A candidate's folder of weights; a baseline is where it is.

        Ranks: all.

        Args:
            candidate: of the tuning.
            stays: whether the folder is not removed afterwards.

        Raises:
            MeasurementFailed: the candidate's own elements are the reason: a NaN, a damaged file.
            WsmError: see `plan_windows` and `run_plan`.
        """
        if candidate.folder is not None:
            yield candidate.folder
            return
        folder = self.folder / candidate.name
        failure: str | None = self.ranks.decide(lambda: self._failure_of_export(candidate, folder))
        if failure is not None:
            raise MeasurementFailed(failure)
        try:
            yield folder
        finally:
            if not stays and self.ranks.rank == 0:
                remove(folder)

    def _failure_of_export(self, candidate: Candidate, folder: Path) -> str | None:
        """Exports a candidate; returns what makes that impossible for this one alone."""
        try:
            self._export(candidate, folder)
        except DATA_ERRORS as error:
            return str(error)
        return None

    def _export(self, candidate: Candidate, folder: Path) -> None:
        assert candidate.chosen is not None
        window = candidate.chosen.window
        fields = candidate.chosen.recipe.model_dump(exclude_unset=True) | {
            "out": folder,
            "format": "safetensors",
            "include": self.request.include,
            "rename": self.request.rename,
        }
        gone = next((layout.path for layout in window.layouts if not layout.path.is_dir()), None)
        if gone is not None:
            raise BrokenCheckpoint(f"{gone} is gone since the window was chosen.")
        self.folder.mkdir(parents=True, exist_ok=True)
        # The window that the candidate has, not the one that its recipe gives now: the run may have gone on.
        plan = plan_windows([validated(MergeRecipe, fields)], [window])
        if (folder / MANIFEST).is_file():
            if is_same_merge(read_manifest(folder), description(plan, 0)):
                return
            remove(folder)  # a candidate of this name that an earlier call has exported
        run_plan(plan, restart=True)


def remove(folder: Path) -> None:
    """Removes an exported model, and what a killed export has left.

    Args:
        folder: of the model.
    """
    discard(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _nbytes(candidate: Candidate) -> int:
    """Bytes of a candidate's weights, about."""
    assert candidate.chosen is not None
    layout = candidate.chosen.window.layouts[-1]
    return int(layout.numel * layout.dtype.itemsize)
