"""The first stage: the cheap metric, for every candidate.

Where the metric can be measured on a model in memory, the merges go straight into it, as many in one pass over the
checkpoints as there is room for, and no byte is written. Else each candidate is exported, measured and removed.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from wsm_ds.distributed.ranks import Ranks
from wsm_ds.errors import WsmError
from wsm_ds.evaluation.evaluation import Evaluation
from wsm_ds.evaluation.evaluator import Evaluator, MeasurementFailed
from wsm_ds.evaluation.in_memory import InMemoryEvaluator
from wsm_ds.evaluation.records import Records
from wsm_ds.filesystem.capacity import available_memory
from wsm_ds.loading import LoadedMerge, load_each
from wsm_ds.tuning.candidates import Candidate
from wsm_ds.tuning.exports import Exports
from wsm_ds.tuning.request import TuningRequest

if TYPE_CHECKING:
    import torch

OnEvaluation = Callable[[Candidate, Evaluation], None]
"""Called for each candidate that was measured, on every rank."""


@dataclass
class Costs:
    """What a tuning has cost.

    Attributes:
        seconds: by kind of work: "merge", "evaluate", "export".
        read_bytes: that merges have read.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    read_bytes: int = 0

    def add(self, kind: str, began_s: float) -> None:
        """Adds the seconds since `began_s` (`time.monotonic()`)."""
        self.seconds[kind] = self.seconds.get(kind, 0.0) + time.monotonic() - began_s


class Budget:
    """The time that measurements may take.

    Args:
        budget_s: seconds; None: no limit.
        ranks: those of the tuning; rank 0's clock counts.
    """

    def __init__(self, budget_s: float | None, ranks: Ranks) -> None:
        self.budget_s, self.ranks = budget_s, ranks
        self.began_s, self.begun = time.monotonic(), 0

    def allows_another(self) -> bool:
        """Whether there is time for another measurement, if it takes as long as the others did on average.

        Ranks: all.
        """
        if self.budget_s is None:
            return True

        def has_time() -> bool:
            passed_s = time.monotonic() - self.began_s
            return passed_s + passed_s / max(1, self.begun) <= (self.budget_s or 0.0)

        allows = bool(self.ranks.decide(has_time))
        self.begun += 1
        return allows


@dataclass(frozen=True)
class Stage:
    """What measures candidates, and where the results go.

    Attributes:
        request: of the tuning.
        records: that keep the evaluations.
        exports: exported models.
        costs: are added to.
        ranks: that share the work.
    """

    request: TuningRequest
    records: Records
    exports: Exports
    costs: Costs
    ranks: Ranks

    def remaining(self, candidates: Sequence[Candidate], evaluator: Evaluator) -> list[Candidate]:
        """Those that the evaluator has not measured yet; rank 0 says which.

        Args:
            candidates: of the tuning.
            evaluator: the evaluator.
        """
        identity = evaluator.identity()
        missing: list[int] = self.ranks.decide(
            lambda: [
                number
                for number, candidate in enumerate(candidates)
                if self.records.find(candidate.subject.identity, identity) is None
            ]
        )
        return [candidates[number] for number in missing]

    def add(self, evaluation: Evaluation) -> None:
        """Keeps an evaluation."""
        if self.ranks.rank == 0:
            self.records.add(evaluation)

    def measure_folders(
        self,
        candidates: Sequence[Candidate],
        evaluator: Evaluator,
        budget: Budget,
        on_evaluation: OnEvaluation,
        *,
        stays: bool,
    ) -> None:
        """Exports candidates one by one, and measures the folders.

        Args:
            candidates: to measure.
            evaluator: what measures.
            budget: of time.
            on_evaluation: see `OnEvaluation`.
            stays: whether the exported models are not removed.
        """
        for candidate in candidates:
            if not budget.allows_another():
                return
            began_s = time.monotonic()
            try:
                with self.exports.of(candidate, stays=stays) as folder:
                    self.costs.add("export", began_s)
                    began_s = time.monotonic()
                    evaluation = evaluator.measure_folder(folder, candidate.subject, self.ranks)
                    self.costs.add("evaluate", began_s)
            except MeasurementFailed as error:
                evaluation = evaluator.evaluation(candidate.subject, began_s, error)
            self.add(evaluation)
            on_evaluation(candidate, evaluation)


def screen(
    stage: Stage,
    model: "torch.nn.Module | None",
    candidates: Sequence[Candidate],
    budget: Budget,
    on_evaluation: OnEvaluation,
    evaluator: Evaluator | None = None,
) -> None:
    """Measures candidates that are not measured yet.

    Args:
        stage: where.
        model: in memory, whose weights are replaced; None: the evaluator reads folders.
        candidates: all, in their order.
        budget: of time.
        on_evaluation: see `OnEvaluation`.
        evaluator: another one than that of the screening.

    Raises:
        WsmError: what concerns all candidates, such as data that do not fit the model. What concerns one alone (a NaN,
            a crash) becomes the `failure` of its evaluation.
    """
    evaluator = evaluator or stage.request.screening
    remaining = stage.remaining(candidates, evaluator)
    keeps_all = stage.request.keep == "all"
    if model is None or not isinstance(evaluator, InMemoryEvaluator):
        stage.measure_folders(remaining, evaluator, budget, on_evaluation, stays=keeps_all)
        return
    in_memory = [candidate for candidate in remaining if candidate.chosen is not None]
    on_disk = [candidate for candidate in remaining if candidate.chosen is None]
    stage.measure_folders(on_disk, evaluator, budget, on_evaluation, stays=keeps_all)
    loaded = _loaded(stage, model, in_memory) if in_memory else iter(())
    for candidate in in_memory:
        if not budget.allows_another():
            return
        began_s = time.monotonic()
        merge = next(loaded)
        stage.costs.add("merge", began_s)
        began_s = time.monotonic()
        # All ranks must know: one that has no merge shares no work.
        failures = stage.ranks.gather(str(merge) if isinstance(merge, WsmError) else None)
        failure = next((text for text in failures if text is not None), None)
        if failure is not None:
            evaluation = evaluator.evaluation(candidate.subject, began_s, MeasurementFailed(failure))
        else:
            evaluation = evaluator.measure(model, candidate.subject, stage.ranks)
        stage.costs.add("evaluate", began_s)
        stage.add(evaluation)
        on_evaluation(candidate, evaluation)


def _loaded(
    stage: Stage, model: "torch.nn.Module", candidates: Sequence[Candidate]
) -> Iterator[LoadedMerge | WsmError]:
    request = stage.request
    room = request.memory_room
    if room is None:
        room = (available_memory() or 0) // 2 // stage.ranks.world_size
    # Their windows, not their recipes: the run may have newer checkpoints by now.
    chosen = [candidate.chosen for candidate in candidates if candidate.chosen is not None]
    counted = None
    for merge in load_each(model, chosen, room=room, rename=request.rename or None):
        if isinstance(merge, LoadedMerge) and merge.timings is not counted:  # the merges of a pass share it
            counted = merge.timings
            stage.costs.read_bytes += merge.read_bytes
        yield merge
