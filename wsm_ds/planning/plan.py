"""What a merge will do, as plain data: for every output file, what each of its bytes is made of.

No file is written and no tensor read to make a plan. `plan_zero` and `plan_safetensors` say which files a merge
makes and where elements belong in them, `streams` where the same elements lie in the sources.

One plan may make several outputs (windows, curves, formats), its *parts*. A *stream* goes once over elements that
some of them want: every source is read once for all targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from wsm_ds.planning.intersect import Ints, Order, Places, element_of

Combine = Literal["merge", "equal", "newest", "carry"]
"""merge: weighted sum of a window. equal: the newest of the window, and all must agree. newest: the newest of the
window, and a disagreement is warned of. carry: bytes as they are."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file to read, as it was when the plan was made."""

    path: Path
    nbytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class CopySegment:
    """`nbytes` bytes at `offset`, carried from an input."""

    offset: int
    nbytes: int
    file: int
    source_offset: int


@dataclass(frozen=True, slots=True)
class LiteralSegment:
    """Bytes at `offset` that the plan itself knows."""

    offset: int
    data: bytes

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return len(self.data)


@dataclass(frozen=True, slots=True)
class ZeroSegment:
    """`nbytes` zero bytes at `offset`: room for elements, and padding."""

    offset: int
    nbytes: int


Segment = CopySegment | LiteralSegment | ZeroSegment


@dataclass(frozen=True, slots=True)
class CrcField:
    """The CRC-32 of [offset, offset + nbytes) belongs, as 4 little-endian bytes, at each of `positions`."""

    offset: int
    nbytes: int
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Template:
    """An output file before elements are put in: what tiles it, and the checksums to fill in."""

    name: str
    nbytes: int
    segments: list[Segment]
    crc_fields: tuple[CrcField, ...]


@dataclass(frozen=True)
class OutputFile:
    """One file of a part: what streams do not write of it, in order, and the checksums to fill in."""

    output: int
    name: str
    nbytes: int
    segments: tuple[Segment, ...]
    crc_fields: tuple[CrcField, ...]


@dataclass(frozen=True)
class Target:
    """Where a stream's elements go in one part, and of what they are made.

    Attributes:
        part: number of the part.
        places: in the plan's output files.
        members: which of the stream's sources make the window, oldest first.
        coefficients: float64, one a member.
        cast_from: another target of the stream: its stored value is what is cast here (module weights of masters).
    """

    output: int
    places: Places
    members: tuple[int, ...]
    coefficients: tuple[float, ...]
    cast_from: int | None = None


@dataclass(frozen=True)
class Stream:
    """Elements of one kind, in the order of the first target's files.

    Attributes:
        combine: what is done with them.
        numel: how many there are.
        sources: where they lie, a checkpoint each (in a "carry" stream: one, the input files themselves).
        checkpoints: numbers of these checkpoints among all that the plan reads.
        targets: where they go.
        breaks: elements at which the dtype of a source or target changes.
        order: the elements' names, see `name`.
    """

    combine: Combine
    numel: int
    sources: tuple[Places, ...]
    checkpoints: tuple[int, ...]
    targets: tuple[Target, ...]
    breaks: Ints
    order: Order
    line: Ints

    def name(self, element: int, names: Sequence[str]) -> str:
        """The tensor that an element belongs to."""
        return names[element_of(self.order, self.line, element)[0]]


@dataclass(frozen=True)
class Source:
    """One checkpoint of a window."""

    path: Path
    tag: str
    step: int
    coefficient: float


@dataclass(frozen=True)
class Output:
    """One output folder. `sources` are oldest first; `texts` are small files of the output's root."""

    out: Path
    sources: tuple[Source, ...]
    curve: str
    ess: float
    lag_steps: float
    texts: dict[str, str]
    recipe: dict[str, Any]

    @property
    def coefficients(self) -> tuple[float, ...]:
        """c, oldest → newest."""
        return tuple(source.coefficient for source in self.sources)


@dataclass(frozen=True)
class Plan:
    """A whole merge: one or several parts, made in one pass over `inputs`. `names` are the tensors'."""

    outputs: tuple[Output, ...]
    inputs: tuple[InputFile, ...]
    files: tuple[OutputFile, ...]
    streams: tuple[Stream, ...]
    names: tuple[str, ...]
    memory_bytes: int
    threads: int

    @property
    def bytes_to_write(self) -> int:
        """Bytes of all output files."""
        return sum(file.nbytes for file in self.files)

    @property
    def bytes_to_read(self) -> int:
        """Bytes read from inputs."""
        return sum(source.nbytes for stream in self.streams for source in stream.sources)

    def files_of(self, output: int) -> list[tuple[int, OutputFile]]:
        """(number, file) of a part's files."""
        return [(number, file) for number, file in enumerate(self.files) if file.output == output]

    def to_json(self) -> dict[str, Any]:
        """The plan's figures as plain data."""
        return {
            "bytes_to_read": self.bytes_to_read,
            "bytes_to_write": self.bytes_to_write,
            "memory_bytes": self.memory_bytes,
            "threads": self.threads,
            "outputs": [
                describe_output(part)
                | {"files": [{"name": o.name, "bytes": o.nbytes} for _, o in self.files_of(number)]}
                for number, part in enumerate(self.outputs)
            ],
        }


def describe_output(output: Output) -> dict[str, Any]:
    """A output's window as plain data."""
    return {
        "out": str(output.out),
        "sources": [
            {"path": str(s.path), "tag": s.tag, "step": s.step, "coefficient": s.coefficient} for s in output.sources
        ],
        "curve": output.curve,
        "effective_sample_size": output.ess,
        "lag_steps": output.lag_steps,
    }


def around(base: Sequence[Segment], begins: Ints, ends: Ints) -> tuple[Segment, ...]:
    """What of `base`, which tiles a file, lies outside the ranges [begins, ends). Both ordered; Bytes stay whole."""
    pieces: list[Segment] = []
    at = 0
    for piece in base:
        position, end = piece.offset, piece.offset + piece.nbytes
        while at < len(begins) and begins[at] < end:
            if isinstance(piece, LiteralSegment) or begins[at] < position or ends[at] > end:
                raise AssertionError(f"elements at {begins[at]} do not lie in the piece at {piece.offset}")
            _append_part(pieces, piece, position, int(begins[at]))
            position = int(ends[at])
            at += 1
        _append_part(pieces, piece, position, end)
    return tuple(pieces)


def _append_part(pieces: list[Segment], whole: Segment, begin: int, end: int) -> None:
    """Adds [begin, end) of a piece; Bytes are never cut."""
    if end <= begin:
        return
    if isinstance(whole, CopySegment):
        pieces.append(CopySegment(begin, end - begin, whole.file, whole.source_offset + begin - whole.offset))
    elif isinstance(whole, ZeroSegment):
        pieces.append(ZeroSegment(begin, end - begin))
    else:
        pieces.append(whole)
