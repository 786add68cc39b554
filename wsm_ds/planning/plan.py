"""The plan of a merge, as plain data: the origin of every byte of every output file.

No file is written and no tensor is read to make a plan. `wsm_ds.outputs` says which files a merge makes and where
elements belong in them; `wsm_ds.planning.streams` says where the same elements lie in the sources.

One plan may make several outputs (windows, curves, formats). A *stream* goes once over elements that some of the
outputs need, so every source is read once for all of them.
"""

import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NewType

from wsm_ds.errors import few
from wsm_ds.planning.intersect import Ints, Order, Places, element_of
from wsm_ds.torchfile import Record

OutputNumber = NewType("OutputNumber", int)
"""Index in `Plan.outputs`."""
InputNumber = NewType("InputNumber", int)
"""Index in `Plan.inputs`."""

Combine = Literal["merge", "equal", "newest", "carry"]
"""How the values of a window's members become the value of the output.

- merge: weighted sum (floating-point elements).
- equal: the value of the newest; all members must agree (frozen parameters).
- newest: the value of the newest; a disagreement is logged as a warning (integer buffers).
- carry: bytes of one file, copied.
"""


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file to read. Size and times are those at planning: the engine refuses a file that changed since.

    Attributes:
        path: the file.
        nbytes: its size.
        mtime_ns: when its content changed. `rsync -t` and `cp -p` set it to the time of the original.
        ctime_ns: when the file changed in any way. Nobody can set it. So it tells that another file of the same size
            and `mtime_ns` is in its place. The inode's number would add nothing: a new file has a new `ctime_ns`, and
            on FUSE a file may get another number while nobody has it open.
        records: of a torch file, by name, with their CRC-32s; empty for any other file.
    """

    path: Path
    nbytes: int
    mtime_ns: int
    ctime_ns: int
    records: Mapping[str, Record] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class CopySegment:
    """`nbytes` bytes of an output file at `offset`, copied from byte `source_offset` of input number `source`."""

    offset: int
    nbytes: int
    source: InputNumber
    source_offset: int


@dataclass(frozen=True, slots=True)
class LiteralSegment:
    """Bytes of an output file at `offset` that the plan itself holds: pickles, zip headers, safetensors headers."""

    offset: int
    data: bytes

    @property
    def nbytes(self) -> int:
        """Length in the output file."""
        return len(self.data)


@dataclass(frozen=True, slots=True)
class ZeroSegment:
    """`nbytes` zero bytes of an output file at `offset`: elements that streams will write, or padding."""

    offset: int
    nbytes: int


Segment = CopySegment | LiteralSegment | ZeroSegment


@dataclass(frozen=True, slots=True)
class CrcField:
    """A CRC-32 that a zip file stores of its own bytes.

    The checksum of [offset, offset + nbytes) belongs, as 4 little-endian bytes, at each of `crc_offsets`: a zip has it
    in the record's data descriptor and in the central directory.
    """

    offset: int
    nbytes: int
    crc_offsets: tuple[int, ...]


@dataclass(frozen=True)
class Template:
    """An output file before streams write elements into it.

    Attributes:
        name: path in its checkpoint folder or in the output folder.
        nbytes: length of the file.
        segments: cover every byte of the file once, in order.
        crc_fields: checksums to fill in.
    """

    name: str
    nbytes: int
    segments: list[Segment]
    crc_fields: tuple[CrcField, ...]


@dataclass(frozen=True)
class OutputFile:
    """One file of an output.

    Attributes:
        output: the output that it belongs to.
        name: path in the output folder.
        nbytes: length of the file.
        segments: the bytes that streams of elements do not write, in order.
        crc_fields: checksums to fill in.
    """

    output: OutputNumber
    name: str
    nbytes: int
    segments: tuple[Segment, ...]
    crc_fields: tuple[CrcField, ...]


@dataclass(frozen=True)
class Target:
    """Where the elements of a stream go in one output, and the sources and coefficients that give them.

    Attributes:
        output: the output.
        places: where the elements belong in the plan's output files.
        members: indices of the stream's sources that make the window, oldest first.
        coefficients: float64, one per member.
        cast_from: index of the stream's target whose stored (rounded) value is cast for this one: module weights are
            cast from the stored masters, as DeepSpeed casts them. None: this target stores the sum itself.
    """

    output: OutputNumber
    places: Places
    members: tuple[int, ...]
    coefficients: tuple[float, ...]
    cast_from: int | None = None


@dataclass(frozen=True)
class Stream:
    """Elements of one kind that are read once for all outputs, in the order of the files of one of them or of a source.

    Attributes:
        combine: how the values of a window's members become one value.
        numel: number of elements.
        sources: where the elements lie, one entry per checkpoint; a "carry" stream has one entry, the input files.
        checkpoints: the sources' numbers among all checkpoints that the plan reads; empty in a "carry" stream.
        targets: where the elements go.
        breaks: stream elements at which the dtype of a source or a target changes; a slice never crosses one.
        order: which elements of the line the stream goes over.
        line: the positions at which tensors begin on the line, see `intersect`.
        follows_source: whether the elements are in the order of the newest source's files, not of the first target's.
    """

    combine: Combine
    numel: int
    sources: tuple[Places, ...]
    checkpoints: tuple[int, ...]
    targets: tuple[Target, ...]
    breaks: Ints
    order: Order
    line: Ints
    follows_source: bool = False

    def name(self, element: int, names: Sequence[str]) -> str:
        """Returns which of `names` is the tensor that a stream element belongs to."""
        return names[element_of(self.order, self.line, element)[0]]


@dataclass(frozen=True)
class Source:
    """One checkpoint of a window, with its coefficient."""

    path: Path
    tag: str
    step: int
    coefficient: float


@dataclass(frozen=True)
class Output:
    """One output folder.

    Attributes:
        out: the folder.
        sources: the window, oldest first.
        curve: the name of the decay curve, or "given coefficients".
        ess: effective sample size of the coefficients, see `wsm_ds.effective_sample_size`.
        lag_steps: mean age of the weights against the newest checkpoint, in steps.
        texts: small files of the output's root, by name.
        recipe: the recipe as plain data.
        matched_names: what was renamed in older sources, as plain data.
        figures: length, age and width of the window, see `WindowFigures.to_json`.
        samples, tokens: counts of the run at each source; None: not known.
        carried: the checkpoint that gives all but the masters; None: the newest source.
    """

    out: Path
    sources: tuple[Source, ...]
    curve: str
    ess: float
    lag_steps: float
    texts: dict[str, str]
    recipe: dict[str, Any]
    matched_names: tuple[dict[str, Any], ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)
    samples: tuple[int, ...] | None = None
    tokens: tuple[int, ...] | None = None
    carried: Path | None = None

    @property
    def spread(self) -> str | None:
        """How far the curve's coefficients spread, see `wsm_ds.schedules.spread`; None for given coefficients."""
        return None if self.recipe.get("curve") is None else self.recipe.get("spread") or "wsm"

    @property
    def coefficients(self) -> tuple[float, ...]:
        """The coefficients c, oldest checkpoint first."""
        return tuple(source.coefficient for source in self.sources)


