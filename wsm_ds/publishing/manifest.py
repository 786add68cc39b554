"""The manifest `wsm_merge.json`: an output's sources and files. Its presence means that the output is complete."""

import datetime
import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from wsm_ds.engine.staged_files import WrittenFile
from wsm_ds.engine.tasks import BLOCK_BYTES
from wsm_ds.errors import VerificationFailed, few
from wsm_ds.filesystem import checksum
from wsm_ds.filesystem.small_files import read_small
from wsm_ds.layouts.frameworks import MANIFEST
from wsm_ds.planning.plan import Plan, describe_output
from wsm_ds.publishing.identity import identity_of, stated
from wsm_ds.publishing.staging_folder import RecordedSource

FORMAT = 2
MOST_BLOCK_BYTES = 1 << 26
"""A larger value in a manifest is refused: `verify` reads whole blocks."""


class _File(TypedDict):
    bytes: Annotated[int, Field(strict=True, ge=0)]
    xxh3_128_of_blocks: str


class _Recorded(TypedDict):
    """What a manifest must hold for its output to be verified."""

    files: dict[str, _File]
    block_bytes: Annotated[int, Field(strict=True, ge=1, le=MOST_BLOCK_BYTES)]
    recipe: dict[str, Any]
    sources: Annotated[list[RecordedSource], Field(min_length=1)]


def description(plan: Plan, number: int) -> dict[str, Any]:
    """What one output is made of.

    Args:
        plan: the whole merge.
        number: of the output in the plan.

    Returns:
        Plain data with an `identity`: a hash that two outputs share exactly if their bytes must be equal. `run` and
        `source_times` are not part of it. `source_times` tells whether a source was replaced since a merge was killed.
    """
    output = plan.outputs[number]
    streams = [stream for stream in plan.streams if any(target.output == number for target in stream.targets)]
    used = [source.used_files for stream in streams for source in stream.sources]
    inputs_read = np.unique(np.concatenate([np.zeros(0, np.int64), *used])).tolist()
    other_folders = _folders_of_other_outputs(plan, number)
    # A plan of several windows reads more checkpoints than this output is made of.
    used = [file for file in inputs_read if other_folders.isdisjoint(plan.resolved_inputs[file].parents)]
    inputs = [plan.inputs[file] for file in used]
    content = {
        "recipe": stated(output.recipe),
        "sources": describe_output(output)["sources"],
        # Paths, sizes and times stand for the content: hashing all sources would cost as much as the merge.
        "inputs": [
            [str(plan.resolved_inputs[file]), plan.inputs[file].nbytes, plan.inputs[file].mtime_ns] for file in used
        ],
        "files": [[file.name, file.nbytes] for _, file in plan.files_of(number)],
        "block_bytes": BLOCK_BYTES,
    }
    # Not in the identity: a copy of a run, or one whose owner changed, gives the same bytes.
    times = hashlib.sha256(json.dumps([source.ctime_ns for source in inputs]).encode()).hexdigest()
    run = str(Path(output.recipe["run"]).resolve())
    return {"identity": identity_of(content), "run": run, "source_times": times} | content


def _folders_of_other_outputs(plan: Plan, number: int) -> set[Path]:
    """The checkpoints that the plan reads and that are not in the window of this output."""
    own = {source.path for source in plan.outputs[number].sources}
    return {source.path for output in plan.outputs for source in output.sources} - own


def make_manifest(plan: Plan, number: int, written: Sequence[WrittenFile]) -> dict[str, Any]:
    """The manifest of one output: recipe, sources with steps and coefficients, files with checksums, versions.

    Args:
        plan: the whole merge.
        number: of the output in the plan.
        written: the output's files, finished.
    """
    output = plan.outputs[number]
    return {
        "format": FORMAT,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in ("wsm_ds", "numpy")},
        "identity": description(plan, number)["identity"],
        "recipe": output.recipe,
        **{name: value for name, value in describe_output(output).items() if name != "out"},
        "block_bytes": BLOCK_BYTES,
        "files": {file.name: {"bytes": file.nbytes, "xxh3_128_of_blocks": file.checksum} for file in written}
        | {name: _text_entry(text) for name, text in output.texts.items()},
    }


def _text_entry(text: str) -> dict[str, Any]:
    """The manifest's entry of a small text file."""
    data = text.encode()
    return {"bytes": len(data), "xxh3_128_of_blocks": checksum.of_bytes(data)}


def read_manifest(out: Path) -> dict[str, Any]:
    """Reads the manifest of a merge's output.

    Raises:
        VerificationFailed: the manifest is missing, or is not what a merge writes; the message names the first faults.
    """
    path = out / MANIFEST
    try:
        manifest = json.loads(read_small(path))
    except FileNotFoundError as error:
        raise VerificationFailed(f"{out} has no {MANIFEST}: it is not a merge's output, or not complete.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise VerificationFailed(f"{path} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise VerificationFailed(f"{path} is not a manifest of format {FORMAT}.")
    try:
        TypeAdapter(_Recorded).validate_python(manifest)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)]
        raise VerificationFailed(f"{path} is not what a merge writes: {few(faults, 3)}.") from error
    return manifest


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
