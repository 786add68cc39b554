"""The tuning: candidates → evaluations → recommendation. It may be killed at any time, and goes on when called again.

TUNE holds

    evaluations.jsonl   every measurement, as soon as it is made
    tuning.json         the result so far (`TuningResult`)
    best.yaml           the recommended merge, as a recipe
    models/             exported models, as far as they are kept
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wsm_ds.distributed.ranks import Ranks
from wsm_ds.errors import BrokenCheckpoint, OutputExists, OutputLocked, RecipeError
from wsm_ds.evaluation.evaluation import Evaluation
from wsm_ds.evaluation.evaluator import MeasurementFailed
from wsm_ds.evaluation.in_memory import InMemoryEvaluator
from wsm_ds.evaluation.loss import LossEvaluator
from wsm_ds.evaluation.models import build_model
from wsm_ds.evaluation.records import NAME, Records
from wsm_ds.evaluation.subjects import CONFIG
from wsm_ds.filesystem.durable import replace_shared_text
from wsm_ds.filesystem.locks import hold_lock
from wsm_ds.filesystem.small_files import read_small
from wsm_ds.layouts.frameworks import save_of
from wsm_ds.tuning.candidates import Candidate, candidates_of
from wsm_ds.tuning.conclusion import Found, conclude
from wsm_ds.tuning.exports import Exports, remove
from wsm_ds.tuning.request import TuningRequest
from wsm_ds.tuning.results import TuningResult
from wsm_ds.tuning.screening import Budget, Costs, Stage, screen
from wsm_ds.tuning.transfer import recipe_text
from wsm_ds.tuning.warnings import loss_of_guessing

if TYPE_CHECKING:
    import torch

MOST_SHARED = 0.1
"""Part of the blocks of `confirm` that may also be among those that choose: some texts are in all data."""
RESULT, BEST, LOCK = "tuning.json", "best.yaml", ".wsm-tune.lock"


@dataclass(frozen=True)
class Step:
    """A measurement that was made just now.

    Attributes:
        candidate: its name.
        evaluation: the measurement.
        done: measurements of this call.
        total: measurements that this call will make, as far as it is known.
        left_s: seconds that the others will take, about.
        result: of the tuning so far.
    """

    candidate: str
    evaluation: Evaluation
    done: int
    total: int
    left_s: float
    result: TuningResult


def tune(
    request: TuningRequest, ranks: Ranks | None = None, on_step: Callable[[Step], None] = lambda step: None
) -> TuningResult:
    """Measures the candidates of a run, and recommends one.

    What was measured before is not measured again. Several calls may share the candidates (`share`).

    Ranks: all, inside `ranks.together()`. Each fills a model of its own, and they share the held-out blocks.

    Args:
        request: what to do.
        ranks: those of a launcher; None: this process alone.
        on_step: called for each measurement, on every rank.

    Returns:
        The result, which is also in OUT/tuning.json.

    Raises:
        RecipeError, EvaluationError: an option, the data, or the model is wrong; nothing was measured.
        ModelMismatch: the model's names or shapes are not those of the run.
        OutputExists: OUT is the tuning of another run.
        OutputLocked: another process tunes OUT now, and the candidates are not shared.
        InsufficientCapacity: the memory or the disk is too small.
        WsmError: a window cannot be merged, see `plan_merge`.
    """
    return _Tuning(request, ranks or Ranks(), on_step).run()


def read_result(folder: Path) -> TuningResult | None:
    """The result in a tuning's folder; None if there is none yet.

    Args:
        folder: OUT.

    Raises:
        OutputExists: the file is not what a tuning writes.
    """
    path = folder / RESULT
    try:
        return TuningResult.model_validate_json(read_small(path))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise OutputExists(f"{path} is not what a tuning of this version writes: choose another --out.") from error


class _Tuning:
    """One call of `tune`."""

    def __init__(self, request: TuningRequest, ranks: Ranks, on_step: Callable[[Step], None]) -> None:
        self.request, self.ranks, self.on_step = request, ranks, on_step
        self.done = self.total = 0
        self.began_s = time.monotonic()

    def run(self) -> TuningResult:
        """Does all that is left."""
        request = self.request
        earlier = self._require_own_folder()
        for evaluator in filter(None, (request.screening, *request.finals, request.confirm)):
            evaluator.require_ready()
        _require_other_data(request)
        candidates = candidates_of(request)
        model = self._model(candidates)
        exports = Exports(request, self.ranks)
        exports.require_room(list(candidates))
        records = Records(request.out / NAME)
        costs = Costs(dict(earlier.seconds), earlier.read_bytes) if earlier is not None else Costs()
        self.stage = Stage(request, records, exports, costs, self.ranks)
        self.found = Found(request, candidates, records, _guessing(request))
        is_shared = request.share[1] > 1
        with self._only_one() as is_mine:
            if not is_mine and not is_shared:
                raise OutputLocked(
                    f"another process tunes {request.out} now. Wait for it, choose another --out, or share the "
                    "candidates (--share)."
                )
            if not is_shared:
                self._screen(model, candidates)
                self._finish(model)
                if self.ranks.rank == 0:
                    exports.remove_unfinished()
        if is_shared:
            self._screen(model, candidates)
            # Looked at before the lock is taken: else the last two could each leave the rest to the other.
            if self._is_screened(candidates):
                with self._only_one() as is_mine:
                    if is_mine:
                        self._finish(model)
        return TuningResult.model_validate(self.ranks.decide(lambda: self._result().model_dump(mode="json")))

    def _finish(self, model: "torch.nn.Module | None") -> None:
        """Does what follows the screening."""
        self._finals(model)
        self._confirm(model)
        self._keep_best()

    def _require_own_folder(self) -> TuningResult | None:
        earlier = read_result(self.request.out)
        run = str(self.request.run.resolve())
        if earlier is not None and earlier.run != run:
            raise OutputExists(
                f"{self.request.out} is the tuning of {earlier.run}, not of {run}: choose another --out."
            )
        return earlier

    def _model(self, candidates: tuple[Candidate, ...]) -> "torch.nn.Module | None":
        """The model that is filled again and again; None if every evaluator reads folders."""
        request = self.request
        every = (request.screening, *request.finals, request.confirm)
        evaluators = [one for one in every if isinstance(one, InMemoryEvaluator)]
        if not evaluators:
            return None
        model = build_model(request.model or _config_of(candidates), evaluators[0].dtype)
        for evaluator in evaluators:
            evaluator.require_fit(model)
        return model

    def _screen(self, model: "torch.nn.Module | None", candidates: tuple[Candidate, ...]) -> None:
        number, count = self.request.share
        own = candidates[number::count]
        self.total = len(self.stage.remaining(own, self.request.screening))
        self.total += len(self.request.finals) * (self.request.finalists + 1)
        screen(self.stage, model, own, Budget(self.request.budget_s, self.ranks), self._report)

    def _is_screened(self, candidates: tuple[Candidate, ...]) -> bool:
        """Whether all candidates have a value or a failure, also those of other processes."""
        return bool(
            self.ranks.decide(
                lambda: all(self.found.evaluation(one, self.request.screening) is not None for one in candidates)
            )
        )

    @contextmanager
    def _only_one(self) -> Iterator[bool]:
        """Whether no other process tunes here now, or does what follows the screening of processes that share it."""
        with ExitStack() as stack:

            def take() -> bool:
                self.request.out.mkdir(parents=True, exist_ok=True)
                with suppress(OutputLocked):
                    stack.enter_context(hold_lock(self.request.out / LOCK, f"another process tunes {self.request.out}"))
                    return True
                return False

            yield bool(self.ranks.decide(take))

    def _finals(self, model: "torch.nn.Module | None") -> None:
        if not self.request.finals:
            return
        names: list[str] = self.ranks.decide(lambda: [candidate.name for candidate in self.found.finalists()])
        finalists = [candidate for candidate in self.found.candidates if candidate.name in names]
        remaining = {final: self.stage.remaining(finalists, final) for final in self.request.finals}
        self.total = self.done + sum(map(len, remaining.values()))
        unlimited = Budget(None, self.ranks)
        for final, candidates in remaining.items():
            if isinstance(final, InMemoryEvaluator) and model is not None:
                screen(self.stage, model, candidates, unlimited, self._report, final)
            else:
                stays = self.request.keep in ("finalists", "all")
                self.stage.measure_folders(candidates, final, unlimited, self._report, stays=stays)

    def _confirm(self, model: "torch.nn.Module | None") -> None:
        """Measures the recommended candidate, and the newest raw one, on data that have chosen nothing."""
        confirm = self.request.confirm
        if confirm is None:
            return
        names = self._recommended_names()
        chosen = [candidate for candidate in self.found.candidates if candidate.name in names]
        self.total = self.done + len(self.stage.remaining(chosen, confirm))
        screen(self.stage, model, chosen, Budget(None, self.ranks), self._report, confirm)

    def _recommended_names(self) -> tuple[str | None, str | None]:
        """The recommended candidate, and the newest raw one that it was compared with; rank 0 says which."""

        def names() -> list[str | None]:
            found = self._result().recommendation
            return [found.name, found.raw] if found is not None else [None, None]

        name, raw = self.ranks.decide(names)
        return name, raw

    def _keep_best(self) -> None:
        """Exports the recommended candidate, if it is to be kept, and removes the models of an earlier call."""
        keep = self.request.keep or ("best" if self.request.finals else None)
        if keep != "best":
            return
        name, _ = self._recommended_names()
        best = next((candidate for candidate in self.found.candidates if candidate.name == name), None)
        if best is None:
            return
        try:
            with self.stage.exports.of(best, stays=True):
                pass
        except MeasurementFailed as error:
            raise BrokenCheckpoint(f"{best.name} is recommended, and cannot be exported any more: {error}") from error
        if self.ranks.rank == 0:
            for folder in self.stage.exports.folder.iterdir():
                if folder.name != best.name and not folder.name.startswith("."):
                    remove(folder)

    def _report(self, candidate: Candidate, evaluation: Evaluation) -> None:
        self.done += 1
        passed_s = time.monotonic() - self.began_s
        left = max(0, self.total - self.done)
        self.on_step(
            Step(candidate.name, evaluation, self.done, self.total, left * passed_s / self.done, self._result())
        )

    def _result(self) -> TuningResult:
        """The result so far; rank 0 writes it into OUT."""
        costs, records = self.stage.costs, self.found.records
        while True:
            count = len(records.all())
            result = conclude(self.found, costs.seconds, costs.read_bytes)
            if self.ranks.rank != 0:
                return result
            self._write(result)
            # Processes that share the tuning replace each other's files: an older result must not stay.
            if len(records.all()) == count:
                return result

    def _write(self, result: TuningResult) -> None:
        self.request.out.mkdir(parents=True, exist_ok=True)
        best = self._recommended(result)
        if best is None:
            (self.request.out / BEST).unlink(missing_ok=True)  # of other data, or of a run that has gone on
        elif best.chosen is not None:
            replace_shared_text(self.request.out / BEST, recipe_text(best, result))
        replace_shared_text(self.request.out / RESULT, json.dumps(result.model_dump(mode="json"), indent=1) + "\n")

    def _recommended(self, result: TuningResult) -> Candidate | None:
        name = result.recommendation.name if result.recommendation is not None else None
        return next((candidate for candidate in self.found.candidates if candidate.name == name), None)


def _config_of(candidates: tuple[Candidate, ...]) -> str:
    """The folder with the config.json that a framework has saved beside the newest checkpoint."""
    newest = next(one for one in candidates if one.is_newest and one.chosen is not None)
    assert newest.chosen is not None
    folder = save_of(newest.chosen.window.layouts[-1].path).folder
    if not (folder / CONFIG).is_file():
        raise RecipeError(
            f"`model` must say what the weights are filled into: {folder} has no {CONFIG}. Give a folder with one, or "
            "MODULE:FUNCTION."
        )
    return str(folder)


def _require_other_data(request: TuningRequest) -> None:
    """Raises RecipeError if the data that shall choose nothing are those that choose."""
    screening, confirm = request.screening, request.confirm
    if not isinstance(screening, LossEvaluator) or not isinstance(confirm, LossEvaluator):
        return
    choosing = {row.tobytes() for row in screening.held_out().tokens}
    second = [row.tobytes() for row in confirm.held_out().tokens]
    shared = sum(row in choosing for row in second)
    if shared > MOST_SHARED * len(second):
        raise RecipeError(
            f"--confirm: {shared} of its {len(second)} blocks are in --data, too. Its figure would be as flattering as "
            "the one that chose; give other data."
        )


def _guessing(request: TuningRequest) -> float | None:
    """See `warnings_of`; None if the screening measures no loss."""
    screening = request.screening
    return loss_of_guessing(screening.held_out().tokens) if isinstance(screening, LossEvaluator) else None
