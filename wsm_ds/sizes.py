"""Byte counts, as people write and read them."""

import re

from wsm_ds.errors import RecipeError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def parse_size(value: int | str) -> int:
    """Bytes of "512MiB", "5GB" or a plain number.

    Raises:
        RecipeError: neither.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(value))
    if not match or match[2].upper() not in UNITS:
        raise RecipeError(f"{value!r} is not a size; write for example 512MiB, 5GB or 1000000.")
    nbytes = float(match[1]) * UNITS[match[2].upper()]
    if nbytes >= 1 << 63:
        raise RecipeError(f"{match[0][:40]!r} is more than any machine has.")
    return int(nbytes)


def format_size(nbytes: float) -> str:
    """Bytes with a binary unit: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"
