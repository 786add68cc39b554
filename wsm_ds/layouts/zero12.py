"""ZeRO stages 1 and 2, and BF16_Optimizer: flat partitions of each parameter group.

A group's parameters, flattened in `param_shapes` order, form one flat tensor, padded to equal partitions of P
elements; rank r owns [r·P, (r+1)·P). `param_slice_mappings` is not read: under `round_robin_gradients` it follows
another order than the partitions (`_link_all_hp_params`, `runtime/zero/stage_1_and_2.py:824`), while `param_shapes`
follows the partitions' (`_get_zero_param_shapes`, `runtime/engine.py:5448`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from wsm_ds.dtypes import CODES, ITEMSIZES
from wsm_ds.errors import BrokenCheckpoint, few
from wsm_ds.layouts.fragments import FRAGMENT, Ints
from wsm_ds.layouts.layout import NamedTensor, TableBuilder, TensorInfo
from wsm_ds.layouts.optimizer_states import FlatStates, StateForms, forms_of
from wsm_ds.layouts.rank_files import RankFiles, distinct, require_numel
from wsm_ds.layouts.snapshot import SNAPSHOT
from wsm_ds.torchfile import Tensor, TorchFile

MOMENTUM = "momentum_buffer"


class Piece(NamedTuple):
    """Elements [start, start + numel) of the parameter `name`, at element `position` of a flat partition."""

    name: str
    start: int
    numel: int
    position: int


def add_fragments(builder: TableBuilder, files: RankFiles) -> None:
    """Adds every fragment of a stage 1 or 2 checkpoint to `builder`.

    Raises:
        BrokenCheckpoint: the optimizer files contradict each other, or the model file. File and group are named.
    """
    add_module(builder, files)
    groups = files.models[0].tree["param_shapes"]
    optims = distinct(files.optims.values())
    for optim in optims:
        _require_group_count(optim, optim.tree["optimizer_state_dict"], len(groups))
    forms = forms_of(_flats(optims))
    builder.indivisible_states |= forms.indivisible
    for group, shapes in enumerate(groups):
        for flat_group in _flat_groups(files, group, shapes):
            flat_group.add_partitions(builder, files, forms)


def _flats(optims: Iterable[TorchFile]) -> Iterator[FlatStates]:
    """The optimizer's states of every partition, without Muon's momentum, which is that of whole parameters."""
    for optim in optims:
        state = optim.tree["optimizer_state_dict"]
        base = state["base_optimizer_state"]
        for group, master in enumerate(state["single_partition_of_fp32_groups"]):
            states = _states(state, group)
            if is_muon(base, group):
                states = {name: value for name, value in states.items() if name != MOMENTUM}
            # Elastic checkpoints trim the states as they trim the masters; others save them with the padding
            # (`_get_state_without_padding`, runtime/zero/stage_1_and_2.py:3338).
            yield FlatStates(states, master.numel if isinstance(base, list) else _partition_numel(state, group))


def _partition_numel(state: dict[str, Any], group: int) -> int:
    """Elements of a rank's partition, padding included.

    ZeRO trims the padding off the masters that it saves (`_get_groups_without_padding`,
    `runtime/zero/stage_1_and_2.py:3327`), BF16_Optimizer does not (`runtime/bf16_optimizer.py:633`).
    """
    stored: int = state["single_partition_of_fp32_groups"][group].numel
    # Only the ZeRO class writes `zero_stage`, so its absence shows BF16_Optimizer.
    return stored + int(state["group_paddings"][group]) if "zero_stage" in state else stored


@dataclass(frozen=True)
class _FlatGroup:
    """The flat tensor of a parameter group, cut into equal partitions. Experts have one for each expert-parallel rank.

    Attributes:
        group: number of the group.
        names: its parameters in the order of the flat tensor.
        alignment: elements of padding after each parameter; missing ones are 0.
        size: elements of a partition.
        members: the optimizer file of each rank, by the number of its partition.
    """

    group: int
    names: tuple[str, ...]
    alignment: tuple[int, ...]
    size: int
    members: dict[int, TorchFile]

    def add_partitions(self, builder: TableBuilder, files: RankFiles, forms: StateForms) -> None:
        """Adds the masters and the optimizer's states of all members to `builder`."""
        numels = np.array([files.tensors[name].numel for name in self.names], dtype=np.int64)
        cuts = _Cuts.of(numels, self.alignment, self.size)
        tensors = np.array([files.tensor_numbers[name] for name in self.names], dtype=np.int64)[cuts.parameter]
        places: dict[str, list[tuple[int, int, int, int, int]]] = {}
        for index, optim in self.members.items():
            file = files.indices[optim.path]
            for kind, flat in self._flats(builder, files, optim, index, forms).items():
                place = index, file, optim.address(flat), CODES[flat.dtype.name], flat.numel
                places.setdefault(kind, []).append(place)
        for kind, rows in places.items():
            self._add_kind(builder, kind, cuts, tensors, np.array(rows, dtype=np.int64))

    def _add_kind(self, builder: TableBuilder, kind: str, cuts: "_Cuts", tensors: Ints, places: Ints) -> None:
        """Adds the pieces of one kind; a row of `places` is (partition, file, byte offset, dtype, elements)."""
        of_partition = np.full(max(self.members) + 1, -1, dtype=np.int64)
        of_partition[places[:, 0]] = np.arange(len(places))
        is_held = cuts.partition < len(of_partition)
        place = np.where(is_held, of_partition[np.minimum(cuts.partition, len(of_partition) - 1)], -1)
        held = np.flatnonzero(place >= 0)
        _, file, offset, dtype, numel = places[place[held]].T
        ends = cuts.position[held] + cuts.numel[held]
        short = np.flatnonzero(numel < ends)
        if len(short):
            optim = self.members[int(cuts.partition[held[short[0]]])]
            name = f"{kind} of partition {self.group}"
            require_numel(optim, name, int(numel[short[0]]), int(ends[short[0]]))
        rows = np.zeros(len(held), dtype=FRAGMENT)
        rows["tensor"], rows["start"], rows["numel"] = tensors[held], cuts.start[held], cuts.numel[held]
        rows["file"], rows["dtype"] = file, dtype
        rows["offset"] = offset + cuts.position[held] * ITEMSIZES[dtype]
        builder.add_table(kind, rows)

    def _flats(
        self, builder: TableBuilder, files: RankFiles, optim: TorchFile, index: int, forms: StateForms
    ) -> dict[str, Tensor]:
        """A rank's flat tensors by kind. Muon's momentum, which is that of whole parameters, is added at once."""
        state = optim.tree["optimizer_state_dict"]
        states = _states(state, self.group)
        flats = {"master": state["single_partition_of_fp32_groups"][self.group], **forms.of(states)}
        if not is_muon(state["base_optimizer_state"], self.group) or not isinstance(states.get(MOMENTUM), Tensor):
            return flats
        flats.pop(MOMENTUM, None)
        momentum, numbers, file = states[MOMENTUM], files.tensor_numbers, files.indices[optim.path]
        held = pieces(self.names, list(self.alignment), files.tensors, index * self.size, self.size)
        for name, start, numel, position in whole_parameters(held, files.tensors):
            require_numel(optim, f"{MOMENTUM} of partition {self.group}", momentum.numel, position + numel)
            offset = optim.byte_offset(momentum) + position * momentum.dtype.itemsize
            builder.add(MOMENTUM, numbers[name], start, numel, file=file, offset=offset, dtype=momentum.dtype)
        return flats


