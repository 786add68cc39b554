"""Counts of bytes, and of tokens, samples and steps, as people write and read them."""

import re
from fractions import Fraction

from wsm_ds.errors import RecipeError, brief

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
"""Bytes per unit: decimal (GB) and binary (GiB), in capital letters."""


COUNT_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
"""Thousand, million, billion and trillion."""
MOST = 1 << 63
"""Sizes are stored as int64 in numpy arrays, and a float may be infinite."""


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
    if nbytes >= MOST:
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


def parse_count(value: int | str) -> int:
    """Returns the number of tokens, samples or steps that a text names.

    Example:
        >>> parse_count("100B"), parse_count("1.5 k"), parse_count("2e9"), parse_count(4096)
        (100000000000, 1500, 2000000000, 4096)

    Args:
        value: a whole number, with a unit of `COUNT_UNITS` (small or capital letters) or without one; a text may have
            `_` between digits.

    Raises:
        RecipeError: `value` is not a whole number, or is 2**63 or more; names it.
    """
    match = re.fullmatch(r"\s*(\d+(?:_\d+)*)(\.\d+)?(?:e(\d{1,2}))?\s*([kmbtKMBT]?)\s*", str(value))
    if not match or isinstance(value, bool):
        raise RecipeError(f"{brief(value)} is not a count; write for example 100B, 1.5M or 1000000.")
    # Fractions: a float would round 0.1B, or a count above 2**53.
    number = Fraction(match[1].replace("_", "") + (match[2] or ""))
    count = number * 10 ** int(match[3] or 0) * COUNT_UNITS[match[4].upper()]
    if count.denominator != 1 or count >= MOST:
        raise RecipeError(f"{brief(value)} is not a whole number below 2**63.")
    return int(count)


def format_count(count: float) -> str:
    """Returns a number of tokens, samples or steps with a unit, for people.

    Example:
        >>> format_count(512), format_count(12_500_000_000), format_count(999_999), format_count(1.5)
        ('512', '12.5B', '1M', '1.5')

    Args:
        count: the number; it may be negative, and a fraction.
    """
    if abs(count) < 10_000:
        return f"{count:.4g}"
    rounded = float(f"{count:.3g}")
    unit = next(unit for unit in ("T", "B", "M", "K") if abs(rounded) >= COUNT_UNITS[unit])
    return f"{rounded / COUNT_UNITS[unit]:.4g}{unit}"
