"""Whether the files of a checkpoint are of one save, as their metadata tells.

DeepSpeed writes into every rank's files what all ranks have alike: the configuration, the optimizer's hyper-parameters
and counters, the loss scale; into model files the counters of the engine. A file that was copied from another step, or
from another run, seldom agrees in all of them. What the values of the tensors tell is in `wsm_ds.planning.one_save`.
"""

import zlib
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from wsm_ds.errors import few
from wsm_ds.layouts.file_names import Rank
from wsm_ds.layouts.hyperparameters import parameter_groups
from wsm_ds.torchfile import Stub, Tensor, TorchFile, once_per_form

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
"""Of a model file; every rank writes them alike (`_common_checkpoint_state`, `runtime/engine.py:5017`)."""
LOSS_SCALE = ("loss_scaler", "dynamic_loss_scale", "clip_grad")
"""Of `optimizer_state_dict`; every rank writes them alike (`state_dict`, `runtime/zero/stage_1_and_2.py:3358`)."""
SETTINGS = ("lr", "initial_lr", "betas", "eps", "weight_decay", "momentum", "step")
"""Of `param_groups`. Others may be a rank's own: D-Adaptation and Prodigy estimate `d` from a rank's partition."""


class _Number(NamedTuple):
    """A tensor of one element among a file's facts; its value is not read where its CRC-32 tells enough.

    Attributes:
        number: among such tensors of the file.
        dtype: name of its dtype.
    """

    number: int
    dtype: str


class _FormFacts(NamedTuple):
    """The facts of files that are alike.

    Attributes:
        facts: by name.
        numbers: the tensors that a `_Number` stands for.
        records: numbers of the records that these tensors fill.
    """

    facts: tuple[tuple[str, Hashable], ...]
    numbers: tuple[Tensor, ...]
    records: list[int]


def contradictions(models: Mapping[Rank, TorchFile], optims: Mapping[Rank, TorchFile]) -> tuple[str, ...]:
    """Returns what the metadata of a checkpoint's files contradicts itself in; nothing if they may be of one save.

    Args:
        models: the model files.
        optims: the optimizer files.

    Returns:
        Sentences that name the files and what differs.
    """
    found = _differences([(file, _engine_facts(file)) for file in models.values()])
    for mp in sorted({rank.mp for rank in optims}):
        # Ranks of another pipeline stage have other parameters, and may have other parameter groups.
        found += _differences([(file, _optimizer_facts(file)) for rank, file in optims.items() if rank.mp == mp])
    model, optim = next(iter(models.values())), next(iter(optims.values()))
    found += _differences([(model, _common_facts(model)), (optim, _common_facts(optim))])
    return (*found, *_too_many_updates(model, optim))


def _too_many_updates(model: TorchFile, optim: TorchFile) -> list[str]:
    """An optimizer may have made fewer updates than the engine (it was made anew at a resume), but not more."""
    steps = _steps(optim.tree["optimizer_state_dict"]).values()
    updates = max((optim.number(s) if isinstance(s, Tensor) else float(s) for s in steps), default=0.0)
    if updates <= model.tree["global_steps"]:
        return []
    return [
        f"the optimizer's step is {updates:g} in {optim.path.name}, but global_steps is "
        f"{model.tree['global_steps']} in {model.path.name}"
    ]


@once_per_form
def _engine_facts(file: TorchFile) -> _FormFacts:
    facts = {name: file.tree[name] for name in COUNTERS if name in file.tree}
    return _form_facts(file, facts | _common(file) | _items("lr_scheduler", file.tree.get("lr_scheduler")))


@once_per_form
def _common_facts(file: TorchFile) -> _FormFacts:
    """What both a model file and an optimizer file hold."""
    return _form_facts(file, _common(file))


@once_per_form
def _optimizer_facts(file: TorchFile) -> _FormFacts:
    state = file.tree["optimizer_state_dict"]
    facts = _common(file) | {name: state[name] for name in LOSS_SCALE if name in state}
    groups = [group for group in parameter_groups(file) if isinstance(group, dict)]
    for key in SETTINGS:
        facts[f"{key} of the parameter groups"] = [group.get(key) for group in groups]
    facts["the optimizer's step"] = list(_steps(state).items())
    return _form_facts(file, facts)


def _common(file: TorchFile) -> dict[str, Any]:
    version = {"ds_version": file.tree["ds_version"]} if "ds_version" in file.tree else {}
    return version | _items("ds_config", file.tree.get("ds_config"))


def _items(name: str, values: Any) -> dict[str, Any]:
    """A fact for each item of a dict."""
    items = values.items() if isinstance(values, Mapping) else ()
    return {f"{name} {key}": value for key, value in items}