@dataclass(frozen=True)
class _Cuts:
    """The pieces into which a flat tensor's partitions cut its parameters; all arrays have the shape [pieces].

    Attributes:
        parameter: index of the parameter in the group.
        partition: number of the partition.
        start: first element in the parameter.
        numel: elements.
        position: element in the partition.
    """

    parameter: Ints
    partition: Ints
    start: Ints
    numel: Ints
    position: Ints

    @classmethod
    def of(cls, numels: Ints, alignment: Sequence[int], size: int) -> "_Cuts":
        """Cuts parameters of `numels` elements, with padding after them, into partitions of `size` elements."""
        lengths, size = numels.copy(), max(size, 1)
        lengths[: len(alignment)] += np.array(alignment, dtype=np.int64)[: len(lengths)]
        begins = np.cumsum(lengths) - lengths
        first, last = begins // size, (begins + numels - 1) // size
        counts = np.where(numels > 0, last - first + 1, 0)
        parameter = np.repeat(np.arange(len(numels)), counts)
        within = np.arange(len(parameter)) - np.repeat(np.cumsum(counts) - counts, counts)
        partition = first[parameter] + within
        begin = np.maximum(begins[parameter], partition * size)
        end = np.minimum(begins[parameter] + numels[parameter], (partition + 1) * size)
        return cls(parameter, partition, begin - begins[parameter], end - begin, begin - partition * size)


