"""The opened files of one model-parallel rank, and the tensors that its model file describes."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from wsm_ds.errors import BrokenCheckpoint
from wsm_ds.layouts.layout import TensorInfo
from wsm_ds.layouts.moe import NO_EXPERTS, Experts
from wsm_ds.torchfile import TorchFile


@dataclass(frozen=True)
class WeightsFile:
    """A file of module weights alone, and its tensors under the model's names."""

    file: TorchFile
    tensors: dict[str, Any]


@dataclass(frozen=True)
class RankFiles:
    """Model and optimizer files of one model-parallel rank.

    Attributes:
        models: model files by data-parallel rank; rank 0 alone in stages 0 to 2.
        optims: optimizer files by data-parallel rank.
        indices: number of each file in the fragment tables, by path.
        tensors: the model's tensors, named as these files name them.
        aliases: further names of tied tensors, with the name in `tensors`.
        world_size: data-parallel ranks.
        extra_weights: weights outside the model files: native MoE's experts, a pipeline's layers.
        experts: how many experts each layer has.
        first_tensor: number of the first of `tensors` in the fragment tables.
        extra_states, opaque: as in `Layout`.
    """

    models: dict[int, TorchFile]
    optims: dict[int, TorchFile]
    indices: dict[Path, int]
    tensors: dict[str, TensorInfo]
    aliases: dict[str, str]
    world_size: int
    extra_weights: tuple[WeightsFile, ...] = ()
    experts: Experts = NO_EXPERTS
    first_tensor: int = 0
    extra_states: tuple[str, ...] = ()
    opaque: dict[str, str] = field(default_factory=dict)

    @cached_property
    def tensor_numbers(self) -> dict[str, int]:
        """The number of each tensor in the fragment tables."""
        return {name: number for number, name in enumerate(self.tensors, self.first_tensor)}

    @cached_property
    def untrained(self) -> tuple[tuple[str, TensorInfo], ...]:
        """The tensors that have elements and are not updated by the optimizer: frozen parameters and buffers."""
        return tuple((n, info) for n, info in self.tensors.items() if info.role != "parameter" and info.numel)

    @property
    def files(self) -> tuple[TorchFile, ...]:
        """Every file, in the order of `indices`."""
        return (*self.models.values(), *self.optims.values(), *(weights.file for weights in self.extra_weights))


def distinct(files: Iterable[TorchFile]) -> list[TorchFile]:
    """Returns one file of each form: files that are alike say the same."""
    return list({id(file.memo): file for file in files}.values())


def require_numel(file: TorchFile, tensor: str, numel: int, expected: int) -> None:
    """Raises BrokenCheckpoint if a tensor of a file has fewer elements than expected.

    Args:
        file: the file.
        tensor: a name of the tensor, for the message.
        numel: its elements.
        expected: the least number of elements.
    """
    if numel < expected:
        raise BrokenCheckpoint(f"{file.path}: {tensor} holds {numel} elements, expected at least {expected}.")
