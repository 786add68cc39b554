"""The record of finished blocks, so that a killed merge does not write them again when it continues.

Each rank appends one line of JSON per finished block to its own journal in the staging folder. Lines are not synced to
the disk. After a kill of the process the page cache still has both the line and the block. After a power failure
either may be lost. So a line is never trusted: the block is read again, and it counts as finished only if its seal
is the line's.

When a merge starts again, the old journals become the *claims* of the new attempt, which starts new journals.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from wsm_ds.engine.seals import Seal
from wsm_ds.filesystem.durable import replace_text
from wsm_ds.filesystem.small_files import read_small

CLAIMS = "claims"
MOST_JOURNAL_BYTES = 1 << 30
"""1 GiB: a line of about 100 bytes for each block of 40 TB of output."""
BlockName = tuple[str, int]
"""(name of an output file, number of the block in it)."""


class Journal:
    """The journal of one rank for one output, open for appending.

    Args:
        folder: the staging folder of the output.
        rank: of this process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.descriptor = os.open(folder / f"journal.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def add(self, block: BlockName, seal: Seal) -> None:
        """Appends the line of a finished block, in one write."""
        os.write(self.descriptor, _line(block, seal).encode())

    def close(self) -> None:
        """Closes the file."""
        os.close(self.descriptor)


def read_journals(folder: Path) -> dict[BlockName, Seal]:
    """The blocks that all ranks of this attempt have finished, from the journals in a staging folder."""
    return {block: seal for path in sorted(folder.glob("journal.*")) for block, seal in _entries(path)}


def read_claims(folder: Path) -> dict[BlockName, Seal]:
    """The blocks that earlier attempts had finished, with their seals. The caller compares the bytes with the seals."""
    return dict(_entries(folder / CLAIMS))


def journals_to_claims(folder: Path) -> None:
    """Adds the journals of an earlier attempt to the claims and removes them.

    A kill at any moment loses nothing: the claims are replaced before a journal is removed.

    Ranks: rank 0, before any rank opens a journal.

    Args:
        folder: the staging folder of an output.
    """
    journals = sorted(folder.glob("journal.*"))
    if not journals:
        return
    seals = {**read_claims(folder), **read_journals(folder)}
    replace_text(folder / CLAIMS, "".join(_line(block, seal) for block, seal in seals.items()))
    for path in journals:
        path.unlink()


def _line(block: BlockName, seal: Seal) -> str:
    return json.dumps([*block, seal.digest.hex(), seal.crcs]) + "\n"


def _entries(path: Path) -> Iterator[tuple[BlockName, Seal]]:
    """The entries of a journal. A line that a kill cut short, or that is malformed, is ignored."""
    try:
        text = read_small(path, most_bytes=MOST_JOURNAL_BYTES, errors="replace")
    except (FileNotFoundError, ValueError):
        return
    for line in text.splitlines():
        try:
            name, block, digest, crcs = json.loads(line)
            yield (str(name), int(block)), Seal(bytes.fromhex(digest), tuple(map(int, crcs)))
        except (ValueError, TypeError, OverflowError, RecursionError):
            continue
