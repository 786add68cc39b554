"""A DeepSpeed ZeRO checkpoint's folder → Layout: which files there must be, and what their metadata says.

`zero12` and `zero3` know how a stage places elements; here is what they share. Formats: DeepSpeed 0.19
`runtime/engine.py` (`_common_checkpoint_state`, file names), `runtime/zero/stage_1_and_2.py`, `stage3.py`.
"""

import re
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wsm_ds.dtypes import BY_NAME, DType, widen
from wsm_ds.errors import BrokenCheckpoint, UnsupportedLayout, brief, few
from wsm_ds.layouts import moe, pipeline, universal, zero0, zero3, zero12
from wsm_ds.layouts.layout import Layout, TableBuilder, TensorInfo
from wsm_ds.layouts.rank_files import RankFiles, Weights
from wsm_ds.layouts.run import Checkpoint
from wsm_ds.layouts.schema import (
    is_stage0,
    open_model,
    open_optimizer,
    open_universal_state,
    open_weights,
)
from wsm_ds.torchfile import Stub, Tensor, TorchFile

MODEL_FILE = re.compile(r"^(?:zero_pp_rank_(?P<dp>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt$")
OPTIM_FILE = re.compile(r"^(?:bf16_)?zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>\d+)_?optim_states\.pt$")
UNSUPPORTED = (
    (re.compile(r"^expp_rank_"), "native MoE experts without ZeRO (stage 0)"),
    (re.compile(r"\.pt-\d+\.\d+$"), "pieces written by DeepSpeed's fast writer"),
    (re.compile(r"^offloaded_tensors$"), "NVMe-offloaded optimizer states"),
)
WARMUP_SCHEDULERS = ("WSMLR", "WSDLR", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
MOST_UPDATES = 1 << 53


class Rank(NamedTuple):
    """Whose file it is: a model-parallel and a data-parallel rank; or how many of them there are."""

    mp: int
    dp: int


def read_layout(checkpoint: Checkpoint, allowed_globals: frozenset[str] = frozenset()) -> Layout:
    """The layout of one checkpoint. Reads every file's metadata, no tensor.

    Raises:
        BrokenCheckpoint: a rank's file is missing, truncated, or contradicts the others (named).
        UnsupportedLayout: a form that is not read yet (named).
        UnsafePickle: a file's pickle names an unknown global (named).
    """
    path = checkpoint.path
    entries = sorted(entry.name for entry in path.iterdir())
    _refuse_unsupported(path, entries)
    models, optims = _by_rank(path, entries, MODEL_FILE), _by_rank(path, entries, OPTIM_FILE)
    if not models:
        raise BrokenCheckpoint(f"{path} has no *_model_states.pt.")
    if universal.is_universal(path):
        return _read_universal(checkpoint, path, models, allowed_globals)
    model = open_model(path / next(iter(models.values())), allowed_globals)
    world_size, model_parallel_size = int(model.tree["dp_world_size"]), _model_parallel_size(model.tree)
    if not optims and is_stage0(model.tree):
        if model_parallel_size > 1:
            raise UnsupportedLayout(f"{path} is model-parallel at stage 0, which this version does not read.")
        return _read_stage0(checkpoint, model, world_size)
    if not optims:
        raise BrokenCheckpoint(f"{path} has no optimizer files: its save was cut off, or they lie elsewhere.")
    all_ranks = Rank(model_parallel_size, world_size)
    _require_files(path, "optimizer file", optims, all_ranks)
    opened_optims = {rank: open_optimizer(path / name, allowed_globals) for rank, name in optims.items()}
    stage = _stage(opened_optims)
    _require_files(path, "model file", models, all_ranks if stage == 3 else Rank(model_parallel_size, 1))
    opened = {rank: open_model(path / name, allowed_globals) for rank, name in models.items()}
    for file in opened.values():
        sizes = Rank(_model_parallel_size(file.tree), int(file.tree["dp_world_size"]))
        if sizes != all_ranks or is_stage0(file.tree):
            raise BrokenCheckpoint(f"{file.path} is of {sizes}, {model.path.name} of {all_ranks}: of another save?")
    wholes = [opened[Rank(mp, 0)].tree for mp in range(model_parallel_size)]
    beside = _open_beside(path, entries, stage, wholes, allowed_globals)
    parts: list[RankFiles] = []
    for mp in range(model_parallel_size):
        elsewhere = pipeline.held_elsewhere(wholes[mp], beside[mp], beside)
        files = {
            kind: {rank.dp: file for rank, file in found.items() if rank.mp == mp}
            for kind, found in (("models", opened), ("optims", opened_optims))
        }
        parts.append(_rank_files(files["models"], files["optims"], beside[mp], elsewhere, parts))
    return _assemble(checkpoint, parts, stage)


def _rank_files(
    models: dict[int, TorchFile],
    optims: dict[int, TorchFile],
    beside: tuple[Weights, ...],
    elsewhere: dict[str, Any],
    before: list[RankFiles],
) -> RankFiles:
    """The files of one model-parallel rank, numbered after those `before`.

    Only the first rank of all writes down which names are tied (`runtime/engine.py`, `_get_shared_params`).
    """
    has_experts = bool(models[0].tree.get("num_experts"))
    experts = moe.read_experts(models[0].tree, [weights.file for weights in beside]) if has_experts else moe.NO_EXPERTS
    if has_experts:
        moe.require_same_groups(optims)
    first = before[0].models[0] if before else models[0]
    module = _module(models[0], beside) | elsewhere
    tensors, aliases = _tensors(models[0], module, first.tree.get("shared_params") or {}, experts)
    files = [*models.values(), *optims.values(), *(weights.file for weights in beside)]
    first_file = sum(len(part.opened) for part in before)
    indices = {file.path: index for index, file in enumerate(files, first_file)}
    first_tensor = sum(len(part.tensors) for part in before)
    world_size = int(models[0].tree["dp_world_size"])
    return RankFiles(models, optims, indices, tensors, aliases, world_size, beside, experts, first_tensor)


def _open_beside(
    path: Path, entries: list[str], stage: int, models: list[Any], allowed_globals: frozenset[str]
) -> list[tuple[Weights, ...]]:
    """For each model-parallel rank the weights outside its model files: experts, or a pipeline's layers."""
    layers = [name for name in entries if pipeline.LAYER_FILE.match(name)]
    experts = _open_experts(path, entries, stage, models[0], allowed_globals)
    if not layers:
        return [experts] * len(models)
    if experts:
        raise UnsupportedLayout(f"{path} holds experts in a pipeline, which this version does not read.")
    if any(model["module"] is not None for model in models):
        raise BrokenCheckpoint(
            f"{path} holds pipeline layers' files ({few(layers, 2)}), but its model files hold the weights: files of "
            "another save remain."
        )
    return pipeline.weights_by_rank(path, [open_weights(path / name, allowed_globals) for name in layers], models)


def _open_experts(
    path: Path, entries: list[str], stage: int, model: Any, allowed_globals: frozenset[str]
) -> tuple[Weights, ...]:
    names = [name for name in entries if moe.EXPERT_FILE.match(name)]
    if names and stage == 3:
        raise UnsupportedLayout(f"{path} holds experts of stage 3 ({few(names, 2)}), which this version does not read.")
    if model.get("ds_autoep_layers"):
        raise UnsupportedLayout(f"{path} holds AutoEP layers, which this version does not read.")
    if names and _model_parallel_size(model) > 1:
        raise UnsupportedLayout(f"{path} holds experts of a model-parallel run, which this version does not read.")
    moe.require_expert_files(path, names, model)
    opened = [open_weights(path / name, allowed_globals) for name in names]
    return tuple(Weights(file, file.tree) for file in opened)


def _assemble(checkpoint: Checkpoint, parts: list[RankFiles], stage: int) -> Layout:
    builder = TableBuilder()
    for part in parts:
        (zero3 if stage == 3 else zero12).place(builder, part)
    names = tuple(file.path.name for part in parts for file in part.opened)
    return _layout(checkpoint, parts, stage, names, builder, _parameter_groups(parts[0].optims[0]))


def _read_universal(
    checkpoint: Checkpoint, path: Path, models: dict[Rank, str], allowed_globals: frozenset[str]
) -> Layout:
    if any(rank.mp for rank in models):
        raise UnsupportedLayout(f"{path} is a universal checkpoint of a model-parallel run, which is not read.")
    whole = "mp_rank_00_model_states.pt"
    if (path / whole).is_file():
        models = {Rank(0, 0): whole}  # a stage 3 engine's file beside it holds no weights
    opened = {rank.dp: open_model(path / name, allowed_globals) for rank, name in models.items()}
    if 0 not in opened or is_stage0(opened[0].tree):
        raise BrokenCheckpoint(f"{path} has no model file of rank 0 with param_shapes; DeepSpeed writes one.")
    world_size = int(opened[0].tree["dp_world_size"])
    config = opened[0].tree.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    zero = zero if isinstance(zero, dict) else {}
    if zero.get("round_robin_gradients"):
        raise UnsupportedLayout(
            f"{path} was made of a run with round_robin_gradients; DeepSpeed's converter then puts parameters into "
            "wrong places, so it is not read. Merge the run's own checkpoints."
        )
    if "zero_pp_rank_" in models[Rank(0, 0)]:
        _require_files(path, "model file", models, Rank(1, world_size))
    tensors, aliases = _tensors(opened[0], _module(opened[0], ()), opened[0].tree.get("shared_params") or {})
    names = [name for name, info in tensors.items() if info.role == "parameter"]
    parameters = universal.open_parameters(path, names, allowed_globals)
    head = open_universal_state(path / universal.OPTIMIZER_STATE, allowed_globals)
    parts = [head, *(file for kinds in parameters.values() for file in kinds.values())]
    indices = {file.path: index for index, file in enumerate([*opened.values(), *parts])}
    files = RankFiles(opened, dict(enumerate(parts)), indices, tensors, aliases, world_size)
    builder = TableBuilder()
    universal.place(builder, files, parameters)
    relative = tuple(file.relative_to(path).as_posix() for file in indices)
    stage = zero.get("stage", 1)
    if stage not in (1, 2, 3):
        raise UnsupportedLayout(f"{path} was made of a run of ZeRO stage {brief(stage)}, expected 1, 2 or 3.")
    return _layout(checkpoint, [files], stage, relative, builder, head.tree["param_groups"])


def _read_stage0(checkpoint: Checkpoint, model: TorchFile, world_size: int) -> Layout:
    optimizer = zero0.read_optimizer(model)
    files = RankFiles({0: model}, {}, {model.path: 0}, optimizer.tensors, optimizer.aliases, world_size)
    builder = TableBuilder()
    zero0.place(builder, model, optimizer)
    layout = _layout(checkpoint, [files], 0, (model.path.name,), builder, optimizer.groups)
    return replace(layout, has_nameless_states=optimizer.has_nameless_states)


def _layout(
    checkpoint: Checkpoint,
    parts: list[RankFiles],
    stage: int,
    names: tuple[str, ...],
    builder: TableBuilder,
    groups: Any,
) -> Layout:
    first = parts[0]
    fronts = [f"mp_rank_{mp:02d}/" if len(parts) > 1 else "" for mp in range(len(parts))]
    ranks = list(zip(fronts, parts, strict=True))
    return Layout(
        path=checkpoint.path,
        tag=checkpoint.tag,
        step=int(first.models[0].tree["global_steps"]),
        stage=stage,
        world_size=first.world_size,
        dtype=_module_dtype(first.tensors),
        files=names,
        archives=tuple(file.archive for part in parts for file in part.opened),
        tensors={front + name: info for front, part in ranks for name, info in part.tensors.items()},
        aliases={front + alias: front + name for front, part in ranks for alias, name in part.aliases.items()},
        fragments=builder.tables(),
        learning_rates=_learning_rates(first.optims.get(0, first.models[0]), groups),
        warmup_num_steps=_warmup(first.models[0].tree),
        model_parallel_size=len(parts),
    )


def _refuse_unsupported(path: Path, names: list[str]) -> None:
    for pattern, what in UNSUPPORTED:
        hits = [name for name in names if pattern.search(name)]
        if hits:
            raise UnsupportedLayout(f"{path} holds {what} ({few(hits, 2)}), which this version does not read.")


def _by_rank(path: Path, names: list[str], pattern: re.Pattern[str]) -> dict[Rank, str]:
    found: dict[Rank, str] = {}
    for name in names:
        match = pattern.match(name)
        if not match:
            continue
        rank = Rank(int(match["mp"]), int(match["dp"] or 0))
        if rank in found and not universal.is_universal(path):
            raise BrokenCheckpoint(
                f"{path} holds two files of {_rank_name(rank)}: {found[rank]} and {name}. Two runs were saved into one "
                "folder; remove the stale one."
            )
        found[rank] = name
    return dict(sorted(found.items()))


def _rank_name(rank: Rank) -> str:
    return f"zero_pp_rank_{rank.dp}_mp_rank_{rank.mp:02d}"


def _model_parallel_size(model: Any) -> int:
    """Ranks that hold a replica of the model together: tensor-parallel ones times pipeline stages."""
    return int(model.get("mp_world_size") or 1)


def _require_files(path: Path, what: str, found: dict[Rank, str], sizes: Rank) -> None:
    """Raises BrokenCheckpoint unless all ranks of so many model-parallel and data-parallel ones, and no others, have
    files. Walks only as far as there are files: a broken file may name any number of ranks."""
    ranks = (Rank(mp, dp) for mp in range(sizes.mp) for dp in range(sizes.dp))
    suffix = "optim_states.pt" if what == "optimizer file" else "model_states.pt"
    missing = list(islice((f"{_rank_name(rank)}_{suffix}" for rank in ranks if rank not in found), 6))
    count, held = sizes.mp * sizes.dp, sum(rank.mp < sizes.mp and rank.dp < sizes.dp for rank in found)
    if missing:
        raise BrokenCheckpoint(
            f"{path} is incomplete: {count - held} of {count} ranks' {what}s are missing: "
            f"{few(missing, total=count - held)}."
        )
    if len(found) > count:
        raise BrokenCheckpoint(
            f"{path} holds {what}s of {len(found)} ranks, but was saved by {count}: files of another save remain."
        )


def _stage(optims: dict[Rank, TorchFile]) -> int:
    """The ZeRO stage, which all ranks' files have."""
    stages = {rank: _stage_of(optim) for rank, optim in optims.items()}
    first = stages[Rank(0, 0)]
    for rank, stage in stages.items():
        if stage != first:
            raise BrokenCheckpoint(f"{optims[rank].path} is of ZeRO stage {stage}, rank 0's of {first}: another save?")
    return first


def _stage_of(optim: TorchFile) -> int:
    state = optim.tree["optimizer_state_dict"]
    if "fp32_flat_groups" in state:
        return 3
    stage = state.get("zero_stage", 1)  # BF16_Optimizer writes none
    number = stage.args[0] if isinstance(stage, Stub) and stage.args else stage
    if number not in (1, 2):
        raise BrokenCheckpoint(f"{optim.path} has partitions, but zero_stage {brief(number)}; expected 1 or 2.")
    return int(number)


def _module(model_file: TorchFile, beside: tuple[Weights, ...]) -> dict[str, Any]:
    """Every tensor of the module, wherever it lies: a pipeline's model files hold none."""
    module = dict(model_file.tree["module"] or {})
    for weights in beside:
        module |= weights.tensors
    return module


def _tensors(
    model_file: TorchFile, module: dict[str, Any], shared: dict[str, str], experts: moe.Experts = moe.NO_EXPERTS
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Parameters in partition order, then frozen ones, then buffers; and the tied names of each."""
    model = model_file.tree
    buffers = set(experts.of_all_ranks(model.get("buffer_names") or ()))
    tensors: dict[str, TensorInfo] = {}
    named: set[str] = set()
    for group in model["param_shapes"]:
        for local, shape in group.items():
            if local in named:
                raise BrokenCheckpoint(f"{model_file.path}: param_shapes has {local} twice.")
            named.add(local)
            for name in experts.of_all_ranks([local]):
                tensors[name] = TensorInfo(tuple(shape), _dtype_of(model_file, module, name), "parameter")
    aliases = _tied(module, tensors) | {k: v for k, v in shared.items() if k in module and k not in tensors}
    frozen_shapes = model.get("frozen_param_shapes") or {}
    lost = [name for name in frozen_shapes if name not in module]
    if lost:
        raise BrokenCheckpoint(f"{model_file.path} names the frozen {few(lost)}, but no file holds their weights.")
    for name, value in module.items():
        if name in tensors or name in aliases or not isinstance(value, Tensor):
            continue
        shape = value.shape if name in buffers else tuple(frozen_shapes.get(name, value.shape))
        tensors[name] = TensorInfo(tuple(shape), value.dtype, "buffer" if name in buffers else "frozen")
    return tensors, aliases


def _tied(module: dict[str, Any], parameters: dict[str, TensorInfo]) -> dict[str, str]:
    """Names of the same bytes as a parameter: `shared_params` is filled in on global rank 0 alone (`engine.py`)."""
    owners = {
        (value.storage, value.offset, value.shape): name
        for name, value in module.items()
        if name in parameters and isinstance(value, Tensor) and value.numel
    }
    others = {name: value for name, value in module.items() if name not in parameters and isinstance(value, Tensor)}
    places = {name: (value.storage, value.offset, value.shape) for name, value in others.items()}
    return {name: owners[place] for name, place in places.items() if place in owners}


def _dtype_of(model_file: TorchFile, module: dict[str, Any], name: str) -> DType:
    value = module.get(name)
    if not isinstance(value, Tensor):
        raise BrokenCheckpoint(f"{model_file.path} names the parameter {name}, but no file holds its weights.")
    return value.dtype


def _module_dtype(tensors: dict[str, TensorInfo]) -> DType:
    trained = [info.dtype for info in tensors.values() if info.role == "parameter"]
    return trained[0] if trained else BY_NAME["fp32"]


def _parameter_groups(optim: TorchFile) -> Any:
    state = optim.tree["optimizer_state_dict"]
    base = state.get("base_optimizer_state") or state.get("optimizer_state_dict")
    return base if isinstance(base, list) else (base or {}).get("param_groups", [])


def _learning_rates(optim: TorchFile, groups: Any) -> tuple[float, ...]:
    return tuple(_rate(optim, group["lr"]) for group in groups if isinstance(group, dict) and "lr" in group)


def _rate(file: TorchFile, value: Any) -> float:
    """A group's rate: a number, or a tensor of one element (`capturable` optimizers)."""
    if isinstance(value, Tensor) and value.numel == 1 and value.dtype.is_floating:
        stored = np.fromfile(file.path, value.dtype.storage, 1, offset=file.byte_offset(value))
        return float(widen(stored, value.dtype)[0])
    if not isinstance(value, int | float) or abs(value) > sys.float_info.max:
        raise BrokenCheckpoint(f"{file.path}: a parameter group has the rate {brief(value)}, expected a number.")
    return float(value)


def _warmup(model: dict[str, Any]) -> int | None:
    """Updates of the warmup, as the saved scheduler or else the saved ds_config says; None if neither does."""
    saved = model.get("lr_scheduler") or {}
    if not isinstance(saved, dict):
        return None
    if "warmup_num_steps" in saved:
        return _updates(saved["warmup_num_steps"])
    config = model.get("ds_config")
    named = config.get("scheduler") if isinstance(config, dict) else None
    if not isinstance(named, dict) or named.get("type") not in WARMUP_SCHEDULERS:
        return None
    params = named.get("params")
    return _updates(params.get("warmup_num_steps")) if isinstance(params, dict) else None


def _updates(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and abs(value) < MOST_UPDATES else None
