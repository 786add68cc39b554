"""A DeepSpeed ZeRO checkpoint's folder → Layout: which files there must be, and what their metadata says.

`zero12` and `zero3` know how a stage places elements; here is what they share. Formats: DeepSpeed 0.19
`runtime/engine.py` (`_common_checkpoint_state`, file names), `runtime/zero/stage_1_and_2.py`, `stage3.py`.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from wsm_ds.dtypes import BY_NAME, DType
from wsm_ds.errors import BrokenCheckpoint, UnsupportedLayout, few
from wsm_ds.layouts import moe, universal, zero0, zero3, zero12
from wsm_ds.layouts.layout import Layout, TableBuilder, TensorInfo, joined
from wsm_ds.layouts.rank_files import RankFiles
from wsm_ds.layouts.run import Checkpoint
from wsm_ds.torchfile import Stub, Tensor, TorchFile, open_torch_file

MODEL_FILE = re.compile(r"^(?:zero_pp_rank_(?P<dp>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt$")
OPTIM_FILE = re.compile(r"^(?:bf16_)?zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>\d+)_?optim_states\.pt$")
UNSUPPORTED = (
    (re.compile(r"^expp_rank_"), "native MoE experts without ZeRO (stage 0)"),
    (re.compile(r"^layer_\d+-model_"), "pipeline-parallel layer files"),
    (re.compile(r"\.pt-\d+\.\d+$"), "pieces written by DeepSpeed's fast writer"),
    (re.compile(r"^offloaded_tensors$"), "NVMe-offloaded optimizer states"),
)
WARMUP_SCHEDULERS = ("WSMLR", "WSDLR", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")


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
        return _read_universal(checkpoint, models, allowed_globals)
    parts: list[Layout] = []
    for part in range(1 + max((*models, *optims))):
        experts = [name for name in entries if (match := moe.EXPERT_FILE.match(name)) and int(match["mp"]) == part]
        names = _Names(part, models.get(part, {}), optims.get(part, {}), experts)
        parts.append(_read_part(checkpoint, names, parts[0].aliases if parts else None, allowed_globals))
    return joined(parts)


@dataclass(frozen=True)
class _Names:
    """The names of the files of one model-parallel rank: by data-parallel rank, and those of experts."""

    part: int
    models: dict[int, str]
    optims: dict[int, str]
    experts: list[str]


def _read_part(
    checkpoint: Checkpoint, names: _Names, aliases: dict[str, str] | None, allowed_globals: frozenset[str]
) -> Layout:
    """One model-parallel rank's layout. `aliases` are those of the first one: only global rank 0 writes them."""
    path = checkpoint.path
    if not names.models:
        raise BrokenCheckpoint(f"{path} is incomplete: the model file of mp_rank_{names.part:02d} is missing.")
    opened = {r: open_torch_file(path / n, allowed_globals) for r, n in names.models.items()}
    model = opened[min(opened)].tree
    world_size = _world_size(path, model)
    if not names.optims and zero0.is_stage0(model):
        return _read_stage0(checkpoint, opened[0], world_size)
    if not names.optims:
        raise BrokenCheckpoint(f"{path} has no optimizer files: its save was cut off, or they lie elsewhere.")
    _require_ranks(path, "optimizer file", names.part, "optim_states.pt", set(names.optims), world_size)
    optims = {r: open_torch_file(path / n, allowed_globals) for r, n in names.optims.items()}
    stage = _stage(path, optims[0])
    if stage == 3:
        _require_ranks(path, "model file", names.part, "model_states.pt", set(names.models), world_size)
    experts = _open_experts(path, names.experts, stage, model, allowed_globals)
    sizes = _expert_sizes(optims[0], model)
    tensors, own_aliases = _tensors(opened[0], aliases, experts, sizes)
    files = [*names.models.values(), *names.optims.values(), *names.experts]
    indices = {path / name: index for index, name in enumerate(files)}
    ranks = RankFiles(opened, optims, indices, tensors, own_aliases, world_size, experts, sizes)
    builder = TableBuilder()
    (zero3 if stage == 3 else zero12).place(builder, ranks)
    return _layout(checkpoint, ranks, stage, tuple(files), builder, _parameter_groups(optims[0]))


def _open_experts(
    path: Path, names: list[str], stage: int, model: Any, allowed_globals: frozenset[str]
) -> tuple[TorchFile, ...]:
    config = model.get("ds_config") if isinstance(model.get("ds_config"), dict) else {}
    if names and stage == 3:
        raise UnsupportedLayout(f"{path} holds experts of stage 3 ({few(names, 2)}), which this version does not read.")
    if model.get("ds_autoep_layers"):
        raise UnsupportedLayout(f"{path} holds AutoEP layers, which this version does not read.")
    if names and config.get("use_data_before_expert_parallelism"):
        raise UnsupportedLayout(
            f"{path} was saved with use_data_before_expert_parallelism, which this version does not read."
        )
    return tuple(open_torch_file(path / name, allowed_globals) for name in names)


