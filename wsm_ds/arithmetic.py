"""Σ c_k θ_k in float64, in order, rounded once: fused in C where a compiler was there at installation, else in numpy.

Both give the same bits. The compiled kernel takes fp32 and bf16 sources; everything else goes through numpy.
"""

import ctypes
import importlib.machinery
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsm_ds.dtypes import DType, narrow, widen

Array = NDArray[Any]
SCRATCH_BYTES_PER_ELEMENT = 32
"""Upper bound of the temporary arrays of either function, with what it returns."""


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


def rounded(values: Array, dtype: DType) -> Array:
    """Finite float32 (or float64) values as stored elements of `dtype`; see `dtypes.narrow`."""
    library = kernel()
    if library is None or dtype.name != "bf16" or values.dtype != np.float32:
        return narrow(values, dtype)
    out = np.empty(len(values), dtype=np.uint16)
    library.wsm_round_to_bf16(out.ctypes.data, values.ctypes.data, len(values))
    return out
