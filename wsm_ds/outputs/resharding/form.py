"""The form of a ZeRO checkpoint: all that decides how its parameters are cut into the ranks' files."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wsm_ds.errors import LayoutMismatch, RecipeError, UnsupportedLayout
from wsm_ds.layouts import Layout, read_layout
from wsm_ds.layouts.run import checkpoint_at
from wsm_ds.layouts.saved_names import with_parameter_names
from wsm_ds.outputs.resharding.groups import (
    ParameterGroup,
    in_partition_order,
    read_groups,
    read_universal_groups,
    subgroups,
)
from wsm_ds.planning.names import without_wrappers
from wsm_ds.torchfile import TorchFile, open_own_tree, open_torch_files

RANK = re.compile(r"zero_pp_rank_(\d+)_")
KEEP_FORM = "Merge it without --stage, --world-size, --sub-group-size, --like and --format universal."
"""The advice in errors about a checkpoint that cannot be resharded."""
ONE_MODEL_FILE = re.compile(r"^(?:(?:bf16_)?zero_pp_rank_\d+_)?mp_rank_00_?(?:model|optim)_states\.pt$")
DEFAULT_SUB_GROUP_SIZE = 1_000_000_000
"""DeepSpeed's default, in elements (`runtime/zero/config.py:182`)."""


@dataclass(frozen=True)
class Form:
    """All that decides how a checkpoint's parameters are cut into the ranks' files.

    Attributes:
        stage: ZeRO stage 1, 2 or 3.
        world_size: data-parallel ranks.
        is_bf16_optimizer: whether the run uses BF16_Optimizer (bf16, stage 1, fp32 gradient accumulation) and not the
            ZeRO class.
        round_robin: `round_robin_gradients` of stages 1 and 2: parameters are distributed to the ranks one by one.
        parameter_alignment: stages 1 and 2: every parameter begins at a multiple of 16 bytes.
        sub_group_size: stage 3: a sub-group is closed when a rank has this many elements of it.
    """

    stage: int
    world_size: int
    is_bf16_optimizer: bool = False
    round_robin: bool = False
    parameter_alignment: bool = False
    sub_group_size: int = DEFAULT_SUB_GROUP_SIZE


@dataclass(frozen=True)
class Origin:
    """The newest checkpoint, opened: the files in another form are made from it.

    Attributes:
        layout: the checkpoint.
        form: its form.
        groups: the optimizer's parameter groups.
        models: model files, by data-parallel rank. Those that are alike share a tree.
        optimizers: every rank's optimizer file; none of a universal checkpoint.
        optimizer: rank 0's optimizer file, or a universal checkpoint's `optimizer_state.pt`.
        state: the state of the optimizer wrapper in it: loss scale, base optimizer and the like.
        slice_names: for each rank and group, the names in `param_slice_mappings`; empty where there are none (stage 3,
            universal).
    """

    layout: Layout
    form: Form
    groups: tuple[ParameterGroup, ...]
    models: dict[int, TorchFile]
    optimizers: tuple[TorchFile, ...]
    optimizer: TorchFile
    state: dict[str, Any]
    slice_names: tuple[list[list[str]], ...]

    @property
    def has_bf16_enabled(self) -> bool:
        """Whether names of optimizer files begin with `bf16_` (`runtime/engine.py:4319`)."""
        if not self.layout.is_universal:
            return self.optimizer.path.name.startswith("bf16_")
        config = self.models[0].tree.get("ds_config") or {}
        return bool((config.get("bf16") or config.get("bfloat16") or {}).get("enabled"))


