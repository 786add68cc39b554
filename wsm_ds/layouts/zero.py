"""Checkpoints of ZeRO stages 1 to 3: one model file (stage 3: one per rank), and an optimizer file per rank.

`zero12` and `zero3` know where a stage stores elements. This module has the common rest: which files belong together,
and which weights lie outside the model files (native MoE's experts, a pipeline's layers).
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from wsm_ds.errors import BrokenCheckpoint, UnsupportedLayout, brief, few
from wsm_ds.layouts import moe, pipeline, zero3, zero12
from wsm_ds.layouts.assembly import assemble
from wsm_ds.layouts.file_names import MODEL_FILE, OPTIM_FILE, Rank, RankCounts, files_by_rank, require_files
from wsm_ds.layouts.hyperparameters import learning_rates, parameter_groups
from wsm_ds.layouts.layout import Layout, TableBuilder
from wsm_ds.layouts.metadata import model_parallel_size, module_of, tensors_of
from wsm_ds.layouts.one_save import contradictions
from wsm_ds.layouts.rank_files import RankFiles, WeightsFile
from wsm_ds.layouts.run import Checkpoint
from wsm_ds.layouts.schema import checked_model, checked_optimizer, checked_weights, is_stage0
from wsm_ds.torchfile import Stub, TorchFile, once_per_form, open_torch_files

Key = TypeVar("Key")


def read(
    checkpoint: Checkpoint,
    entries: list[str],
    first_model: TorchFile,
    allowed_globals: frozenset[str],
    on_file: Callable[[], None] = lambda: None,
) -> Layout:
    """Reads a checkpoint of ZeRO stage 1, 2 or 3.

    Args:
        checkpoint: the folder to read.
        entries: names of the files and folders in it, sorted.
        first_model: a model file of it, opened: it holds the numbers of ranks.
        allowed_globals: names of the user's own classes that the files may mention.
        on_file: called for each file that was read.

    Raises:
        BrokenCheckpoint, UnsupportedLayout, UnsafePickle: as `detection.read_layout`.
    """
    path = checkpoint.path
    counts = _rank_counts(first_model)
    optim_names = files_by_rank(path, entries, OPTIM_FILE)
    require_files(path, "optimizer file", optim_names, counts)
    optims = _open_all(path, optim_names, allowed_globals, checked_optimizer, on_file)
    stage = _stage(optims)
    model_names = files_by_rank(path, entries, MODEL_FILE)
    require_files(path, "model file", model_names, counts if stage == 3 else RankCounts(counts.mp, 1))
    models = _open_all(path, model_names, allowed_globals, checked_model, on_file)
    _require_one_save(models, first_model, counts)
    trees = [models[Rank(mp, 0)].tree for mp in range(counts.mp)]
    extra_weights = _open_extra_weights(path, entries, stage, trees, allowed_globals, on_file)
    ranks: list[RankFiles] = []
    # A layer that borrows a tied module has no file of its own: the weights are in the file of another stage.
    for mp in range(counts.mp):
        borrowed = pipeline.borrowed_weights(trees[mp], extra_weights[mp], extra_weights)
        ranks.append(_rank_files(_of_mp_rank(models, mp), _of_mp_rank(optims, mp), extra_weights[mp], borrowed, ranks))
    builder = TableBuilder()
    for rank_files in ranks:
        (zero3 if stage == 3 else zero12).add_fragments(builder, rank_files)
    names = tuple(file.path.name for rank_files in ranks for file in rank_files.files)
    layout = assemble(
        checkpoint,
        ranks,
        builder,
        stage=stage,
        file_names=names,
        groups=parameter_groups(ranks[0].optims[0]),
        contradictions=contradictions(models, optims),
    )
    return replace(layout, learning_rates=_rates(ranks))


def _open_all(
    path: Path,
    names: dict[Key, str],
    allowed_globals: frozenset[str],
    checked: Callable[[TorchFile], TorchFile],
    on_file: Callable[[], None],
) -> dict[Key, TorchFile]:
    """Opens files of a checkpoint, many at a time, and checks their keys."""
    opened = open_torch_files((path / name for name in names.values()), allowed_globals, on_file)
    return {key: checked(file) for key, file in zip(names, opened, strict=True)}


def _rates(ranks: list[RankFiles]) -> tuple[float | None, ...]:
    """The rates of the parameter groups. Those of another pipeline stage follow if they differ from the first one's."""
    of_ranks = (learning_rates(files.optims[0], parameter_groups(files.optims[0])) for files in ranks)
    return tuple(rate for rates in dict.fromkeys(of_ranks) for rate in rates)


@once_per_form
def _rank_counts(model: TorchFile) -> RankCounts:
    return RankCounts(model_parallel_size(model.tree), int(model.tree["dp_world_size"]))


def _require_one_save(models: dict[Rank, TorchFile], first_model: TorchFile, counts: RankCounts) -> None:
    """Raises BrokenCheckpoint if a model file was saved by another number of ranks, or at stage 0."""
    for file in models.values():
        if is_stage0(file.tree):
            raise BrokenCheckpoint(
                f"{file.path} is of stage 0, but ZeRO files lie beside it: are they of another save?"
            )
        if _rank_counts(file) != counts:
            raise BrokenCheckpoint(
                f"{file.path} was saved by {_rank_counts(file)}, but {first_model.path.name} by {counts}: files of "
                "another save remain. Remove them."
            )


