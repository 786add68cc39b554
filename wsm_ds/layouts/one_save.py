"""Whether the files of a checkpoint are of one save, as their metadata tells.

DeepSpeed writes into every rank's files what all ranks have alike: the configuration, the optimizer's hyper-parameters
and counters, the loss scale; into model files the counters of the engine. A file that was copied from another step, or
from another run, seldom agrees in all of them. What the values of the tensors tell is in `wsm_ds.planning.one_save`.
"""

import zlib
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from wsm_ds.errors import few
from wsm_ds.layouts.file_names import Rank
from wsm_ds.layouts.hyperparameters import parameter_groups
from wsm_ds.torchfile import Stub, Tensor, TorchFile

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
"""Of a model file; every rank writes them alike (`_common_checkpoint_state`, `runtime/engine.py:5017`)."""
LOSS_SCALE = ("loss_scaler", "dynamic_loss_scale", "clip_grad")
"""Of `optimizer_state_dict`; every rank writes them alike (`state_dict`, `runtime/zero/stage_1_and_2.py:3358`)."""
SETTINGS = ("lr", "initial_lr", "betas", "eps", "weight_decay", "momentum", "step")
"""Of `param_groups`. Others may be a rank's own: D-Adaptation and Prodigy estimate `d` from a rank's partition."""
Facts = dict[str, Hashable]


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
    updates = max((step for _, step in _steps(optim, optim.tree["optimizer_state_dict"])), default=0.0)
    if updates <= model.tree["global_steps"]:
        return []
    return [
        f"the optimizer's step is {updates:g} in {optim.path.name}, but global_steps is "
        f"{model.tree['global_steps']} in {model.path.name}"
    ]


def _engine_facts(file: TorchFile) -> Facts:
    facts = {name: _plain(file, file.tree[name]) for name in COUNTERS if name in file.tree}
    scheduler = file.tree.get("lr_scheduler")
    return facts | _common_facts(file) | _items(file, "lr_scheduler", scheduler)


def _common_facts(file: TorchFile) -> Facts:
    """What both a model file and an optimizer file hold."""
    version = {"ds_version": _plain(file, file.tree["ds_version"])} if "ds_version" in file.tree else {}
    return version | _items(file, "ds_config", file.tree.get("ds_config"))


def _items(file: TorchFile, name: str, values: Any) -> Facts:
    """A fact for each item of a dict."""
    items = values.items() if isinstance(values, Mapping) else ()
    return {f"{name} {key}": _plain(file, value) for key, value in items}


def _optimizer_facts(file: TorchFile) -> Facts:
    state = file.tree["optimizer_state_dict"]
    facts = _common_facts(file) | {name: _plain(file, state[name]) for name in LOSS_SCALE if name in state}
    groups = [group for group in parameter_groups(file) if isinstance(group, dict)]
    for key in SETTINGS:
        facts[f"{key} of the parameter groups"] = _plain(file, [group.get(key) for group in groups])
    facts["the optimizer's step"] = _steps(file, state)
    return facts


def _steps(file: TorchFile, state: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """The count of updates that the optimizer keeps with each of its states, by the state's number."""
    base = state.get("base_optimizer_state") or state.get("optimizer_state_dict")
    states = base.get("state") if isinstance(base, dict) else None
    kept = [(str(number), value["step"]) for number, value in states.items() if _has_step(value)] if states else []
    return tuple((number, file.number(step) if isinstance(step, Tensor) else float(step)) for number, step in kept)


def _has_step(value: Any) -> bool:
    step = value.get("step") if isinstance(value, dict) else None
    return isinstance(step, int | float) or (isinstance(step, Tensor) and step.numel == 1 and step.dtype.is_floating)


def _plain(file: TorchFile, value: Any) -> Hashable:
    """A value that can be compared: texts, numbers and tuples. A tensor of one element becomes its value."""
    if isinstance(value, Tensor):
        if value.numel != 1 or not value.dtype.is_floating:
            return ("tensor", value.dtype.name, value.shape)
        return repr(file.number(value))  # a text: a NaN is not equal to itself
    if isinstance(value, Mapping):
        return tuple(sorted(((repr(key), _plain(file, item)) for key, item in value.items()), key=lambda pair: pair[0]))
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(_plain(file, item) for item in value)
    if isinstance(value, Stub):
        parts = (value.args, value.state, value.items, value.entries)
        return (str(value.callee), *(_plain(file, part) for part in parts))
    if isinstance(value, str | int | float | bool | None):
        return repr(value)
    return type(value).__name__


def _differences(files: Sequence[tuple[TorchFile, Facts]]) -> list[str]:
    """A sentence for each fact in which files differ. It names the files that differ from most others."""
    found = []
    for name in dict.fromkeys(name for _, facts in files for name in facts):
        values = [(file, facts[name]) for file, facts in files if name in facts]
        (common, count), *others = Counter(value for _, value in values).most_common()
        if not others:
            continue
        odd = [(file.path.name, value) for file, value in values if value != common]
        usual = next(file.path.name for file, value in values if value == common)
        found.append(
            f"{name}: {_shown(common)} in {usual}{f' and {count - 1} others' if count > 1 else ''}, "
            + few(f"{_shown(value)} in {file}" for file, value in odd)
        )
    return found


def _shown(value: Hashable) -> str:
    text = str(value)
    # Long values may differ behind their beginning: a checksum shows that they do.
    return text if len(text) <= 60 else f"{text[:57]}… (CRC-32 {zlib.crc32(text.encode()):08x})"
