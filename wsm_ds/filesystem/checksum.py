"""Checksums of output files: the XXH3-128 of their blocks' XXH3-128 digests, so that blocks may come in any order.

XXH3 is much faster than a disk. It finds damaged and truncated files. It does not find a file that somebody has forged;
`wsm-ds verify --full` does, because it recomputes the file from the sources.
"""

from collections.abc import Iterable
from pathlib import Path

import xxhash

Hasher = xxhash.xxh3_128


def of_blocks(digests: Iterable[bytes]) -> str:
    """A file's checksum in hex, from the digests of its blocks in order."""
    return Hasher(b"".join(digests)).hexdigest()


def of_bytes(data: bytes) -> str:
    """The checksum of a file of one block."""
    return of_blocks([Hasher(data).digest()])


def of_file(path: Path, block_bytes: int) -> str:
    """The checksum of a file on the disk, whose blocks have `block_bytes` each (the last one may have less)."""
    with path.open("rb") as file:
        return of_blocks(Hasher(block).digest() for block in iter(lambda: file.read(block_bytes), b""))
