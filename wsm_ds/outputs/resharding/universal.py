"""A universal checkpoint: every parameter in files of its own, for any ZeRO stage and any number of ranks.

Form: `checkpoint/ds_to_universal.py` writes, `runtime/base_optimizer.py:332` (stages 1 and 2) and
`runtime/zero/stage3.py:3653` read. Here every tensor keeps its shape in a dict, which both readers take, and
`optimizer_state.pt` has what each of them looks for, so that one checkpoint serves all stages.
"""

import logging
from collections import OrderedDict
from dataclasses import replace
from typing import Any

from wsm_ds.errors import UnsupportedLayout, brief, few
from wsm_ds.layouts import zero12
from wsm_ds.layouts.layout import Table, TableBuilder
from wsm_ds.layouts.rank_files import RankFiles
from wsm_ds.outputs.resharding.form import Origin
from wsm_ds.outputs.resharding.groups import Group
from wsm_ds.outputs.resharding.model_file import model_tree
from wsm_ds.outputs.resharding.optimizer_file import entry, scaling
from wsm_ds.outputs.resharding.placeholders import room
from wsm_ds.outputs.torch_template import TorchTemplate, inputs_of, make_torch_template
from wsm_ds.planning.plan import Template
from wsm_ds.torchfile import TorchFile

log = logging.getLogger(__name__)

MODEL_FILES = {2: "mp_rank_00_model_states.pt", 3: "zero_pp_rank_0_mp_rank_00_model_states.pt"}


def universal_templates(
    origin: Origin, first_input: int, allowed_globals: frozenset[str]
) -> tuple[list[Template], dict[str, Table]]:
    """Templates of all files, and where each kind's elements belong in them; the tables' `file` counts them.

    Raises:
        UnsupportedLayout: the run deals parameters out round robin, which DeepSpeed's loading does not undo.
    """
    if origin.form.round_robin:
        raise UnsupportedLayout(
            f"{origin.layout.path} was trained with round_robin_gradients, under which DeepSpeed puts the parameters "
            "of a universal checkpoint into wrong places. Write --format zero with --world-size instead."
        )
    strange = [name for name in origin.layout.tensors if {"", ".", ".."} & set(name.split("/")) or "\0" in name]
    if strange:
        raise UnsupportedLayout(f"{origin.layout.path}: {few(map(brief, strange))} cannot be names of files.")
    layout, inputs = origin.layout, inputs_of(origin.layout, first_input)
    lost = [name for name, info in layout.tensors.items() if info.role in ("frozen", "buffer")]
    if lost:
        log.warning("DeepSpeed's universal loading does not restore buffers and frozen parameters: %s", few(lost))
    builder = TableBuilder()
    made: list[TorchTemplate] = []
    for stage, name in MODEL_FILES.items():
        tree = model_tree(origin, replace(origin.form, stage=stage), 0)
        if stage == 3:  # counters and client state only: whole weights are in the other file, fragments nowhere
            tree |= {"module": OrderedDict(), "frozen_param_fragments": None}
        made.append(make_torch_template(name, tree, origin.models[0].archive, inputs, allowed_globals))
    _place_module(builder, origin, made[0].file)
    like = origin.optimizer.archive
    numbers = {name: number for number, name in enumerate(layout.tensors)}
    for group in origin.groups:
        kinds = {"master": group.master, **group.element_wise}
        for name in group.names:
            folder, info = f"zero/{name}", layout.tensors[name]
            for kind, dtype in kinds.items():
                tensor = room(dtype, info.shape)
                file = "fp32" if kind == "master" else kind
                tree = {"cat_dim": 0, "param": tensor}
                part = make_torch_template(f"{folder}/{file}.pt", tree, like, inputs, allowed_globals)
                offset = part.file.byte_offset(part.file.tree["param"])
                builder.add(kind, numbers[name], 0, info.numel, file=len(made), offset=offset, dtype=dtype)
                made.append(part)
            if "step" in group.states:
                made.append(
                    make_torch_template(f"{folder}/step.pt", group.states["step"], like, inputs, allowed_globals)
                )
    tree = _optimizer_state(origin)
    made.append(make_torch_template("zero/optimizer_state.pt", tree, like, inputs, allowed_globals))
    return [part.template for part in made], builder.tables()


def _place_module(builder: TableBuilder, origin: Origin, model: TorchFile) -> None:
    layout = origin.layout
    zero12.place_module(builder, RankFiles({0: model}, {}, {model.path: 0}, layout.tensors, layout.aliases, 1))


def _optimizer_state(origin: Origin) -> dict[str, Any]:
    """What is not a parameter's: stages 1 and 2 look at the top level, stage 3 one level below."""
    old = origin.state
    groups = [entry(group, [number], keeps_states=True) for number, group in enumerate(origin.groups)]
    state: dict[str, Any] = scaling(old)
    if "clip_grad" in old:
        state["clip_grad"] = old["clip_grad"]
    state["ds_version"] = origin.models[0].tree.get("ds_version")
    state["param_groups"] = groups
    state["optimizer_state_dict"] = {"state": {0: _counters(origin.groups[0])}, "param_groups": groups}
    return state


def _counters(group: Group) -> dict[str, Any]:
    return {name: value for name, value in group.states.items() if name not in group.element_wise}
