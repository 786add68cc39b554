"""Weighted sums of stored elements, Σ c_k θ_k, and their rounding to the dtype of an output.

The sum is taken in float64, oldest source first, and rounded once to float32 (docs/theory.md, "What is exact"). So
every result has one right bit pattern. Two implementations give these bits: `kernel.c`, which reads and sums fp32 and
bf16 sources and is built if the installation finds a C compiler; and numpy, for everything else.
"""

import ctypes
import importlib.machinery
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsm_ds.dtypes import DType, narrow, widen

Array = NDArray[Any]
SCRATCH_BYTES_PER_ELEMENT = 32
"""Upper bound of the temporary arrays and the result of one sum, per element."""
SCRATCH_BYTES = 1 << 20
"""Upper bound of the further memory that the compiled kernel needs, for any number of elements."""
PADDED_NUMEL = 32
"""`BLOCK` of `kernel.c`: it writes whole blocks, so the length of its output arrays is a multiple of this."""
IN_MEMORY = -(1 << 31)
"""`IN_MEMORY` of `kernel.c`."""


@lru_cache(maxsize=1)
def kernel() -> ctypes.CDLL | None:
    """The compiled loops of `kernel.c`; None if they were not built."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name("_kernel" + suffix)
        if path.is_file():
            # CDLL, not PyDLL: it releases the GIL during a call, so that threads sum at the same time.
            library = ctypes.CDLL(str(path))
            if not hasattr(library, "wsm_crc_bits"):  # built for an older version of this file
                return None
            pointer, size = ctypes.c_void_p, ctypes.c_size_t
            library.wsm_scratch_bytes.argtypes, library.wsm_scratch_bytes.restype = [size], size
            library.wsm_sums.argtypes = [pointer] * 6 + [size] * 3 + [pointer] * 3
            library.wsm_sums.restype = ctypes.c_int
            library.wsm_round_to_bf16.argtypes = [pointer, pointer, size]
            library.wsm_round_to_bf16.restype = None
            library.wsm_crc32.argtypes = [ctypes.c_uint32, pointer, size]
            library.wsm_crc32.restype = ctypes.c_uint32
            if hasattr(library, "wsm_add_to_means"):
                library.wsm_add_to_means.argtypes = [pointer] * 3 + [ctypes.c_float, size]
                library.wsm_add_to_means.restype = None
            return library
    return None


@dataclass(frozen=True)
class StoredElements:
    """Where the elements of a source lie, one after the other.

    Attributes:
        descriptor: of an open file, or IN_MEMORY.
        offset: of the first element in the file, in bytes; its address if `descriptor` is IN_MEMORY.
        dtype: of the elements.
    """

    descriptor: int
    offset: int
    dtype: DType


class FusedSums(NamedTuple):
    """What `fused_sums` returns.

    Attributes:
        sums: float32, [numel] each.
        is_finite: whether every element of every sum is finite.
        read_s: seconds that were spent in reading.
        crcs: for each source, the CRC-32 of all its bytes so far; empty if it was not asked for.
    """

    sums: list[Array]
    is_finite: bool
    read_s: float
    crcs: list[int]


class Scratch:
    """Arrays that one thread uses again for every slice.

    A new large array costs time: the system clears each of its pages when it is first touched.
    """

    def __init__(self) -> None:
        self._arrays: dict[tuple[str, int], Array] = {}

    def array(self, use: str, number: int, size: int, dtype: type[np.generic]) -> Array:
        """An array that holds any values, shape [size].

        Args:
            use: what it is for. Every use has its own arrays, always of the same dtype.
            number: of the array within this use.
            size: elements. The array grows if it is smaller.
            dtype: of the array.
        """
        array = self._arrays.get((use, number))
        if array is None or len(array) < size:
            array = self._arrays[use, number] = np.empty(size, dtype=dtype)
        return array[:size]


def weighted_sum(
    elements: Sequence[Array], dtypes: Sequence[DType], coefficients: Sequence[float], *, keeps_fp64: bool = False
) -> tuple[Array, bool]:
    """Sums stored elements with weights, Σ c_k θ_k.

    Args:
        elements: stored elements of each source, oldest source first, shape [n] each.
        dtypes: one for each source.
        coefficients: float64, one for each source.
        keeps_fp64: whether the sum stays in float64.

    Returns:
        The sum, [n] (for complex elements [2n], see `dtypes.widen`), taken in float64 in the given order and rounded
        once to float32 (unless `keeps_fp64`); and whether all of it is finite.
    """
    if not keeps_fp64:
        sources = [
            StoredElements(IN_MEMORY, values.ctypes.data, dtype) for values, dtype in zip(elements, dtypes, strict=True)
        ]
        fused = fused_sums(sources, [(tuple(range(len(sources))), tuple(coefficients))], len(elements[0]))
        if fused is not None:
            return fused.sums[0], fused.is_finite
    with np.errstate(all="ignore"):
        total = np.multiply(widen(elements[0], dtypes[0]), coefficients[0], dtype=np.float64)
        for values, dtype, coefficient in zip(elements[1:], dtypes[1:], coefficients[1:], strict=True):
            # float64 products: a product in float32 would be rounded before it is added.
            total += np.multiply(widen(values, dtype), coefficient, dtype=np.float64)
        summed: Array = total if keeps_fp64 else total.astype(np.float32)
    return summed, bool(np.isfinite(summed).all())


def fused_sums(
    sources: Sequence[StoredElements],
    wanted_sums: Sequence[tuple[tuple[int, ...], tuple[float, ...]]],
    numel: int,
    scratch: Scratch | None = None,
    crcs_before: Sequence[int] = (),
) -> FusedSums | None:
    """Reads sources and makes several weighted sums of them in the compiled kernel.

    It reads a few thousand elements at a time, so that every sum finds them in the processor's cache.

    Args:
        sources: the sources of all sums.
        wanted_sums: for each sum, the numbers of its sources, rising, and their coefficients.
        numel: elements of each source.
        scratch: gives the arrays for the sums, which are valid until its next use.
        crcs_before: for each source, the CRC-32 of the bytes before `numel`'s, if CRC-32s are asked for.

    Returns:
        The sums. None if there is no kernel for these sources, or if a source could not be read in full. The caller
        then reads by itself and calls `weighted_sum`, which gives the same bits.
    """
    library = kernel()
    is_known = all(source.dtype.name in ("fp32", "bf16") for source in sources)
    in_order = all(list(members) == sorted(set(members)) for members, _ in wanted_sums)
    if library is None or not is_known or not in_order or not wanted_sums:
        return None
    scratch = scratch or Scratch()
    padded = -(-numel // PADDED_NUMEL) * PADDED_NUMEL
    sums = [scratch.array("sum", number, padded, np.float32) for number in range(len(wanted_sums))]
    coefficients = np.zeros((len(wanted_sums), len(sources)))
    is_member = np.zeros((len(wanted_sums), len(sources)), dtype=np.uint8)
    for row, (members, coefficients_of_members) in enumerate(wanted_sums):
        coefficients[row, list(members)] = coefficients_of_members
        is_member[row, list(members)] = 1
    descriptors = np.array([source.descriptor for source in sources], dtype=np.int32)
    offsets = np.array([source.offset for source in sources], dtype=np.int64)
    is_bf16 = np.array([source.dtype.name == "bf16" for source in sources], dtype=np.uint8)
    addresses = (ctypes.c_void_p * len(sums))(*(array.ctypes.data for array in sums))
    kernel_memory = scratch.array("kernel", 0, library.wsm_scratch_bytes(len(sources)), np.uint8)
    read_s = ctypes.c_double(0.0)
    crcs = np.array(crcs_before, dtype=np.uint32)
    status = library.wsm_sums(
        addresses, descriptors.ctypes.data, offsets.ctypes.data, is_bf16.ctypes.data, coefficients.ctypes.data,
        is_member.ctypes.data, len(sources), len(sums), numel, crcs.ctypes.data if len(crcs) else None,
        kernel_memory.ctypes.data, ctypes.byref(read_s),
    )  # fmt: skip
    if status < 0:
        return None
    return FusedSums([array[:numel] for array in sums], bool(status), read_s.value, crcs.tolist())


def rounded(values: Array, dtype: DType, scratch: Scratch | None = None, number: int = 0) -> Array:
    """Rounds float32 or float64 values to stored elements of `dtype`, to nearest even.

    Args:
        values: finite, shape [n]; for a complex dtype [2n].
        dtype: a floating or complex dtype. Values that it cannot hold become infinities, see `dtypes.narrow`.
        scratch: gives the array of bf16 elements, which is valid until its next use; None: a new array.
        number: of the array in `scratch`.

    Returns:
        [n], of the numpy dtype that has the same bits.
    """
    library = kernel()
    if library is None or dtype.name != "bf16" or values.dtype != np.float32:
        return narrow(values, dtype)
    out = (scratch or Scratch()).array("bf16", number, len(values), np.uint16)
    library.wsm_round_to_bf16(out.ctypes.data, values.ctypes.data, len(values))
    return out
