"""What a tuning has found: candidates with their measurements, and the recommendation. Plain data, `tuning.json`."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from wsm_ds.evaluation.evaluation import Metric


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Span(_Data):
    """A length of training.

    Attributes:
        steps: optimizer steps.
        tokens: None where the run does not tell.
    """

    steps: float
    tokens: float | None = None


class Difference(_Data):
    """The paired difference of a candidate to the best one, positive where the candidate is worse.

    Attributes:
        value: in the unit of the metric.
        error: its standard error; None: not known.
    """

    value: float
    error: float | None = None


class CandidateResult(_Data):
    """A candidate and what was measured of it.

    Attributes:
        name: unique.
        kind: "merge", "raw" (a checkpoint of the run) or "baseline" (a folder that the user named).
        end: from the run's beginning to the newest checkpoint; None for a folder without a manifest.
        window: duration of the merge; None for baselines; zero for a raw checkpoint.
        fraction: of the run that the window covers, in tokens where they are known, else in steps.
        curve: None for raw checkpoints and baselines.
        spread: "wsm", "qam" or "maxent"; None as `curve`.
        steps: of the checkpoints, oldest first.
        tokens: counts of tokens at the checkpoints; None where the run does not tell.
        coefficients: of the checkpoints, oldest first.
        mean_age, deviation: mean and standard deviation of the age of the weights.
        ess: effective number of checkpoints.
        metrics: measured, by name: those of the screening and, for finalists, of the final stage.
        difference: to the best, in the metric of the tuning; None without a measurement.
        stage: 1: screened alone, 2: a finalist.
        failure: why a measurement is missing.
        seconds: of all its evaluations.
    """

    name: str
    kind: Literal["merge", "raw", "baseline"]
    end: Span | None = None
    window: Span | None = None
    fraction: float | None = None
    curve: str | None = None
    spread: str | None = None
    steps: tuple[int, ...] = ()
    tokens: tuple[int, ...] | None = None
    coefficients: tuple[float, ...] = ()
    mean_age: Span | None = None
    deviation: Span | None = None
    ess: float | None = None
    metrics: dict[str, Metric] = Field(default_factory=dict)
    difference: Difference | None = None
    stage: Literal[1, 2] = 1
    failure: str | None = None
    seconds: float = 0.0


class Recommendation(_Data):
    """What to use.

    Attributes:
        name: of the candidate; None: nothing was measured.
        sentence: the reason, in words, with figures.
        best: the name of the candidate with the best value.
        raw: the name of the newest raw checkpoint, if it was measured.
        confirmed: the metric of the recommended candidate on the second held-out set, which chose nothing.
        confirmed_raw: the same of the newest raw checkpoint.
        warnings: sentences.
    """

    name: str | None
    sentence: str
    best: str | None = None
    raw: str | None = None
    confirmed: Metric | None = None
    confirmed_raw: Metric | None = None
    warnings: tuple[str, ...] = ()


class TuningResult(_Data):
    """All that a tuning has found so far.

    Attributes:
        version: of this form.
        run: its folder.
        metric: name of the metric that decides.
        unit: of that metric.
        maximize: whether more of it is better.
        data: what it is measured on, in words: files, blocks, tokens.
        run_length: from the beginning to the newest checkpoint.
        candidates: in the order of measurement.
        recommendation: None until the first measurement.
        waiting: names of candidates that are not measured yet.
        read_bytes: that the merges have read.
        seconds: by kind of work: "merge", "evaluate", "export".
    """

    version: Literal[1] = 1
    run: str
    metric: str
    unit: str = ""
    maximize: bool = False
    data: str = ""
    run_length: Span | None = None
    candidates: tuple[CandidateResult, ...] = ()
    recommendation: Recommendation | None = None
    waiting: tuple[str, ...] = ()
    read_bytes: int = 0
    seconds: dict[str, float] = Field(default_factory=dict)
