"""Reads a ds_config or a run, and runs the checks that fit."""

import json
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from wsm_ds.doctor.config_checks import block, check_config
from wsm_ds.doctor.deepspeed_facts import NEWEST_READ
from wsm_ds.doctor.findings import Finding, Report, by_weight
from wsm_ds.doctor.run_checks import Intent, RunFacts, Save, check_intent, check_run
from wsm_ds.errors import (
    BrokenCheckpoint,
    ForeignFiles,
    RecipeError,
    UnsafePickle,
    UnsupportedLayout,
    WindowError,
    brief,
)
from wsm_ds.filesystem.small_files import read_small
from wsm_ds.layouts import Checkpoint, Layout, find_checkpoints, read_layout
from wsm_ds.layouts.file_names import MODEL_FILE
from wsm_ds.layouts.order import Dated, in_order, require_one_series, without_universal_copies
from wsm_ds.layouts.schema import open_model
from wsm_ds.planning.one_save import require_one_save
from wsm_ds.planning.recipe_options import StrPath

TIMEOUT = "DEEPSPEED_TIMEOUT"
"""DeepSpeed reads the timeout of its process groups, in minutes, from this variable (`constants.py`)."""
LAST = 2
"""Checkpoints of the window that is looked at, if the user names none."""


def examine(
    path: StrPath,
    *,
    intent: Intent | None = None,
    deepspeed: str | None = None,
    allow_globals: frozenset[str] = frozenset(),
) -> Report:
    """Looks for what bites a WSM run. Reads metadata only, and changes nothing.

    Args:
        path: a run's folder, or a ds_config JSON file.
        intent: what the user plans; None: nothing is known.
        deepspeed: the version of DeepSpeed that trains; None: the one that is installed here, or else the one that
            wrote the newest checkpoint, or else the newest one that is known.
        allow_globals: see `read_layout`.

    Raises:
        CheckpointNotFound: the run holds no checkpoint.
        RecipeError: the file is not a JSON object, or `deepspeed` is not a version; names it.
        OSError: the path cannot be read.
    """
    intent = intent or Intent()
    place = Path(path)
    if place.is_dir():
        return _examine_run(place, intent, deepspeed, allow_globals)
    config = _read_config(place)
    version, origin = judged_version(deepspeed, None)
    findings = [*check_config(config, version), *check_intent(intent), *_first_window(config, intent)]
    return Report(str(place), str(version), origin, by_weight(findings))


def judged_version(named: str | None, saved: str | None) -> tuple[Version, str]:
    """Returns the version of DeepSpeed to judge for, and how it is known.

    Args:
        named: by the user.
        saved: in the newest checkpoint.

    Raises:
        RecipeError: `named` is not a version.
    """
    try:
        here = installed_version("deepspeed")
    except PackageNotFoundError:
        here = None
    for text, origin in ((named, "--deepspeed"), (here, "installed here"), (saved, "wrote the newest checkpoint")):
        if text is None:
            continue
        try:
            return Version(text), origin
        except InvalidVersion:
            if text is named:
                raise RecipeError(f"deepspeed (--deepspeed): {named!r} is not a version such as 0.19.8.") from None
    return NEWEST_READ, "the newest version that is known"


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(read_small(path))
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is not a ds_config: {error}. Give a JSON file, or a run's folder.") from None
    if not isinstance(config, dict):
        raise RecipeError(f"{path} is not a ds_config: it holds {brief(config)}, not an object.")
    return config


