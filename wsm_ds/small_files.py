"""Files of text that people or a merge have written, and that are read whole."""

from pathlib import Path

MOST_BYTES = 1 << 26
"""64 MiB: a manifest of 100 000 files has a quarter of it."""


def read_small(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than MOST_BYTES, or no text.
    """
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"{path} is larger than {MOST_BYTES >> 20} MiB")
    return data.decode()
