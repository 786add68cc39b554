"""A universal checkpoint: every parameter in its own files, for any ZeRO stage and any number of ranks.

Form: `checkpoint/ds_to_universal.py` writes it; `runtime/base_optimizer.py:332` (stages 1 and 2) and
`runtime/zero/stage3.py:3653` read it. Here every tensor keeps its shape and is in a dict, which both readers accept.
`optimizer_state.pt` has the entries that each of them needs, so one checkpoint serves all stages.
"""

import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from wsm_ds.errors import UnsupportedLayout, brief, few
from wsm_ds.layouts import zero12
from wsm_ds.layouts.layout import Table, TableBuilder
from wsm_ds.layouts.optimizer_states import unnested
from wsm_ds.layouts.rank_files import RankFiles
from wsm_ds.layouts.saved_names import with_parameter_names
from wsm_ds.outputs.resharding.form import Origin
from wsm_ds.outputs.resharding.groups import ParameterGroup
from wsm_ds.outputs.resharding.model_file import model_tree
from wsm_ds.outputs.resharding.optimizer_file import loss_scaling, param_group
from wsm_ds.outputs.resharding.placeholders import placeholder
from wsm_ds.outputs.resharding.shared_states import require_loadable_scalars
from wsm_ds.outputs.torch_template import Inputs, TorchTemplate, inputs_of, make_torch_template
from wsm_ds.planning.plan import InputNumber, Template
from wsm_ds.torchfile import TorchFile

log = logging.getLogger(__name__)

MODEL_FILES = {2: "mp_rank_00_model_states.pt", 3: "zero_pp_rank_0_mp_rank_00_model_states.pt"}
"""The model file that DeepSpeed opens when it loads at this stage (2: stages 1 and 2)."""


def universal_templates(
    origin: Origin, first_input: InputNumber, allowed_globals: frozenset[str]
) -> tuple[list[Template], Mapping[str, Table]]:
    """Makes all files of a universal checkpoint.

    Args:
        origin: the newest checkpoint.
        first_input: the plan's number of the origin's first file.
        allowed_globals: see `open_torch_file`.

    Returns:
        The files, and by kind where elements belong in them; `file` in the tables is the index of a template.

    Raises:
        UnsupportedLayout: the run uses `round_robin_gradients`, which DeepSpeed's loading ignores; or a parameter's
            name cannot be the name of a folder.
    """
    _require_loadable(origin)
    require_loadable_scalars(origin)
    inputs = inputs_of(origin.layout, first_input)
    builder = TableBuilder()
    templates = _model_templates(origin, inputs, allowed_globals)
    _add_module(builder, origin, templates[0].file)
    numbers = {name: number for number, name in enumerate(origin.layout.tensors)}
    for group in origin.groups:
        for name in group.names:
            files = _parameter_templates(origin, group, name, inputs, allowed_globals)
            for kind, template in files.items():
                if kind != "step":
                    tensor = template.file.tree["param"]
                    offset = template.file.byte_offset(tensor)
                    builder.add(kind, numbers[name], 0, tensor.numel, file=len(templates), offset=offset,
                                dtype=tensor.dtype)  # fmt: skip
                templates.append(template)
    tree = _optimizer_state(origin)
    name = "zero/optimizer_state.pt"
    templates.append(make_torch_template(name, tree, origin.optimizer.archive, inputs, allowed_globals))
    return [template.template for template in templates], builder.tables()


def _require_loadable(origin: Origin) -> None:
    """Raises for a checkpoint that DeepSpeed would load wrongly; warns of tensors that it would not load."""
    if origin.form.round_robin:
        raise UnsupportedLayout(
            f"{origin.layout.path} was trained with round_robin_gradients, under which DeepSpeed puts the parameters "
            "of a universal checkpoint into wrong places. Write --format zero with --world-size instead."
        )
    tensors = origin.layout.tensors
    unusable = [name for name in tensors if {"", ".", ".."} & set(name.split("/")) or "\0" in name]
    if unusable:
        raise UnsupportedLayout(
            f"{origin.layout.path}: {few(map(brief, unusable))} cannot be names of folders, which a universal "
            "checkpoint needs. Write --format zero or safetensors instead."
        )
    ignored = [name for name, info in tensors.items() if info.role in ("frozen", "buffer")]
    if ignored:
        log.warning("DeepSpeed's universal loading does not restore buffers and frozen parameters: %s", few(ignored))


def _model_templates(origin: Origin, inputs: Inputs, allowed_globals: frozenset[str]) -> list[TorchTemplate]:
    """The model files of all stages; the first one holds the weights."""
    templates = []
    for stage, name in MODEL_FILES.items():
        tree = model_tree(origin, replace(origin.form, stage=stage), 0)
        if stage == 3:
            # Only the counters and the client state are read from it: the weights are in the other file.
            tree |= {"module": OrderedDict(), "frozen_param_fragments": None}
        templates.append(make_torch_template(name, tree, origin.models[0].archive, inputs, allowed_globals))
    return templates


def _parameter_templates(
    origin: Origin, group: ParameterGroup, name: str, inputs: Inputs, allowed_globals: frozenset[str]
) -> dict[str, TorchTemplate]:
    """The files of one parameter by kind: its master, its optimizer states, and `step`."""
    original, shape = origin.optimizer.archive, origin.layout.tensors[name].shape
    templates = {}
    for kind, dtype in {"master": group.master, **group.element_wise}.items():
        file = "fp32" if kind == "master" else kind
        tree = {"cat_dim": 0, "param": placeholder(dtype, shape)}
        templates[kind] = make_torch_template(f"zero/{name}/{file}.pt", tree, original, inputs, allowed_globals)
    if "step" in group.states:
        step = group.states["step"]
        templates["step"] = make_torch_template(f"zero/{name}/step.pt", step, original, inputs, allowed_globals)
    return templates


def _add_module(builder: TableBuilder, origin: Origin, model: TorchFile) -> None:
    """Adds where the module's weights belong in the first template."""
    layout = origin.layout
    named = with_parameter_names(model)
    zero12.add_module(builder, RankFiles({0: named}, {}, {model.path: 0}, layout.tensors, layout.aliases, 1))


def _optimizer_state(origin: Origin) -> dict[str, Any]:
    """The state that belongs to no parameter. Stages 1 and 2 read it at the top level, stage 3 one level below."""
    old = origin.state
    groups = [param_group(group, [number], keeps_states=True) for number, group in enumerate(origin.groups)]
    state: dict[str, Any] = loss_scaling(old)
    if "clip_grad" in old:
        state["clip_grad"] = old["clip_grad"]
    state["ds_version"] = origin.models[0].tree.get("ds_version")
    state["param_groups"] = groups
    state["optimizer_state_dict"] = {"state": {0: _counters(origin.groups[0])}, "param_groups": groups}
    return state


def _counters(group: ParameterGroup) -> dict[str, Any]:
    return {name: value for name, value in unnested(group.states).items() if name not in group.element_wise}
