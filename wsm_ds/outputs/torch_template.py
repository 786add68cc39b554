"""A torch file with a changed object tree: the template of its bytes, and the file as a reader will see it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsm_ds.layouts import Layout
from wsm_ds.planning.plan import CopySegment, CrcField, InputNumber, LiteralSegment, Segment, Template, ZeroSegment
from wsm_ds.torchfile import Archive, Record, TorchFile, archive_of, record_of
from wsm_ds.torchfile.repickle import repickle
from wsm_ds.torchfile.unpickle import Storage, unpickle
from wsm_ds.torchfile.zip_format import ZipFrame, frame


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


def make_torch_template(
    name: str, tree: Any, original: Archive, inputs: Inputs, allowed_globals: frozenset[str]
) -> TorchTemplate:
    """Writes an object tree as a torch file: pickled anew, in a new zip frame.

    Storages that lie in a file are copied from it. Storages that lie in no file (`placeholders.placeholder`) become
    zeros, which streams fill.

    Args:
        name: name of the file.
        tree: the object tree, of inert stand-ins as `torchfile.unpickle` makes them.
        original: the file whose small records (version, byte order) the new one gets.
        inputs: every file that storages of `tree` lie in, and `original`.
        allowed_globals: see `unpickle`.
    """
    data, storages = repickle(tree)
    contents = _record_contents(data, storages, original, inputs)
    zip_frame = frame(Path(name).stem, {record: segment.nbytes for record, segment in contents.items()})
    records = [Record(r.name, r.offset, r.nbytes, 0, r.crc_offsets) for r in zip_frame.records]
    archive = archive_of(Path(name), zip_frame.nbytes, records)
    # Unpickled from the new bytes, so that the layouts read what DeepSpeed will read.
    file = TorchFile(archive, unpickle(archive, data, allowed_globals))
    crc_fields = tuple(CrcField(record.offset, record.nbytes, record.crc_offsets) for record in zip_frame.records)
    template = Template(name, zip_frame.nbytes, _segments(zip_frame, contents), crc_fields)
    return TorchTemplate(template, file, _new_offsets(zip_frame, contents, inputs.numbers[str(original.path)]))


def _record_contents(
    data: bytes, storages: Mapping[str, Storage], original: Archive, inputs: Inputs
) -> dict[str, Segment]:
    """The content of each record of the new file, by name. Offsets in the new file are not known yet: they are 0."""
    contents: dict[str, Segment] = {"data.pkl": LiteralSegment(0, data)}
    for key, storage in storages.items():
        if not storage.file:
            contents[f"data/{key}"] = ZeroSegment(0, storage.nbytes)
            continue
        record = record_of(inputs.archives[storage.file], storage)
        contents[f"data/{key}"] = CopySegment(0, record.nbytes, inputs.numbers[storage.file], record.offset)
    # torch checks the records `version` and `byteorder` when it loads (`torch/serialization.py`).
    for name, record in original.records.items():
        if name != "data.pkl" and not name.startswith("data/"):
            contents[name] = CopySegment(0, record.nbytes, inputs.numbers[str(original.path)], record.offset)
    return contents


def _segments(zip_frame: ZipFrame, contents: Mapping[str, Segment]) -> list[Segment]:
    """All bytes of the file, in order: the zip frame and the records."""
    segments: list[Segment] = [LiteralSegment(offset, literal) for offset, literal in zip_frame.literals]
    for record in zip_frame.records:
        content = contents[record.name]
        if isinstance(content, LiteralSegment):
            segments.append(LiteralSegment(record.offset, content.data))
        elif isinstance(content, ZeroSegment):
            segments.append(ZeroSegment(record.offset, record.nbytes))
        else:
            segments.append(CopySegment(record.offset, record.nbytes, content.source, content.source_offset))
    return sorted((segment for segment in segments if segment.nbytes), key=lambda segment: segment.offset)


def _new_offsets(zip_frame: ZipFrame, contents: Mapping[str, Segment], original: InputNumber) -> dict[int, int]:
    copies = [(record.offset, contents[record.name]) for record in zip_frame.records]
    return {
        content.source_offset: offset
        for offset, content in copies
        if isinstance(content, CopySegment) and content.source == original
    }
