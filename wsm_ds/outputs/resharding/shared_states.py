"""Checks that the optimizer's states can be written in another form.

States of one value per element are cut anew. All others are copied from rank 0 to every rank: so they must be one value
for a whole flat tensor, and the same on every rank and in every sub-group that becomes part of it.
"""

import logging
from collections.abc import Iterator
from typing import Any

from wsm_ds.errors import UnsupportedLayout, brief, few
from wsm_ds.layouts.hyperparameters import parameter_groups
from wsm_ds.layouts.optimizer_states import RECOMPUTED, is_plain, unnested
from wsm_ds.outputs.resharding.form import Origin
from wsm_ds.torchfile import Tensor, TorchFile

log = logging.getLogger(__name__)

DROP = "Leave the optimizer states out (--optimizer-states drop; not with --format universal, which needs them)."
MOST_LISTED = 8
"""Longer lists among an optimizer's hyper-parameters are not compared."""
HYPERPARAMETERS, STATES = "hyper-parameters", "optimizer states"
PER_ELEMENT = "one value per element"


def require_divisible(origin: Origin) -> None:
    """Checks the states of a checkpoint that is to be written in another form with its optimizer states.

    Args:
        origin: the newest checkpoint.

    Raises:
        UnsupportedLayout: a state holds neither one value per element nor one value alone; or one value differs
            between ranks or sub-groups. The message names the states, what they hold, and the files.
    """
    path = origin.layout.path
    if origin.layout.indivisible_states:
        words = few(f"{name} ({problem})" for name, problem in origin.layout.indivisible_states.items())
        raise UnsupportedLayout(
            f"{path} is not written in another form with its optimizer states, which cannot be cut for other ranks: "
            f"{words}. {DROP}"
        )
    for _, words in _differences(origin):
        raise UnsupportedLayout(f"{path} is not written in another form with its optimizer states: {words}. {DROP}")


def warn_of_hyperparameters(origin: Origin) -> None:
    """Warns if hyper-parameters differ between ranks: without the states, those of rank 0 are written for every rank.

    Args:
        origin: the newest checkpoint, whose optimizer states are dropped.
    """
    for part, words in _differences(origin):
        if part == HYPERPARAMETERS:
            log.warning("%s: %s. Those of rank 0 are written for every rank.", origin.layout.path, words)


def _differences(origin: Origin) -> Iterator[tuple[str, str]]:
    """What should be alike on all ranks and is not: whether states or hyper-parameters, and the values."""
    first: dict[tuple[int, str], dict[str, str]] = {}
    for file in origin.optimizers:
        for group, part, values in _shared_values(origin, file):
            expected = first.setdefault((group, part), values)
            names = [name for name in {**expected, **values} if expected.get(name) != values.get(name)]
            if names:
                pairs = few(f"{n}: {expected.get(n, 'absent')} against {values.get(n, 'absent')}" for n in names)
                is_first = file is origin.optimizers[0]
                where = f"two sub-groups in {file.path.name}" if is_first else f"rank 0 and {file.path.name}"
                yield part, f"{part} of parameter group {group} differ between {where}: {pairs}"


def require_loadable_scalars(origin: Origin) -> None:
    """Checks that DeepSpeed restores every state from a universal checkpoint: of one value alone, it restores `step`.

    `load_hp_checkpoint_state_from_checkpoint_dir`, `runtime/base_optimizer.py:332`; stage 3:
    `runtime/zero/stage3.py:3653`.

    Raises:
        UnsupportedLayout: there are others; they are named.
    """
    lost = {
        name: brief(value)
        for group in origin.groups
        for name, value in unnested(group.states).items()
        if name not in {*group.element_wise, *RECOMPUTED, "step"} and value is not None
    }
    if lost:
        raise UnsupportedLayout(
            f"{origin.layout.path} is not written as a universal checkpoint: DeepSpeed would not restore the optimizer "
            f"states {few(lost)}. Write --format zero with --world-size or --stage instead."
        )


def _shared_values(origin: Origin, file: TorchFile) -> Iterator[tuple[int, str, dict[str, str]]]:
    """For each parameter group of a rank, what must be alike everywhere: (group, what it is, texts by name)."""
    state = file.tree["optimizer_state_dict"]
    base = state.get("base_optimizer_state") or state["optimizer_state_dict"]
    for number, entry in enumerate(parameter_groups(file)):
        hyperparameters = {name: _text(file, value) for name, value in entry.items() if name != "params"}
        yield number, HYPERPARAMETERS, hyperparameters
        for flat in entry["params"]:
            states = unnested(base["state"].get(flat, {}))
            yield (
                number,
                STATES,
                {
                    name: PER_ELEMENT if name in origin.layout.state_names else _text(file, value)
                    for name, value in states.items()
                    if name not in RECOMPUTED
                },
            )


def _text(file: TorchFile, value: Any) -> str:
    """A text that is equal for equal values; a tensor's has its elements."""
    if isinstance(value, Tensor) and value.numel == 1:
        return f"{value.dtype.name} {file.elements(value)[0]}"
    if isinstance(value, Tensor):
        return f"a {value.dtype.name} tensor of shape {list(value.shape)}"
    if isinstance(value, list | tuple) and len(value) <= MOST_LISTED:
        return "[" + ", ".join(_text(file, item) if is_plain(item) else brief(item) for item in value) + "]"
    return brief(value)