def _first_window(config: Mapping[str, Any], intent: Intent) -> list[Finding]:
    """When the first window of the plan can be merged, and whether training ends before."""
    warmup = block(block(config, "scheduler"), "params").get("warmup_num_steps")
    if not (isinstance(warmup, int) and intent.interval_steps and intent.last):
        return []
    first = -(-max(warmup, 1) // intent.interval_steps) * intent.interval_steps
    step = first + (intent.last - 1) * intent.interval_steps
    ends_before = intent.steps is not None and intent.steps < step
    return [
        Finding(
            name="first-window",
            level="error" if ends_before else "note",
            found=f"the warmup has {warmup} steps; a window of {intent.last} checkpoints, one every "
            f"{intent.interval_steps} steps, lies after it from step {step} on",
            effect=f"training ends at step {intent.steps} (--steps), before a window is complete"
            if ends_before
            else "earlier windows reach into the warmup and are refused",
            cure="save more often, choose a shorter window or a shorter warmup" if ends_before else "nothing",
            source="scheduler.params.warmup_num_steps, --interval, --last",
        )
    ]


def _examine_run(run: Path, intent: Intent, deepspeed: str | None, allowed: frozenset[str]) -> Report:
    checkpoints = without_universal_copies(find_checkpoints(run))
    mixed = _mixed_runs(run, checkpoints)
    dated = in_order(checkpoints)
    unreadable = [_unreadable(item.checkpoint, item.problem) for item in dated if item.problem is not None]
    known = [item for item in dated if item.problem is None]
    if not known:
        version, origin = judged_version(deepspeed, None)
        return Report(str(run), str(version), origin, by_weight([*mixed, *unreadable]))
    window: list[Layout] = []
    for item in known[-(intent.last or LAST) :]:
        try:
            window.append(read_layout(item.checkpoint, allowed))
            require_one_save(window[-1:], ())
        except (BrokenCheckpoint, ForeignFiles, UnsupportedLayout, UnsafePickle) as error:
            unreadable.append(_unreadable(item.checkpoint, error))
    model = _model(known[-1].checkpoint, allowed)
    version, origin = judged_version(deepspeed, _text(model.get("ds_version")))
    status = os.statvfs(run)
    saves = tuple(_save(item) for item in known)
    facts = RunFacts(run, saves, tuple(window), status.f_bavail * status.f_frsize)
    config = model.get("ds_config")
    findings = [
        *mixed,
        *unreadable,
        *(check_config(config, version) if isinstance(config, dict) else ()),
        *check_run(facts, intent, version, _timeout_s()),
        *_update(_text(model.get("ds_version")), version),
    ]
    return Report(str(run), str(version), origin, by_weight(findings))


def _mixed_runs(run: Path, checkpoints: list[Checkpoint]) -> list[Finding]:
    try:
        require_one_series(run, checkpoints)
    except WindowError as error:
        return [
            Finding(
                name="several-runs",
                level="error",
                found="the folder holds checkpoints of more than one run",
                effect=str(error),
                cure="give the folder of one run, or choose checkpoints by --tags",
                source="the names of the folders",
            )
        ]
    return []


def _update(saved: str | None, version: Version) -> list[Finding]:
    if saved is None or saved == str(version):
        return []
    return [
        Finding(
            name="other-deepspeed",
            level="note",
            found=f"the newest checkpoint was written by DeepSpeed {saved}, not {version}",
            effect="defaults differ between versions; each finding says since when",
            cure="compare the release notes before you resume with another version",
            source="ds_version in the checkpoint",
        )
    ]


def _unreadable(checkpoint: Checkpoint, error: Exception) -> Finding:
    return Finding(
        name="unreadable-checkpoint",
        level="error",
        found=f"{checkpoint.tag} cannot be merged",
        effect=str(error),
        cure="what the message says; a save that goes on now is complete when it has ended",
        source="wsm-ds inspect",
    )


def _model(checkpoint: Checkpoint, allowed: frozenset[str]) -> dict[str, Any]:
    """What a model file of a checkpoint, whose step is known, holds beside the weights; empty if it cannot be read."""
    for path in sorted(path for path in checkpoint.path.iterdir() if MODEL_FILE.match(path.name)):
        try:
            return dict(open_model(path, allowed).tree)
        except (BrokenCheckpoint, UnsupportedLayout, UnsafePickle):
            continue
    return {}


def _save(dated: Dated) -> Save:
    statuses = [path.stat() for path in dated.checkpoint.path.rglob("*") if path.is_file()]
    times = [status.st_mtime for status in statuses]
    nbytes = sum(status.st_size for status in statuses)
    return Save(dated.checkpoint.tag, dated.latest, nbytes, min(times), max(times))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _timeout_s() -> float | None:
    """The timeout that the environment sets, in seconds."""
    try:
        return int(os.environ[TIMEOUT]) * 60.0
    except (KeyError, ValueError):
        return None
