"""What a merge will do, as plain data: for every output file, what each of its bytes is made of.

No file is written and no tensor read to make a plan. `plan_zero` and `plan_safetensors` build the outputs.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from wsm_ds.dtypes import DType
from wsm_ds.intersect import Ints

Fate = Literal["merge", "derive", "equal", "newest"]
"""merge: weighted sum of all sources. derive: one source alone, cast (an output's merged
master, a carried state). equal: the newest, and all
sources must agree. newest: the newest, and a disagreement is warned of."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file to read. A staged one is an output of an earlier phase of the same plan, `path` relative to it."""

    path: Path
    nbytes: int
    mtime_ns: int
    is_staged: bool = False


@dataclass(frozen=True, slots=True)
class Read:
    """Where one source's elements of a run begin."""

    file: int
    offset: int
    dtype: DType


@dataclass(frozen=True, slots=True)
class Sum:
    """`numel` elements of `dtype` at `offset`, made of the same elements of every source, oldest first."""

    offset: int
    numel: int
    dtype: DType
    fate: Fate
    sources: tuple[Read, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Copy:
    """`nbytes` bytes at `offset`, carried from an input."""

    offset: int
    nbytes: int
    file: int
    source_offset: int


@dataclass(frozen=True, slots=True)
class Bytes:
    """Bytes at `offset` that the plan itself knows."""

    offset: int
    data: bytes

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return len(self.data)


@dataclass(frozen=True, slots=True)
class Zeros:
    """`nbytes` zero bytes at `offset`: room for elements, and padding."""

    offset: int
    nbytes: int


Base = Copy | Bytes | Zeros
Piece = Sum | Base


@dataclass(frozen=True, slots=True)
class CrcField:
    """The CRC-32 of [offset, offset + nbytes) belongs, as 4 little-endian bytes, at each of `places`."""

    offset: int
    nbytes: int
    places: tuple[int, ...]


@dataclass(frozen=True)
class Template:
    """An output file before its runs are put in: what tiles it, and the checksums to fill in."""

    name: str
    nbytes: int
    base: list[Base]
    crcs: tuple[CrcField, ...]


@dataclass(frozen=True)
class OutputFile:
    """One file: pieces that tile it, in order; checksums to fill in; names of its elements for errors.

    Files of phase 1 read outputs of phase 0.
    """

    name: str
    nbytes: int
    pieces: tuple[Piece, ...]
    crcs: tuple[CrcField, ...] = ()
    phase: int = 0
    label_offsets: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    label_tensors: Ints = field(default_factory=lambda: np.zeros(0, np.int64))


@dataclass(frozen=True)
class Source:
    """One checkpoint of the window."""

    path: Path
    tag: str
    step: int
    coefficient: float


@dataclass(frozen=True)
class Plan:
    """A whole merge. `coefficients` are float64, oldest first; `texts` are small files of the output's root."""

    out: Path
    sources: tuple[Source, ...]
    curve: str
    ess: float
    lag_steps: float
    inputs: tuple[InputFile, ...]
    outputs: tuple[OutputFile, ...]
    names: tuple[str, ...]
    texts: dict[str, str]
    recipe: dict[str, Any]
    memory_bytes: int
    threads: int

    @property
    def coefficients(self) -> tuple[float, ...]:
        """c, oldest → newest."""
        return tuple(source.coefficient for source in self.sources)

    @property
    def bytes_to_write(self) -> int:
        """Bytes of all output files."""
        return sum(output.nbytes for output in self.outputs)

    @property
    def bytes_to_read(self) -> int:
        """Bytes read from inputs, staged ones included."""
        return sum(_bytes_read(piece) for output in self.outputs for piece in output.pieces)

    @property
    def run_count(self) -> int:
        """Number of long runs that the arithmetic works on."""
        return sum(isinstance(piece, Sum) for output in self.outputs for piece in output.pieces)

    def to_json(self) -> dict[str, Any]:
        """The plan's figures as plain data."""
        return {
            "out": str(self.out),
            "sources": [
                {"path": str(s.path), "tag": s.tag, "step": s.step, "coefficient": s.coefficient} for s in self.sources
            ],
            "curve": self.curve,
            "effective_sample_size": self.ess,
            "lag_steps": self.lag_steps,
            "bytes_to_read": self.bytes_to_read,
            "bytes_to_write": self.bytes_to_write,
            "memory_bytes": self.memory_bytes,
            "threads": self.threads,
            "runs": self.run_count,
            "files": [{"name": output.name, "bytes": output.nbytes} for output in self.outputs],
        }


def _bytes_read(piece: Piece) -> int:
    if isinstance(piece, Copy):
        return piece.nbytes
    if isinstance(piece, Sum):
        return sum(piece.numel * source.dtype.itemsize for source in piece.sources)
    return 0


def overlay(base: list[Base], sums: list[Sum]) -> tuple[Piece, ...]:
    """`base`, which tiles a file, with the ranges of `sums` replaced. Both are ordered by offset; Bytes stay whole."""
    pieces: list[Piece] = []
    pending = iter(sums)
    current = next(pending, None)
    for piece in base:
        position, end = piece.offset, piece.offset + piece.nbytes
        while current is not None and current.offset < end:
            if isinstance(piece, Bytes) or current.offset < position or current.offset + current.nbytes > end:
                raise AssertionError(f"a run at {current.offset} does not lie in the piece at {piece.offset}")
            _append_part(pieces, piece, position, current.offset)
            pieces.append(current)
            position = current.offset + current.nbytes
            current = next(pending, None)
        _append_part(pieces, piece, position, end)
    return tuple(pieces)


def _append_part(pieces: list[Piece], whole: Base, begin: int, end: int) -> None:
    """Adds [begin, end) of a piece; Bytes are never cut."""
    if end <= begin:
        return
    if isinstance(whole, Copy):
        pieces.append(Copy(begin, end - begin, whole.file, whole.source_offset + begin - whole.offset))
    elif isinstance(whole, Zeros):
        pieces.append(Zeros(begin, end - begin))
    else:
        pieces.append(whole)
