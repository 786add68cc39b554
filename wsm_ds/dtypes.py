"""The dtypes that checkpoints store, as bytes on disk and as numpy arrays (numpy has no bfloat16).

A tensor's bytes are little-endian. `widen` and `narrow` convert between stored elements and the float32
that all arithmetic passes through; `narrow` rounds to nearest even.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class DType:
    """One element type: its name here, in torch and in safetensors, and how numpy holds its bits."""

    name: str
    torch_name: str
    safetensors_name: str
    storage: str  # numpy dtype that has the same bits

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return np.dtype(self.storage).itemsize

    @property
    def is_floating(self) -> bool:
        """Whether elements of this type can be summed with weights."""
        return self.name in ("fp64", "fp32", "fp16", "bf16")


ALL = (
    DType("fp64", "float64", "F64", "<f8"),
    DType("fp32", "float32", "F32", "<f4"),
    DType("fp16", "float16", "F16", "<f2"),
    DType("bf16", "bfloat16", "BF16", "<u2"),
    DType("int64", "int64", "I64", "<i8"),
    DType("int32", "int32", "I32", "<i4"),
    DType("int16", "int16", "I16", "<i2"),
    DType("int8", "int8", "I8", "|i1"),
    DType("uint64", "uint64", "U64", "<u8"),
    DType("uint32", "uint32", "U32", "<u4"),
    DType("uint16", "uint16", "U16", "<u2"),
    DType("uint8", "uint8", "U8", "|u1"),
    DType("bool", "bool", "BOOL", "|b1"),
    DType("fp8_e4m3", "float8_e4m3fn", "F8_E4M3", "|u1"),
    DType("fp8_e5m2", "float8_e5m2", "F8_E5M2", "|u1"),
    DType("complex64", "complex64", "C64", "<c8"),
)
BY_NAME = {dtype.name: dtype for dtype in ALL}
BY_TORCH_NAME = {dtype.torch_name: dtype for dtype in ALL}
CODES = {dtype.name: code for code, dtype in enumerate(ALL)}
"""Small integers for the `dtype` column of fragment tables."""


def widen(stored: Array, dtype: DType) -> Array:
    """Stored elements as the float array they stand for: float64 for fp64, else float32, exactly."""
    if dtype.name == "bf16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype.name == "fp64":
        return stored
    return stored.astype(np.float32, copy=False)


def narrow(values: Array, dtype: DType) -> Array:
    """Finite float values as stored elements of `dtype`, rounded to nearest even.

    fp16 overflows to infinity above 65504 and bf16 above about 3.39e38: callers check.
    """
    if dtype.name == "bf16":
        bits = values.astype(np.float32, copy=False).view(np.uint32)
        half = ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
        return ((bits + half) >> np.uint32(16)).astype(np.uint16)
    with np.errstate(over="ignore"):
        return values.astype(dtype.storage, copy=False)