@dataclass(frozen=True)
class Plan:
    """A whole merge: one or several outputs, made in one pass over the inputs.

    Attributes:
        outputs: the folders to make.
        inputs: the files to read.
        files: the files of all outputs.
        streams: what is written into the files.
        names: names of the tensors.
        memory_bytes: budget of all buffers of one process.
        threads: workers of one process.
        planning_bytes: memory that the plan itself takes, about.
    """

    outputs: tuple[Output, ...]
    inputs: tuple[InputFile, ...]
    files: tuple[OutputFile, ...]
    streams: tuple[Stream, ...]
    names: tuple[str, ...]
    memory_bytes: int
    threads: int
    planning_bytes: int = 0

    @property
    def bytes_to_write(self) -> int:
        """Bytes of all output files."""
        return sum(file.nbytes for file in self.files)

    @property
    def bytes_to_read(self) -> int:
        """Bytes that are read from inputs."""
        return sum(source.nbytes for stream in self.streams for source in stream.sources)

    def files_of(self, output: int) -> list[tuple[int, OutputFile]]:
        """Returns an output's files, each with its index in `files`."""
        return self._files_by_output.get(output, [])

    @cached_property
    def _files_by_output(self) -> dict[int, list[tuple[int, OutputFile]]]:
        files: dict[int, list[tuple[int, OutputFile]]] = {}
        for number, file in enumerate(self.files):
            files.setdefault(file.output, []).append((number, file))
        return files

    @cached_property
    def resolved_inputs(self) -> tuple[Path, ...]:
        """The inputs' paths without symbolic links. A folder is resolved and listed once for all files in it."""
        folders: dict[Path, Path] = {}
        links: set[Path] = set()
        resolved = []
        for path in (input_file.path for input_file in self.inputs):
            if path.parent not in folders:
                folders[path.parent] = path.parent.resolve()
                with os.scandir(path.parent) as entries:
                    links.update(path.parent / entry.name for entry in entries if entry.is_symlink())
            real = folders[path.parent] / path.name
            resolved.append(real.resolve() if path in links else real)
        return tuple(resolved)

    def marks(self) -> list[Path]:
        """Returns one file of each source, by whose lock `prune` knows that a merge reads the checkpoint."""
        sources = sorted({source.path for output in self.outputs for source in output.sources})
        paths = sorted(self.resolved_inputs)
        # The files of a folder follow each other in the order of their paths.
        marks = [paths[bisect_left(paths, source)] for source in sources]
        if not all(mark.is_relative_to(source) for mark, source in zip(marks, sources, strict=True)):
            raise AssertionError(f"a source of {few(map(str, sources))} has no input")
        return marks

    def to_json(self) -> dict[str, Any]:
        """Returns the plan's figures as plain data, for `--dry-run --json`."""
        return {
            "bytes_to_read": self.bytes_to_read,
            "bytes_to_write": self.bytes_to_write,
            "memory_bytes": self.memory_bytes,
            "planning_bytes": self.planning_bytes,
            "threads": self.threads,
            "outputs": [
                describe_output(output)
                | {"files": [{"name": file.name, "bytes": file.nbytes} for _, file in self.files_of(number)]}
                for number, output in enumerate(self.outputs)
            ],
        }


