"""The sink of a merge into memory: bytes of a plan become elements of tensors, on the CPU or an accelerator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from wsm_ds.dtypes import ALL, DType
from wsm_ds.engine.model_tensors import Tensors, span
from wsm_ds.errors import NonFiniteValue
from wsm_ds.planning.intersect import NOWHERE
from wsm_ds.planning.plan import Plan

if TYPE_CHECKING:
    import torch

INDEXED_NUMEL = 1 << 14
"""Elements that are scattered at a time into a tensor that is not contiguous."""


class LiveTensors:
    """The sink of workers that fill tensors. All threads share it: each writes other elements.

    Bytes become elements of the dtype that the plan states, and the tensor takes them with torch's `copy_`, as
    `load_state_dict` does. Where neither dtype nor device differ, they are copied as bytes.

    Args:
        plan: each of its files is a tensor, see `outputs.live_model`.
        models: for each output of the plan, the tensors that it fills, by name.

    Memory: INDEXED_NUMEL indices of a tensor that is not contiguous; on an accelerator, one slice where the dtype
        differs.
    """

    def __init__(self, plan: Plan, models: Sequence[Tensors]) -> None:
        self.plan = plan
        self.tensors = [models[file.output][file.name].detach() for file in plan.files]
        self.dtypes = _stored_dtypes(plan)
        self.bytes = [_as_bytes(*pair) for pair in zip(self.tensors, self.dtypes, strict=True)]

    def write(self, number: int, offset: int, data: memoryview) -> None:
        """Fills elements of a tensor, see `Sink`.

        Raises:
            NonFiniteValue: a finite element does not fit the tensor's dtype.
        """
        as_bytes = self.bytes[number]
        if as_bytes is not None:
            as_bytes[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
        else:
            self._convert(number, offset // self.dtypes[number].itemsize, data)

    def carry(self, number: int, offset: int, data: memoryview, source: int, source_offset: int) -> None:
        """Fills elements of a tensor, see `Sink`."""
        self.write(number, offset, data)

    def _convert(self, number: int, begin: int, data: memoryview) -> None:
        import torch

        tensor, dtype = self.tensors[number], self.dtypes[number]
        # Tensors that were made in inference mode can be changed only there; all others can, too.
        with torch.inference_mode():
            values = torch.frombuffer(data, dtype=getattr(torch, dtype.torch_name))
            if tensor.is_contiguous():
                filled = tensor.view(-1)[begin : begin + len(values)]
                filled.copy_(values)
            else:
                filled = values.to(tensor.device, tensor.dtype)
                _scatter(tensor, begin, filled)
            if dtype.is_floating and torch.finfo(filled.dtype).max < torch.finfo(values.dtype).max:
                self._require_no_overflow(number, values, filled)

    def _require_no_overflow(self, number: int, values: torch.Tensor, filled: torch.Tensor) -> None:
        """Raises NonFiniteValue if a finite value became an infinity. A frozen tensor may hold infinities."""
        if bool(filled.isfinite().all()):
            return
        overflows = ~filled.isfinite() & values.to(filled.device).isfinite()
        if bool(overflows.any()):
            raise NonFiniteValue(
                f"{self.plan.files[number].name} overflows {str(filled.dtype).removeprefix('torch.')}, the dtype that "
                "it has in the model; build the model in bfloat16 or float32 instead."
            )


def _stored_dtypes(plan: Plan) -> list[DType]:
    """The dtype in which a plan stores the elements of each file; of a file without elements, any."""
    codes = np.zeros(len(plan.files), dtype=np.int64)
    for places in (target.places for stream in plan.streams for target in stream.targets):
        is_somewhere = places.files != NOWHERE
        codes[places.files[is_somewhere] + places.first_file] = places.dtypes[is_somewhere]
    return [ALL[code] for code in codes.tolist()]


def _as_bytes(tensor: torch.Tensor, stored: DType) -> np.ndarray[Any, Any] | None:
    """The bytes of a tensor, if the elements of a plan can be copied there as they are."""
    import torch

    is_same = str(tensor.dtype) == f"torch.{stored.torch_name}"
    if not (is_same and tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.numel()):
        return None
    as_bytes: np.ndarray[Any, Any] = tensor.view(-1).view(torch.uint8).numpy()
    return as_bytes


def _scatter(tensor: torch.Tensor, begin: int, values: torch.Tensor) -> None:
    """Fills elements [begin, begin + n) of a tensor that is not contiguous, counted in row-major order."""
    import torch

    storage = torch.as_strided(tensor, (span(tensor),), (1,), tensor.storage_offset())
    for first in range(0, len(values), INDEXED_NUMEL):
        piece = values[first : first + INDEXED_NUMEL]
        rest = torch.arange(begin + first, begin + first + len(piece), device=tensor.device)
        position = torch.zeros_like(rest)
        for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
            position += rest % size * stride
            rest //= size
        storage[position] = piece
