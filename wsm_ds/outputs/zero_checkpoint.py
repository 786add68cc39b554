"""A part as a ZeRO checkpoint: the newest source's rank files, or another form's, with some byte ranges replaced."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from wsm_ds.dtypes import ALL
from wsm_ds.errors import BrokenCheckpoint, LayoutMismatch, UnsupportedLayout, few
from wsm_ds.layouts import Layout
from wsm_ds.layouts.layout import FRAGMENT, Table
from wsm_ds.layouts.schema import is_stage0
from wsm_ds.outputs.resharding.form import RequestedForm, open_origin, target_form
from wsm_ds.outputs.resharding.universal import universal_templates
from wsm_ds.outputs.resharding.zero import zero_templates
from wsm_ds.outputs.torch_template import Inputs, inputs_of, make_torch_template
from wsm_ds.planning.intersect import ITEMSIZES
from wsm_ds.planning.plan import CopySegment, CrcField, LiteralSegment, OutputFile, Template, around
from wsm_ds.planning.shared_bytes import trim_shared_bytes
from wsm_ds.planning.streams import ElementRequest, SourceTables
from wsm_ds.torchfile import Archive, open_torch_file


@dataclass(frozen=True)
class OutputWindow:
    """The part that is planned: its number, its checkpoints among all (oldest first) and their coefficients."""

    output: int
    members: tuple[int, ...]
    coefficients: tuple[float, ...]
    first_file: int

    def newest(self, tables: SourceTables) -> Layout:
        """The checkpoint that everything carried comes from."""
        return tables.layouts[self.members[-1]]

    def wanted(self, kind: str, table: Table, *, of_newest: bool = False, is_cast: bool = False) -> ElementRequest:
        """`kind` at the places of `table`, whose files count those of the part: merged, or the newest's alone."""
        table = table.copy()
        table["file"] += self.first_file
        if of_newest:
            return ElementRequest(self.output, kind, table, self.members[-1:], (1.0,), is_cast)
        return ElementRequest(self.output, kind, table, self.members, self.coefficients, is_cast)


@dataclass(frozen=True)
class OutputFiles:
    """What a part is made of: its files, and the elements to be put into them."""

    files: tuple[OutputFile, ...]
    requests: tuple[ElementRequest, ...]


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
    """The files of a ZeRO checkpoint `tag`.

    Args:
        optimizer_states: "carry" (those of the newest), "merge" (same coefficients) or "drop" (left out).
        form: the form of the output; that of the newest, if nothing is wanted.
        reads_states: whether another part reads the states element by element: then this one does, too, so that they
            are read once.

    Raises:
        UnsupportedLayout, LayoutMismatch, RecipeError: see `open_origin` and `target_form`.
    """
    newest, drop = window.newest(tables), optimizer_states == "drop"
    if optimizer_states == "merge" and any(tables.layouts[number].has_nameless_states for number in window.members):
        raise UnsupportedLayout(
            f"{newest.path}: a stage 0 checkpoint in fp32 does not say which optimizer state belongs to which "
            "parameter, if there are several parameter groups. Carry or drop the states."
        )
    is_changed = newest.is_universal or form != RequestedForm()
    origin = open_origin(newest, allowed_globals) if is_changed else None
    target = target_form(origin, form, allowed_globals) if origin else None
    is_reformed = origin is not None and (target != origin.form or newest.is_universal)
    first = tables.first_input[window.members[-1]]
    if origin is None or not is_reformed:
        templates, places = _same_layout(newest, first, drop, allowed_globals)
    elif target is None:
        templates, places = universal_templates(origin, first, allowed_globals)
    else:
        templates, places = zero_templates(origin, target, first, not drop, allowed_globals)
    places = {kind: tables.renumbered(table, newest) for kind, table in places.items()}
    shareable = ("frozen", "buffer", *(["master"] if newest.stage == 0 else []))  # of the module, not the optimizer
    places |= {kind: _once(tables, window, kind, places[kind]) for kind in shareable if kind in places}
    wanted = [window.wanted(kind, places[kind]) for kind in ("master", "frozen", "buffer") if kind in places]
    if "module" in places:
        wanted.append(window.wanted("master", places["module"], is_cast=True))
    lost = [kind for kind in newest.state_names if kind not in places and not drop]
    if lost:
        raise BrokenCheckpoint(f"{newest.path}: rank 0 lacks the optimizer states {few(lost)}, which others have.")
    for kind in newest.state_names:
        if optimizer_states == "merge":
            wanted.append(window.wanted(kind, places[kind]))
        elif (is_reformed or reads_states) and not drop:
            wanted.append(window.wanted(kind, places[kind], of_newest=True))
    return OutputFiles(finished(window, templates, wanted, prefix=f"{tag}/"), tuple(wanted))