def describe_output(output: Output) -> dict[str, Any]:
    """Returns an output's window and its figures as plain data, as in the manifest."""
    counts = {"samples": output.samples, "tokens": output.tokens}
    window = output.figures | {name: list(values) for name, values in counts.items() if values is not None}
    carried = {} if output.carried is None else {"carried_from": str(output.carried)}
    return (
        carried
        | {
            "out": str(output.out),
            "sources": [
                {"path": str(s.path), "tag": s.tag, "step": s.step, "coefficient": s.coefficient}
                for s in output.sources
            ],
            "curve": output.curve,
            "spread": output.spread,
            "effective_sample_size": output.ess,
            "lag_steps": output.lag_steps,
            "window": window,
        }
        | ({"matched_names": list(output.matched_names)} if output.matched_names else {})
    )


def segments_outside(segments: Sequence[Segment], begins: Ints, ends: Ints) -> tuple[Segment, ...]:
    """Removes byte ranges from the segments of a file.

    Args:
        segments: cover every byte of the file once, in order.
        begins: first byte of each range to remove, rising. Each range lies in one segment, which is not literal.
        ends: byte after the end of each range.

    Returns:
        The rest, in order; a segment with a range in its middle becomes two. Literal segments stay whole.
    """
    remaining: list[Segment] = []
    index = 0
    for segment in segments:
        offset, end = segment.offset, segment.offset + segment.nbytes
        while index < len(begins) and begins[index] < end:
            if isinstance(segment, LiteralSegment) or begins[index] < offset or ends[index] > end:
                raise AssertionError(f"elements at {begins[index]} do not lie in the segment at {segment.offset}")
            _append_range(remaining, segment, offset, int(begins[index]))
            offset = int(ends[index])
            index += 1
        _append_range(remaining, segment, offset, end)
    return tuple(remaining)


def _append_range(segments: list[Segment], whole: Segment, begin: int, end: int) -> None:
    """Appends the bytes [begin, end) of a segment; a literal segment is appended whole."""
    if end <= begin:
        return
    if isinstance(whole, CopySegment):
        segments.append(CopySegment(begin, end - begin, whole.source, whole.source_offset + begin - whole.offset))
    elif isinstance(whole, ZeroSegment):
        segments.append(ZeroSegment(begin, end - begin))
    else:
        segments.append(whole)
