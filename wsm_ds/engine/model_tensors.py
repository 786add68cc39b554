"""The tensors of a torch module that a merge can fill, and further sets of such tensors that wait for their turn."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from wsm_ds.dtypes import BY_TORCH_NAME
from wsm_ds.errors import ModelMismatch, few
from wsm_ds.outputs.live_model import ModelTensor

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, "torch.Tensor"]
"""Tensors by name. A tied tensor has several names."""


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that `load_state_dict` fills: parameters and persistent buffers, by all their names.

    Args:
        model: any module.

    Returns:
        The tensors themselves, in the order of the module's state dict. A tied tensor has several names.
    """
    found: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        own = {**module._parameters, **module._buffers}
        for name, tensor in own.items():
            if tensor is not None and name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = tensor
    return found


def require_fillable(models: Sequence[Tensors]) -> None:
    """Checks that the tensors of models can be filled in place, each without a change of another.

    Args:
        models: the tensors of each model, by name.

    Raises:
        ModelMismatch: a tensor has no elements of its own here (it is on the meta device, or partitioned among ranks),
            is of a special kind, or shares memory with another one and is not the same. The message names the tensors.
    """
    for what, is_so, advice in (
        ("are on the meta device", lambda t: t.is_meta, "Give them memory first (model.to_empty(device=…))."),
        ("are partitioned by ZeRO stage 3", lambda t: hasattr(t, "ds_id"), "Build the model without zero.Init."),
        ("are of a special kind, not plain tensors", _is_special, "Build the model with plain, dense tensors."),
        ("have elements that share memory", _repeats_itself, "Make them contiguous (tensor.contiguous())."),
    ):
        names = [name for tensors in models for name, tensor in tensors.items() if is_so(tensor)]
        if names:
            raise ModelMismatch(f"tensors of the model {what}: {few(names)}. {advice}")
    ranges: dict[Any, list[tuple[int, int, str]]] = {}
    for name, tensor in (item for tensors in models for item in _distinct(tensors).items() if item[1].numel()):
        end = tensor.data_ptr() + span(tensor) * tensor.element_size()
        ranges.setdefault(tensor.device, []).append((tensor.data_ptr(), end, name))
    for on_device in ranges.values():
        on_device.sort()
        for (_, end, name), (begin, _, other) in pairwise(on_device):
            if begin < end:
                raise ModelMismatch(
                    f"{name} and {other} of the models share memory and are not one tensor, so one cannot be filled "
                    "without a change of the other. Give one of them memory of its own (tensor.clone())."
                )


def described(tensors: Tensors) -> dict[str, ModelTensor]:
    """The tensors as plain data. Names of one tensor, and of equal views, have one number.

    Raises:
        ModelMismatch: a tensor has a dtype that no checkpoint has; it is named.
    """
    numbers: dict[Any, int] = {}
    model = {}
    for name, tensor in tensors.items():
        torch_name = str(tensor.dtype).removeprefix("torch.")
        if torch_name not in BY_TORCH_NAME:
            raise ModelMismatch(f"{name} of the model is of dtype {torch_name}, which no merge can fill.")
        number = numbers.setdefault(_memory(tensor), len(numbers))
        model[name] = ModelTensor(tuple(tensor.shape), BY_TORCH_NAME[torch_name], number)
    return model


def copies_of(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Makes tensors of the same shapes, dtypes and names in the CPU's memory. Tied ones are tied there, too."""
    import torch

    made: dict[Any, torch.Tensor] = {}
    for tensor in tensors.values():
        if _memory(tensor) not in made:
            made[_memory(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return {name: made[_memory(tensor)] for name, tensor in tensors.items()}


def copy_bytes(tensors: Tensors) -> int:
    """Bytes that `copies_of` takes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _distinct(tensors).values())


def copy_into(tensors: Tensors, copies: Tensors, *, except_for: Collection[str]) -> None:
    """Copies the elements of `copies` into the tensors of the same names.

    Args:
        tensors: are filled.
        copies: from `copies_of`.
        except_for: names of tensors that stay as they are.
    """
    import torch

    with torch.inference_mode():
        for name, tensor in _distinct({n: tensor for n, tensor in tensors.items() if n not in except_for}).items():
            tensor.detach().copy_(copies[name])


def span(tensor: torch.Tensor) -> int:
    """Elements of the storage from the first to the last one of a tensor."""
    return 1 + sum(int(size - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _is_special(tensor: torch.Tensor) -> bool:
    import torch

    is_plain = type(tensor.data) is torch.Tensor and tensor.layout is torch.strided
    return not is_plain or bool(tensor.is_quantized)


def _repeats_itself(tensor: torch.Tensor) -> bool:
    """Whether several elements may lie in one place, as in an expanded tensor."""
    return 0 < span(tensor) < int(tensor.numel())


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What two tensors share if they are one. A tensor without elements is one by itself."""
    if tensor.numel() == 0:
        return (id(tensor),)
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _distinct(tensors: Tensors) -> dict[str, torch.Tensor]:
    """The tensors, each under one of its names."""
    by_memory = {_memory(tensor): (name, tensor) for name, tensor in tensors.items()}
    return dict(by_memory.values())
