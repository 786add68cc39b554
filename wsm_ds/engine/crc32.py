"""CRC-32 of a concatenation from the CRC-32s of its parts, so that parts can be written in any order.

To append n zero bytes is a linear map over GF(2) on the 32-bit state of a CRC-32. The map for n bytes comes from
repeated squaring of the map for one bit, as in zlib's `crc32_combine` (zlib, crc32.c).
"""

import ctypes
import zlib
from functools import lru_cache

import numpy as np

from wsm_ds.engine.arithmetic import kernel

POLYNOMIAL = 0xEDB88320
Matrix = tuple[int, ...]
"""A linear map on 32 bits: row i is the image of bit i."""


def _times(matrix: Matrix, vector: int) -> int:
    """The image of `vector`: the exclusive or of the rows of its bits."""
    total = 0
    for row in matrix:
        if not vector:
            break
        if vector & 1:
            total ^= row
        vector >>= 1
    return total


def _square(matrix: Matrix) -> Matrix:
    return tuple(_times(matrix, row) for row in matrix)


@lru_cache(maxsize=64)
def _append_zeros(power: int) -> Matrix:
    """The map that appends 2**power zero bits."""
    if power == 0:
        return (POLYNOMIAL, *(1 << bit for bit in range(31)))
    return _square(_append_zeros(power - 1))


def is_fast() -> bool:
    """Whether the kernel computes CRC-32s by carry-less multiplication, which costs less than reading does."""
    library = kernel()
    return library is not None and bool(ctypes.c_int.in_dll(library, "wsm_crc_bits"))


def crc_of(data: memoryview, before: int = 0) -> int:
    """CRC-32 of bytes, from that of the bytes before them. Several times as fast as zlib, if `is_fast`."""
    library = kernel()
    if library is None or not is_fast():
        return zlib.crc32(data, before)
    array = np.frombuffer(data, np.uint8)
    return int(library.wsm_crc32(before, array.ctypes.data, len(array)))


def combine(first: int, second: int, second_nbytes: int) -> int:
    """CRC-32 of a + b from the CRC-32s of a and b.

    >>> import zlib
    >>> combine(zlib.crc32(b"warmup "), zlib.crc32(b"stable"), 6) == zlib.crc32(b"warmup stable")
    True

    Args:
        first: CRC-32 of a.
        second: CRC-32 of b.
        second_nbytes: length of b.
    """
    power, remaining = 3, second_nbytes  # 2**3 bits are a byte
    while remaining:
        if remaining & 1:
            first = _times(_append_zeros(power), first)
        remaining >>= 1
        power += 1
    return first ^ second
