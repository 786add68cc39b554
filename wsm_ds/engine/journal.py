"""The record of finished blocks, so that a killed merge does not write them again when it continues.

Each rank appends one line of JSON per finished block to its own journal in the staging folder. Lines are not synced to
the disk. After a kill of the process the page cache still has both the line and the block. After a power failure
either may be lost. So a line is never trusted: the block is read again, and it counts as finished only if its seal
is the line's.

When a merge starts again, the old journals become the *claims* of the new attempt, which starts new journals. A rank
holds the lock of its journal as long as it writes. So a new attempt notices if a rank of an earlier one lives on.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from wsm_ds.engine.seals import Seal
from wsm_ds.errors import OutputLocked
from wsm_ds.filesystem.durable import replace_text
from wsm_ds.filesystem.locks import try_lock
from wsm_ds.filesystem.own_files import open_own
from wsm_ds.filesystem.small_files import read_small

CLAIMS = "claims"
MOST_JOURNAL_BYTES = 1 << 30
"""1 GiB: a line of about 100 bytes for each block of 40 TB of output."""
ORPHANS_END_S, POLL_S = 10.0, 0.1
"""Seconds that a new attempt waits for ranks of an earlier one: they notice within a second that rank 0 has ended."""
BlockName = tuple[str, int]
"""(name of an output file, number of the block in it)."""


class Journal:
    """The journal of one rank for one output, open for appending.

    Args:
        folder: the staging folder of the output.
        rank: of this process.

    Raises:
        OutputLocked: another process writes this journal.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        path = folder / f"journal.{rank}"
        self.descriptor = open_own(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        if not try_lock(self.descriptor, folder):
            os.close(self.descriptor)
            raise _still_written(path)

    def add(self, block: BlockName, seal: Seal) -> None:
        """Appends the line of a finished block, in one write."""
        os.write(self.descriptor, _line(block, seal).encode())

    def close(self) -> None:
        """Closes the file."""
        os.close(self.descriptor)


def read_journals(folder: Path) -> dict[BlockName, Seal]:
    """The blocks that all ranks of this attempt have finished, from the journals in a staging folder.

    A block for which two journals have different seals is left out: nobody knows which of them are its bytes.
    """
    seals: dict[BlockName, Seal] = {}
    contradicted = set()
    for path in sorted(folder.glob("journal.*")):
        for block, seal in _entries(path):
            if seals.setdefault(block, seal) != seal:
                contradicted.add(block)
    return {block: seal for block, seal in seals.items() if block not in contradicted}


def require_no_writers(folder: Path) -> None:
    """Waits until no process writes a journal in a staging folder any more.

    Ranks: rank 0, before it changes anything in the folder.

    Args:
        folder: the staging folder of an output.

    Raises:
        OutputLocked: a rank of an earlier attempt lives on; the message names its journal.
    """
    deadline_s = time.monotonic() + ORPHANS_END_S
    for path in sorted(folder.glob("journal.*")):
        descriptor = open_own(path, os.O_WRONLY)
        try:
            while not try_lock(descriptor, folder):
                if time.monotonic() > deadline_s:
                    raise _still_written(path)
                time.sleep(POLL_S)
        finally:
            os.close(descriptor)


def _still_written(path: Path) -> OutputLocked:
    return OutputLocked(
        f"{path} is being written by a rank of an earlier start of a merge to this output. Its process lives on "
        "although its rank 0 has ended: end it (`fuser` of the file names it), and start the merge again."
    )


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
