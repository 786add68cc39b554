"""Names that change within a run: the tensors of older checkpoints get the names that the newest checkpoint has.

A model is wrapped at a resume, for example by `torch.compile`. Then the same tensors have other names from there
on. Only the older checkpoint's layout in memory is renamed: fragments refer to tensors by number, not by name.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from wsm_ds.errors import LayoutMismatch
from wsm_ds.layouts import Layout

SEGMENTS = {
    "_orig_mod": "torch.compile",
    "module": "DistributedDataParallel, DataParallel",
    "_checkpoint_wrapped_module": "checkpoint_wrapper",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "base_layer": "PEFT",
}
"""Parts of names that a wrapper adds, with what adds them. From the sources: torch's `_dynamo/eval_frame.py`
(OptimizedModule), `nn/parallel/distributed.py`, `distributed/algorithms/_checkpoint/checkpoint_wrapper.py` and
`distributed/fsdp/_common_utils.py`; peft's `tuners/tuners_utils.py`."""
PEFT_PREFIX = "base_model.model"
"""What a PeftModel adds in front of all names: peft's `utils/save_and_load.py`."""
_SEGMENT = re.compile(r"(?:^|(?<=[./]))(?:" + "|".join(SEGMENTS) + r")\.")
_PREFIX = re.compile(r"(?:^|(?<=/))" + re.escape(PEFT_PREFIX) + r"\.")


@dataclass(frozen=True)
class MatchedNames:
    """What was renamed in one older checkpoint.

    Attributes:
        tag: of the checkpoint.
        names: the new name of each tensor whose name differs from that of the newest checkpoint.
    """

    tag: str
    names: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain data for the manifest: the number of names, and the first of them."""
        old, new = next(iter(self.names.items()))
        return {"tag": self.tag, "renamed": len(self.names), "example": [old, new]}

    def __str__(self) -> str:
        old, new = next(iter(self.names.items()))
        more = f" and {len(self.names) - 1} more" if len(self.names) > 1 else ""
        return f"{self.tag} ({old} as {new}{more})"


def without_wrappers(name: str) -> str:
    """A tensor's name without the parts that known wrappers add.

    >>> without_wrappers("_orig_mod.layer.0._checkpoint_wrapped_module.weight")
    'layer.0.weight'

    Args:
        name: fully qualified; with several model-parallel ranks, `mp_rank_01/` in front.
    """
    return _PREFIX.sub("", _SEGMENT.sub("", name))


def with_names_of_newest(
    layouts: Sequence[Layout], rules: Mapping[str, Mapping[str, str]]
) -> tuple[tuple[Layout, ...], tuple[MatchedNames, ...]]:
    """Gives the tensors of older checkpoints the names of the newest.

    First the user's rules apply. Then names that differ from the newest checkpoint's only by the parts of known
    wrappers are matched. All other names stay.

    Args:
        layouts: the window, by rising step.
        rules: by tag (or a pattern of tags, with * and ?): regular expressions and their replacements, in order.

    Returns:
        The layouts, and what was renamed in them.

    Raises:
        LayoutMismatch: two tensors of a checkpoint would get the same name; the message names them.
    """
    newest = layouts[-1]
    renamed, matches = [], []
    for layout in layouts[:-1]:
        by_rule = {
            name: _by_rules(name, rule)
            for tag, rule in rules.items()
            if tag == layout.tag or fnmatchcase(layout.tag, tag)
            for name in _all_names(layout)
        }
        named = _renamed(layout, by_rule)
        named = _renamed(named, _by_wrappers(named, newest))
        pairs = zip(_all_names(layout), _all_names(named), strict=True)
        names = {old: new for old, new in pairs if old != new}
        renamed.append(named)
        if names:
            matches.append(MatchedNames(layout.tag, names))
    return (*renamed, newest), tuple(matches)


def _by_rules(name: str, rule: Mapping[str, str]) -> str:
    for pattern, replacement in rule.items():
        name = re.sub(pattern, replacement, name)
    return name


def _by_wrappers(older: Layout, newest: Layout) -> dict[str, str]:
    """The newest's name for each name of `older` that differs from it by known wrappers; {} if no name differs."""
    old_names, new_names = set(_all_names(older)), set(_all_names(newest))
    if old_names == new_names:
        return {}
    only_old = [name for name in _all_names(older) if name not in new_names]
    only_new = [name for name in _all_names(newest) if name not in old_names]
    old_by_core = _by_core(only_old, older)
    new_by_core = _by_core(only_new, newest)
    return {name: new_by_core[core] for core, name in old_by_core.items() if core in new_by_core}


def _by_core(names: Iterable[str], layout: Layout) -> dict[str, str]:
    """The names by what is left of them without wrappers."""
    return {new: old for old, new in _distinct(names, without_wrappers, layout).items()}


def _renamed(layout: Layout, new_names: Mapping[str, str]) -> Layout:
    if not new_names:
        return layout
    named = _distinct(_all_names(layout), lambda name: new_names.get(name, name), layout)
    return replace(
        layout,
        tensors={named[name]: info for name, info in layout.tensors.items()},
        aliases={named[alias]: named[name] for alias, name in layout.aliases.items()},
    )


def _distinct(names: Iterable[str], new_name: Callable[[str], str], layout: Layout) -> dict[str, str]:
    """The new name of each name.

    Raises:
        LayoutMismatch: two of them are equal.
    """
    new_names: dict[str, str] = {}
    olds: dict[str, str] = {}
    for name in names:
        new = new_name(name)
        if new in olds:
            raise LayoutMismatch(
                f"{layout.path}: {olds[new]} and {name} would both be {new}, so nobody knows which of them is the "
                "tensor of that name in the other checkpoints. Say it for each by --rename-sources TAG:PATTERN=NEW."
            )
        new_names[name], olds[new] = new, name
    return new_names


def _all_names(layout: Layout) -> tuple[str, ...]:
    """Names of all tensors, and the further names of tied ones."""
    return (*layout.tensors, *layout.aliases)
