"""Where the time of a merge goes."""

from dataclasses import dataclass


@dataclass
class Timings:
    """Seconds that threads spent in each kind of work.

    Attributes:
        read_s: reading the sources.
        arithmetic_s: sums, casts and comparisons.
        write_s: writing the output files, without the wait for the disk at the end.
        hash_s: checksums of the output.
    """

    read_s: float = 0.0
    arithmetic_s: float = 0.0
    write_s: float = 0.0
    hash_s: float = 0.0

    def add(self, other: "Timings") -> None:
        """Adds the seconds of another thread to these."""
        for name, seconds in vars(other).items():
            setattr(self, name, getattr(self, name) + seconds)
