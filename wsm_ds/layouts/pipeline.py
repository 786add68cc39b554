"""DeepSpeed's PipelineModule: each layer's weights have a file of their own, under names without the layer.

A layer's parameters are called `LAYER.…` in the model file of its stage, or `tied_modules.KEY.…` if layers share them.
Every stage that uses such a module keeps masters of it; a layer that only borrows it (`forward_fn`) has no file
(`runtime/pipe/module.py:588-659`). Model-parallel ranks are pipeline stages times tensor-parallel ranks
(`runtime/pipe/topology.py:300-315`).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from wsm_ds.errors import BrokenCheckpoint, UnsupportedLayout, few
from wsm_ds.layouts.rank_files import WeightsFile
from wsm_ds.torchfile import Tensor, TorchFile

# `ckpt_layer_path`, runtime/pipe/module.py:588: without `-model_NN` where there is no tensor parallelism.
LAYER_FILE = re.compile(r"^layer_(?P<layer>\d+)(?:-model_(?P<tp>\d+))?-model_states\.pt$")
LAYER_NAME = re.compile(r"^(\d{1,9})\.")
EMPTY = (0,)
"""The shape of a trained weight in a snapshot."""
TIED_NAME = re.compile(r"^tied_modules\.([^.]+)\.")


class LayerRank(NamedTuple):
    """A layer's number, and the tensor-parallel rank that holds this part of its weights."""

    layer: int
    tp: int


@dataclass(frozen=True)
class _Stage:
    """The names in the model file of a model-parallel rank.

    Attributes:
        shapes: of parameters, by name; None for buffers.
        layers: numbers of the layers.
        tied: keys of the tied modules.
    """

    shapes: dict[str, tuple[int, ...] | None]
    layers: frozenset[int]
    tied: frozenset[str]

    def distance(self, layer: int) -> int:
        """How many layers lie between a layer and those of the rank."""
        return max(min(self.layers, default=layer) - layer, layer - max(self.layers, default=layer), 0)


def weights_by_rank(path: Path, files: Iterable[TorchFile], models: list[Any]) -> list[tuple[WeightsFile, ...]]:
    """Finds the model-parallel rank of each layer's file, and the names of its tensors in the rank's model file.

    Args:
        path: the checkpoint's folder, for messages.
        files: the layers' files, opened.
        models: the tree of each model-parallel rank's model file.

    Returns:
        For each model-parallel rank its layers' files, with the names of its model file.

    Raises:
        BrokenCheckpoint: a layer's file is missing; it is named.
        UnsupportedLayout: a file may belong to any of several tied modules; they are named.
    """
    stages = [_stage(model) for model in models]
    layer_files = {_layer_rank(file): file for file in files}
    tp_size = max((rank.tp for rank in layer_files), default=0) + 1
    if tp_size > len(stages):
        raise BrokenCheckpoint(
            f"{path} has layers' files of {tp_size} tensor-parallel ranks, but model files of {len(stages)} ranks."
        )
    _require_layers(path, layer_files, stages, tp_size)
    weights: list[list[WeightsFile]] = [[] for _ in stages]
    for (layer, tp), file in layer_files.items():
        owners, prefix = _owners(file, layer, stages, tp_size)
        # A layer's file has the layer's own names (`save_state_dict`, runtime/pipe/module.py:607), while `param_shapes`
        # has those of the whole module.
        weights[owners[tp]].append(WeightsFile(file, {prefix + name: value for name, value in file.tree.items()}))
    return [tuple(rank_weights) for rank_weights in weights]


def borrowed_weights(
    model: Any, rank_weights: tuple[WeightsFile, ...], all_weights: list[tuple[WeightsFile, ...]]
) -> dict[str, Any]:
    """Tied parameters that a model file names, but whose weights only other ranks' layer files hold.

    Args:
        model: tree of the rank's model file.
        rank_weights: the rank's layer files.
        all_weights: the layer files of each rank.
    """
    names = [name for group in model["param_shapes"] for name in group]
    rank_names = {name for weights in rank_weights for name in weights.tensors}
    all_tensors = {name: value for rank in all_weights for weights in rank for name, value in weights.tensors.items()}
    return {
        name: all_tensors[name]
        for name in names
        if TIED_NAME.match(name) and name not in rank_names and name in all_tensors
    }


