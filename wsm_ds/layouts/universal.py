"""Universal checkpoints: `zero/NAME/{fp32,exp_avg,…}.pt` hold whole parameters, model files everything else.

`checkpoint/ds_to_universal.py` writes them. A tensor has its shape and is inside a dict in stages 1 and 2
(`merge_tp_slices`, :517), and is flat and bare in stage 3 (`merge_zero3_slices`, :543).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from wsm_ds.errors import BrokenCheckpoint, UnsupportedLayout, brief
from wsm_ds.layouts import zero3, zero12
from wsm_ds.layouts.assembly import assemble
from wsm_ds.layouts.file_names import MODEL_FILE, Rank, RankCounts, files_by_rank, require_files
from wsm_ds.layouts.layout import Layout, TableBuilder
from wsm_ds.layouts.metadata import is_partitioned, module_of, tensors_of
from wsm_ds.layouts.rank_files import RankFiles
from wsm_ds.layouts.run import Checkpoint
from wsm_ds.layouts.schema import is_stage0, open_model, open_universal_state
from wsm_ds.torchfile import Tensor, TorchFile, open_torch_file

OPTIMIZER_STATE = "zero/optimizer_state.pt"
MODEL_FILE_OF_ALL = "mp_rank_00_model_states.pt"


def is_universal(path: Path) -> bool:
    """Whether a checkpoint's folder is a universal one."""
    return (path / OPTIMIZER_STATE).is_file()


def read(checkpoint: Checkpoint, entries: list[str], allowed_globals: frozenset[str]) -> Layout:
    """Reads a universal checkpoint.

    Args:
        checkpoint: the folder to read.
        entries: names of the files and folders in it, sorted.
        allowed_globals: names of the user's own classes that the files may mention.

    Raises:
        BrokenCheckpoint, UnsupportedLayout, UnsafePickle: as `detection.read_layout`.
    """
    path = checkpoint.path
    models = _open_models(path, entries, allowed_globals)
    zero = _zero_config(models[0])
    if zero.get("round_robin_gradients"):
        raise UnsupportedLayout(
            f"{path} was made from a run with round_robin_gradients. DeepSpeed's converter puts its parameters into "
            "wrong places, so wsm_ds does not read it. Merge the run's own checkpoints."
        )
    stage = zero.get("stage", 1)
    if stage not in (1, 2, 3):
        raise UnsupportedLayout(f"{path} was made from a run of ZeRO stage {brief(stage)}, expected 1, 2 or 3.")
    world_size = int(models[0].tree["dp_world_size"])
    shared_params = models[0].tree.get("shared_params") or {}
    described = tensors_of(models[0], module_of(models[0], ()), shared_params)
    trained = [name for name, info in described.tensors.items() if info.role == "parameter"]
    parameters = open_parameters(path, trained, allowed_globals)
    optimizer_state = open_universal_state(path / OPTIMIZER_STATE, allowed_globals)
    others = [optimizer_state, *(file for kinds in parameters.values() for file in kinds.values())]
    indices = {file.path: index for index, file in enumerate([*models.values(), *others])}
    files = RankFiles(
        models,
        dict(enumerate(others)),
        indices,
        described.tensors,
        described.aliases,
        world_size,
        extra_states=described.extra_states,
        opaque=described.opaque,
    )
    builder = TableBuilder()
    add_fragments(builder, files, parameters)
    names = tuple(file.relative_to(path).as_posix() for file in indices)
    groups = optimizer_state.tree["param_groups"]
    return assemble(checkpoint, [files], builder, stage=stage, file_names=names, groups=groups)


