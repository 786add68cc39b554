"""A model in memory as an output: which tensor of a checkpoint fills which of its tensors, and in which dtype.

For the plan, each tensor of the model is a file of its own, whose bytes are what `export` would write of it. So a merge
into memory is planned and summed as one into files. `engine.live_tensors` takes the bytes.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from wsm_ds.dtypes import CODES, DType
from wsm_ds.errors import ModelMismatch, UnsupportedLayout, few
from wsm_ds.layouts import Layout
from wsm_ds.layouts.coverage import KIND_OF_ROLE
from wsm_ds.outputs.named_tensors import in_stored_order, new_names, stored_dtype
from wsm_ds.outputs.zero_checkpoint import OutputFiles, OutputWindow
from wsm_ds.planning.names import without_wrappers
from wsm_ds.planning.plan import OutputFile
from wsm_ds.planning.streams import FragmentRow, SourceTables, fragment_table


@dataclass(frozen=True, slots=True)
class ModelTensor:
    """A parameter or a persistent buffer of a model in memory.

    Attributes:
        shape: its sizes.
        dtype: its dtype there.
        number: of its memory. Names with one number are one tensor: they are tied.
    """

    shape: tuple[int, ...]
    dtype: DType
    number: int


@dataclass(frozen=True)
class Filling:
    """How a checkpoint's tensors go into a model.

    Attributes:
        sources: for each name of the model that is filled, the name of the tensor in the checkpoint that has the
            elements. Tied names are all here.
        kept: names of the model that the checkpoint does not have; these tensors stay as they are.
        left_out: names of the checkpoint that the model does not have.
    """

    sources: dict[str, str]
    kept: tuple[str, ...]
    left_out: tuple[str, ...]


def fill(
    newest: Layout,
    model: Mapping[str, ModelTensor],
    rename: Mapping[str, str],
    allow_missing: Collection[str],
    allow_surplus: Collection[str],
) -> Filling:
    """Finds the tensor of a checkpoint for each tensor of a model.

    Names are compared as they are. Those that have no counterpart are compared without the parts that known wrappers
    add (`torch.compile`, DeepSpeed's engine and others). A tensor that is tied in the training fills all its names.

    Args:
        newest: the newest checkpoint of the window.
        model: the tensors that the model's state dict has, by name.
        rename: regular expressions and their replacements, applied to every name of the checkpoint, in order.
        allow_missing: names of the model, or patterns with * and ?, that the checkpoint need not have.
        allow_surplus: names of the checkpoint, after `rename`, or patterns, that the model need not have.

    Raises:
        ModelMismatch: the model lacks tensors or has others, shapes or dtypes do not fit, or the model ties tensors
            that the training kept apart. The message names all of them.
        RecipeError: see `new_names`.
        UnsupportedLayout: the checkpoint is model-parallel, or holds tensors that are not simply stored elements.
    """
    names = new_names((*newest.tensors, *newest.aliases), rename, "in the model", ("",))
    _require_plain(newest, allow_surplus)
    owners = {fqn: newest.aliases.get(fqn, fqn) for fqn in names}
    sources = {name: owners[fqn] for name, fqn in _matched(names, model).items()}
    filled_numbers = {model[name].number for name in sources}
    missing = [name for name in model if name not in sources and model[name].number not in filled_numbers]
    filled = set(sources.values())
    surplus = [name for fqn, name in names.items() if fqn in newest.tensors and fqn not in filled]
    faults = [
        _only("the model has {}, which the checkpoint lacks", _not_in(missing, allow_missing)),
        _only("the checkpoint has {}, which the model lacks", _not_in(surplus, allow_surplus)),
        *_unfitting(newest, model, sources),
    ]
    if any(faults):
        raise ModelMismatch(
            f"the model in memory does not fit {newest.path}: {'; '.join(fault for fault in faults if fault)}."
            f" {_prefix_advice(missing, surplus)}Build the model as the training did, give the checkpoint's tensors "
            "other names (`rename`), let tensors of the model stay as they are (`allow_missing`), or leave tensors of "
            "the checkpoint out (`allow_surplus`)."
        )
    return Filling(sources, tuple(missing), tuple(surplus))


def plan_live_model(
    tables: SourceTables,
    window: OutputWindow,
    filling: Filling,
    model: Mapping[str, ModelTensor],
    dtype: DType | None,
) -> OutputFiles:
    """Plans the elements that fill a model: a file for each of its tensors, under one of the names that it has there.

    Args:
        tables: the checkpoints that the plan reads.
        window: the window whose sum fills the model.
        filling: of the window's newest checkpoint, from `fill`.
        model: as for `fill`.
        dtype: to which parameters are rounded first, as `export` does; see `stored_dtype`.

    Raises:
        UnsupportedLayout: see `in_stored_order`.
    """
    newest = window.newest(tables)
    one_name = {model[name].number: name for name in reversed(filling.sources)}  # the first of tied ones
    names_by_source = defaultdict(list)
    for name in one_name.values():
        names_by_source[filling.sources[name]].append(name)
    files: list[OutputFile] = []
    rows_by_role: dict[str, list[FragmentRow]] = {role: [] for role in KIND_OF_ROLE}
    for number, (fqn, info) in enumerate(newest.tensors.items()):
        stored = stored_dtype(info, dtype)
        for name in names_by_source[fqn]:
            rows_by_role[info.role].append(FragmentRow(number, 0, info.numel, len(files), 0, CODES[stored.name]))
            files.append(OutputFile(window.output, name, info.numel * stored.itemsize, (), ()))
    requests = []
    for role, kind in KIND_OF_ROLE.items():
        table = in_stored_order(fragment_table(rows_by_role[role]), newest)
        if len(table):
            requests.append(window.request(kind, tables.renumbered(table, newest)))
    return OutputFiles(tuple(files), tuple(requests))


def _prefix_advice(missing: Sequence[str], surplus: Sequence[str]) -> str:
    """A sentence about the prefix by which most names differ; "" if there is none."""
    example = max(missing, key=len, default="")
    for name in surplus if example else ():
        if name.endswith(f".{example}"):
            pattern, new = f"^{re.escape(name.removesuffix(example))}", ""
        elif example.endswith(f".{name}"):
            pattern, new = "^", example.removesuffix(name)
        else:
            continue
        fitting = len({re.sub(pattern, new, other) for other in surplus} & set(missing))
        if 2 * fitting > len(missing):
            return f"With rename={{{pattern!r}: {new!r}}} {fitting} of the {len(missing)} names would fit. "
    return ""


def _require_plain(newest: Layout, allow_surplus: Collection[str]) -> None:
    """Raises UnsupportedLayout for a checkpoint whose tensors are not whole, or not simply stored elements."""
    if newest.model_parallel_size > 1:
        raise UnsupportedLayout(
            f"{newest.path} is a checkpoint of {newest.model_parallel_size} model-parallel ranks, and its files do "
            "not say how each tensor is split. Merge into a zero checkpoint, and load that with the training code."
        )
    opaque = [f"{name} ({what})" for name, what in newest.opaque.items() if _not_in([name], allow_surplus)]
    if opaque:
        raise UnsupportedLayout(
            f"{newest.path} holds {few(opaque)}, which cannot be merged into a tensor in memory. Leave them out "
            "(allow_surplus), and set them in your program."
        )


def _matched(names: Mapping[str, str], model: Mapping[str, ModelTensor]) -> dict[str, str]:
    """For each name of the model that has a counterpart, the name in the checkpoint."""
    matched = {name: fqn for fqn, name in names.items() if name in model}
    by_core: dict[str, list[str]] = defaultdict(list)
    for fqn, name in names.items():
        if name not in matched:
            by_core[without_wrappers(name)].append(fqn)
    rest: dict[str, list[str]] = defaultdict(list)
    for name in model:
        if name not in matched:
            rest[without_wrappers(name)].append(name)
    pairs = {own[0]: by_core[core][0] for core, own in rest.items() if len(own) == len(by_core[core]) == 1}
    return matched | pairs


def _unfitting(newest: Layout, model: Mapping[str, ModelTensor], sources: Mapping[str, str]) -> list[str]:
    """What does not fit of the tensors that both have; "" for no fault of a kind."""
    shapes, dtypes, owners = [], [], defaultdict[int, set[str]](set)
    for name, fqn in sources.items():
        info, tensor = newest.tensors[fqn], model[name]
        owners[tensor.number].add(fqn)
        if info.shape != tensor.shape:
            shapes.append(f"{name} ({list(tensor.shape)} in the model, {list(info.shape)} in the checkpoint)")
        if not _is_convertible(info.dtype, tensor.dtype):
            dtypes.append(f"{name} ({tensor.dtype.name} in the model, {info.dtype.name} in the checkpoint)")
    tied = [" and ".join(sorted(fqns)) for fqns in owners.values() if len(fqns) > 1]
    return [
        _only("shapes differ: {}", shapes),
        _only("dtypes that no conversion joins: {}", dtypes),
        _only("the model ties tensors that the training kept apart: {}", tied),
    ]


def _is_convertible(source: DType, target: DType) -> bool:
    """Whether elements keep their meaning in another dtype: real numbers are rounded, all others must be the same."""
    return source == target or (source.is_floating and target.is_floating)


def _not_in(names: Iterable[str], patterns: Collection[str]) -> list[str]:
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)]


def _only(text: str, names: Collection[str]) -> str:
    return text.format(few(names)) if names else ""