def _of_mp_rank(files: dict[Rank, TorchFile], mp: int) -> dict[int, TorchFile]:
    """The files of a model-parallel rank, by data-parallel rank."""
    return {rank.dp: file for rank, file in files.items() if rank.mp == mp}


def _rank_files(
    models: dict[int, TorchFile],
    optims: dict[int, TorchFile],
    extra_weights: tuple[WeightsFile, ...],
    borrowed: dict[str, Any],
    earlier: list[RankFiles],
) -> RankFiles:
    """Collects the files of one model-parallel rank.

    Args:
        models: its model files by data-parallel rank.
        optims: its optimizer files by data-parallel rank.
        extra_weights: its weights outside the model files.
        borrowed: tied weights that only other ranks' files hold.
        earlier: the model-parallel ranks before it. The numbers of files and tensors continue theirs.
    """
    model = models[0]
    has_experts = bool(model.tree.get("num_experts"))
    experts = moe.read_experts(model.tree, [weights.file for weights in extra_weights]) if has_experts else None
    if has_experts:
        moe.require_same_groups(optims)
    # Only global rank 0 saves the tied names (`_get_shared_params`, runtime/engine.py:5490).
    shared_params = (earlier[0].models[0] if earlier else model).tree.get("shared_params") or {}
    module = module_of(model, extra_weights) | borrowed
    described = tensors_of(model, module, shared_params, experts or moe.NO_EXPERTS)
    files = [*models.values(), *optims.values(), *(weights.file for weights in extra_weights)]
    first_file = sum(len(rank.files) for rank in earlier)
    return RankFiles(
        models,
        optims,
        {file.path: index for index, file in enumerate(files, first_file)},
        described.tensors,
        described.aliases,
        int(model.tree["dp_world_size"]),
        extra_weights,
        experts or moe.NO_EXPERTS,
        first_tensor=sum(len(rank.tensors) for rank in earlier),
        extra_states=described.extra_states,
        opaque=described.opaque,
    )


def _open_extra_weights(
    path: Path,
    entries: list[str],
    stage: int,
    models: list[Any],
    allowed_globals: frozenset[str],
    on_file: Callable[[], None],
) -> list[tuple[WeightsFile, ...]]:
    """Opens the weights outside the model files, for each model-parallel rank: experts, or a pipeline's layers."""
    layers = [name for name in entries if pipeline.LAYER_FILE.match(name)]
    experts = _open_experts(path, entries, stage, models[0], allowed_globals, on_file)
    if not layers:
        return [experts] * len(models)
    if experts:
        raise UnsupportedLayout(f"{path} holds experts in a pipeline, which this version does not read.")
    if any(model["module"] is not None for model in models):
        raise BrokenCheckpoint(
            f"{path} holds pipeline layers' files ({few(layers, 2)}), but its model files hold the weights: files of "
            "another save remain. Remove them."
        )
    files = _open_all(path, {name: name for name in layers}, allowed_globals, checked_weights, on_file)
    return pipeline.weights_by_rank(path, files.values(), models)


def _open_experts(
    path: Path,
    entries: list[str],
    stage: int,
    model: Any,
    allowed_globals: frozenset[str],
    on_file: Callable[[], None],
) -> tuple[WeightsFile, ...]:
    names = [name for name in entries if moe.EXPERT_FILE.match(name)]
    if names and stage == 3:
        raise UnsupportedLayout(f"{path} holds experts of stage 3 ({few(names, 2)}), which this version does not read.")
    if model.get("ds_autoep_layers"):
        raise UnsupportedLayout(f"{path} holds AutoEP layers, which this version does not read.")
    if names and model_parallel_size(model) > 1:
        raise UnsupportedLayout(f"{path} holds experts of a model-parallel run, which this version does not read.")
    moe.require_expert_files(path, names, model)
    files = _open_all(path, {name: name for name in names}, allowed_globals, checked_weights, on_file)
    return tuple(WeightsFile(file, file.tree) for file in files.values())


def _stage(optims: dict[Rank, TorchFile]) -> int:
    """The ZeRO stage of all ranks' optimizer files."""
    stages = {rank: _stage_of(optim) for rank, optim in optims.items()}
    first = stages[Rank(0, 0)]
    for rank, stage in stages.items():
        if stage != first:
            raise BrokenCheckpoint(
                f"{optims[rank].path} is of ZeRO stage {stage}, rank 0's file of stage {first}: files of another save "
                "remain. Remove them."
            )
    return first


@once_per_form
def _stage_of(optim: TorchFile) -> int:
    state = optim.tree["optimizer_state_dict"]
    if "fp32_flat_groups" in state:
        return 3
    stage = state.get("zero_stage", 1)  # BF16_Optimizer writes none (`state_dict`, runtime/bf16_optimizer.py:629)
    number = stage.args[0] if isinstance(stage, Stub) and stage.args else stage  # an enum, ZeroStageEnum(2)
    if number not in (1, 2):
        raise BrokenCheckpoint(f"{optim.path} has partitions, but zero_stage {brief(number)}; expected 1 or 2.")
    return int(number)
