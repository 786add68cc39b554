"""The entries of a module's state dict: plain tensors, tensors that are more than stored elements, and extra states."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from wsm_ds.torchfile import Stub, Tensor
from wsm_ds.torchfile.unpickle import as_global

EXTRA_STATE = "_extra_state"
"""The end of an extra state's name (`torch/nn/modules/module.py`, `_EXTRA_STATE_KEY_SUFFIX`)."""
OPAQUE = {
    "_rebuild_qtensor": "a quantized tensor",
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor without data (device meta)",
    "_rebuild_wrapper_subclass": "a tensor subclass without data",
    "_rebuild_tensor_v2": "a view with torch's conjugate or negative bit",
    "_rebuild_tensor_v3": "a tensor of a dtype that this version does not know",
}
"""What a call of torch's makes, by the function's name (`torch/_utils.py`)."""


@dataclass(frozen=True)
class Entries:
    """The entries of a module's state dict, by name.

    Attributes:
        tensors: parameters and buffers, and what hooks of the module add as plain tensors.
        opaque: tensors whose values are not simply stored elements, with what each is.
        extra_states: all others: what `get_extra_state` returned, in whatever form.
    """

    tensors: dict[str, Tensor]
    opaque: dict[str, str]
    extra_states: tuple[str, ...]


def entries_of(module: dict[str, Any], buffer_names: Collection[str]) -> Entries:
    """Sorts the entries of a state dict.

    Args:
        module: the state dict.
        buffer_names: names of registered buffers. One of them may be called as an extra state is.
    """
    tensors, opaque, extra_states = {}, {}, []
    for name, value in module.items():
        is_extra_state = name.rpartition(".")[2] == EXTRA_STATE and name not in buffer_names
        if isinstance(value, Tensor) and not is_extra_state:
            tensors[name] = value
        elif not is_extra_state and (what := _opaque_kind(value)):
            opaque[name] = what
        else:
            extra_states.append(name)
    return Entries(tensors, opaque, tuple(extra_states))


def _opaque_kind(value: Any) -> str | None:
    """What a value that torch makes of stored elements is; None if it is not a tensor."""
    if not isinstance(value, Stub) or value.callee.module not in ("torch._utils", "torch._tensor"):
        return None
    if value.callee.name == "_rebuild_parameter":
        return _opaque_kind(value.args[0])
    if value.callee.name == "_rebuild_from_type_v2" and (subclass := as_global(value.args[1])):
        return f"a {subclass}"
    return OPAQUE.get(value.callee.name, f"a tensor made by {value.callee}")
