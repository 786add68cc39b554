"""The element types that checkpoints store: their names, and the conversion from and to floats.

The bytes of a tensor are little-endian. numpy has no bfloat16, no 8-bit floats and no complex32, so arrays of these
types hold the bits as unsigned integers. `widen` and `narrow` convert between stored elements and the float32 (for fp64
and complex128: float64) in which values are summed and rounded (docs/theory.md, "What is exact"). A complex element is
two such values, the real part first.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    Attributes:
        name: the name in recipes, plans and manifests.
        torch_name: the name of torch's dtype, without "torch.".
        safetensors_name: the name in a safetensors header; None if that format has no such type.
        storage: the numpy dtype of an array that holds the same bits, little-endian.
    """

    name: str
    torch_name: str
    safetensors_name: str | None
    storage: str

    @property
    def itemsize(self) -> int:
        """Bytes per element.

        Example:
            >>> BY_NAME["bf16"].itemsize
            2
        """
        return np.dtype(self.storage).itemsize

    @property
    def is_floating(self) -> bool:
        """Whether elements are real numbers that a merge can sum, and cast to another such type.

        8-bit floats are not: they have no meaning without the scales that a library keeps beside them.
        """
        return self.name in ("fp64", "fp32", "fp16", "bf16")

    @property
    def is_complex(self) -> bool:
        """Whether an element is two real numbers."""
        return self.name.startswith("complex")

    @property
    def is_summable(self) -> bool:
        """Whether a merge sums elements of this type. It copies those of other types."""
        return self.is_floating or self.is_complex

    @property
    def sums_in_fp64(self) -> bool:
        """Whether sums of this type stay in float64, and are not rounded to float32."""
        return self.name in ("fp64", "complex128")


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
    DType("fp8_e4m3fnuz", "float8_e4m3fnuz", "F8_E4M3FNUZ", "|u1"),
    DType("fp8_e5m2fnuz", "float8_e5m2fnuz", "F8_E5M2FNUZ", "|u1"),
    DType("fp8_e8m0", "float8_e8m0fnu", "F8_E8M0", "|u1"),
    DType("complex32", "complex32", None, "<u4"),
    DType("complex64", "complex64", "C64", "<c8"),
    DType("complex128", "complex128", None, "<c16"),
)
REAL_PARTS = {"complex32": "<f2", "complex64": "<f4", "complex128": "<f8"}
"""The numpy dtype of the real and of the imaginary part, by the name of a complex type."""
BY_NAME = {dtype.name: dtype for dtype in ALL}
BY_TORCH_NAME = {dtype.torch_name: dtype for dtype in ALL}
CODES = {dtype.name: code for code, dtype in enumerate(ALL)}
"""Indices in `ALL` by name: the small integers in the `dtype` column of fragment tables."""
ITEMSIZES = np.array([dtype.itemsize for dtype in ALL], dtype=np.int64)
"""Bytes per element, by such an index."""
IS_SUMMABLE = np.array([dtype.is_summable for dtype in ALL], dtype=bool)
"""Whether a merge sums such elements, by such an index."""
IS_COMPLEX = np.array([dtype.is_complex for dtype in ALL], dtype=bool)
"""Whether an element is two values, by such an index."""


def widen(stored: Array, dtype: DType) -> Array:
    """Returns stored elements as floats, without a change of value.

    Example:
        >>> widen(np.array([0x3F80, 0xC000], dtype=np.uint16), BY_NAME["bf16"]).tolist()
        [1.0, -2.0]

    Args:
        stored: elements of `dtype`, as an array of `dtype.storage`, of any shape.
        dtype: the type of the stored elements.

    Returns:
        float64 for fp64 and complex128, float32 for every other type, of the same shape (for complex types with twice
        as many values); `stored` itself if nothing has to change.
    """
    if dtype.is_complex:
        parts: Array = stored.view(REAL_PARTS[dtype.name])
        return parts if dtype.sums_in_fp64 else parts.astype(np.float32, copy=False)
    # The upper half of a float32 is a bfloat16.
    if dtype.name == "bf16":
        bits: Array = stored.astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32)
    if dtype.name == "fp64":
        return stored
    return stored.astype(np.float32, copy=False)


def narrow(values: Array, dtype: DType) -> Array:
    """Returns floats as stored elements, rounded to nearest even, as torch rounds.

    A value that is too large becomes an infinity (fp16: from 65520 on, bf16: from about 3.396e38 on). The caller has
    to check for it.

    Example:
        >>> [hex(bits) for bits in narrow(np.array([1.0, -2.0], dtype=np.float32), BY_NAME["bf16"])]
        ['0x3f80', '0xc000']
        >>> narrow(np.array([2049.0, 2051.0], dtype=np.float32), BY_NAME["fp16"]).tolist()
        [2048.0, 2052.0]

    Args:
        values: finite float32 or float64 values, of any shape; two of them for an element of a complex type.
        dtype: the type of the stored elements.

    Returns:
        An array of `dtype.storage`, of the same shape (for complex types with half as many elements).
    """
    if dtype.is_complex:
        with np.errstate(over="ignore"):
            parts: Array = values.astype(REAL_PARTS[dtype.name], copy=False)
        return parts.view(dtype.storage)
    # Adds half of the dropped bits' range, minus one where the kept part is even: a tie then rounds to even.
    if dtype.name == "bf16":
        bits: Array = values.astype(np.float32, copy=False).view(np.uint32)
        half: Array = ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
        rounded: Array = (bits + half) >> np.uint32(16)
        return rounded.astype(np.uint16)
    with np.errstate(over="ignore"):
        return values.astype(dtype.storage, copy=False)
