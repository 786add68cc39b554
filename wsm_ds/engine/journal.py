"""What was finished before a merge was killed: a line a block, believed only if the staged bytes agree.

A line is appended after its block was written, and nothing waits for the disk: after a kill the page cache has both,
after a power failure any of them may be lost, and then the block's bytes are not those of its line.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wsm_ds.filesystem.durable import replace_text

CLAIMS = "claims"
Block = tuple[str, int]
"""(name of an output file, number of the block in it)."""


@dataclass(frozen=True, slots=True)
class Seal:
    """What a finished block is known by.

    Attributes:
        digest: of its bytes (`checksum.Hasher`); those of a zip's CRC-32s count as zeros, they are filled in last.
        crcs: CRC-32 of what it has of each of the file's CRC fields, in their order.
    """

    digest: bytes
    crcs: tuple[int, ...]


class Journal:
    """The blocks of one part that this process has finished, as a file that grows."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.descriptor = os.open(folder / f"journal.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def add(self, block: Block, seal: Seal) -> None:
        """Appends a line."""
        line = json.dumps([*block, seal.digest.hex(), seal.crcs]) + "\n"
        os.write(self.descriptor, line.encode())

    def close(self) -> None:
        """Lets go of the file."""
        os.close(self.descriptor)


def read_journals(folder: Path) -> dict[Block, Seal]:
    """All blocks of the journals in `folder`, of every rank."""
    return {block: seal for path in sorted(folder.glob("journal.*")) for block, seal in _entries(path)}


def read_claims(folder: Path) -> dict[Block, Seal]:
    """The blocks that an earlier attempt says it has finished."""
    return dict(_entries(folder / CLAIMS))


def journals_to_claims(folder: Path) -> None:
    """Makes the journals of an earlier attempt the claims of this one."""
    journals = sorted(folder.glob("journal.*"))
    if not journals:
        return
    lines = [
        json.dumps([*block, seal.digest.hex(), seal.crcs]) + "\n"
        for block, seal in {**read_claims(folder), **read_journals(folder)}.items()
    ]
    replace_text(folder / CLAIMS, "".join(lines))
    for path in journals:
        path.unlink()


def _entries(path: Path) -> Iterator[tuple[Block, Seal]]:
    """Whole lines of a journal; one that was cut short by a kill is passed over."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            name, index, digest, crcs = json.loads(line)
            yield (str(name), int(index)), Seal(bytes.fromhex(digest), tuple(map(int, crcs)))
        except (ValueError, TypeError, OverflowError, RecursionError):
            continue