def _open_models(path: Path, entries: list[str], allowed_globals: frozenset[str]) -> dict[int, TorchFile]:
    """The model files with weights, by data-parallel rank."""
    matches = [match for name in entries if (match := MODEL_FILE.match(name))]
    if any(int(match["mp"]) for match in matches):
        raise UnsupportedLayout(f"{path} is a universal checkpoint of a model-parallel run, which is not read.")
    # We write a model file for each stage's loader; that of stage 3 holds no weights (`outputs/resharding/universal`).
    is_whole = MODEL_FILE_OF_ALL in entries
    names = files_by_rank(path, [MODEL_FILE_OF_ALL] if is_whole else entries, MODEL_FILE)
    models = {rank.dp: open_model(path / name, allowed_globals) for rank, name in names.items()}
    if 0 not in models or is_stage0(models[0].tree):
        raise BrokenCheckpoint(f"{path} has no model file of rank 0 with param_shapes; DeepSpeed writes one.")
    if "zero_pp_rank_" in names[Rank(0, 0)]:
        require_files(path, "model file", names, RankCounts(1, int(models[0].tree["dp_world_size"])))
    return models


def _zero_config(model: TorchFile) -> dict[str, Any]:
    """`zero_optimization` of the saved ds_config; empty if there is none."""
    config = model.tree.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    return zero if isinstance(zero, dict) else {}


def open_parameters(
    path: Path, names: Iterable[str], allowed_globals: frozenset[str]
) -> dict[str, dict[str, TorchFile]]:
    """Opens the files of parameters.

    Args:
        path: the checkpoint's folder.
        names: the parameters to open.
        allowed_globals: names of the user's own classes that the files may mention.

    Returns:
        By the parameter's name and the kind, which is the file's name without `.pt`.

    Raises:
        BrokenCheckpoint: a parameter has no `fp32.pt`, or its name cannot be a folder's.
    """
    opened = {}
    for name in names:
        if {"", ".", ".."} & set(name.split("/")) or "\0" in name:
            raise BrokenCheckpoint(f"{path}: the parameter {brief(name)} cannot be the name of a folder in it.")
        files = sorted((path / "zero" / name).glob("*.pt"))
        opened[name] = {file.stem: open_torch_file(file, allowed_globals) for file in files}
        if "fp32" not in opened[name]:
            raise BrokenCheckpoint(f"{path} is incomplete: zero/{name}/fp32.pt is missing.")
    return opened


def add_fragments(builder: TableBuilder, files: RankFiles, parameters: dict[str, dict[str, TorchFile]]) -> None:
    """Adds every fragment of a universal checkpoint to `builder`.

    Args:
        builder: the tables to add to.
        files: all files of the checkpoint.
        parameters: the opened files, as `open_parameters` returns them.

    Raises:
        UnsupportedLayout: a parameter is stored in another size (a vocabulary without its padding).
    """
    if is_partitioned(files.models[0]):
        for rank, model in files.models.items():
            zero3.add_model(builder, files, model, rank)
    else:
        zero12.add_module(builder, files)
    numbers = files.tensor_numbers
    for name, kinds in parameters.items():
        numel = files.tensors[name].numel
        for kind, file in kinds.items():
            tensor = whole(file.tree)
            # `step.pt` holds the optimizer's step counter, not a value per element.
            if tensor is None or kind == "step":
                continue
            if tensor.numel != numel:
                raise UnsupportedLayout(
                    f"{file.path} holds {tensor.numel} elements, but the model's {name} has {numel}: it was cut for "
                    "another degree of tensor parallelism, which this version does not read."
                )
            if kind != "fp32" and not tensor.dtype.is_floating:
                builder.indivisible_states[kind] = f"{tensor.dtype.name} codes, which mean nothing without their scales"
            builder.add(
                "master" if kind == "fp32" else kind,
                numbers[name],
                0,
                numel,
                file=files.indices[file.path],
                offset=file.byte_offset(tensor),
                dtype=tensor.dtype,
            )


def whole(tree: Any) -> Tensor | None:
    """The whole tensor in a parameter's file; None if the file holds something else (a step counter)."""
    value = tree.get("param") if isinstance(tree, dict) else tree
    return value if isinstance(value, Tensor) else None
