"""A checkpoint's opened files, with what its model file says of them: what the stages' readers work on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsm_ds.errors import BrokenCheckpoint
from wsm_ds.layouts.layout import TensorInfo
from wsm_ds.layouts.moe import NO_EXPERTS, Experts
from wsm_ds.torchfile import Tensor, TorchFile


@dataclass(frozen=True)
class Weights:
    """A file of module weights, and its tensors under the model's names."""

    file: TorchFile
    tensors: dict[str, Any]


@dataclass(frozen=True)
class RankFiles:
    """Model and optimizer files of one model-parallel rank, by data-parallel rank; `indices` numbers them by path.

    `tensors` and `aliases` are named as those files name them. `beside` are weights outside the model files: native
    MoE's experts, a pipeline's layers. `first_tensor` is the number of the first of `tensors` in the fragment tables.
    """

    models: dict[int, TorchFile]
    optims: dict[int, TorchFile]
    indices: dict[Path, int]
    tensors: dict[str, TensorInfo]
    aliases: dict[str, str]
    world_size: int
    beside: tuple[Weights, ...] = ()
    experts: Experts = NO_EXPERTS
    first_tensor: int = 0

    @property
    def numbers(self) -> dict[str, int]:
        """The number of each tensor in the fragment tables."""
        return {name: number for number, name in enumerate(self.tensors, self.first_tensor)}

    @property
    def opened(self) -> tuple[TorchFile, ...]:
        """Every file, in the order of `indices`."""
        return (*self.models.values(), *self.optims.values(), *(weights.file for weights in self.beside))


def element_wise(states: dict[str, Any], *numels: int) -> dict[str, Tensor]:
    """The states that hold a value for each element of a flat tensor, whose length is one of `numels`."""
    tensors = {name: value for name, value in states.items() if isinstance(value, Tensor)}
    return {name: value for name, value in tensors.items() if len(value.shape) == 1 and value.numel in numels}


def require_numel(file: TorchFile, what: str, held: int, needed: int) -> None:
    """Raises BrokenCheckpoint if `what` holds fewer elements than belong there."""
    if held < needed:
        raise BrokenCheckpoint(f"{file.path}: {what} holds {held} elements, but {needed} belong there.")