def _expert_sizes(optim: TorchFile, model: Any) -> tuple[int, ...]:
    groups = _parameter_groups(optim)
    if "base_optimizer_state" in optim.tree["optimizer_state_dict"] and any(group.get("moe") for group in groups):
        return tuple(moe.expert_parallel_sizes(optim.path, groups))
    return (1,) * len(model["param_shapes"])


def _read_universal(
    checkpoint: Checkpoint, by_part: dict[int, dict[int, str]], allowed_globals: frozenset[str]
) -> Layout:
    path, models = checkpoint.path, by_part.get(0, {})
    if len(by_part) > 1:
        raise UnsupportedLayout(f"{path} is a universal checkpoint of a model-parallel run, which is not read.")
    whole = "mp_rank_00_model_states.pt"
    if (path / whole).is_file():
        models = {0: whole}  # a stage 3 engine's file beside it holds no weights
    opened = {r: open_torch_file(path / n, allowed_globals) for r, n in models.items()}
    world_size = _world_size(path, opened[0].tree)
    config = opened[0].tree.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    zero = zero if isinstance(zero, dict) else {}
    if zero.get("round_robin_gradients"):
        raise UnsupportedLayout(
            f"{path} was made of a run with round_robin_gradients; DeepSpeed's converter then puts parameters into "
            "wrong places, so it is not read. Merge the run's own checkpoints."
        )
    if "zero_pp_rank_" in models[0]:
        _require_ranks(path, "model file", 0, "model_states.pt", set(models), world_size)
    tensors, aliases = _tensors(opened[0])
    names = [name for name, info in tensors.items() if info.role == "parameter"]
    parameters = universal.open_parameters(path, names, allowed_globals)
    head = open_torch_file(path / universal.OPTIMIZER_STATE, allowed_globals)
    parts = [head, *(file for kinds in parameters.values() for file in kinds.values())]
    indices = {file.path: index for index, file in enumerate([*opened.values(), *parts])}
    files = RankFiles(opened, dict(enumerate(parts)), indices, tensors, aliases, world_size)
    builder = TableBuilder()
    universal.place(builder, files, parameters)
    relative = tuple(file.relative_to(path).as_posix() for file in indices)
    return _layout(checkpoint, files, int(zero.get("stage", 1)), relative, builder, head.tree["param_groups"])


def _read_stage0(checkpoint: Checkpoint, model: TorchFile, world_size: int) -> Layout:
    optimizer = zero0.read_optimizer(model)
    files = RankFiles({0: model}, {}, {model.path: 0}, optimizer.tensors, optimizer.aliases, world_size)
    builder = TableBuilder()
    zero0.place(builder, model, optimizer)
    layout = _layout(checkpoint, files, 0, (model.path.name,), builder, optimizer.groups)
    return replace(layout, has_nameless_states=optimizer.has_nameless_states)


def _layout(
    checkpoint: Checkpoint, files: RankFiles, stage: int, names: tuple[str, ...], builder: TableBuilder, groups: Any
) -> Layout:
    model = files.models[0].tree
    return Layout(
        path=checkpoint.path,
        tag=checkpoint.tag,
        step=int(model["global_steps"]),
        stage=stage,
        world_size=files.world_size,
        dtype=_module_dtype(files.tensors),
        files=names,
        archives=tuple(file.archive for file in (*files.models.values(), *files.optims.values(), *files.experts)),
        tensors=files.tensors,
        aliases=files.aliases,
        fragments=builder.tables(),
        learning_rates=_learning_rates(files.optims.get(0, files.models[0]), groups),
        warmup_num_steps=_warmup(model),
        model_parallel_size=int(model.get("mp_world_size") or 1),
    )


def _refuse_unsupported(path: Path, names: list[str]) -> None:
    for pattern, what in UNSUPPORTED:
        hits = [name for name in names if pattern.search(name)]
        if hits:
            raise UnsupportedLayout(f"{path} holds {what} ({few(hits, 2)}), which this version does not read.")


def _by_rank(path: Path, names: list[str], pattern: re.Pattern[str]) -> dict[int, dict[int, str]]:
    """Names by model-parallel and data-parallel rank."""
    found: dict[int, dict[int, str]] = {}
    for name in names:
        match = pattern.match(name)
        if not match:
            continue
        part, rank = found.setdefault(int(match["mp"]), {}), int(match["dp"] or 0)
        if rank in part and not universal.is_universal(path):
            raise BrokenCheckpoint(
                f"{path} holds two files of rank {rank}: {part[rank]} and {name}. Two runs were saved into one "
                "folder; remove the stale one."
            )
        part[rank] = name
    return {number: dict(sorted(part.items())) for number, part in sorted(found.items())}


def _world_size(path: Path, model: Any) -> int:
    if not isinstance(model, dict) or "dp_world_size" not in model or "param_shapes" not in model:
        raise BrokenCheckpoint(f"{path}: its model file lacks dp_world_size or param_shapes; DeepSpeed writes both.")
    return int(model["dp_world_size"])


