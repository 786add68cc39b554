"""A rank's model file in another form. Its keys: `runtime/engine.py:5017`, `_common_checkpoint_state`."""

from collections import OrderedDict
from typing import Any

from wsm_ds.errors import UnsupportedLayout, few
from wsm_ds.layouts.layout import TensorInfo
from wsm_ds.layouts.saved_names import saved_name
from wsm_ds.outputs.resharding.form import Form, Origin, cuts
from wsm_ds.outputs.resharding.placeholders import placeholder
from wsm_ds.torchfile import Tensor
from wsm_ds.torchfile.unpickle import TorchSize


def model_tree(origin: Origin, form: Form, rank: int) -> dict[str, Any]:
    """Returns the object tree of a rank's model file, with placeholders for elements that move in the new form.

    Args:
        origin: the newest checkpoint.
        form: the form of the new file.
        rank: data-parallel rank; stages 1 and 2 have only rank 0's file.
    """
    tree: dict[str, Any] = dict(origin.models.get(rank, origin.models[0]).tree)
    first = origin.models[0].tree
    tensors = origin.layout.tensors
    frozen = {name: info for name, info in tensors.items() if info.role == "frozen"}
    tree["module"] = _module(origin, form, tree["module"])
    tree["param_shapes"] = [
        OrderedDict((name, TorchSize(tensors[name].shape)) for name in names)
        for cut in cuts(form, origin.groups, origin.layout)
        for names in cut
    ]
    # Only rank 0 saves the tied names (`_get_shared_params`, runtime/engine.py:5490).
    tree["shared_params"] = first.get("shared_params") if rank == 0 else {}
    tree["frozen_param_shapes"] = tree["frozen_param_fragments"] = None
    # DeepSpeed saves frozen parameters apart if gradients are partitioned, from stage 2 on (runtime/engine.py:5383).
    if form.stage > 1:
        shapes = first.get("frozen_param_shapes") or {n: TorchSize(info.shape) for n, info in frozen.items()}
        tree["frozen_param_shapes"] = OrderedDict(shapes)
        tree["frozen_param_fragments"] = OrderedDict(
            (name, _fragment(form, frozen[name], tree["module"][name]) if name in frozen else tree["module"][name])
            for name in shapes
        )
    tree["module"] = OrderedDict((saved_name(name), value) for name, value in tree["module"].items())
    tree["dp_world_size"] = form.world_size
    tree["ds_config"] = with_form(tree.get("ds_config"), form)
    return tree


def _module(origin: Origin, form: Form, old: dict[str, Any]) -> OrderedDict[str, Any]:
    """The module's weights under the old names, in the old order.

    Stage 3 saves empty tensors there, other stages whole ones. Tied weights share one tensor, as in the source.
    """
    if form.stage < 3 and origin.form.stage < 3:
        return OrderedDict(old)
    new: OrderedDict[str, Any] = OrderedDict()
    tensors: dict[str, Tensor] = {}
    whole = set(whole_in_every_form(origin))
    for name, value in old.items():
        owner = origin.layout.aliases.get(name, name)
        info = origin.layout.tensors.get(owner)
        if info is None or owner in whole or not isinstance(value, Tensor):
            new[name] = value
            continue
        if owner not in tensors:
            tensors[owner] = placeholder(info.dtype, (0,) if form.stage == 3 else info.shape)
        new[name] = tensors[owner]
    return new


def whole_in_every_form(origin: Origin) -> list[str]:
    """Returns the tensors that no stage partitions: buffers, and those neither in the optimizer nor named as frozen."""
    frozen_shapes = origin.models[0].tree.get("frozen_param_shapes")
    return [
        name
        for name, info in origin.layout.tensors.items()
        if info.role == "buffer" or (info.role == "frozen" and frozen_shapes is not None and name not in frozen_shapes)
    ]


def require_places(origin: Origin, form: Form) -> None:
    """Raises UnsupportedLayout if stage 3 would be written and has no place for a parameter; it is named."""
    if form.stage < 3 or origin.form.stage == 3:
        return
    buffers = set(origin.models[0].tree.get("buffer_names") or ())
    unplaced = [name for name in whole_in_every_form(origin) if origin.layout.tensors[name].role == "frozen"]
    unplaced += [f"{name} ({what})" for name, what in origin.layout.opaque.items() if name not in buffers]
    if unplaced:
        raise UnsupportedLayout(
            f"{origin.layout.path} holds {few(unplaced)}, for which ZeRO stage 3 has no place: neither in the "
            "optimizer nor frozen, or no plain tensor. Write stage 1 or 2, or safetensors."
        )


def _fragment(form: Form, info: TensorInfo, whole: Tensor) -> Tensor:
    """A frozen parameter outside the module: the module's tensor, or in stage 3 the rank's partition of it."""
    return placeholder(info.dtype, (-(-info.numel // form.world_size),)) if form.stage == 3 else whole


def with_form(config: Any, form: Form) -> Any:
    """Returns a ds_config with the form's stage and sub_group_size; a config without ZeRO is returned unchanged."""
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization"), dict):
        return config
    changed = {"stage": form.stage}
    if form.stage == 3:
        changed["sub_group_size"] = form.sub_group_size
    return config | {"zero_optimization": config["zero_optimization"] | changed}