def _flat_groups(files: RankFiles, group: int, shapes: Mapping[str, Any]) -> list[_FlatGroup]:
    """The flat tensors of a parameter group, and the partitions that the ranks have of them.

    Raises:
        BrokenCheckpoint: a rank's partition has another size than rank 0's, or names a parameter that no model file
            has, or is too small for the group. File and group are named.
    """
    # By the identity of the names: ranks with the same experts have the same object, and have only these names.
    found: dict[tuple[int, tuple[int, ...]], _FlatGroup] = {}
    names, size = tuple(shapes), -1
    for rank, optim in files.optims.items():
        state = optim.tree["optimizer_state_dict"]
        numel = _partition_numel(state, group)
        size = numel if size < 0 else size
        if numel != size:
            raise BrokenCheckpoint(f"{optim.path}: partition {group} holds {numel} elements, that of rank 0 {size}.")
        share = files.experts.share(optim, group, names, rank, files.world_size)
        alignments = state.get("param_alignment_paddings")
        alignment = tuple(map(int, alignments[group])) if alignments else ()
        flat_group = found.get((id(share.names), alignment))
        if flat_group is None:
            _require_names(files, optim, group, share.names)
            flat_group = found[id(share.names), alignment] = _FlatGroup(group, share.names, alignment, size, {})
            expected = sum(files.tensors[name].numel for name in share.names) + sum(alignment)
            require_numel(optim, f"parameter group {group}", size * share.count, expected)
        flat_group.members[share.index] = optim
    return list(found.values())


def _require_names(files: RankFiles, optim: TorchFile, group: int, names: Iterable[str]) -> None:
    unknown = [name for name in names if name not in files.tensors]
    if unknown:
        raise BrokenCheckpoint(f"{optim.path}: group {group} holds {few(unknown)}, which no model file has.")


def is_muon(base: Any, group: int) -> bool:
    """Whether Muon updates a group.

    In stages 1 and 2 Muon keeps the momentum of whole parameters, on every rank whose partition they touch.

    Args:
        base: the base optimizer's state dict.
        group: number of the group.
    """
    return isinstance(base, dict) and bool(base["param_groups"][group].get("use_muon"))


def whole_parameters(pieces: Iterable[Piece], tensors: dict[str, TensorInfo]) -> list[Piece]:
    """The parameters that lie in a partition, whole or in part, laid out as whole ones one after the other.

    >>> from wsm_ds.dtypes import BY_NAME
    >>> info = TensorInfo((4,), BY_NAME["bf16"], "parameter")
    >>> whole_parameters([Piece("a", 2, 2, 0), Piece("b", 0, 1, 2)], {"a": info, "b": info})
    [Piece(name='a', start=0, numel=4, position=0), Piece(name='b', start=0, numel=4, position=4)]
    """
    whole_pieces, position = [], 0
    for name, *_ in pieces:
        whole_pieces.append(Piece(name, 0, tensors[name].numel, position))
        position += tensors[name].numel
    return whole_pieces