def _steps(state: Mapping[str, Any]) -> dict[str, Any]:
    """The count of updates that the optimizer keeps with each of its states, by the state's number."""
    base = state.get("base_optimizer_state") or state.get("optimizer_state_dict")
    states = base.get("state") if isinstance(base, dict) else None
    return {str(number): value["step"] for number, value in states.items() if _has_step(value)} if states else {}


def _has_step(value: Any) -> bool:
    step = value.get("step") if isinstance(value, dict) else None
    return isinstance(step, int | float) or (isinstance(step, Tensor) and step.numel == 1 and step.dtype.is_floating)


def _form_facts(file: TorchFile, facts: Mapping[str, Any]) -> _FormFacts:
    numbers: list[Tensor] = []
    plain = tuple((name, _plain(value, numbers)) for name, value in facts.items())
    records = [file.archive.directory.numbers[file.record(tensor).name] for tensor in numbers]
    return _FormFacts(plain, tuple(numbers), records)


def _plain(value: Any, numbers: list[Tensor]) -> Hashable:
    """A value that can be compared: texts, numbers and tuples. A tensor of one element is added to `numbers`."""
    if isinstance(value, Tensor):
        if value.numel != 1 or not value.dtype.is_floating:
            return ("tensor", value.dtype.name, value.shape)
        numbers.append(value)
        return _Number(len(numbers) - 1, value.dtype.name)
    if isinstance(value, Mapping):
        items = [(repr(key), _plain(item, numbers)) for key, item in value.items()]
        return tuple(sorted(items, key=lambda pair: pair[0]))
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(_plain(item, numbers) for item in value)
    if isinstance(value, Stub):
        parts = (value.args, value.state, value.items, value.entries)
        return (str(value.callee), *(_plain(part, numbers) for part in parts))
    if isinstance(value, str | int | float | bool | None):
        return repr(value)
    return type(value).__name__


def _values(file: TorchFile, numbers: Sequence[Tensor]) -> tuple[str, ...]:
    """The values of tensors of one element, as texts: a NaN is not equal to itself."""
    return tuple(repr(file.number(tensor)) for tensor in numbers)


def _fingerprint(file: TorchFile, found: _FormFacts) -> Hashable:
    """What differs in files of different numbers. The CRC-32s of a few bytes differ exactly if these do."""
    if not found.numbers:
        return None
    crcs = file.archive.crcs[found.records]
    is_told = crcs.all() and all(t.numel == t.storage.numel and t.dtype.itemsize <= 4 for t in found.numbers)
    return crcs.tobytes() if is_told else _values(file, found.numbers)


def _differences(files: Sequence[tuple[TorchFile, _FormFacts]]) -> list[str]:
    """A sentence for each fact in which files differ. It names the files that differ from most others."""
    alike: dict[Hashable, list[TorchFile]] = {}
    for file, found in files:
        alike.setdefault((found.facts, _fingerprint(file, found)), []).append(file)
    if len(alike) <= 1:
        return []
    facts_of = {id(file): found for file, found in files}
    groups = [(members, _with_values(members[0], facts_of[id(members[0])])) for members in alike.values()]
    sentences = []
    for name in dict.fromkeys(name for _, facts in groups for name in facts):
        values = [(members, facts[name]) for members, facts in groups if name in facts]
        counts: Counter[Hashable] = Counter()
        for members, value in values:
            counts[value] += len(members)
        (common, count), *others = counts.most_common()
        if not others:
            continue
        odd = [(file.path.name, value) for members, value in values if value != common for file in members]
        usual = next(members[0].path.name for members, value in values if value == common)
        sentences.append(
            f"{name}: {_shown(common)} in {usual}{f' and {count - 1} others' if count > 1 else ''}, "
            + few(f"{_shown(value)} in {file}" for file, value in odd)
        )
    return sentences


def _with_values(file: TorchFile, found: _FormFacts) -> dict[str, Hashable]:
    values = _values(file, found.numbers)

    def resolved(value: Hashable) -> Hashable:
        if isinstance(value, _Number):
            return values[value.number]
        return tuple(map(resolved, value)) if isinstance(value, tuple) else value

    return {name: resolved(value) for name, value in found.facts}


def _shown(value: Hashable) -> str:
    text = str(value).replace("'", "").replace('"', "")
    # Long values may differ behind their beginning: a checksum shows that they do.
    return text if len(text) <= 60 else f"{text[:57]}… (CRC-32 {zlib.crc32(text.encode()):08x})"
