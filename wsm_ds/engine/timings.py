"""Where the time of a merge goes."""

from dataclasses import dataclass


@dataclass
class Timings:
    """Seconds of one thread."""

    read_s: float = 0.0
    arithmetic_s: float = 0.0
    write_s: float = 0.0
    hash_s: float = 0.0

    def add(self, other: "Timings") -> None:
        """Adds another thread's."""
        for name, seconds in vars(other).items():
            setattr(self, name, getattr(self, name) + seconds)