def open_origin(layout: Layout, allowed_globals: frozenset[str]) -> Origin:
    """Opens a checkpoint that is to be resharded.

    Args:
        layout: the checkpoint.
        allowed_globals: see `open_own_tree`.

    Raises:
        UnsupportedLayout: it cannot be resharded: stage 0, model-parallel, expert, elastic or old files, or parameters
            in another order than its ds_config says. The message names the reason.
    """
    if layout.is_universal:
        return _open_universal(layout, allowed_globals)
    other_files = [name for name in layout.files if not ONE_MODEL_FILE.match(name)]
    if layout.stage == 0 or other_files:
        reason = f"it holds {other_files[0]}" if other_files else "it is stage 0"
        raise UnsupportedLayout(f"{layout.path} is not written in another form: {reason}. {KEEP_FORM}")
    files = list(open_torch_files((archive.path for archive in layout.archives), allowed_globals))
    models = {_rank(file): file for file in files if file.path.name.endswith("model_states.pt")}
    optims = {_rank(file): file for file in files if file.path.name.endswith("optim_states.pt")}
    # Storages of rank 0's trees are copied into many files, so they must know where they lie.
    models[0], optims[0] = (open_own_tree(files_of_kind[0].path, allowed_globals) for files_of_kind in (models, optims))
    models = {rank: with_parameter_names(file) for rank, file in models.items()}
    states = [optims[rank].tree["optimizer_state_dict"] for rank in sorted(optims)]
    if isinstance(states[0].get("base_optimizer_state"), list):
        raise UnsupportedLayout(f"{layout.path} is not written in another form: it is elastic. {KEEP_FORM}")
    form = _form_of(layout, models[0], is_bf16_optimizer="zero_stage" not in states[0])
    ranks = form.world_size if form.round_robin else 1
    groups = read_groups(models[0], states[0], ranks, frozenset(layout.state_names))
    mappings = [state.get("param_slice_mappings") for state in states if layout.stage < 3]
    if any(mapping is None or len(mapping) != len(groups) for mapping in mappings):
        raise UnsupportedLayout(
            f"{layout.path} is not written in another form: its optimizer files have no param_slice_mappings for each "
            f"of the {len(groups)} parameter groups. {KEEP_FORM}"
        )
    slice_names = tuple([list(slices) for slices in mapping] for mapping in mappings if mapping is not None)
    origin = Origin(
        layout, form, groups, models, tuple(optims[rank] for rank in sorted(optims)), optims[0], states[0], slice_names
    )
    _require_known_order(origin)
    return origin


def _open_universal(layout: Layout, allowed_globals: frozenset[str]) -> Origin:
    """Opens a universal checkpoint. Its form is that of the run that it was converted from."""
    files = {path.name: open_own_tree(path, allowed_globals) for path in _metadata_files(layout)}
    model_files = [file for name, file in files.items() if name.endswith("model_states.pt")]
    models = {_rank(file): with_parameter_names(file) for file in model_files}
    optimizer_state = files["optimizer_state.pt"]
    config = models[0].tree.get("ds_config") or {}
    accumulates_in_fp32 = (config.get("data_types") or {}).get("grad_accum_dtype") == "fp32"
    is_bf16_optimizer = accumulates_in_fp32 and layout.dtype.name == "bf16" and layout.stage == 1
    form = _form_of(layout, models[0], is_bf16_optimizer)
    groups = read_universal_groups(layout.path, models[0], optimizer_state, allowed_globals)
    return Origin(layout, form, groups, models, (), optimizer_state, optimizer_state.tree, ())


def _metadata_files(layout: Layout) -> list[Path]:
    """A universal checkpoint's files that belong to no single parameter: those of parameters are zero/NAME/KIND.pt."""
    return [archive.path for name, archive in zip(layout.files, layout.archives, strict=True) if name.count("/") < 2]


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
    """Returns `zero_optimization` of the ds_config in a model file's tree; empty if there is none."""
    config = model.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    return zero if isinstance(zero, dict) else {}


def _require_known_order(origin: Origin) -> None:
    """Checks that `cuts` gives the origin's own cuts for its form. Otherwise it would be wrong for other forms, too."""
    saved = [list(names) for names in origin.models[0].tree["param_shapes"]]
    expected = [names for cut in cuts(origin.form, origin.groups, origin.layout) for names in cut]
    if expected != saved or not _slices_are_in_order(origin):
        raise UnsupportedLayout(
            f"{origin.layout.path} is not written in another form: it orders its parameters in another way than its "
            f"ds_config says ({origin.form}). {KEEP_FORM}"
        )


