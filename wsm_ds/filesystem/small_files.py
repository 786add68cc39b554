"""Small text files that are read whole: recipes, manifests, plans."""

from pathlib import Path

MOST_BYTES = 1 << 28
"""256 MiB. A manifest takes about 180 bytes for each output file, a merge's plan about 220 bytes for each source
file; so the plan of 64 checkpoints of 9 000 ranks is smaller."""


def read_small(path: Path) -> str:
    """Reads a UTF-8 file, but not a huge one: a wrong path must not fill the memory.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than MOST_BYTES, or not UTF-8.
    """
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"{path} is larger than {MOST_BYTES >> 20} MiB")
    return data.decode()
