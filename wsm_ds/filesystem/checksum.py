"""Checksums of output files: XXH3-128 of their blocks' XXH3-128 digests, so that blocks may be made in any order.

They tell a damaged or truncated file, at a speed that does not count beside the disk's; that nobody has tampered with
a file they do not tell: `verify --full` recomputes it from the sources.
"""

from collections.abc import Iterable
from pathlib import Path

import xxhash

Hasher = xxhash.xxh3_128


def of_blocks(digests: Iterable[bytes]) -> str:
    """A file's checksum (hex) from the digests of its blocks, in order."""
    return Hasher(b"".join(digests)).hexdigest()


def of_bytes(data: bytes) -> str:
    """The checksum of a file of one block."""
    return of_blocks([Hasher(data).digest()])


def of_file(path: Path, block_bytes: int) -> str:
    """The checksum of a file, read again."""
    with path.open("rb") as file:
        return of_blocks(Hasher(block).digest() for block in iter(lambda: file.read(block_bytes), b""))
