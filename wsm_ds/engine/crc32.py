"""CRC-32 of a concatenation from the CRC-32s of its parts, so that parts can be written in any order.

Appending n zero bytes is a linear map over GF(2) on the 32-bit state; its matrix for n bytes is found by
repeated squaring, as in zlib's `crc32_combine`.
"""

from functools import lru_cache

POLYNOMIAL = 0xEDB88320
Matrix = tuple[int, ...]


def _times(matrix: Matrix, vector: int) -> int:
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
def _zeros(power: int) -> Matrix:
    """The map that appends 2**power zero bits."""
    if power == 0:
        return (POLYNOMIAL, *(1 << bit for bit in range(31)))
    return _square(_zeros(power - 1))


def combine(first: int, second: int, second_nbytes: int) -> int:
    """CRC-32 of a + b, from that of a, that of b and the length of b in bytes."""
    power, remaining = 3, second_nbytes
    while remaining:
        if remaining & 1:
            first = _times(_zeros(power), first)
        remaining >>= 1
        power += 1
    return first ^ second
