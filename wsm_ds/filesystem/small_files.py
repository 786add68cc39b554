"""Files of text that people or a merge have written, and that are read whole."""

from pathlib import Path

MOST_BYTES = 1 << 28
"""256 MiB. With long paths a manifest has 180 bytes a file, and the plan of a merge 220 bytes a source file: of 64
checkpoints of 9 000 ranks it is still read."""


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
