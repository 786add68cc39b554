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
PIECE_NUMEL = 8192
"""`PIECE` of `kernel.c`."""
MOST_SUMS = 64


@lru_cache(maxsize=1)
def kernel() -> ctypes.CDLL | None:
    """The compiled loops of `kernel.c`, if they were built."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name("_kernel" + suffix)
        if path.is_file():
            library = ctypes.CDLL(str(path))
            pointer, size = ctypes.c_void_p, ctypes.c_size_t
            library.wsm_weighted_sum.argtypes = [pointer, pointer, pointer, pointer, size, size]
            library.wsm_weighted_sum.restype = ctypes.c_int
            library.wsm_read_and_sum.argtypes = [pointer] * 6 + [size] * 3 + [pointer] * 2
            library.wsm_read_and_sum.restype = ctypes.c_int
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
    library = None if keeps_fp64 else kernel()
    if library is not None and {dtype.name for dtype in dtypes} <= {"fp32", "bf16"}:
        out = np.empty(len(slices[0]), dtype=np.float32)
        sources = (ctypes.c_void_p * len(slices))(*(values.ctypes.data for values in slices))
        is_bf16 = (ctypes.c_uint8 * len(slices))(*(dtype.name == "bf16" for dtype in dtypes))
        factors = (ctypes.c_double * len(slices))(*coefficients)
        finite = library.wsm_weighted_sum(out.ctypes.data, sources, is_bf16, factors, len(slices), len(out))
        return out, bool(finite)
    with np.errstate(all="ignore"):
        total = np.multiply(widen(slices[0], dtypes[0]), coefficients[0], dtype=np.float64)
        for values, dtype, coefficient in zip(slices[1:], dtypes[1:], coefficients[1:], strict=True):
            total += np.multiply(widen(values, dtype), coefficient, dtype=np.float64)
        summed: Array = total if keeps_fp64 else total.astype(np.float32)
    return summed, bool(np.isfinite(summed).all())


@dataclass(frozen=True)
class Range:
    """Where a source's elements begin: an open file, a byte offset, and what they are."""

    descriptor: int
    offset: int
    dtype: DType


def read_and_sum(
    ranges: Sequence[Range], sums: Sequence[tuple[tuple[int, ...], tuple[float, ...]]], numel: int
) -> tuple[list[Array], bool, float] | None:
    """Several weighted sums of the same elements, which are read on the way, piece by piece, in the processor's cache.

    Args:
        ranges: of each source.
        sums: for each sum, which of the sources it is made of, in order, and their coefficients.
        numel: elements of each source.

    Returns:
        The sums (float32 [numel] each), whether all are finite, and the seconds spent in reading; None if there is no
        kernel for this, or a source could not be read: `weighted_sum` of what is read otherwise is the same.
    """
    library = kernel()
    is_known = all(range_.dtype.name in ("fp32", "bf16") for range_ in ranges)
    in_order = all(list(members) == sorted(set(members)) for members, _ in sums)
    if library is None or not is_known or not in_order or not 0 < len(sums) <= MOST_SUMS:
        return None
    outs = [np.empty(numel, dtype=np.float32) for _ in sums]
    coefficients = np.zeros((len(sums), len(ranges)))
    is_member = np.zeros((len(sums), len(ranges)), dtype=np.uint8)
    for row, (members, own) in enumerate(sums):
        coefficients[row, list(members)] = own
        is_member[row, list(members)] = 1
    descriptors = np.array([range_.descriptor for range_ in ranges], dtype=np.int32)
    offsets = np.array([range_.offset for range_ in ranges], dtype=np.int64)
    is_bf16 = np.array([range_.dtype.name == "bf16" for range_ in ranges], dtype=np.uint8)
    places = (ctypes.c_void_p * len(outs))(*(out.ctypes.data for out in outs))
    scratch = np.empty(PIECE_NUMEL * (len(sums) + 1), dtype=np.float64)
    spent_s = ctypes.c_double(0.0)
    answer = library.wsm_read_and_sum(
        places, descriptors.ctypes.data, offsets.ctypes.data, is_bf16.ctypes.data, coefficients.ctypes.data,
        is_member.ctypes.data, len(ranges), len(sums), numel, scratch.ctypes.data, ctypes.byref(spent_s),
    )  # fmt: skip
    return None if answer < 0 else (outs, bool(answer), spent_s.value)


def rounded(values: Array, dtype: DType) -> Array:
    """Finite float32 (or float64) values as stored elements of `dtype`; see `dtypes.narrow`."""
    library = kernel()
    if library is None or dtype.name != "bf16" or values.dtype != np.float32:
        return narrow(values, dtype)
    out = np.empty(len(values), dtype=np.uint16)
    library.wsm_round_to_bf16(out.ctypes.data, values.ctypes.data, len(values))
    return out
