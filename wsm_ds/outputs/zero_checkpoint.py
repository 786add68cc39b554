"""An output as a ZeRO checkpoint: the newest source's rank files, or resharded ones, with some byte ranges replaced."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import compress

import numpy as np

from wsm_ds.dtypes import ALL, ITEMSIZES
from wsm_ds.errors import BrokenCheckpoint, LayoutMismatch, RecipeError, UnsupportedLayout, few
from wsm_ds.layouts import Layout
from wsm_ds.layouts.coverage import require_whole
from wsm_ds.layouts.fragments import Ints
from wsm_ds.layouts.layout import FRAGMENT, Table
from wsm_ds.layouts.schema import is_stage0
from wsm_ds.outputs.dropped_states import drop_states
from wsm_ds.outputs.merged_states import require_carriable, require_mergeable
from wsm_ds.outputs.resharding.form import RequestedForm, open_origin, target_form
from wsm_ds.outputs.resharding.shared_states import require_divisible, warn_of_hyperparameters
from wsm_ds.outputs.resharding.universal import universal_templates
from wsm_ds.outputs.resharding.zero import zero_templates
from wsm_ds.outputs.torch_template import Inputs, inputs_of, make_torch_template
from wsm_ds.planning.plan import (
    CopySegment,
    CrcField,
    InputNumber,
    LiteralSegment,
    OutputFile,
    OutputNumber,
    Template,
    segments_outside,
)
from wsm_ds.planning.shared_bytes import trim_shared_bytes
from wsm_ds.planning.streams import ElementRequest, SourceTables
from wsm_ds.torchfile import Archive, open_own_tree, open_torch_file

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutputWindow:
    """The window of the output that is being planned.

    Attributes:
        output: the output.
        members: the window's checkpoints, as numbers of `SourceTables.layouts`, oldest first.
        coefficients: float64, one per member.
        first_file: the number that the output's first file gets in the plan.
        carried: the number of the full checkpoint that gives all but the masters; None: the newest member.
    """

    output: OutputNumber
    members: tuple[int, ...]
    coefficients: tuple[float, ...]
    first_file: int
    carried: int | None = None

    @property
    def origin(self) -> int:
        """The number of the checkpoint that everything that is carried comes from."""
        return self.members[-1] if self.carried is None else self.carried

    def newest(self, tables: SourceTables) -> Layout:
        """Returns the checkpoint that everything that is carried comes from: the newest of the window, if none else."""
        return tables.layouts[self.origin]

    def request(self, kind: str, table: Table, *, of_newest: bool = False, is_cast: bool = False) -> ElementRequest:
        """Returns a request to fill `table` with elements of `kind`.

        Args:
            kind: kind of the elements.
            table: where they belong; its file numbers are relative to this output.
            of_newest: take the values of `origin`, not the weighted sum.
            is_cast: see `ElementRequest`.
        """
        table = table.copy()
        table["file"] += self.first_file
        if of_newest:
            return ElementRequest(self.output, kind, table, (self.origin,), (1.0,), is_cast)
        return ElementRequest(self.output, kind, table, self.members, self.coefficients, is_cast)


@dataclass(frozen=True)
class OutputFiles:
    """What an output is made of: its files, and the elements to be written into them."""

    files: tuple[OutputFile, ...]
    requests: tuple[ElementRequest, ...]


@dataclass(frozen=True)
class _Templates:
    """The files of a checkpoint before streams write into them.

    Attributes:
        files: the templates.
        tables: where the elements of each kind belong; `file` is an index in `files`.
        is_resharded: whether the form differs from that of the newest checkpoint.
    """

    files: list[Template]
    tables: Mapping[str, Table]
    is_resharded: bool


def plan_zero_checkpoint(
    tables: SourceTables,
    window: OutputWindow,
    tag: str,
    optimizer_states: str,
    allowed_globals: frozenset[str],
    form: RequestedForm,
    *,
    reads_states: bool = False,
) -> OutputFiles:
    """Plans the files of a ZeRO checkpoint or of a universal checkpoint.

    Args:
        tables: the checkpoints that the plan reads.
        window: the window of the output.
        tag: name of the checkpoint's folder in the output.
        optimizer_states: "carry" (those of the newest), "merge" (same coefficients) or "drop" (left out).
        allowed_globals: see `open_own_tree`.
        form: the form of the output; the newest checkpoint's, where nothing is requested.
        reads_states: whether to read carried optimizer states element by element. Set if another output of the plan
            does so, so that they are read once.

    Raises:
        UnsupportedLayout, LayoutMismatch, RecipeError: see `open_origin`, `target_form`, `require_mergeable`,
            `require_carriable` and `require_divisible`.
        BrokenCheckpoint: rank 0's files lack optimizer states that other ranks have.
    """
    newest, drops_states = window.newest(tables), optimizer_states == "drop"
    if newest.snapshot is not None:
        raise RecipeError(
            f"{newest.path} is a snapshot: it holds masters, and neither module weights nor optimizer states to make a "
            "checkpoint of. Name the full checkpoint that they come from (--carry-from RUN), or write the weights "
            "alone (--format safetensors)."
        )
    members = [tables.layouts[number] for number in window.members]
    if window.carried is not None and optimizer_states == "carry":
        members.append(newest)
    if optimizer_states == "merge":
        require_mergeable(members)
    if optimizer_states == "carry":
        require_carriable(members)
    first_input = tables.first_input[window.origin]
    if newest.opaque and len(window.members) > 1:
        described = [f"{name} ({what})" for name, what in newest.opaque.items()]
        log.warning("%s: kept as they are here, not compared or merged: %s", newest.path, few(described))
    templates = _templates(newest, first_input, drops_states, allowed_globals, form)
    if templates.is_resharded:
        require_whole(newest.tensors, templates.tables, f"{tag} in its new form")
    places = {kind: tables.renumbered(table, newest) for kind, table in templates.tables.items()}
    # At stage 0 in fp32 the masters are the module's own tensors, which may be views of each other.
    shareable = ("frozen", "buffer", *(["master"] if newest.stage == 0 else []))
    places |= {kind: _trimmed(tables, window, kind, places[kind]) for kind in shareable if kind in places}
    requests = [
        window.request(kind, places[kind], of_newest=window.carried is not None and kind != "master")
        for kind in ("master", "frozen", "buffer")
        if kind in places
    ]
    # Stage 3 saves no module weights: the engine casts them from the masters when it loads.
    if "module" in places:
        requests.append(window.request("master", places["module"], is_cast=True))
    if not drops_states:
        reads_states |= templates.is_resharded
        requests += _state_requests(newest, window, places, is_merged=optimizer_states == "merge", is_read=reads_states)
    return OutputFiles(output_files(window, templates.files, requests, prefix=f"{tag}/"), tuple(requests))


def _templates(
    newest: Layout, first_input: InputNumber, drops_states: bool, allowed_globals: frozenset[str], form: RequestedForm
) -> _Templates:
    """The newest checkpoint's own files, or those of the form that is requested, if that differs."""
    if not newest.is_universal and form == RequestedForm():
        return _same_form(newest, first_input, drops_states, allowed_globals)
    origin = open_origin(newest, allowed_globals)
    target = target_form(origin, form, allowed_globals)
    if target == origin.form and not newest.is_universal:
        return _same_form(newest, first_input, drops_states, allowed_globals)
    (warn_of_hyperparameters if drops_states else require_divisible)(origin)
    if target is None:
        files, tables = universal_templates(origin, first_input, allowed_globals)
    else:
        files, tables = zero_templates(origin, target, first_input, not drops_states, allowed_globals)
    return _Templates(files, tables, is_resharded=True)


