"""A torch file with a changed object tree: its bytes as a template, and itself as it will be read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsm_ds.layouts import Layout
from wsm_ds.planning.plan import CopySegment, CrcField, LiteralSegment, Segment, Template, ZeroSegment
from wsm_ds.torchfile import Archive, Record, TorchFile, record_of
from wsm_ds.torchfile.repickle import repickle
from wsm_ds.torchfile.unpickle import unpickle
from wsm_ds.torchfile.zip_format import frame


@dataclass(frozen=True)
class Inputs:
    """The files that storages are copied from, by path, and their numbers in the plan."""

    archives: Mapping[str, Archive]
    numbers: Mapping[str, int]


def inputs_of(layout: Layout, first_input: int) -> Inputs:
    """A layout's files, of which the first is number `first_input` of the plan."""
    archives = {str(archive.path): archive for archive in layout.archives}
    return Inputs(archives, {path: first_input + index for index, path in enumerate(archives)})


@dataclass(frozen=True)
class TorchTemplate:
    """A file to be. `moved` says where the data of each record that was copied from `like` has gone."""

    template: Template
    file: TorchFile
    moved: dict[int, int]


def make_torch_template(
    name: str, tree: Any, like: Archive, inputs: Inputs, allowed_globals: frozenset[str]
) -> TorchTemplate:
    """`tree` as a torch file called `name`, with the small records (version, byte order) of `like`.

    Storages that have a file are copied from it; those that have none are zeros, for elements to be put in.
    """
    data, storages = repickle(tree)
    numbers = dict(inputs.numbers)
    contents: dict[str, Segment] = {"data.pkl": LiteralSegment(0, data)}
    for key, storage in storages.items():
        if not storage.file:
            contents[f"data/{key}"] = ZeroSegment(0, storage.nbytes)
            continue
        record = record_of(inputs.archives[storage.file], storage)
        contents[f"data/{key}"] = CopySegment(0, record.nbytes, numbers[storage.file], record.offset)
    for other, record in like.records.items():
        if other != "data.pkl" and not other.startswith("data/"):
            contents[other] = CopySegment(0, record.nbytes, numbers[str(like.path)], record.offset)
    placed = frame(Path(name).stem, {other: piece.nbytes for other, piece in contents.items()})
    base: list[Segment] = [LiteralSegment(offset, literal) for offset, literal in placed.literals]
    moved = {}
    for put in placed.records:
        piece = contents[put.name]
        if isinstance(piece, LiteralSegment):
            base.append(LiteralSegment(put.offset, piece.data))
        elif isinstance(piece, ZeroSegment):
            base.append(ZeroSegment(put.offset, put.nbytes))
        else:
            base.append(CopySegment(put.offset, put.nbytes, piece.file, piece.source_offset))
            if piece.file == numbers[str(like.path)]:
                moved[piece.source_offset] = put.offset
    base = sorted((piece for piece in base if piece.nbytes), key=lambda piece: piece.offset)
    crcs = tuple(CrcField(put.offset, put.nbytes, put.crc_offsets) for put in placed.records)
    records = {put.name: Record(put.name, put.offset, put.nbytes, 0, put.crc_offsets) for put in placed.records}
    archive = Archive(Path(name), placed.nbytes, records)
    file = TorchFile(archive, unpickle(archive, data, allowed_globals))
    return TorchTemplate(Template(name, placed.nbytes, base, crcs), file, moved)