def _slices_are_in_order(origin: Origin) -> bool:
    """Whether `param_slice_mappings` name parameters in the optimizer's order, as DeepSpeed writes them."""
    positions_by_group = [{name: index for index, name in enumerate(group.names)} for group in origin.groups]
    for names_by_group in origin.slice_names:
        for positions, names in zip(positions_by_group, names_by_group, strict=True):
            order = [positions.get(name, -1) for name in names]
            if order != sorted(order) or -1 in order:
                return False
    return True


def cuts(form: Form, groups: tuple[ParameterGroup, ...], layout: Layout) -> list[list[list[str]]]:
    """Returns which parameters each flat tensor is made of, in order.

    Args:
        form: the form.
        groups: the optimizer's parameter groups.
        layout: has the tensors' sizes.

    Returns:
        For each parameter group, the names in each of its flat tensors: one tensor in stages 1 and 2, one per sub-group
        in stage 3.
    """
    if form.stage < 3:
        return [[in_partition_order(group.names, form.world_size if form.round_robin else 1)] for group in groups]
    numels = {name: layout.tensors[name].numel for group in groups for name in group.names}
    return [subgroups(group.names, numels, form.world_size, form.sub_group_size) for group in groups]


@dataclass(frozen=True)
class RequestedForm:
    """The form that a recipe asks for. None keeps the value of the newest checkpoint.

    Attributes:
        is_universal: whether to write a universal checkpoint; if so, nothing else is set.
        stage: ZeRO stage.
        world_size: data-parallel ranks.
        sub_group_size: of stage 3, in elements.
        like: the folder of a checkpoint, RUN/TAG, whose form is taken; if set, nothing else is.
    """

    is_universal: bool = False
    stage: int | None = None
    world_size: int | None = None
    sub_group_size: int | None = None
    like: Path | None = None


def target_form(origin: Origin, requested: RequestedForm, allowed_globals: frozenset[str]) -> Form | None:
    """Returns the form of the output; None for a universal checkpoint.

    Args:
        origin: the newest checkpoint; its form is used for what is not requested.
        requested: what the recipe asks for.
        allowed_globals: see `open_own_tree`.

    Raises:
        LayoutMismatch: the checkpoint `like` has other parameter groups or another training precision.
        RecipeError: sub_group_size is requested for another stage than 3.
    """
    if requested.is_universal:
        return None
    if requested.like is not None:
        pattern = open_origin(read_layout(checkpoint_at(requested.like), allowed_globals), allowed_globals)
        _require_same_groups(origin, pattern)
        return pattern.form
    sub_group_size = requested.sub_group_size
    form = replace(
        origin.form,
        stage=requested.stage or origin.form.stage,
        world_size=requested.world_size or origin.form.world_size,
        sub_group_size=origin.form.sub_group_size if sub_group_size is None else sub_group_size,
    )
    if form.stage == 3:
        return replace(form, is_bf16_optimizer=False, round_robin=False, parameter_alignment=False)
    if sub_group_size is not None:
        raise RecipeError(
            f"sub_group_size belongs to stage 3; the output is stage {form.stage}, found --sub-group-size "
            f"{sub_group_size}. Remove it, or add --stage 3."
        )
    return replace(form, is_bf16_optimizer=form.is_bf16_optimizer and form.stage == 1)


def _group_names(checkpoint: Origin) -> list[list[str]]:
    """The parameters of each group. Only the form is taken, so it does not matter whether the models are wrapped."""
    return [[without_wrappers(name) for name in group.names] for group in checkpoint.groups]


def _require_same_groups(origin: Origin, pattern: Origin) -> None:
    """Checks that the checkpoint whose form is taken has the same parameter groups and dtype."""
    comparisons = [
        ("dtypes", origin.layout.dtype.name, pattern.layout.dtype.name),
        ("parameter groups", *map(_group_names, (origin, pattern))),
    ]
    for name, origin_value, pattern_value in comparisons:
        if origin_value != pattern_value:
            raise LayoutMismatch(
                f"{origin.layout.path} cannot be written like {pattern.layout.path} (--like): their {name} differ, "
                f"{origin_value} against {pattern_value}. Choose a checkpoint of the same model, or give --stage and "
                "--world-size."
            )