def _stage(model: Any) -> _Stage:
    shapes: dict[str, tuple[int, ...] | None] = dict.fromkeys(model.get("buffer_names") or ())
    for group in (*model["param_shapes"], model.get("frozen_param_shapes") or {}):
        shapes |= {name: tuple(shape) for name, shape in group.items()}
    layers = frozenset(int(match[1]) for name in shapes if (match := LAYER_NAME.match(name)))
    return _Stage(shapes, layers, frozenset(match[1] for name in shapes if (match := TIED_NAME.match(name))))


def _layer_rank(file: TorchFile) -> LayerRank:
    match = LAYER_FILE.match(file.path.name)
    if match is None or not isinstance(file.tree, dict):
        raise BrokenCheckpoint(f"{file.path} is not a file of a pipeline layer: it holds no dict of weights.")
    return LayerRank(int(match["layer"]), int(match["tp"] or 0))


def _require_layers(path: Path, layer_files: dict[LayerRank, TorchFile], stages: list[_Stage], tp_size: int) -> None:
    """Raises BrokenCheckpoint unless every layer has a file of each tensor-parallel rank."""
    has_axis = any("-model_" in file.path.name.removesuffix("-model_states.pt") for file in layer_files.values())
    layers = {layer for layer, _ in layer_files}.union(*(stage.layers for stage in stages))
    missing = [
        f"layer_{layer:02d}" + (f"-model_{tp:02d}" if has_axis else "") + "-model_states.pt"
        for layer in sorted(layers)
        for tp in range(tp_size)
        if (layer, tp) not in layer_files
    ]
    if missing:
        raise BrokenCheckpoint(f"{path} is incomplete: layers' files are missing: {few(missing)}.")


def _owners(file: TorchFile, layer: int, stages: list[_Stage], tp_size: int) -> tuple[list[int], str]:
    """The model-parallel ranks that hold a layer, by tensor-parallel rank, and the prefix of its names there."""
    owners = [number for number, stage in enumerate(stages) if layer in stage.layers]
    if owners:
        return _of_one_stage(file, owners, tp_size), f"{layer}."
    # No model file names the layer: it is a tied module, or has no parameters. It belongs to the nearest stage that
    # holds the module.
    keys = sorted({key for stage in stages for key in stage.tied if _is_module(file, stage, f"tied_modules.{key}.")})
    if len(keys) > 1:
        raise UnsupportedLayout(f"{file.path} may hold any of the tied modules {few(keys)}: they have the same shapes.")
    prefix = f"tied_modules.{keys[0]}." if keys else f"{layer}."
    holders = [number for number, stage in enumerate(stages) if not keys or _is_module(file, stage, prefix)]
    nearest = min(stages[number].distance(layer) for number in holders)
    closest = [number for number in holders if stages[number].distance(layer) == nearest]
    return _of_one_stage(file, closest[:tp_size], tp_size), prefix


def _is_module(file: TorchFile, stage: _Stage, prefix: str) -> bool:
    """Whether a file holds all names that a rank has under `prefix`, in the same shapes."""
    expected = {name.removeprefix(prefix): shape for name, shape in stage.shapes.items() if name.startswith(prefix)}
    stored = {name: value.shape for name, value in file.tree.items() if isinstance(value, Tensor)}
    return bool(expected) and all(
        name in stored and (shape is None or stored[name] in (shape, EMPTY)) for name, shape in expected.items()
    )


def _of_one_stage(file: TorchFile, ranks: list[int], tp_size: int) -> list[int]:
    if len(ranks) != tp_size:
        raise BrokenCheckpoint(
            f"{file.path}: {len(ranks)} model-parallel ranks hold this layer, but {tp_size} files have its weights."
        )
    return ranks