def _state_requests(
    newest: Layout, window: OutputWindow, places: dict[str, Table], *, is_merged: bool, is_read: bool
) -> list[ElementRequest]:
    """Requests for optimizer states; none if they are copied with the bytes of whole files."""
    missing = [kind for kind in newest.state_names if kind not in places]
    if missing:
        raise BrokenCheckpoint(
            f"{newest.path}: rank 0 lacks the optimizer states {few(missing)}, which other ranks have. "
            "Leave the checkpoint out, or drop the states (--optimizer-states drop)."
        )
    if not (is_merged or is_read):
        return []
    return [window.request(kind, places[kind], of_newest=not is_merged) for kind in newest.state_names]


def _trimmed(tables: SourceTables, window: OutputWindow, kind: str, table: Table) -> Table:
    """The table without elements whose bytes the output stores for another tensor.

    Raises:
        LayoutMismatch: the newest checkpoint stores tensors in the same bytes and an older one stores them apart:
            their averages differ.
    """
    newest = window.newest(tables)
    trimmed = trim_shared_bytes(table, str(newest.path))
    if kind == "frozen" or not trimmed.shared or window.carried is not None:
        return trimmed.table  # frozen parameters are equal in all members, so sharing does not matter
    averaged = {int(row["tensor"]) for row in table if ALL[row["dtype"]].is_summable}
    for number in window.members:
        shared = trim_shared_bytes(tables.table(number, kind), str(tables.layouts[number].path)).shared
        apart = {tables.names[run.tensor] for run in trimmed.shared - shared if run.tensor in averaged}
        if apart:
            raise LayoutMismatch(
                f"{newest.path} holds {few(sorted(apart))} in the same bytes as others, "
                f"{tables.layouts[number].path} does not. Leave it out, or write safetensors (--format safetensors), "
                "which store them apart."
            )
    return trimmed.table


def _same_form(
    newest: Layout, first_input: InputNumber, drops_states: bool, allowed_globals: frozenset[str]
) -> _Templates:
    """The newest checkpoint's own files, with or without optimizer states."""
    inputs = inputs_of(newest, first_input)
    file_templates = [_file_template(archive, inputs, drops_states, allowed_globals) for archive in newest.archives]
    tables = {
        kind: _moved(table.copy(), [new_offsets for _, new_offsets in file_templates])
        for kind, table in newest.fragments.items()
        if not (drops_states and kind in newest.state_names)
    }
    return _Templates([template for template, _ in file_templates], tables, is_resharded=False)


