"""What a watch tells while it runs."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """One event: its name, a line for people, and its figures as plain data."""

    name: str
    text: str
    values: dict[str, Any] = field(default_factory=dict)
