"""What one evaluation says: of which model, measured how, with which result. Plain data, a line of JSON."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SubjectSource(_Data):
    """A checkpoint that a model is made of.

    Attributes:
        tag: its name in the run.
        step: its optimizer step.
        coefficient: its weight in the model; 1 for a checkpoint alone.
    """

    tag: str
    step: int
    coefficient: float


class Subject(_Data):
    """The model that an evaluation is about.

    Attributes:
        name: for people, unique in a tuning, such as "last8-linear".
        kind: "merge", "checkpoint" (one raw checkpoint of the run), or "folder" (weights from elsewhere).
        identity: SHA-256, in hex. Two subjects share it if they have the same weights.
        path: the folder of the weights or of the run, for people.
        sources: the checkpoints that it is made of, oldest first; empty for a folder without a manifest.
    """

    name: str
    kind: Literal["merge", "checkpoint", "folder"]
    identity: str
    path: str
    sources: tuple[SubjectSource, ...] = ()


class Metric(_Data):
    """A measured value.

    Attributes:
        value: the mean.
        error: its standard error; None: not known.
        maximize: whether more is better.
        unit: such as "nats/token"; "" for a plain number.
    """

    value: float
    error: float | None = None
    maximize: bool = False
    unit: str = ""


class Blocks(_Data):
    """Sums over each block of a held-out set. All lists have one value a block, in the order of the blocks.

    Attributes:
        sources: names of the held-out sets.
        source: number of each block's source in `sources`.
        nats: sum of the losses of a block's tokens, natural logarithm.
        tokens: number of predicted tokens.
        nbytes: bytes of the text of these tokens; None if the data do not tell.
    """

    sources: tuple[str, ...]
    source: tuple[int, ...]
    nats: tuple[float, ...]
    tokens: tuple[int, ...]
    nbytes: tuple[int, ...] | None = None


class Evaluation(_Data):
    """One measurement of one model, or the reason why there is none.

    Attributes:
        subject: the model.
        evaluator: what measured: its "kind" ("loss", "generate", "command", "lm-eval"), "identity" (SHA-256 of all that
            decides the result besides the model), and details for people.
        metrics: by name. The names of one evaluator are the same for every model.
        blocks: of an evaluator of kind "loss".
        seconds: that the measurement took.
        at: when it ended, ISO 8601, UTC.
        versions: of the packages that took part.
        failure: why there is no result; None: there is one.
    """

    subject: Subject
    evaluator: dict[str, Any]
    metrics: dict[str, Metric] = Field(default_factory=dict)
    blocks: Blocks | None = None
    seconds: float = 0.0
    at: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    failure: str | None = None
