"""Candidates as folders of safetensors, for programs that load a model from a folder."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wsm_ds.distributed.ranks import Ranks
from wsm_ds.errors import InsufficientCapacity, OutputExists
from wsm_ds.merging import merge
from wsm_ds.planning.recipe import MergeRecipe
from wsm_ds.planning.window_recipe import validated
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
            WsmError: see `merge`.
        """
        if candidate.folder is not None:
            yield candidate.folder
            return
        folder = self.folder / candidate.name
        self.ranks.decide(lambda: self._export(candidate, folder))
        try:
            yield folder
        finally:
            if not stays and self.ranks.rank == 0:
                remove(folder)

    def _export(self, candidate: Candidate, folder: Path) -> None:
        assert candidate.chosen is not None
        fields = candidate.chosen.recipe.model_dump(exclude_unset=True) | {
            "out": folder,
            "format": "safetensors",
            "include": self.request.include,
            "rename": self.request.rename,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        recipe = validated(MergeRecipe, fields)
        try:
            merge(recipe)
        except OutputExists:  # of an earlier call, when the run ended at another step
            remove(folder)
            merge(recipe)


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
