"""What an optimizer's states are: one value per element, one value per flat tensor, or something that cannot be cut.

An optimizer sees flat tensors: a rank's partition of a parameter group, in stage 3 of a sub-group. What it keeps of one
is a state under a name of the optimizer's own choice. Only a state of one value per element can be cut for other ranks,
or summed. Nothing in a file says which states are of this kind, so lengths have to tell: such a state is a
floating-point vector as long as its flat tensor, in every flat tensor of every rank. A table may have the length of a
small flat tensor by accident. So a name that is not in `ELEMENT_WISE` needs two flat tensors of different lengths, or
one that is longer than a table.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from wsm_ds.errors import brief
from wsm_ds.torchfile import Stub, Tensor

MERGEABLE = frozenset({
    "exp_avg", "exp_avg_sq", "exp_avg_slow", "exp_avg_diff", "exp_avg_var",
    "momentum_buffer", "momentum", "square_avg", "grad_avg", "acc_delta", "sum", "variance",
    "max_exp_avg_sq", "exp_inf",
    "state1", "state2",
    "z", "slow_params", "ax",
})  # fmt: skip
"""States of one value per element that may be merged: weighted means of them are what the optimizer may find.

They are means and sums of gradients and of their squares, which stay non-negative; upper bounds of such (amsgrad's
`max_exp_avg_sq`, Adamax's `exp_inf`): a mean of upper bounds bounds the mean; bitsandbytes' 32-bit `state1` and
`state2`; and weights (`WEIGHTS`, ASGD's `ax`).
"""
ELEMENT_WISE = MERGEABLE | {"s", "p0", "x0", "prev", "step_size", "previous_grad", "grad_sum_sq", "kahan_comp"}
"""Names that stand for one value per element in torch, DeepSpeed, bitsandbytes, schedulefree, pytorch_optimizer."""
WEIGHTS = frozenset({"z", "slow_params"})
"""States from which the next weights are computed: schedule-free's base sequence, Lookahead's slow weights."""
SCALARS = frozenset({"step", "RMS", "weight_norm", "adam_norm", "trust_ratio", "unorm_vec"})
"""Names that stand for one value per flat tensor."""
RECOMPUTED = SCALARS - {"step"}
"""Scalars that the optimizer computes anew in each update before it reads them: norms of Adafactor, CAME and LAMB."""
NESTED = "__bnb_optimizer_quant_state__"
"""bitsandbytes keeps its states in a dict under this name (`bitsandbytes/optim/optimizer.py`, `state_dict`)."""
LARGEST_TABLE = 1 << 16
"""A state of more values is not taken for a table. The code tables of bitsandbytes have 256 values."""
DEEPEST = 8
"""Lists and dicts that are nested deeper are not looked into."""


@dataclass(frozen=True)
class FlatStates:
    """The states of one flat tensor.

    Attributes:
        states: by the optimizer's names.
        numel: length of a state of one value per element.
    """

    states: dict[str, Any]
    numel: int


@dataclass(frozen=True)
class StateForms:
    """What the states of an optimizer are.

    Attributes:
        element_wise: names of those that hold one value per element.
        indivisible: what the others hold that are no scalars, by name. They can be copied, not cut and not summed.
    """

    element_wise: frozenset[str]
    indivisible: dict[str, str]

    def of(self, states: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the states of a flat tensor that hold one value per element."""
        flat = unnested(states)
        return {name: value for name, value in flat.items() if name in self.element_wise and isinstance(value, Tensor)}


class _Observed(NamedTuple):
    """A state of one flat tensor: a tensor's dtype and shape, and the length that one value per element would need."""

    dtype: str
    is_floating: bool
    shape: tuple[int, ...]
    numel: int


def unnested(states: dict[str, Any]) -> dict[str, Any]:
    """Returns the states of a flat tensor with those of `NESTED` beside the others."""
    nested = states.get(NESTED)
    if not isinstance(nested, dict):
        return states
    return {name: value for name, value in states.items() if name != NESTED} | nested


def forms_of(flats: Iterable[FlatStates]) -> StateForms:
    """Tells the states of an optimizer apart.

    Args:
        flats: the states of every flat tensor of every rank.
    """
    observed: dict[str, set[_Observed]] = {}
    objects: dict[str, str] = {}
    for flat in flats:
        for name, value in unnested(flat.states).items():
            if isinstance(value, Tensor):
                seen = _Observed(value.dtype.name, value.dtype.is_floating, value.shape, flat.numel)
                observed.setdefault(name, set()).add(seen)
            elif not is_plain(value):
                objects[name] = _object_words(value)
    problems = {name: _problem(name, seen) for name, seen in observed.items()}
    scalars = {name for name, seen in observed.items() if _is_scalar(name, seen)}
    return StateForms(
        frozenset(name for name, problem in problems.items() if not problem and name not in scalars | set(objects)),
        {name: problem for name, problem in problems.items() if problem and name not in scalars} | objects,
    )


def problems_of_shaped(states: dict[str, Any], shape: tuple[int, ...]) -> dict[str, str]:
    """Returns the states of a parameter that hold neither one value per element nor one value alone.

    Args:
        states: by the optimizer's names.
        shape: the parameter's shape, which a state of one value per element has, too (stage 0).

    Returns:
        What they hold, by name.
    """
    problems = {}
    for name, value in unnested(states).items():
        if isinstance(value, Tensor):
            is_one = value.numel == 1 and (name in SCALARS or value.shape != shape)
            if not is_one and not (value.shape == shape and value.dtype.is_floating):
                words = f"a {value.dtype.name} tensor of shape {list(value.shape)}"
                problems[name] = f"{words} for a parameter of shape {list(shape)}"
        elif not is_plain(value):
            problems[name] = _object_words(value)
    return problems


def _object_words(value: Any) -> str:
    if isinstance(value, Stub):
        return f"an object of {value.callee}"
    return f"{brief(value)} with tensors or objects in it"


def is_plain(value: Any, depth: int = 0) -> bool:
    """Whether a value is None, a number, a text, or a list or dict of such: it says nothing about single elements.

    Args:
        value: the value.
        depth: lists and dicts around it.
    """
    if isinstance(value, dict | list | tuple):
        values = value.values() if isinstance(value, dict) else value
        return depth < DEEPEST and all(is_plain(item, depth + 1) for item in values)
    return value is None or isinstance(value, bool | int | float | str)


def _is_scalar(name: str, observed: set[_Observed]) -> bool:
    """Whether a state holds one value in every flat tensor, and not because all of these have one element."""
    has_one = all(seen.shape in ((), (1,)) for seen in observed)
    return has_one and (
        name in SCALARS or all(seen.shape == () for seen in observed) or any(seen.numel != 1 for seen in observed)
    )


def _problem(name: str, observed: set[_Observed]) -> str | None:
    """Why a state is not one value per element; None if it is."""
    for seen in sorted(observed):
        if seen.shape != (seen.numel,):
            return f"a {seen.dtype} tensor of shape {list(seen.shape)} for {seen.numel} elements"
        if not seen.is_floating:
            return f"{seen.dtype} codes, which mean nothing without their scales"
    lengths = {seen.numel for seen in observed}
    if name in ELEMENT_WISE or len(lengths) > 1 or max(lengths) > LARGEST_TABLE:
        return None
    return f"{max(lengths)} values, as many as there are elements, or a table of this length: the name is unknown"
