"""The tensors of a checkpoint as a model has them, whole and by name: in safetensors files, or in memory."""

import re
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from wsm_ds.dtypes import DType
from wsm_ds.errors import RecipeError, few
from wsm_ds.layouts import Layout
from wsm_ds.layouts.element_order import reordered
from wsm_ds.layouts.layout import Table, TensorInfo
from wsm_ds.layouts.saved_names import saved_name


def new_names(fqns: Iterable[str], rename: Mapping[str, str], where: str, reserved: Collection[str]) -> dict[str, str]:
    """The name of each tensor of a checkpoint in an output.

    Args:
        fqns: names in the checkpoint.
        rename: regular expressions and their replacements, applied to every name, in order.
        where: where the names are used, for the message.
        reserved: names that no tensor may have there.

    Raises:
        RecipeError: a pattern matches no name, or `rename` gives two tensors one name, or a tensor a reserved name.
    """
    names = {fqn: saved_name(fqn) for fqn in fqns}
    for pattern, replacement in rename.items():
        if not any(re.search(pattern, name) for name in names.values()):
            raise RecipeError(
                f"rename (--rename): {pattern!r} matches no tensor's name. The names are {few(names.values())}."
            )
        names = {fqn: re.sub(pattern, replacement, name) for fqn, name in names.items()}
    used_names: dict[str, str] = {}
    for fqn, name in names.items():
        if name in reserved:
            raise RecipeError(
                f"{fqn} would be called {name!r} {where}, which cannot be a tensor's name; give it another with "
                "rename (--rename PATTERN=NEW)."
            )
        if name in used_names:
            raise RecipeError(
                f"rename (--rename) gives {fqn} the name {name!r}, which {used_names[name]} has already; change the "
                "pattern or the replacement."
            )
        used_names[name] = fqn
    return names


def stored_dtype(info: TensorInfo, requested: DType | None) -> DType:
    """The dtype of a tensor in an output.

    Args:
        info: the tensor.
        requested: of all floating-point parameters; None: each keeps the one that it has in the module. Buffers, and
            parameters of other dtypes, always keep theirs.
    """
    is_cast = requested is not None and info.role != "buffer" and info.dtype.is_floating
    return requested if requested is not None and is_cast else info.dtype


def in_stored_order(table: Table, newest: Layout) -> Table:
    """Numbers the elements of a table of row-major tensors as a checkpoint does.

    Args:
        table: whole tensors, with the checkpoint's numbers.
        newest: the checkpoint.

    Raises:
        UnsupportedLayout: see `reordered`.
    """
    for number, (name, info) in enumerate(newest.tensors.items()):
        if info.axes is not None and (is_turned := table["tensor"] == number).any():
            turned = reordered(table[is_turned], name, info.shape, None, info.axes)
            table = np.concatenate([table[~is_turned], turned])
    return table