def _once(tables: SourceTables, window: OutputWindow, kind: str, table: Table) -> Table:
    """The table without elements that have their bytes in the output from another name.

    Raises:
        LayoutMismatch: the newest holds tensors in the same bytes that an older one holds apart: their averages differ.
    """
    newest = window.newest(tables)
    once = trim_shared_bytes(table, str(newest.path))
    if kind == "frozen" or not once.shared:
        return once.table  # what does not change over the window is the newest's in any case
    averaged = {int(row["tensor"]) for row in table if ALL[row["dtype"]].is_floating}
    for number in window.members:
        held = trim_shared_bytes(tables.table(number, kind), str(tables.layouts[number].path)).shared
        apart = {tables.names[elements.tensor] for elements in once.shared - held if elements.tensor in averaged}
        if apart:
            raise LayoutMismatch(
                f"{newest.path} holds {few(sorted(apart))} in the same bytes as others, "
                f"{tables.layouts[number].path} does not. Leave it out, or write safetensors, which keep them apart."
            )
    return once.table


def _same_layout(
    newest: Layout, first_input: int, drop: bool, allowed_globals: frozenset[str]
) -> tuple[list[Template], dict[str, Table]]:
    """The newest's own files, and where each kind's elements lie in them; `file` counts output files."""
    inputs = inputs_of(newest, first_input)
    built = [_template(archive, inputs, drop, allowed_globals) for archive in newest.archives]
    moves = [moved for _, moved in built]
    kept = {kind: table for kind, table in newest.fragments.items() if not (drop and kind in newest.state_names)}
    return [template for template, _ in built], {kind: _moved(table.copy(), moves) for kind, table in kept.items()}


def finished(
    window: OutputWindow, templates: list[Template], wanted: list[ElementRequest], prefix: str = ""
) -> tuple[OutputFile, ...]:
    """The output files: templates without the ranges that elements are put in, and with only those CRC-32 fields that
    can have changed."""
    rows = np.concatenate([want.table for want in wanted]) if wanted else np.zeros(0, FRAGMENT)
    rows = rows[np.lexsort((rows["offset"], rows["file"]))]
    begins = rows["offset"]
    ends = begins + rows["numel"] * ITEMSIZES[rows["dtype"].astype(np.int64)]
    outputs = []
    for index, template in enumerate(templates):
        low, high = np.searchsorted(rows["file"], [window.first_file + index, window.first_file + index + 1])
        begin, end = begins[low:high], ends[low:high]
        is_new = any(isinstance(piece, LiteralSegment) for piece in template.segments)
        if np.any(begin[1:] < end[:-1]):
            raise UnsupportedLayout(
                f"{prefix}{template.name}: two tensors to be merged share bytes of it. "
                "Write safetensors, which keep them apart."
            )
        touched = tuple(
            crc
            for crc in template.crc_fields
            if is_new or np.searchsorted(end, crc.offset, "right") < np.searchsorted(begin, crc.offset + crc.nbytes)
        )
        pieces = around(template.segments, begin, end)
        outputs.append(OutputFile(window.output, prefix + template.name, template.nbytes, pieces, touched))
    return tuple(outputs)


def _template(
    archive: Archive, inputs: Inputs, drop: bool, allowed_globals: frozenset[str]
) -> tuple[Template, dict[int, int]]:
    """The template of a file, and where its records' data has moved to (empty: nothing moved)."""
    tree = open_torch_file(archive.path, allowed_globals).tree if drop else {}
    is_optimizer = archive.path.name.endswith("optim_states.pt")
    if drop and (is_optimizer or is_stage0(tree)):
        _drop_states(tree["optimizer_state_dict" if is_optimizer else "optimizer"])
        fresh = make_torch_template(archive.path.name, tree, archive, inputs, allowed_globals)
        return fresh.template, fresh.moved
    file = inputs.numbers[str(archive.path)]
    crcs = tuple(CrcField(r.offset, r.nbytes, r.crc_offsets) for r in archive.records.values() if r.crc)
    return Template(archive.path.name, archive.nbytes, [CopySegment(0, archive.nbytes, file, 0)], crcs), {}


def _moved(table: Table, moves: list[dict[int, int]]) -> Table:
    """Fragments at their places in the templates."""
    for index, moved in enumerate(moves):
        if not moved:
            continue
        rows = np.flatnonzero(table["file"] == index)
        old = np.array(sorted(moved), dtype=np.int64)
        shift = np.array([moved[offset] for offset in old], dtype=np.int64) - old
        record = np.searchsorted(old, table["offset"][rows], "right") - 1
        table["offset"][rows] += shift[record]
    return table


def _drop_states(state: dict[str, Any]) -> None:
    """Empties the base optimizer's state, and takes back step counters kept in parameter groups."""
    base: Any = state.get("base_optimizer_state", state.get("optimizer_state_dict", state))
    if isinstance(base, list):  # elastic: an entry a group, and its steps, which a fresh state must not have
        for entry in base:
            entry.clear()
        if "base_optimizer_state_step" in state:
            state["base_optimizer_state_step"] = 0
        return
    base["state"].clear()
    for group in base["param_groups"]:
        group.pop("step", None)
