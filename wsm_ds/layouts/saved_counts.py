"""What a checkpoint's model file counts: optimizer steps, samples and tokens since the beginning of the run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wsm_ds.layouts.snapshot import Snapshot, snapshot_in
from wsm_ds.torchfile import Stub

JOB_CONSTANTS = "wsm_training"
"""The key of a `TrainingJob`'s constants in the client state."""
LENGTHS = ("sequence_length", "seq_length", "seq_len")
"""Names of the tokens of a sample, in the client state and in Megatron's arguments."""
JOB_LENGTHS = (*LENGTHS, "context")
"""The same in a job's constants; `launch/pretrain.py` calls it `context`."""
_WIDTHS = {"i4": 4, "i8": 8, "u4": 4, "u8": 8}


@dataclass(frozen=True, slots=True)
class SavedCounts:
    """The counts of a checkpoint; None for what its files do not tell.

    Attributes:
        steps: optimizer steps (`global_steps`).
        samples: sequences that the model has seen.
        tokens: tokens that the model has seen.
        sequence_length: tokens of each sample.
        snapshot: what it is, if it is no full checkpoint.
    """

    steps: int
    samples: int | None = None
    tokens: int | None = None
    sequence_length: int | None = None
    snapshot: Snapshot | None = None


def counts_of(tree: Mapping[Any, Any]) -> SavedCounts:
    """Reads the counts in a model file.

    DeepSpeed counts `global_steps` and `global_samples`; it merges the client state into the same mapping
    (`_common_checkpoint_state`, runtime/engine.py:5017). Megatron-DeepSpeed has its own counts there, which go before:
    `args.consumed_train_samples`, `args.consumed_train_tokens`, and the latter again as `tokens` beside
    `checkpoint_version` (megatron/checkpointing.py). A script may save `consumed_train_samples` and
    `consumed_train_tokens` itself.

    Args:
        tree: the file's objects, with `global_steps`.
    """
    args = _attributes(tree.get("args"))
    constants = tree.get(JOB_CONSTANTS)
    constants = constants if isinstance(constants, dict) else {}
    megatron_tokens = tree.get("tokens") if "checkpoint_version" in tree else None
    lengths = [place.get(name) for place in (tree, args) for name in LENGTHS]
    lengths += [constants.get(name) for name in JOB_LENGTHS]
    return SavedCounts(
        steps=int(tree["global_steps"]),
        samples=_first(
            tree.get("consumed_train_samples"), args.get("consumed_train_samples"), tree.get("global_samples")
        ),
        tokens=_first(tree.get("consumed_train_tokens"), args.get("consumed_train_tokens"), megatron_tokens),
        sequence_length=_first(*lengths) or None,
        snapshot=snapshot_in(tree),
    )


def _attributes(args: Any) -> Mapping[Any, Any]:
    """The arguments of a training: the attributes of a Namespace, or a mapping (GPT-NeoX)."""
    values = args.state if isinstance(args, Stub) else args
    return values if isinstance(values, dict) else {}


def _first(*values: Any) -> int | None:
    """The first whole number among values, as it is or as a numpy scalar."""
    return next((number for number in map(_whole, values) if number is not None and number >= 0), None)


def _whole(value: Any) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, Stub) and value.callee.name == "scalar" and len(value.args) == 2:
        dtype, data = value.args
        code = dtype.args[0] if isinstance(dtype, Stub) and dtype.args else None
        if isinstance(data, Stub) and data.args and isinstance(data.args[0], str):  # protocol 2 writes bytes as a text
            data = data.args[0].encode("latin1")
        if isinstance(data, bytes) and code in _WIDTHS and len(data) == _WIDTHS[code]:
            return int.from_bytes(data, "little", signed=code.startswith("i"))
    return None
