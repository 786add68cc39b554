"""Names that a module's hooks change while its state dict is made.

torch's `checkpoint_wrapper` leaves its part out of the names in a state dict, and puts it in again when the state dict
is loaded (`distributed/algorithms/_checkpoint/checkpoint_wrapper.py`, `_post_state_dict_hook`). All other names that
DeepSpeed writes come from `named_parameters()`, and have it. A layout has the names of `named_parameters()`.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from wsm_ds.torchfile import TorchFile

HIDDEN = "_checkpoint_wrapped_module."


def saved_name(name: str) -> str:
    """The name in a state dict of a parameter or a buffer.

    >>> saved_name("layer._checkpoint_wrapped_module.weight")
    'layer.weight'

    Args:
        name: as `named_parameters()` gives it.
    """
    return name.replace(HIDDEN, "")


def with_parameter_names(file: TorchFile) -> TorchFile:
    """A model file whose `module` has the names of `named_parameters()`.

    Args:
        file: a model file of ZeRO stage 1 to 3. Others are returned as they are.
    """
    tree = file.tree
    module = tree.get("module")
    names = {saved_name(name): name for name in _names(tree) if HIDDEN in name}
    if not names or not isinstance(module, dict):
        return file
    renamed = type(module)((names.get(name, name), value) for name, value in module.items())
    return replace(file, tree=tree | {"module": renamed})


def _names(tree: dict[str, Any]) -> Iterator[str]:
    for shapes in (*(tree.get("param_shapes") or ()), tree.get("frozen_param_shapes") or {}):
        yield from shapes
    yield from tree.get("buffer_names") or ()
    for alias, owner in (tree.get("shared_params") or {}).items():
        yield from (alias, owner)
