"""What a watch reports while it runs."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """Something that has happened.

    Attributes:
        name: what happened, as `--json` prints it: "merged", "refused", "waiting", ...
        text: a line for people.
        values: its figures, as plain data for JSON.
    """

    name: str
    text: str
    values: dict[str, Any] = field(default_factory=dict)
