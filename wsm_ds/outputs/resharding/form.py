"""What decides how a ZeRO checkpoint cuts its parameters, and how the newest source did it."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wsm_ds.errors import LayoutMismatch, RecipeError, UnsupportedLayout
from wsm_ds.layouts import Layout, read_layout
from wsm_ds.layouts.run import checkpoint_at
from wsm_ds.outputs.resharding.groups import Group, in_partition_order, read_groups, read_universal_groups, subgroups
from wsm_ds.torchfile import TorchFile, open_torch_file

RANK = re.compile(r"zero_pp_rank_(\d+)_")
ONE_MODEL_FILE = re.compile(r"^(?:(?:bf16_)?zero_pp_rank_\d+_)?mp_rank_00_?(?:model|optim)_states\.pt$")
DEFAULT_SUB_GROUP_SIZE = 1_000_000_000  # `runtime/zero/config.py:182`


@dataclass(frozen=True)
class Form:
    """The choices that cut a checkpoint.

    Attributes:
        stage: ZeRO stage 1, 2 or 3.
        world_size: data-parallel ranks.
        is_bf16_optimizer: BF16_Optimizer (bf16, stage 1, fp32 gradient accumulation), not the ZeRO class.
        round_robin: stages 1 and 2: parameters dealt out to the ranks one by one.
        parameter_alignment: stages 1 and 2: every parameter begins at a multiple of 16 bytes.
        sub_group_size: stage 3: elements of a rank at which a sub-group is closed.
    """

    stage: int
    world_size: int
    is_bf16_optimizer: bool = False
    round_robin: bool = False
    parameter_alignment: bool = False
    sub_group_size: int = DEFAULT_SUB_GROUP_SIZE


@dataclass(frozen=True)
class Origin:
    """The newest checkpoint, opened: what another form is made from.

    Attributes:
        models: model files by data-parallel rank.
        optimizer: rank 0's optimizer file, or a universal checkpoint's `optimizer_state.pt`.
        state: in it, what the optimizer wrapper saved: loss scale and the like.
        order: for each rank and group the names in `param_slice_mappings`.
    """

    layout: Layout
    form: Form
    groups: tuple[Group, ...]
    models: dict[int, TorchFile]
    optimizer: TorchFile
    state: dict[str, Any]
    order: tuple[list[list[str]], ...]

    @property
    def has_bf16_enabled(self) -> bool:
        """Whether DeepSpeed names optimizer files with bf16 in front (`runtime/engine.py:4319`)."""
        if not self.layout.is_universal:
            return self.optimizer.path.name.startswith("bf16_")
        config = self.models[0].tree.get("ds_config") or {}
        return bool((config.get("bf16") or config.get("bfloat16") or {}).get("enabled"))


def open_origin(layout: Layout, allowed_globals: frozenset[str]) -> Origin:
    """Opens a checkpoint to be put into another form.

    Raises:
        UnsupportedLayout: its form is not one that is understood well enough to change it (the reason is named).
    """
    if layout.is_universal:
        return _open_universal(layout, allowed_globals)
    others = [name for name in layout.files if not ONE_MODEL_FILE.match(name)]
    if layout.stage == 0 or others:
        what = f"it holds {others[0]}" if others else "it is stage 0"
        raise UnsupportedLayout(f"{layout.path} is not written in another form: {what}.")
    opened = [open_torch_file(archive.path, allowed_globals) for archive in layout.archives]
    models = {_rank(file): file for file in opened if file.path.name.endswith("model_states.pt")}
    optims = {_rank(file): file for file in opened if file.path.name.endswith("optim_states.pt")}
    states = [optims[rank].tree["optimizer_state_dict"] for rank in sorted(optims)]
    if isinstance(states[0].get("base_optimizer_state"), list):
        raise UnsupportedLayout(f"{layout.path} is an elastic checkpoint, which is not written in another form.")
    form = _form_of(layout, models[0], is_bf16_optimizer="zero_stage" not in states[0])
    groups = read_groups(models[0], states[0], form.world_size if form.round_robin else 1)
    mappings = [state.get("param_slice_mappings") for state in states if layout.stage < 3]
    if any(held is None or len(held) != len(groups) for held in mappings):
        raise UnsupportedLayout(f"{layout.path} has no param_slice_mappings of its {len(groups)} parameter groups.")
    order = tuple([list(held) for held in mapping] for mapping in mappings if mapping is not None)
    origin = Origin(layout, form, groups, models, optims[0], states[0], order)
    _require_understood(origin)
    return origin


def _open_universal(layout: Layout, allowed_globals: frozenset[str]) -> Origin:
    opened = {path.name: open_torch_file(path, allowed_globals) for path in _metadata_files(layout)}
    models = {_rank(file): file for name, file in opened.items() if name.endswith("model_states.pt")}
    head = opened["optimizer_state.pt"]
    config = models[0].tree.get("ds_config") or {}
    accumulates_in_fp32 = (config.get("data_types") or {}).get("grad_accum_dtype") == "fp32"
    is_bf16_optimizer = accumulates_in_fp32 and layout.dtype.name == "bf16" and layout.stage == 1
    form = _form_of(layout, models[0], is_bf16_optimizer)
    groups = read_universal_groups(layout.path, models[0], head, allowed_globals)
    return Origin(layout, form, groups, models, head, head.tree, ())


def _metadata_files(layout: Layout) -> list[Path]:
    """A universal checkpoint's files that belong to no single parameter."""
    named = zip(layout.files, layout.archives, strict=True)
    return [archive.path for name, archive in named if name.count("/") < 2]