def _require_group_count(optim: TorchFile, state: dict[str, Any], groups: int) -> None:
    """Raises BrokenCheckpoint unless each list of the optimizer file has one entry per group of the model file."""
    base = state["base_optimizer_state"]
    lists = {name: state[name] for name in ("single_partition_of_fp32_groups", "partition_count", "group_paddings")}
    lists["base_optimizer_state"] = base if isinstance(base, list) else base["param_groups"]
    lists["param_alignment_paddings"] = state.get("param_alignment_paddings") or [[]] * groups
    for name, entries in lists.items():
        if len(entries) != groups:
            raise BrokenCheckpoint(
                f"{optim.path}: {name} has {len(entries)} entries, but the model file names {groups} parameter groups."
            )


def pieces(
    names: Iterable[str], alignment: list[int], tensors: dict[str, TensorInfo], first: int, size: int
) -> Iterator[Piece]:
    """Yields the parts of a group's parameters that lie in the partition [first, first + size) of its flat tensor.

    Args:
        names: the group's parameters in the order of the flat tensor.
        alignment: elements of padding after each parameter; missing ones are 0.
        tensors: shapes of the parameters.
        first: the partition's first element in the flat tensor.
        size: elements of the partition.

    >>> from wsm_ds.dtypes import BY_NAME
    >>> info = TensorInfo((4,), BY_NAME["bf16"], "parameter")
    >>> list(pieces(["a", "b"], [], {"a": info, "b": info}, 3, 3))
    [Piece(name='a', start=3, numel=1, position=0), Piece(name='b', start=0, numel=2, position=1)]
    """
    position = 0
    for index, name in enumerate(names):
        numel = tensors[name].numel
        begin, end = max(position, first), min(position + numel, first + size)
        if begin < end:
            yield Piece(name, begin - position, end - begin, begin - first)
        position += numel + (int(alignment[index]) if index < len(alignment) else 0)


def _states(state: dict[str, Any], group: int) -> dict[str, Any]:
    """The optimizer's states of a group, by the optimizer's own names; elastic checkpoints hold a list of groups."""
    base = state["base_optimizer_state"]
    states: dict[str, Any] = base[group] if isinstance(base, list) else base["state"].get(group, {})
    return states


def add_module(builder: TableBuilder, files: RankFiles) -> None:
    """Adds the whole tensors of the model file, and of the files that hold further weights, to `builder`.

    A tied name is added only where it has bytes of its own (DeepSpeed clones tensors when it saves experts).

    Raises:
        BrokenCheckpoint: a weight's shape is not that of `param_shapes`; file and tensor are named.
    """
    model = files.models[0]
    copies = further_copies(files, model)
    _add_weights(builder, files, model, [*(model.tree["module"] or {}).items(), *copies.items()])
    for weights in files.extra_weights:
        _add_weights(builder, files, weights.file, weights.tensors.items())


def _add_weights(
    builder: TableBuilder, files: RankFiles, source: TorchFile, weights: Iterable[tuple[str, Any]]
) -> None:
    kinds = {"parameter": "module", "frozen": "frozen", "buffer": "buffer"}
    numbers, file = files.tensor_numbers, files.indices[source.path]
    is_snapshot = SNAPSHOT in files.models[0].tree
    added: set[tuple[Any, ...]] = set()
    for name, value in weights:
        owner = files.aliases.get(name, name)
        if not isinstance(value, Tensor) or owner not in files.tensors:
            continue
        view = (owner, value.storage.key, value.offset, value.shape, value.stride)
        if view in added:
            continue
        added.add(view)
        info = files.tensors[owner]
        if is_snapshot and value.numel == 0 and info.role == "parameter":
            continue
        if value.shape != info.shape:
            raise BrokenCheckpoint(f"{source.path}: {name} has shape {value.shape}, param_shapes says {info.shape}.")
        builder.add_whole(kinds[info.role], numbers[owner], NamedTensor(name, value, source), info.axes, file=file)


def further_copies(files: RankFiles, model: TorchFile) -> dict[str, Any]:
    """Returns what a model file holds of parameters that were trained and later frozen, by name.

    They are in the optimizer, and also in `frozen_param_fragments` (`_get_zero_frozen_param_attributes`,
    `runtime/engine.py:5433`), from which DeepSpeed loads them.
    """
    fragments = model.tree.get("frozen_param_fragments") or {}
    return {n: value for n, value in fragments.items() if n in files.tensors and files.tensors[n].role == "parameter"}
