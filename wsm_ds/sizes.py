"""Byte counts as people write and read them."""

import re

from wsm_ds.errors import RecipeError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
"""Bytes per unit: decimal (GB) and binary (GiB), in capital letters."""


def parse_size(value: int | str) -> int:
    """Returns the number of bytes that a text names.

    Example:
        >>> parse_size("512MiB"), parse_size("1.5 GB"), parse_size(4096)
        (536870912, 1500000000, 4096)

    Args:
        value: a number, with a unit of `UNITS` or without one (bytes); small or capital letters.

    Raises:
        RecipeError: `value` is not a size, or is 2**63 bytes or more; names it.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(value))
    if not match or match[2].upper() not in UNITS:
        raise RecipeError(f"{value!r} is not a size; write for example 512MiB, 5GB or 1000000.")
    nbytes = float(match[1]) * UNITS[match[2].upper()]
    # Sizes are stored as int64 in numpy arrays, and a float may be infinite.
    if nbytes >= 1 << 63:
        raise RecipeError(f"{match[0][:40]!r} is more than any machine has.")
    return int(nbytes)


def format_size(nbytes: float) -> str:
    """Returns a number of bytes with a binary unit, for people.

    Example:
        >>> format_size(512), format_size(1.5 * 2**30), format_size(2**50)
        ('512 B', '1.5 GiB', '1024.0 TiB')

    Args:
        nbytes: number of bytes, 0 or more; a rate per second may be a fraction.
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"
