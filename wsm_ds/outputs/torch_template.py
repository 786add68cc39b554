"""A torch file with a changed object tree: the template of its bytes, and the file as a reader will see it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from wsm_ds.layouts import Layout
from wsm_ds.planning.plan import CopySegment, CrcField, InputNumber, LiteralSegment, Segment, Template, ZeroSegment
from wsm_ds.torchfile import Archive, Record, TorchFile, archive_of, record_of
from wsm_ds.torchfile.repickle import repickle
from wsm_ds.torchfile.unpickle import unpickle
from wsm_ds.torchfile.zip_format import PlacedRecord, ZipFrame, frame


@dataclass(frozen=True)
class Inputs:
    """The files that storages are copied from.

    Attributes:
        archives: by path.
        numbers: their numbers among the plan's inputs, by path.
    """

    archives: Mapping[str, Archive]
    numbers: Mapping[str, InputNumber]


def inputs_of(layout: Layout, first_input: InputNumber) -> Inputs:
    """Returns a layout's files, the first of which is number `first_input` among the plan's inputs."""
    archives = {str(archive.path): archive for archive in layout.archives}
    return Inputs(archives, {path: InputNumber(first_input + index) for index, path in enumerate(archives)})


@dataclass(frozen=True)
class TorchTemplate:
    """A torch file that does not exist yet.

    Attributes:
        template: its bytes.
        file: the file as `open_torch_file` will read it: slots and their byte offsets.
        new_offsets: the byte offset in the new file of each record that is copied from the original, by its byte
            offset there.
    """

    template: Template
    file: TorchFile
    new_offsets: dict[int, int]


@dataclass(frozen=True, eq=False)
class _Place:
    """Where the records of a content lie in files whose names are equally long.

    Attributes:
        frame: the zip.
        records: those that have bytes, or are copied.
        archive: its records, in a file of one of the names.
        crc_fields: checksums to fill in.
        memo: see `once_per_form`.
    """

    frame: ZipFrame
    records: tuple[PlacedRecord, ...]
    archive: Archive
    crc_fields: tuple[CrcField, ...]
    memo: dict[Any, Any] = field(default_factory=dict)


class TorchContent:
    """An object tree, pickled anew. Torch files that are alike in all but their names and elements are made from it.

    Storages that lie in a file are copied from it. Storages that lie in no file (`placeholders.placeholder`) become
    zeros, which streams fill.

    Args:
        tree: the object tree, of inert stand-ins as `torchfile.unpickle` makes them.
        original: the file whose small records (version, byte order) the new ones get.
        inputs: every file that storages of `tree` lie in, and `original`.
        allowed_globals: see `unpickle`.
    """

    def __init__(self, tree: Any, original: Archive, inputs: Inputs, allowed_globals: frozenset[str]) -> None:
        self.original, self.inputs, self.allowed_globals = original, inputs, allowed_globals
        self.data, storages = repickle(tree)
        self.storages = {f"data/{key}": storage for key, storage in storages.items()}
        # torch checks the records `version` and `byteorder` when it loads (`torch/serialization.py`).
        names = (name for name in original.directory.names if name != "data.pkl" and not name.startswith("data/"))
        self.small_records = {name: original.records[name] for name in names}
        self.places: dict[int, _Place] = {}

    @cached_property
    def tree(self) -> Any:
        """The tree, unpickled from the new bytes, so that the layouts read what DeepSpeed will read."""
        return unpickle(next(iter(self.places.values())).archive, self.data, self.allowed_globals)

    def template(self, name: str, source: Path | None = None) -> TorchTemplate:
        """Makes a file.

        Args:
            name: name of the file.
            source: the file that all storages are copied from; None: each from the file that it names.

        Raises:
            BrokenCheckpoint: a file lacks a storage.
        """
        root = Path(name).stem
        place = self._place(name, root)
        segments: list[Segment] = [LiteralSegment(*literal) for literal in place.frame.with_root(root)]
        contents = (self._content(record, source) for record in place.records)
        segments = sorted((s for s in (*segments, *contents) if s.nbytes), key=lambda segment: segment.offset)
        template = Template(name, place.frame.nbytes, segments, place.crc_fields)
        file = TorchFile(replace(place.archive, path=Path(name)), self.tree, place.memo)
        return TorchTemplate(template, file, _new_offsets(segments, self.inputs.numbers[str(self.original.path)]))

    def _place(self, name: str, root: str) -> _Place:
        """Where the records lie: it depends on the length of the root folder's name alone."""
        length = len(root.encode())
        if length not in self.places:
            sizes = {"data.pkl": len(self.data), **{key: storage.nbytes for key, storage in self.storages.items()}}
            sizes |= {record.name: record.nbytes for record in self.small_records.values()}
            zip_frame = frame(root, sizes)
            records = [Record(r.name, r.offset, r.nbytes, 0, r.crc_offsets) for r in zip_frame.records]
            crc_fields = tuple(CrcField(r.offset, r.nbytes, r.crc_offsets) for r in zip_frame.records)
            copied = {key for key, storage in self.storages.items() if storage.file}
            filled = tuple(record for record in zip_frame.records if record.nbytes or record.name in copied)
            archive = archive_of(Path(name), zip_frame.nbytes, records)
            self.places[length] = _Place(zip_frame, filled, archive, crc_fields)
        return self.places[length]

    def _content(self, placed: PlacedRecord, source: Path | None) -> Segment:
        """What a record of the new file holds."""
        if placed.name == "data.pkl":
            return LiteralSegment(placed.offset, self.data)
        storage = self.storages.get(placed.name)
        if storage is not None and not storage.file:
            return ZeroSegment(placed.offset, placed.nbytes)
        # Files that are alike share a tree, whose storages name one of them.
        path = str(self.original.path if storage is None else source or storage.file)
        record = self.small_records[placed.name] if storage is None else record_of(self.inputs.archives[path], storage)
        return CopySegment(placed.offset, record.nbytes, self.inputs.numbers[path], record.offset)


def make_torch_template(
    name: str, tree: Any, original: Archive, inputs: Inputs, allowed_globals: frozenset[str]
) -> TorchTemplate:
    """Writes an object tree as a torch file: pickled anew, in a new zip frame.

    Args:
        name: name of the file.
        tree: see `TorchContent`.
        original: see `TorchContent`.
        inputs: see `TorchContent`.
        allowed_globals: see `unpickle`.
    """
    return TorchContent(tree, original, inputs, allowed_globals).template(name)


def _new_offsets(segments: Iterable[Segment], original: InputNumber) -> dict[int, int]:
    copies = (segment for segment in segments if isinstance(segment, CopySegment))
    return {segment.source_offset: segment.offset for segment in copies if segment.source == original}
