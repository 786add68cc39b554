"""Σ c_k θ_k in float64, in order, rounded once: fused in C where a compiler was there at installation, else in numpy.

Both give the same bits. The compiled kernel takes fp32 and bf16 sources; everything else goes through numpy.
"""

import ctypes
import importlib.machinery
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsm_ds.dtypes import DType, narrow, widen

Array = NDArray[Any]
SCRATCH_BYTES_PER_ELEMENT = 32
"""Upper bound of the temporary arrays of one sum, with what it returns."""
SCRATCH_BYTES = 1 << 20
"""Upper bound of what the compiled kernel needs besides, however many elements it sums."""
PADDED_NUMEL = 32
"""`BLOCK` of `kernel.c`."""
IN_MEMORY = -(1 << 31)


@lru_cache(maxsize=1)
def kernel() -> ctypes.CDLL | None:
    """The compiled loops of `kernel.c`, if they were built."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name("_kernel" + suffix)
        if path.is_file():
            library = ctypes.CDLL(str(path))
            pointer, size = ctypes.c_void_p, ctypes.c_size_t
            library.wsm_scratch_bytes.argtypes, library.wsm_scratch_bytes.restype = [size], size
            library.wsm_sums.argtypes = [pointer] * 6 + [size] * 3 + [pointer] * 2
            library.wsm_sums.restype = ctypes.c_int
            library.wsm_round_to_bf16.argtypes = [pointer, pointer, size]
            library.wsm_round_to_bf16.restype = None
            return library
    return None


def weighted_sum(
    slices: Sequence[Array], dtypes: Sequence[DType], coefficients: Sequence[float], *, keeps_fp64: bool = False
) -> tuple[Array, bool]:
    """The sum of stored elements, and whether all of it is finite.

    Args:
        slices: stored elements of each source, shape [n] each.
        dtypes: what they are.
        coefficients: float64, one a source.
        keeps_fp64: whether the sum is left in float64.

    Returns:
        [n], summed in float64 in the given order and rounded once to float32, unless `keeps_fp64`.
    """
    if not keeps_fp64:
        held = [Elements(IN_MEMORY, values.ctypes.data, dtype) for values, dtype in zip(slices, dtypes, strict=True)]
        answer = sums_of(held, [(tuple(range(len(held))), tuple(coefficients))], len(slices[0]))
        if answer is not None:
            return answer[0][0], answer[1]
    with np.errstate(all="ignore"):
        total = np.multiply(widen(slices[0], dtypes[0]), coefficients[0], dtype=np.float64)
        for values, dtype, coefficient in zip(slices[1:], dtypes[1:], coefficients[1:], strict=True):
            total += np.multiply(widen(values, dtype), coefficient, dtype=np.float64)
        summed: Array = total if keeps_fp64 else total.astype(np.float32)
    return summed, bool(np.isfinite(summed).all())


@dataclass(frozen=True)
class Elements:
    """Where a source's elements begin, and what they are: at a byte of an open file, or, if `descriptor` is
    IN_MEMORY, at an address."""

    descriptor: int
    place: int
    dtype: DType


class Scratch:
    """Arrays that one thread uses again and again: of new ones the system would have to clear every page."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[str, int], Array] = {}

    def array(self, use: str, number: int, size: int, dtype: type[np.generic]) -> Array:
        """One of `size` elements, [size]; it holds what its last user left there."""
        held = self._arrays.get((use, number))
        if held is None or len(held) < size:
            held = self._arrays[use, number] = np.empty(size, dtype=dtype)
        return held[:size]


def sums_of(
    sources: Sequence[Elements],
    sums: Sequence[tuple[tuple[int, ...], tuple[float, ...]]],
    numel: int,
    scratch: Scratch | None = None,
) -> tuple[list[Array], bool, float] | None:
    """Several weighted sums of the same elements, read on the way, piece by piece, while they are in the cache.

    Args:
        sources: all that any sum wants.
        sums: for each sum, which of the sources it is made of, in order, and their coefficients.
        numel: elements of each source.
        scratch: the sums are held there, until its next use.

    Returns:
        The sums (float32 [numel] each), whether all are finite, and the seconds spent in reading; None if there is no
        kernel for this, or a source could not be read: `weighted_sum` of what is read otherwise is the same.
    """
    library = kernel()
    is_known = all(source.dtype.name in ("fp32", "bf16") for source in sources)
    in_order = all(list(members) == sorted(set(members)) for members, _ in sums)
    if library is None or not is_known or not in_order or not sums:
        return None
    scratch = scratch or Scratch()
    padded = -(-numel // PADDED_NUMEL) * PADDED_NUMEL
    outs = [scratch.array("sum", number, padded, np.float32) for number in range(len(sums))]
    coefficients = np.zeros((len(sums), len(sources)))
    is_member = np.zeros((len(sums), len(sources)), dtype=np.uint8)
    for row, (members, own) in enumerate(sums):
        coefficients[row, list(members)] = own
        is_member[row, list(members)] = 1
    descriptors = np.array([source.descriptor for source in sources], dtype=np.int32)
    places = np.array([source.place for source in sources], dtype=np.int64)
    is_bf16 = np.array([source.dtype.name == "bf16" for source in sources], dtype=np.uint8)
    addresses = (ctypes.c_void_p * len(outs))(*(out.ctypes.data for out in outs))
    pieces = scratch.array("pieces", 0, library.wsm_scratch_bytes(len(sources)), np.uint8)
    spent_s = ctypes.c_double(0.0)
    answer = library.wsm_sums(
        addresses, descriptors.ctypes.data, places.ctypes.data, is_bf16.ctypes.data, coefficients.ctypes.data,
        is_member.ctypes.data, len(sources), len(sums), numel, pieces.ctypes.data, ctypes.byref(spent_s),
    )  # fmt: skip
    return None if answer < 0 else ([out[:numel] for out in outs], bool(answer), spent_s.value)


def rounded(values: Array, dtype: DType) -> Array:
    """Finite float32 (or float64) values as stored elements of `dtype`; see `dtypes.narrow`."""
    library = kernel()
    if library is None or dtype.name != "bf16" or values.dtype != np.float32:
        return narrow(values, dtype)
    out = np.empty(len(values), dtype=np.uint16)
    library.wsm_round_to_bf16(out.ctypes.data, values.ctypes.data, len(values))
    return out
