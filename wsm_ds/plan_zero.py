"""Output as a ZeRO checkpoint in the newest source's layout: its rank files with some byte ranges replaced."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from wsm_ds.errors import UnsupportedLayout
from wsm_ds.forms.form import WantedForm, open_origin, target_form
from wsm_ds.forms.universal import universal_templates
from wsm_ds.forms.zero import zero_templates
from wsm_ds.layouts.layout import Table
from wsm_ds.plan import Bytes, Copy, CrcField, InputFile, OutputFile, Template, overlay
from wsm_ds.rewrite import Inputs, inputs_of, rewritten
from wsm_ds.runs import FileRuns, WindowTables, add_copied_runs, add_window_runs
from wsm_ds.torchfile import Archive, open_torch_file


def zero_outputs(
    tables: WindowTables, tag: str, optimizer_states: str, allowed_globals: frozenset[str], wanted: WantedForm
) -> tuple[tuple[OutputFile, ...], tuple[InputFile, ...]]:
    """The output files of a ZeRO checkpoint `tag`, and all inputs (the staged masters are the last ones).

    Args:
        optimizer_states: "carry" (those of the newest), "merge" (same coefficients) or "drop" (left out).
        wanted: the form of the output; that of the newest, if nothing is wanted.

    Raises:
        UnsupportedLayout, LayoutMismatch, RecipeError: see `open_origin` and `target_form`.
    """
    newest, drop = tables.newest, optimizer_states == "drop"
    if optimizer_states == "merge" and any(layout.has_nameless_states for layout in tables.layouts):
        raise UnsupportedLayout(
            f"{newest.path}: a stage 0 checkpoint in fp32 does not say which optimizer state belongs to which "
            "parameter, if there are several parameter groups. Carry or drop the states."
        )
    is_changed = newest.is_universal or wanted != WantedForm()
    origin = open_origin(newest, allowed_globals) if is_changed else None
    form = target_form(origin, wanted, allowed_globals) if origin else None
    is_reformed = origin is not None and (form != origin.form or newest.is_universal)
    first = tables.first_input[-1]
    if origin is None or not is_reformed:
        templates, places = _same_layout(tables, drop, allowed_globals)
    elif form is None:
        templates, places = universal_templates(origin, first, allowed_globals)
    else:
        templates, places = zero_templates(origin, form, first, not drop, allowed_globals)
    files: defaultdict[int, FileRuns] = defaultdict(FileRuns)
    for kind in ("master", "frozen", "buffer"):
        if kind in places:
            add_window_runs(files, tables, kind, places[kind])
    for kind in newest.state_names:
        if optimizer_states == "merge":
            add_window_runs(files, tables, kind, places[kind])
        elif is_reformed and not drop:
            add_copied_runs(files, tables, places[kind], tables.table(len(tables.layouts) - 1, kind))
    phases = dict.fromkeys(range(len(templates)), 0)
    if newest.stage == 0 and "module" in places:
        add_window_runs(files, tables, "master", places["module"])  # the masters lie in the same file
    elif "module" in places:
        masters = places["master"].copy()
        masters["file"] += len(tables.inputs)
        add_copied_runs(files, tables, places["module"], masters)
        phases.update(dict.fromkeys((int(file) for file in np.unique(places["module"]["file"])), 1))
    outputs = tuple(
        finished(f"{tag}/{template.name}", template, files[index], phases[index])
        for index, template in enumerate(templates)
    )
    staged = tuple(InputFile(Path(tag) / t.name, t.nbytes, 0, is_staged=True) for t in templates)
    return outputs, tables.inputs + staged


def _same_layout(
    tables: WindowTables, drop: bool, allowed_globals: frozenset[str]
) -> tuple[list[Template], dict[str, Table]]:
    """The newest's own files, and where each kind's elements lie in them; `file` counts output files."""
    newest, first = tables.newest, tables.first_input[-1]
    inputs = inputs_of(newest, first)
    built = [_template(archive, inputs, drop, allowed_globals) for archive in newest.archives]
    places = {}
    for kind in newest.fragments:
        if drop and kind in newest.state_names:
            continue
        table = tables.table(len(tables.layouts) - 1, kind)
        table["file"] -= first
        places[kind] = _moved(table, [moved for _, moved in built])
    return [template for template, _ in built], places


def finished(name: str, template: Template, runs: FileRuns, phase: int = 0) -> OutputFile:
    """An output file: the template with its runs put in, and only those CRC-32 fields that can have changed."""
    base, crcs = template.base, template.crcs
    sums = sorted(runs.sums, key=lambda run: run.offset)
    starts = np.array([run.offset for run in sums], dtype=np.int64)
    ends = np.array([run.offset + run.nbytes for run in sums], dtype=np.int64)
    touched = tuple(
        crc
        for crc in crcs
        if np.searchsorted(ends, crc.offset, "right") < np.searchsorted(starts, crc.offset + crc.nbytes, "left")
        or any(isinstance(piece, Bytes) for piece in base)
    )
    labels = np.array(sorted(runs.labels), dtype=np.int64).reshape(-1, 2)
    return OutputFile(name, template.nbytes, overlay(base, sums), touched, phase, labels[:, 0], labels[:, 1])


def _template(
    archive: Archive, inputs: Inputs, drop: bool, allowed_globals: frozenset[str]
) -> tuple[Template, dict[int, int]]:
    """The template of a file, and where its records' data has moved to (empty: nothing moved)."""
    holder = "optimizer_state_dict" if archive.path.name.endswith("optim_states.pt") else "optimizer"
    tree = open_torch_file(archive.path, allowed_globals).tree if drop else {}
    if tree.get(holder) is not None:
        _drop_states(tree[holder])
        fresh = rewritten(archive.path.name, tree, archive, inputs, allowed_globals)
        return fresh.template, fresh.moved
    file = inputs.numbers[str(archive.path)]
    crcs = tuple(CrcField(r.offset, r.nbytes, r.crc_offsets) for r in archive.records.values() if r.crc)
    return Template(archive.path.name, archive.nbytes, [Copy(0, archive.nbytes, file, 0)], crcs), {}


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
