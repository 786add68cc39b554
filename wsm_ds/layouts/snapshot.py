"""Snapshots: checkpoints of masters alone, which a running engine writes between the full ones.

Their model files hold, beside what DeepSpeed writes, under the key `wsm_snapshot`:

    kind      "mean": of the masters after each sampled update of the slot; "point": the masters after the last one
    first     the slot's first step, from 1
    last      its last step, which is the snapshot's
    updates   steps of the slot that changed the masters (an overflow changes nothing)
    count     samples in the mean
    sample    updates between two samples
    is_constant_rate  whether all updates of the slot had the learning rates of its first one
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from wsm_ds.errors import BrokenCheckpoint, brief

SNAPSHOT = "wsm_snapshot"
"""The key in a model file."""


class Snapshot(BaseModel):
    """What the masters of a snapshot are; see the module's text."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    kind: Literal["mean", "point"]
    first: int = Field(ge=1)
    last: int = Field(ge=1)
    updates: int = Field(ge=1)
    count: int = Field(ge=1)
    sample: int = Field(ge=1)
    is_constant_rate: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.first <= self.last or self.updates > self.last - self.first + 1 or self.count > self.updates:
            raise ValueError("first, last, updates and count contradict each other")
        return self

    @property
    def length(self) -> int:
        """Steps of the slot."""
        return self.last - self.first + 1

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return self.model_dump()


def snapshot_in(model: Mapping[Any, Any]) -> Snapshot | None:
    """Returns what a model file says of its snapshot; None for a full checkpoint.

    Args:
        model: the file's objects.

    Raises:
        BrokenCheckpoint: it says what cannot be.
    """
    values = model.get(SNAPSHOT)
    if values is None:
        return None
    try:
        return Snapshot.model_validate(values)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(map(str, fault["loc"])) or SNAPSHOT
        found = brief(fault["input"])
        raise BrokenCheckpoint(
            f"{SNAPSHOT} is not what a snapshot holds: {where}: {fault['msg']}, found {found}."
        ) from error
