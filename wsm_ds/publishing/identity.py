"""What makes two merges the same one, however their folders are spelled, and whichever version recorded one of them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NOT_OF_THE_BYTES = ("out", "memory_budget", "threads", "tuned", "data_switch")
"""Fields of a recipe that do not change the output's bytes."""
RUN = "run"
"""Not part of the identity either: the sources are, with their resolved paths. A run can be spelled in many ways."""
NOT_OF_THE_IDENTITY = ("identity", "run", "source_times")
"""Keys of a description that are recorded beside the identity."""


def stated(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe, as plain data, that decide the output's bytes; its paths are resolved."""
    fields = {name: value for name, value in recipe.items() if name not in (*NOT_OF_THE_BYTES, RUN)}
    if fields.get("like") is not None:
        fields["like"] = _resolved(fields["like"])
    if fields.get("carry_from") is not None:
        fields["carry_from"] = _resolved(fields["carry_from"])
    if fields.get("include"):
        fields["include"] = [_resolved(path) for path in fields["include"]]
    return fields


def _resolved(path: Any) -> str:
    return str(Path(str(path)).resolve())


def identity_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of what decides an output's bytes.

    Args:
        content: plain data with the `recipe` as from `stated`.
    """
    hashed = {name: value for name, value in content.items() if name not in NOT_OF_THE_IDENTITY}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()


def is_same_recipe(recorded: Mapping[str, Any], recipe: Mapping[str, Any]) -> bool:
    """Whether two recipes ask for the same bytes from the same sources; their runs are not compared.

    Args:
        recorded: plain data, perhaps of an earlier version, which had fewer fields.
        recipe: plain data of this version. Fields that `recorded` lacks must be empty.
    """
    old, new = stated(recorded), stated(recipe)
    return old.keys() <= new.keys() and all(new[name] == old[name] if name in old else not new[name] for name in new)


def is_same_merge(recorded: Mapping[str, Any], described: Mapping[str, Any]) -> bool:
    """Whether a merge that is recorded, in a manifest or a plan.json, is the described one.

    Args:
        recorded: has `identity` and `recipe`.
        described: as `manifest.description` gives it.
    """
    identity = recorded.get("identity")
    if identity == described["identity"]:
        return True
    recipe = recorded.get("recipe")
    if not isinstance(recipe, Mapping) or not is_same_recipe(recipe, described["recipe"]):
        return False
    # Version 0.1.0 hashed its fields of the recipe as they were spelled, with the run.
    spelled = {name: value for name, value in recipe.items() if name not in NOT_OF_THE_BYTES}
    return identity in [identity_of({**described, "recipe": fields}) for fields in (stated(recipe), spelled)]


def is_of_run(recorded: Mapping[str, Any], run: Path) -> bool:
    """Whether a recorded merge is of this run.

    Args:
        recorded: a plan.json.
        run: the run's folder, spelled in any way.
    """
    resolved = run.resolve()
    if str(resolved) in (recorded.get("run"), _resolved(recorded["recipe"].get(RUN, ""))):
        return True
    # Version 0.1.0 recorded a relative run, and nobody knows relative to what. The paths of sources are resolved.
    return all(Path(source["path"]).is_relative_to(resolved) for source in recorded["sources"])
