"""Merges the newest snapshots in a running engine: each rank reads its own partitions, a piece after the other."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wsm_ds.averaging.masters import Masters
from wsm_ds.averaging.snapshot_folder import Written
from wsm_ds.errors import RecipeError
from wsm_ds.schedules.coefficients import merge_coefficients
from wsm_ds.schedules.curves import parse_curve
from wsm_ds.torchfile import Tensor, TorchFile, open_torch_file

PIECE_ELEMENTS = 1 << 22


def merged_slots(engine: Any, masters: Masters, slots: Sequence[Written], curve: str) -> Iterator[Any]:
    """Returns the merge of snapshots, one fp32 tensor on the CPU for each master.

    It is summed in float64, oldest to newest, and rounded once, as a merge on the disk is.

    Memory: one of the tensors, and pieces of 48 MiB.

    Args:
        engine: DeepSpeed's.
        masters: the engine's.
        slots: oldest first, each beginning where the one before it ends.
        curve: the decay curve to emulate.

    Raises:
        RecipeError: a snapshot was written by another number of ranks, or at another stage.
    """
    name = Path(engine._get_zero_ckpt_name("", "")).name
    steps = [slot.snapshot.last for slot in slots]
    coefficients = merge_coefficients(parse_curve(curve), steps=steps, oldest_interval=slots[0].snapshot.length)
    files = [_opened(slot.path / name, engine) for slot in slots]
    return _merged(files, coefficients.tolist(), masters)


def _opened(path: Path, engine: Any) -> tuple[TorchFile, list[Tensor]]:
    if not path.is_file():
        raise _of_other_ranks(path.parent)
    file = open_torch_file(path, frozenset())
    state = file.tree["optimizer_state_dict"]
    kept = "fp32_flat_groups" if "fp32_flat_groups" in state else "single_partition_of_fp32_groups"
    if state["partition_count"] != engine.optimizer.partition_count:
        raise _of_other_ranks(path.parent)
    return file, state[kept]


def _of_other_ranks(path: Path) -> RecipeError:
    return RecipeError(
        f"{path} was written by another number of ranks, or at another ZeRO stage, so this rank cannot read its part "
        "alone. Ask for fewer snapshots, or merge them with `wsm-ds merge`."
    )


def _merged(files: list[tuple[TorchFile, list[Tensor]]], coefficients: list[float], masters: Masters) -> Iterator[Any]:
    import torch

    for number, master in enumerate(masters.tensors()):
        merged = np.zeros(master.numel(), np.float32)
        stored = [(file, tensors[number]) for file, tensors in files]
        if any(tensor.numel > len(merged) or tensor.numel != stored[0][1].numel for _, tensor in stored):
            raise _of_other_ranks(files[0][0].path.parent)
        for begin in range(0, stored[0][1].numel, PIECE_ELEMENTS):
            count = min(PIECE_ELEMENTS, stored[0][1].numel - begin)
            total = np.zeros(count)
            for (file, tensor), coefficient in zip(stored, coefficients, strict=True):
                offset = file.byte_offset(tensor) + 4 * begin
                total += coefficient * np.fromfile(file.path, np.float32, count, offset=offset).astype(np.float64)
            merged[begin : begin + count] = total
        yield torch.from_numpy(merged)