def _require_ranks(path: Path, what: str, part: int, ending: str, found: set[int], world_size: int) -> None:
    missing = [f"zero_pp_rank_{rank}_mp_rank_{part:02d}_{ending}" for rank in range(world_size) if rank not in found]
    if missing:
        raise BrokenCheckpoint(
            f"{path} is incomplete: {len(missing)} of {world_size} ranks' {what}s are missing: {few(missing)}."
        )
    if len(found) > world_size:
        raise BrokenCheckpoint(
            f"{path} holds {what}s of {len(found)} ranks, but was saved by {world_size}: files of another save remain."
        )


def _stage(path: Path, optim: TorchFile) -> int:
    state = optim.tree.get("optimizer_state_dict") if isinstance(optim.tree, dict) else None
    if not isinstance(state, dict):
        raise BrokenCheckpoint(f"{optim.path} holds no optimizer_state_dict; DeepSpeed writes one.")
    if "fp32_flat_groups" in state:
        return 3
    if "single_partition_of_fp32_groups" not in state:
        raise UnsupportedLayout(f"{optim.path} holds neither ZeRO partitions nor sub-groups: {few(state)}.")
    stage = state.get("zero_stage")
    if isinstance(stage, Stub):
        return int(stage.args[0])
    return 1  # BF16_Optimizer, which writes no zero_stage


def _tensors(
    model_file: TorchFile,
    shared: dict[str, str] | None = None,
    experts: tuple[TorchFile, ...] = (),
    expert_sizes: tuple[int, ...] = (),
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Parameters in partition order, then frozen ones, then buffers; and the tied names of each."""
    model = model_file.tree
    if not isinstance(model["module"], dict):
        raise UnsupportedLayout(f"{model_file.path} holds no module weights (pipeline parallel).")
    module = dict(model["module"])
    for expert in experts:
        module |= expert.tree
    aliases = shared if shared is not None else {str(k): str(v) for k, v in (model.get("shared_params") or {}).items()}
    buffers = set(model.get("buffer_names") or ())
    tensors: dict[str, TensorInfo] = {}
    for number, group in enumerate(model["param_shapes"]):
        for expert_rank in range(expert_sizes[number] if expert_sizes else 1):
            for local, name in moe.global_names(group, expert_rank).items():
                tensors[name] = TensorInfo(tuple(group[local]), _dtype_of(model_file, module, name), "parameter")
    frozen_shapes = model.get("frozen_param_shapes") or {}
    for name, value in module.items():
        if name in tensors or name in aliases or not isinstance(value, Tensor):
            continue
        shape = value.shape if name in buffers else tuple(frozen_shapes.get(name, value.shape))
        tensors[name] = TensorInfo(tuple(shape), value.dtype, "buffer" if name in buffers else "frozen")
    return tensors, aliases


def _dtype_of(model_file: TorchFile, module: dict[str, Any], name: str) -> DType:
    value = module.get(name)
    if not isinstance(value, Tensor):
        where = f"no expert's file beside {model_file.path}" if moe.EXPERT.match(name) else f"{model_file.path}: module"
        raise BrokenCheckpoint(f"{where} holds no tensor {name}, although param_shapes names it.")
    return value.dtype


def _module_dtype(tensors: dict[str, TensorInfo]) -> DType:
    trained = [info.dtype for info in tensors.values() if info.role == "parameter"]
    return trained[0] if trained else BY_NAME["fp32"]


def _parameter_groups(optim: TorchFile) -> Any:
    state = optim.tree["optimizer_state_dict"]
    base = state.get("base_optimizer_state") or state.get("optimizer_state_dict")
    return base if isinstance(base, list) else (base or {}).get("param_groups", [])


def _learning_rates(optim: TorchFile, groups: Any) -> tuple[float, ...]:
    return tuple(_scalar(optim, group["lr"]) for group in groups if isinstance(group, dict) and "lr" in group)


def _scalar(file: TorchFile, value: Any) -> float:
    if not isinstance(value, Tensor):
        return float(value)
    stored = np.fromfile(file.path, value.dtype.storage, 1, offset=file.byte_offset(value))
    return float(stored[0])


def _warmup(model: dict[str, Any]) -> int | None:
    """Updates of the warmup, as the saved scheduler or else the saved ds_config says."""
    saved = model.get("lr_scheduler") or {}
    if not isinstance(saved, dict):
        return None
    config = model.get("ds_config")
    named = (config.get("scheduler") if isinstance(config, dict) else None) or {}
    if "warmup_num_steps" in saved:
        return int(saved["warmup_num_steps"])
    if named.get("type") in WARMUP_SCHEDULERS and isinstance(named.get("params"), dict):
        steps = named["params"].get("warmup_num_steps")
        return int(steps) if isinstance(steps, int | float) else None
    return None
