"""Native MoE (`deepspeed.moe`), ZeRO 1 and 2: every expert under its global name.

A rank holds `num_experts / ep_size` experts of a layer under local numbers. Each expert's weights have a file of their
own, under global numbers (`_save_moe_checkpoint`, `runtime/engine.py:5040`). A parameter group of experts is cut among
the ranks with the same expert-parallel rank only (`_create_expert_and_data_parallel`, `utils/groups.py:370`).
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from wsm_ds.errors import BrokenCheckpoint, UnsupportedLayout, brief, few
from wsm_ds.torchfile import TorchFile

# `_get_expert_ckpt_name`, runtime/engine.py:4368
EXPERT_FILE = re.compile(r"^layer_\d+_expert_\d+_mp_rank_\d+_model_states\.pt$")
EXPERT_NAME = re.compile(
    r"^(?P<layer>.*\.deepspeed_moe\.experts\.deepspeed_experts\.)(?P<number>\d{1,9})(?P<rest>\..*)$"
)


@dataclass(frozen=True)
class ExpertShare:
    """A rank's share of a parameter group: partition `index` of `count` equal partitions of the elements of `names`."""

    names: tuple[str, ...]
    index: int
    count: int


@dataclass(frozen=True)
class Experts:
    """The experts of a checkpoint.

    Attributes:
        counts: experts of each layer, by the beginning of a parameter's name, up to the expert's number.
        is_data_first: whether ranks with the same expert-parallel rank are neighbours
            (`use_data_before_expert_parallelism` in ds_config, `utils/groups.py:435`).
    """

    counts: dict[str, int]
    is_data_first: bool
    _names: dict[tuple[tuple[str, ...], int, int], tuple[str, ...]] = field(default_factory=dict, compare=False)

    def global_names(self, names: tuple[str, ...], ep_rank: int, ep_size: int) -> tuple[str, ...]:
        """Replaces the local numbers of experts in a rank's parameter names by global ones."""
        if not self.counts:
            return names
        key = (names, ep_rank, ep_size)
        if key not in self._names:
            self._names[key] = self._global_names(*key)
        return self._names[key]

    def _global_names(self, names: tuple[str, ...], ep_rank: int, ep_size: int) -> tuple[str, ...]:
        global_names = []
        for name in names:
            match = EXPERT_NAME.match(name)
            if match is None or match["layer"] not in self.counts:
                global_names.append(name)
                continue
            # `global_expert_id` of `_save_moe_checkpoint`, runtime/engine.py.
            number = ep_rank * (self.counts[match["layer"]] // ep_size) + int(match["number"])
            global_names.append(f"{match['layer']}{number}{match['rest']}")
        return tuple(global_names)

    def names_of_all_ranks(self, names: Iterable[str]) -> Iterator[str]:
        """Yields `names`, and for a parameter of one expert the same parameter of every expert of its layer.

        >>> prefix = "mlp.deepspeed_moe.experts.deepspeed_experts."
        >>> list(Experts({prefix: 2}, False).names_of_all_ranks(["norm.weight", prefix + "0.bias"])) == [
        ...     "norm.weight", prefix + "0.bias", prefix + "1.bias"]
        True
        """
        for name in names:
            match = EXPERT_NAME.match(name)
            if match is None or match["layer"] not in self.counts:
                yield name
                continue
            yield from (f"{match['layer']}{number}{match['rest']}" for number in range(self.counts[match["layer"]]))

    def share(self, optim: TorchFile, group: int, names: tuple[str, ...], rank: int, world_size: int) -> ExpertShare:
        """Finds the partition of a parameter group that a rank holds.

        Args:
            optim: the rank's optimizer file.
            group: number of the parameter group.
            names: the group's names in rank 0's `param_shapes`.
            rank: the data-parallel rank.
            world_size: data-parallel ranks.

        Raises:
            BrokenCheckpoint: the number of partitions does not fit the number of ranks.
        """
        state = optim.tree["optimizer_state_dict"]
        count = int(state["partition_count"][group])
        if count != world_size and (not self._are_experts(names) or count < 1 or world_size % count):
            raise BrokenCheckpoint(
                f"{optim.path}: parameter group {group} is cut into {count} partitions, but was saved by {world_size} "
                "ranks."
            )
        ep_size = world_size // count
        ep_rank, index = divmod(rank, count) if self.is_data_first else (rank % ep_size, rank // ep_size)
        return ExpertShare(self.global_names(names, ep_rank, ep_size), index, count)

    def _are_experts(self, names: Iterable[str]) -> bool:
        return any((match := EXPERT_NAME.match(name)) and match["layer"] in self.counts for name in names)


NO_EXPERTS = Experts({}, is_data_first=False)


def require_expert_files(path: Path, file_names: list[str], model: Any) -> None:
    """Raises BrokenCheckpoint unless each expert of each layer has its file, and no other expert has one.

    Args:
        path: the checkpoint's folder, for the message.
        file_names: the experts' files in the folder.
        model: tree of the model file; its `num_experts` says how many experts each layer has.
    """
    counts, present = model.get("num_experts") or (), set(file_names)
    names = (f"layer_{n}_expert_{e}_mp_rank_00_model_states.pt" for n, count in enumerate(counts) for e in range(count))
    expected = set(islice(names, len(present) + 1))  # a broken file may name any number of experts
    missing, foreign = sorted(expected - present), sorted(present - expected)
    if missing:
        raise BrokenCheckpoint(
            f"{path} is incomplete: it has {len(present)} of {sum(counts)} experts' files; experts' files are missing: "
            f"{few(missing)}."
        )
    if foreign:
        raise BrokenCheckpoint(
            f"{path} holds files of experts that its model does not have ({few(foreign)}): files of another save "
            "remain. Remove them."
        )


def require_same_groups(optims: dict[int, TorchFile]) -> None:
    """Raises UnsupportedLayout unless all ranks' parameter groups have the same names in the same order.

    DeepSpeed makes a group for each `ep_size` in the order of a set of strings, which differs between processes unless
    PYTHONHASHSEED is set (`split_params_into_different_moe_groups_for_optimizer`, `moe/utils.py:93`).
    """
    orders = {rank: _group_names(optim) for rank, optim in optims.items()}
    for rank, order in orders.items():
        if order != orders[0]:
            raise UnsupportedLayout(
                f"{optims[rank].path} has the parameter groups {order}, rank 0 has {orders[0]}: their order is random "
                "where layers have different ep_size. Save with the same PYTHONHASHSEED on all ranks."
            )


def _group_names(optim: TorchFile) -> list[str]:
    base = optim.tree["optimizer_state_dict"]["base_optimizer_state"]
    if isinstance(base, list):
        raise UnsupportedLayout(f"{optim.path} is an elastic checkpoint of MoE, which this version does not read.")
    return [brief(group.get("name")) for group in base["param_groups"]]


def read_experts(model: dict[str, Any], files: Iterable[TorchFile]) -> Experts:
    """Counts the experts of each layer.

    Args:
        model: tree of a model file.
        files: all experts' files.

    Raises:
        UnsupportedLayout: a tensor is not a parameter of an expert; it is named.
        BrokenCheckpoint: the experts of a layer are not numbered from 0 on.
    """
    numbers: dict[str, set[int]] = {}
    for file in files:
        for name in file.tree:
            match = EXPERT_NAME.match(name)
            if match is None:
                raise UnsupportedLayout(f"{file.path} holds {name}, which is not a parameter of an expert.")
            numbers.setdefault(match["layer"], set()).add(int(match["number"]))
    for layer, present in numbers.items():
        if present != set(range(len(present))):
            raise BrokenCheckpoint(
                f"the experts' files hold numbers {sorted(present)} of {layer}*, expected 0 to {len(present) - 1}: "
                "some files have a wrong name."
            )
    config = model.get("ds_config")
    is_data_first = bool(config.get("use_data_before_expert_parallelism")) if isinstance(config, dict) else False
    return Experts({layer: len(present) for layer, present in numbers.items()}, is_data_first)