def _rank(file: TorchFile) -> int:
    match = RANK.search(file.path.name)
    return int(match[1]) if match else 0


def _form_of(layout: Layout, model: TorchFile, is_bf16_optimizer: bool) -> Form:
    config = zero_config(model.tree)
    size = config.get("sub_group_size", DEFAULT_SUB_GROUP_SIZE)
    return Form(
        stage=layout.stage,
        world_size=layout.world_size,
        is_bf16_optimizer=is_bf16_optimizer,
        round_robin=layout.stage < 3 and bool(config.get("round_robin_gradients")),
        parameter_alignment=layout.stage < 3 and bool(config.get("parameter_alignment")),
        sub_group_size=int(size) if isinstance(size, int | float) else DEFAULT_SUB_GROUP_SIZE,
    )


def zero_config(model: dict[str, Any]) -> dict[str, Any]:
    """`zero_optimization` of the ds_config that a model file holds; empty if there is none."""
    config = model.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    return zero if isinstance(zero, dict) else {}


def _require_understood(origin: Origin) -> None:
    """Cutting the origin by its own form must give its own cuts, or another form would be cut wrongly too."""
    saved = [list(group) for group in origin.models[0].tree["param_shapes"]]
    if [
        names for cut in cuts(origin.form, origin.groups, origin.layout) for names in cut
    ] != saved or not _names_are_in_order(origin):
        raise UnsupportedLayout(
            f"{origin.layout.path} orders its parameters in another way than its ds_config says "
            f"({origin.form}); it is not written in another form."
        )


def _names_are_in_order(origin: Origin) -> bool:
    """`param_slice_mappings` names parameters in the optimizer's order, dealt out or not."""
    for held_by_group in origin.order:
        for group, held in zip(origin.groups, held_by_group, strict=True):
            places = {name: index for index, name in enumerate(group.names)}
            order = [places.get(name, -1) for name in held]
            if order != sorted(order) or -1 in order:
                return False
    return True


def cuts(form: Form, groups: tuple[Group, ...], layout: Layout) -> list[list[list[str]]]:
    """For each parameter group, the names of each flat tensor in its order: one, or in stage 3 one a sub-group."""
    if form.stage < 3:
        return [[in_partition_order(group.names, form.world_size if form.round_robin else 1)] for group in groups]
    numels = {name: layout.tensors[name].numel for group in groups for name in group.names}
    return [subgroups(group.names, numels, form.world_size, form.sub_group_size) for group in groups]


@dataclass(frozen=True)
class RequestedForm:
    """What a recipe asks for; None leaves it as it is. `like` is a checkpoint's folder, RUN/TAG."""

    is_universal: bool = False

    stage: int | None = None
    world_size: int | None = None
    sub_group_size: int | None = None
    like: Path | None = None


def target_form(origin: Origin, wanted: RequestedForm, allowed_globals: frozenset[str]) -> Form | None:
    """The form of `wanted.like`, or the origin's with what is wanted changed; None for a universal checkpoint.

    Raises:
        LayoutMismatch: `like` groups other parameters together, or trains in another precision.
        RecipeError: sub_group_size without stage 3.
    """
    if wanted.is_universal:
        return None
    if wanted.like is not None:
        like = open_origin(read_layout(checkpoint_at(wanted.like), allowed_globals), allowed_globals)
        _require_alike(origin, like)
        return like.form
    form = replace(
        origin.form,
        stage=wanted.stage or origin.form.stage,
        world_size=wanted.world_size or origin.form.world_size,
        sub_group_size=origin.form.sub_group_size if wanted.sub_group_size is None else wanted.sub_group_size,
    )
    if form.stage == 3:
        return replace(form, is_bf16_optimizer=False, round_robin=False, parameter_alignment=False)
    if wanted.sub_group_size is not None:
        raise RecipeError(f"sub_group_size belongs to stage 3; the output is stage {form.stage}.")
    return replace(form, is_bf16_optimizer=form.is_bf16_optimizer and form.stage == 1)


def _require_alike(origin: Origin, like: Origin) -> None:
    pairs = [
        ("dtypes", origin.layout.dtype.name, like.layout.dtype.name),
        ("parameter groups", *([group.names for group in o.groups] for o in (origin, like))),
    ]
    for what, ours, theirs in pairs:
        if ours != theirs:
            raise LayoutMismatch(
                f"{origin.layout.path} cannot be written like {like.layout.path}: their {what} differ, "
                f"{ours} against {theirs}."
            )
