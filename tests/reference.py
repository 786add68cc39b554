"""The slow literal merge: torch.load everything, average in float64, round once. What every fast path must equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from lazy import torch


def load_all(checkpoint: Path) -> tuple[dict[int, Any], dict[int, Any]]:
    """(model files, optimizer files) of a checkpoint by rank, fully loaded."""
    models = [torch.load(path, weights_only=False) for path in sorted(checkpoint.glob("*_model_states.pt"))]
    optims = [torch.load(path, weights_only=False) for path in sorted(checkpoint.glob("*_optim_states.pt"))]
    return dict(enumerate(models)), dict(enumerate(o["optimizer_state_dict"] for o in optims))


def average(tensors: list[torch.Tensor], coefficients: list[float]) -> torch.Tensor:
    """Σ c_j θ_j in float64, oldest first, rounded to float32 and, if they are narrower, to the tensors' own dtype."""
    total = tensors[0].double() * coefficients[0]
    for tensor, coefficient in zip(tensors[1:], coefficients[1:], strict=True):
        total = total + tensor.double() * coefficient
    return total.float().to(tensors[0].dtype)


def partitions(optim: Any) -> list[torch.Tensor]:
    """A rank's master partitions, by group or sub-group."""
    return optim["fp32_flat_groups"] if "fp32_flat_groups" in optim else optim["single_partition_of_fp32_groups"]


def states(optim: Any) -> dict[int, dict[str, torch.Tensor]]:
    """A rank's optimizer states, by group or sub-group."""
    base = optim["optimizer_state_dict"] if "fp32_flat_groups" in optim else optim["base_optimizer_state"]
    return dict(enumerate(base)) if isinstance(base, list) else base["state"]


def moments(optim: Any, name: str) -> list[torch.Tensor]:
    """A rank's optimizer state `name`, by group or sub-group, of those that have it."""
    return [state[name] for state in states(optim).values() if name in state]


def parameters(models: dict[int, Any], masters: dict[int, list[torch.Tensor]], stage: int) -> dict[str, torch.Tensor]:
    """Whole fp32 parameters from all ranks' partitions."""
    found = {}
    for group, shapes in enumerate(models[0]["param_shapes"]):
        if stage < 3:
            flat = torch.cat([masters[rank][group] for rank in sorted(masters)])
            position = 0
            for name, shape in shapes.items():
                found[name] = flat[position : position + shape.numel()].view(shape)
                position += shape.numel()
            continue
        position = 0
        for name, shape in shapes.items():
            size = -(-shape.numel() // len(masters))
            pieces = [masters[rank][group][position : position + size] for rank in sorted(masters)]
            found[name] = torch.cat(pieces)[: shape.numel()].view(shape)
            position += size
    return found


def merged_masters(checkpoints: list[Path], coefficients: list[float]) -> dict[int, list[torch.Tensor]]:
    """Every rank's merged master partitions."""
    loaded = [load_all(path)[1] for path in checkpoints]
    return {
        rank: [
            average(list(column), coefficients) for column in zip(*(partitions(o[rank]) for o in loaded), strict=True)
        ]
        for rank in loaded[0]
    }


def merged_parameters(checkpoints: list[Path], coefficients: list[float], stage: int) -> dict[str, torch.Tensor]:
    """The merged fp32 model."""
    return parameters(load_all(checkpoints[-1])[0], merged_masters(checkpoints, coefficients), stage)


def unpadded(
    models: dict[int, Any], flats: list[torch.Tensor], rank: int, stage: int, groups: list[int] | None = None
) -> list[torch.Tensor]:
    """A rank's flat tensors (of all groups, or of `groups`) without the padding that stage 3 keeps inside them.

    A merge carries that padding from the newest.
    """
    if stage < 3:
        return flats
    world_size, kept = models[0]["dp_world_size"], []
    all_shapes = models[0]["param_shapes"]
    for flat, shapes in zip(flats, all_shapes if groups is None else [all_shapes[g] for g in groups], strict=True):
        sizes = [-(-shape.numel() // world_size) for shape in shapes.values()]
        pieces = flat.split(sizes)
        for piece, size, shape in zip(pieces, sizes, shapes.values(), strict=True):
            kept.append(piece[: max(0, min(size, shape.numel() - rank * size))])
    return kept


def whole(
    checkpoint: Path, stage: int, kinds: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
) -> dict[str, dict[str, Any]]:
    """Masters ("master") and optimizer states of a checkpoint as whole parameters."""
    models, optims = load_all(checkpoint)
    held = {"master": {rank: partitions(optim) for rank, optim in optims.items()}}
    held |= {name: {rank: moments(o, name) for rank, o in optims.items()} for name in kinds}
    return {kind: parameters(models, flats, stage) for kind, flats in held.items()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit: a partition's padding may be whatever memory held, NaN included."""
    flat_a, flat_b = (tensor.detach().contiguous().flatten() for tensor in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(flat_a.view(torch.uint8), flat_b.view(torch.uint8))


def same_tree(a: Any, b: Any) -> bool:
    """Whether two loaded object trees are equal: types, order, and every bit of tensors and arrays."""
    if type(a) is not type(b):
        return False
    if torch.is_tensor(a):
        return same_bits(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same_tree(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_tree, a, b))
    return bool(a == b) or (hasattr(a, "__dict__") and same_tree(vars(a), vars(b)))
