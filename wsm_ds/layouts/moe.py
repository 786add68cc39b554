"""Native MoE (`deepspeed.moe`), ZeRO 1 and 2: every expert under its global name.

A rank holds `num_experts / ep` experts of a layer under local numbers; files of the experts, one each, have the
global ones (`runtime/engine.py`, `_save_moe_checkpoint`). A group of expert parameters is cut among the ranks of
the same expert-parallel rank only (`utils/groups.py`, `_create_expert_and_data_parallel`).
"""

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from wsm_ds.errors import BrokenCheckpoint, UnsupportedLayout, brief, few
from wsm_ds.torchfile import TorchFile

EXPERT_FILE = re.compile(r"^layer_\d+_expert_\d+_mp_rank_\d+_model_states\.pt$")
EXPERT_NAME = re.compile(
    r"^(?P<layer>.*\.deepspeed_moe\.experts\.deepspeed_experts\.)(?P<number>\d{1,9})(?P<rest>\..*)$"
)


@dataclass(frozen=True)
class ExpertShare:
    """What a rank holds of a parameter group: number `index` of `count` equal parts of the line of `names`."""

    names: tuple[str, ...]
    index: int
    count: int


@dataclass(frozen=True)
class Experts:
    """A checkpoint's experts: how many each layer has, by what stands before their number in a name.

    `is_data_first`: ranks of one expert-parallel rank are neighbours (`use_data_before_expert_parallelism`).
    """

    counts: dict[str, int]
    is_data_first: bool

    def global_names(self, names: Iterable[str], ep_rank: int, ep_size: int) -> tuple[str, ...]:
        """The names of a rank's parameters with local numbers of experts turned into global ones."""
        found = []
        for name in names:
            match = EXPERT_NAME.match(name)
            if match is None or match["layer"] not in self.counts:
                found.append(name)
                continue
            number = ep_rank * (self.counts[match["layer"]] // ep_size) + int(match["number"])
            found.append(f"{match['layer']}{number}{match['rest']}")
        return tuple(found)

    def of_all_ranks(self, names: Iterable[str]) -> Iterator[str]:
        """A parameter of one expert stands for that of every expert of its layer."""
        for name in names:
            match = EXPERT_NAME.match(name)
            if match is None or match["layer"] not in self.counts:
                yield name
                continue
            yield from (f"{match['layer']}{number}{match['rest']}" for number in range(self.counts[match["layer"]]))

    def part(self, optim: TorchFile, group: int, names: Collection[str], rank: int, world_size: int) -> ExpertShare:
        """What `rank` holds of a parameter group whose names in `param_shapes` are `names`.

        Raises:
            BrokenCheckpoint: the group is not cut in as many parts as its ranks can hold.
        """
        state = optim.tree["optimizer_state_dict"]
        count = int(state["partition_count"][group])
        has_experts = any((match := EXPERT_NAME.match(name)) and match["layer"] in self.counts for name in names)
        if count != world_size and (not has_experts or count < 1 or world_size % count):
            raise BrokenCheckpoint(f"{optim.path}: group {group} is cut in {count}, on {world_size} ranks.")
        ep_size = world_size // count
        ep_rank, index = divmod(rank, count) if self.is_data_first else (rank % ep_size, rank // ep_size)
        return ExpertShare(self.global_names(names, ep_rank, ep_size), index, count)


NO_EXPERTS = Experts({}, is_data_first=False)


def require_expert_files(where: object, found: list[str], model: Any) -> None:
    """Raises BrokenCheckpoint unless each expert of each layer that `model` counts, and no other, has its file."""
    counts, held = model.get("num_experts") or (), set(found)
    named = (f"layer_{n}_expert_{e}_mp_rank_00_model_states.pt" for n, count in enumerate(counts) for e in range(count))
    expected = list(islice(named, len(held) + 1))  # a broken file may count any number of them
    missing, foreign = sorted(set(expected) - held), sorted(held - set(expected))
    if missing:
        raise BrokenCheckpoint(
            f"{where} is incomplete: it has {len(held)} of {sum(counts)} experts' files; experts' files are missing: "
            f"{few(missing)}."
        )
    if foreign:
        raise BrokenCheckpoint(f"{where} holds experts that its model has not ({few(foreign)}): of another save?")


def require_same_groups(optims: dict[int, TorchFile]) -> None:
    """Raises UnsupportedLayout unless all ranks' parameter groups have the same names in the same order.

    DeepSpeed makes a group for each `ep_size` in the order of a set of strings, which differs from process to process
    unless PYTHONHASHSEED is set (`moe/utils.py`, `split_params_into_different_moe_groups_for_optimizer`).
    """
    orders = {rank: _group_names(optim) for rank, optim in optims.items()}
    for rank, order in orders.items():
        if order != orders[0]:
            raise UnsupportedLayout(
                f"{optims[rank].path} has the parameter groups {order}, rank 0 {orders[0]}: their order is left to "
                "chance where layers have several ep_size. Save with PYTHONHASHSEED equal on all ranks."
            )


def _group_names(optim: TorchFile) -> list[str]:
    base = optim.tree["optimizer_state_dict"]["base_optimizer_state"]
    if isinstance(base, list):
        raise UnsupportedLayout(f"{optim.path} is an elastic checkpoint of MoE, which this version does not read.")
    return [brief(group.get("name")) for group in base["param_groups"]]


def read_experts(model: dict[str, Any], files: Iterable[TorchFile]) -> Experts:
    """The experts that `files` hold.

    Raises:
        UnsupportedLayout, BrokenCheckpoint: a name is no expert's; experts are not numbered from 0 on.
    """
    numbers: dict[str, set[int]] = {}
    for file in files:
        for name in file.tree:
            match = EXPERT_NAME.match(name)
            if match is None:
                raise UnsupportedLayout(f"{file.path} holds {name}, which is not a parameter of an expert.")
            numbers.setdefault(match["layer"], set()).add(int(match["number"]))
    for layer, held in numbers.items():
        if held != set(range(len(held))):
            raise BrokenCheckpoint(f"the experts' files hold numbers {sorted(held)} of {layer}*: some are misnamed.")
    config = model.get("ds_config")
    is_data_first = bool(config.get("use_data_before_expert_parallelism")) if isinstance(config, dict) else False
    return Experts({layer: len(held) for layer, held in numbers.items()}, is_data_first)