def output_files(
    window: OutputWindow, templates: list[Template], requests: list[ElementRequest], prefix: str = ""
) -> tuple[OutputFile, ...]:
    """Returns the output's files: the templates without the byte ranges that streams write.

    CRC-32 fields are kept only where the checksum can differ from the one that is copied: in new files, and over
    ranges that streams write.

    Args:
        window: the window of the output.
        templates: its files.
        requests: all elements that belong in the files.
        prefix: goes before the names of the templates.

    Raises:
        UnsupportedLayout: two tensors that are merged share bytes of a file; the message names it.
    """
    rows = np.concatenate([request.table for request in requests]) if requests else np.zeros(0, FRAGMENT)
    rows = rows[np.lexsort((rows["offset"], rows["file"]))]
    in_file, begins = rows["file"].astype(np.int64), rows["offset"].astype(np.int64)
    ends = begins + rows["numel"] * ITEMSIZES[rows["dtype"].astype(np.int64)]
    # Rows that follow each other are one range.
    heads = np.flatnonzero(
        np.concatenate([[True], (in_file[1:] != in_file[:-1]) | (begins[1:] != ends[:-1])])[: len(rows)]
    )
    in_file, begins, ends = in_file[heads], begins[heads], ends[np.append(heads[1:], len(rows))[: len(heads)] - 1]
    bounds = np.searchsorted(in_file, window.first_file + np.arange(len(templates) + 1)).tolist()
    files = []
    for template, low, high in zip(templates, bounds[:-1], bounds[1:], strict=True):
        begin, end = begins[low:high], ends[low:high]
        if np.any(begin[1:] < end[:-1]):
            raise UnsupportedLayout(
                f"{prefix}{template.name}: two tensors that are merged share bytes. Write safetensors "
                "(--format safetensors), which store them apart."
            )
        is_new = any(isinstance(segment, LiteralSegment) for segment in template.segments)
        crc_fields = template.crc_fields if is_new else _overlapping(template.crc_fields, begin, end)
        segments = segments_outside(template.segments, begin, end)
        files.append(OutputFile(window.output, prefix + template.name, template.nbytes, segments, crc_fields))
    return tuple(files)


def _overlapping(crc_fields: tuple[CrcField, ...], begins: Ints, ends: Ints) -> tuple[CrcField, ...]:
    """The checksums of records that have bytes in one of the ranges."""
    offsets = np.array([(crc.offset, crc.offset + crc.nbytes) for crc in crc_fields], dtype=np.int64).reshape(-1, 2)
    is_changed = np.searchsorted(ends, offsets[:, 0], "right") < np.searchsorted(begins, offsets[:, 1])
    return tuple(compress(crc_fields, is_changed.tolist()))


def _file_template(
    archive: Archive, inputs: Inputs, drops_states: bool, allowed_globals: frozenset[str]
) -> tuple[Template, dict[int, int]]:
    """The template of a file, and the new offsets of its records by their old ones (empty: no record has moved)."""
    is_optimizer = archive.path.name.endswith("optim_states.pt")
    if drops_states and (is_optimizer or is_stage0(open_torch_file(archive.path, allowed_globals).tree)):
        tree = open_own_tree(archive.path, allowed_globals).tree
        drop_states(tree["optimizer_state_dict" if is_optimizer else "optimizer"])
        rewritten = make_torch_template(archive.path.name, tree, archive, inputs, allowed_globals)
        return rewritten.template, rewritten.new_offsets
    whole = CopySegment(0, archive.nbytes, inputs.numbers[str(archive.path)], 0)
    directory, checked = archive.directory, np.flatnonzero(archive.crcs)
    columns = (directory.offsets[checked], directory.nbytes[checked], directory.crc_offsets[checked])
    fields = zip(*(column.tolist() for column in columns), strict=True)
    crc_fields = tuple(CrcField(offset, nbytes, tuple(crc_offsets)) for offset, nbytes, crc_offsets in fields)
    return Template(archive.path.name, archive.nbytes, [whole], crc_fields), {}


def _moved(table: Table, new_offsets: list[dict[int, int]]) -> Table:
    """Moves the fragments to their byte offsets in the templates.

    Args:
        table: fragments with the byte offsets of the source files; it is changed.
        new_offsets: of each file, as `_file_template` returns them.
    """
    for index, offsets in enumerate(new_offsets):
        if not offsets:
            continue
        rows = np.flatnonzero(table["file"] == index)
        old = np.array(sorted(offsets), dtype=np.int64)
        shift = np.array([offsets[offset] for offset in old], dtype=np.int64) - old
        record = np.searchsorted(old, table["offset"][rows], "right") - 1
        table["offset"][rows] += shift[record]
    return table
