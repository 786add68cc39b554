"""DeepSpeed's PipelineModule: each layer's weights have a file of their own, under names without the layer.

A layer is `LAYER.…` in its stage's model file, or `tied_modules.KEY.…` if layers share it: every stage that uses such
a module keeps masters of it, but a layer that only borrows it (`forward_fn`) has no file. Model-parallel ranks count
pipeline stages times tensor-parallel ranks (`runtime/pipe/module.py:588-659`, `runtime/pipe/topology.py:300-315`).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsm_ds.errors import BrokenCheckpoint, UnsupportedLayout, few
from wsm_ds.layouts.rank_files import Weights
from wsm_ds.torchfile import Tensor, TorchFile

LAYER_FILE = re.compile(r"^layer_(?P<layer>\d+)(?:-model_(?P<tp>\d+))?-model_states\.pt$")
OWN = re.compile(r"^(\d{1,9})\.")
TIED = re.compile(r"^tied_modules\.([^.]+)\.")


@dataclass(frozen=True)
class _Rank:
    """What a model-parallel rank's model file names: shapes (None for buffers), layer numbers, keys of tied modules."""

    shapes: dict[str, tuple[int, ...] | None]
    layers: frozenset[int]
    tied: frozenset[str]

    def distance(self, layer: int) -> int:
        """How far a layer lies from those of the rank."""
        return max(min(self.layers, default=layer) - layer, layer - max(self.layers, default=layer), 0)


def weights_by_rank(path: Path, files: Iterable[TorchFile], models: list[Any]) -> list[tuple[Weights, ...]]:
    """For each model-parallel rank its layers' files, with the names of its model file.

    Args:
        models: the trees of the model-parallel ranks' model files.

    Raises:
        BrokenCheckpoint: a layer's file is missing (named).
        UnsupportedLayout: which tied module a file holds cannot be told.
    """
    ranks = [_rank(model) for model in models]
    named = {_layer_and_tp(file): file for file in files}
    degree = max((tp for _, tp in named), default=0) + 1
    if degree > len(ranks):
        raise BrokenCheckpoint(f"{path} has layers' files of {degree} tensor-parallel ranks, of {len(ranks)} ranks.")
    _require_layers(path, named, ranks, degree)
    found: list[list[Weights]] = [[] for _ in ranks]
    for (layer, tp), file in named.items():
        owners, front = _owners(file, layer, ranks, degree)
        found[owners[tp]].append(Weights(file, {front + name: value for name, value in file.tree.items()}))
    return [tuple(weights) for weights in found]


def held_elsewhere(model: Any, own: tuple[Weights, ...], every: list[tuple[Weights, ...]]) -> dict[str, Any]:
    """Tied parameters that a model file names, but whose weights only other ranks' layer files hold."""
    shapes = [name for group in model["param_shapes"] for name in group]
    held = {name for weights in own for name in weights.tensors}
    others = {name: value for rank in every for weights in rank for name, value in weights.tensors.items()}
    return {name: others[name] for name in shapes if TIED.match(name) and name not in held and name in others}


def _rank(model: Any) -> _Rank:
    shapes: dict[str, tuple[int, ...] | None] = dict.fromkeys(model.get("buffer_names") or ())
    for group in (*model["param_shapes"], model.get("frozen_param_shapes") or {}):
        shapes |= {name: tuple(shape) for name, shape in group.items()}
    layers = frozenset(int(match[1]) for name in shapes if (match := OWN.match(name)))
    return _Rank(shapes, layers, frozenset(match[1] for name in shapes if (match := TIED.match(name))))


def _layer_and_tp(file: TorchFile) -> tuple[int, int]:
    match = LAYER_FILE.match(file.path.name)
    if match is None or not isinstance(file.tree, dict):
        raise BrokenCheckpoint(f"{file.path} is no pipeline layer's file.")
    return int(match["layer"]), int(match["tp"] or 0)


def _require_layers(path: Path, named: dict[tuple[int, int], TorchFile], ranks: list[_Rank], degree: int) -> None:
    has_axis = any("-model_" in file.path.name.removesuffix("-model_states.pt") for file in named.values())
    missing = [
        f"layer_{layer:02d}" + (f"-model_{tp:02d}" if has_axis else "") + "-model_states.pt"
        for layer in sorted({layer for layer, _ in named}.union(*(rank.layers for rank in ranks)))
        for tp in range(degree)
        if (layer, tp) not in named
    ]
    if missing:
        raise BrokenCheckpoint(f"{path} is incomplete: layers' files are missing: {few(missing)}.")


def _owners(file: TorchFile, layer: int, ranks: list[_Rank], degree: int) -> tuple[list[int], str]:
    """The model-parallel ranks of a layer's stage, by tensor-parallel rank, and what stands before its names there."""
    own = [number for number, rank in enumerate(ranks) if layer in rank.layers]
    if own:
        return _of_one_stage(file, own, degree), f"{layer}."
    keys = sorted({key for rank in ranks for key in rank.tied if _is_module(file, rank, f"tied_modules.{key}.")})
    if len(keys) > 1:
        raise UnsupportedLayout(f"{file.path} may hold any of the tied modules {few(keys)}: they are of one shape.")
    front = f"tied_modules.{keys[0]}." if keys else f"{layer}."
    holders = [n for n, rank in enumerate(ranks) if not keys or _is_module(file, rank, front)]
    nearest = min(ranks[number].distance(layer) for number in holders)
    closest = [number for number in holders if ranks[number].distance(layer) == nearest]
    return _of_one_stage(file, closest[:degree], degree), front


def _is_module(file: TorchFile, rank: _Rank, front: str) -> bool:
    """Whether all that a rank names with `front` is in a file, and in the same shapes."""
    names = {name.removeprefix(front): shape for name, shape in rank.shapes.items() if name.startswith(front)}
    held = {name: value.shape for name, value in file.tree.items() if isinstance(value, Tensor)}
    return bool(names) and all(name in held and shape in (None, held[name]) for name, shape in names.items())


def _of_one_stage(file: TorchFile, ranks: list[int], degree: int) -> list[int]:
    if len(ranks) != degree:
        raise BrokenCheckpoint(
            f"{file.path}: {len(ranks)} model-parallel ranks hold this layer, but {degree} files have its weights."
        )
    return ranks
