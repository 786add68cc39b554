"""Where the elements of a strided tensor lie in its storage, as runs of elements that follow each other."""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Runs(NamedTuple):
    """The elements of a tensor, in row-major order, as runs of equal length that are contiguous in the storage.

    Attributes:
        numel: elements of a run.
        positions: of each run's first element in the storage, relative to the tensor's first element; int64, [runs].
    """

    numel: int
    positions: NDArray[Any]


def run_count(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Returns the number of runs of a tensor; 1 if it is contiguous.

    >>> run_count((3, 4), (4, 1)), run_count((3, 4), (8, 1)), run_count((3, 4), (1, 3))
    (1, 3, 12)
    """
    return math.prod(shape[: _outer_dimensions(shape, stride)])


def runs_of(shape: tuple[int, ...], stride: tuple[int, ...]) -> Runs:
    """Returns the runs of a tensor.

    >>> runs_of((2, 3), (1, 2)).positions.tolist()  # transposed
    [0, 2, 4, 1, 3, 5]
    >>> runs_of((2, 3), (0, 1))  # one row, expanded to two
    Runs(numel=3, positions=array([0, 0]))

    Memory: 8 bytes a run; see `run_count`.

    Args:
        shape: sizes.
        stride: in elements.
    """
    outer = _outer_dimensions(shape, stride)
    positions = np.zeros((1,) * outer, dtype=np.int64)
    for dimension in range(outer):
        steps = np.arange(shape[dimension], dtype=np.int64) * stride[dimension]
        positions = positions + steps.reshape([-1 if axis == dimension else 1 for axis in range(outer)])
    return Runs(math.prod(shape[outer:]), positions.reshape(-1))


def dense_axes(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...] | None:
    """Returns the dimensions of a tensor whose elements fill its storage, the slowest first.

    None if that is row-major order, or if elements lie apart or share bytes.

    >>> dense_axes((2, 3), (1, 2)), dense_axes((2, 3), (3, 1)), dense_axes((2, 3), (0, 1))
    ((1, 0), None, None)
    """
    axes = tuple(sorted(range(len(shape)), key=lambda axis: (shape[axis] != 1, -stride[axis], axis)))
    is_dense = run_count(*permuted(shape, stride, axes)) == 1
    is_row_major = 0 in shape or run_count(shape, stride) == 1
    return axes if is_dense and not is_row_major else None


def permuted(
    shape: tuple[int, ...], stride: tuple[int, ...], axes: tuple[int, ...] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns shape and stride with the dimensions in the order `axes`; unchanged if that is None."""
    if axes is None:
        return shape, stride
    return tuple(shape[axis] for axis in axes), tuple(stride[axis] for axis in axes)


def last_position(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Returns the position of the last stored element, relative to the tensor's first; -1 if the tensor is empty."""
    if 0 in shape:
        return -1
    return sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _outer_dimensions(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """How many of the first dimensions are outside of a run. The others are in row-major order, without gaps."""
    expected = 1
    for dimension in range(len(shape) - 1, -1, -1):
        if shape[dimension] != 1 and stride[dimension] != expected:
            return dimension + 1
        expected *= shape[dimension]
    return 0
