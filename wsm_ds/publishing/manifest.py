"""The manifest: what an output was made of and what it must hold. Its presence means that the output is whole."""

import datetime
import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from wsm_ds.engine.staged_files import Written
from wsm_ds.engine.tasks import BLOCK_BYTES
from wsm_ds.errors import VerificationFailed, few
from wsm_ds.filesystem import checksum
from wsm_ds.filesystem.small_files import read_small
from wsm_ds.planning.plan import Plan, describe_output
from wsm_ds.publishing.staging_folder import MANIFEST, RecordedSource

FORMAT = 2
MOST_BLOCK_BYTES = 1 << 26
NOT_OF_THE_RESULT = ("out", "memory_budget", "threads")


class _File(TypedDict):
    bytes: Annotated[int, Field(strict=True, ge=0)]
    xxh3_128_of_blocks: str


class _Recorded(TypedDict):
    """What a manifest must hold for its output to be verified."""

    files: dict[str, _File]
    block_bytes: Annotated[int, Field(strict=True, ge=1, le=MOST_BLOCK_BYTES)]
    recipe: dict[str, Any]
    sources: Annotated[list[RecordedSource], Field(min_length=1)]


def description(plan: Plan, part: int) -> dict[str, Any]:
    """What a part is made of, and an `identity` that is the same exactly if the output's bytes must be."""
    chosen = plan.outputs[part]
    streams = [s for s in plan.streams if any(target.output == part for target in s.targets)]
    read = sorted({int(file) for stream in streams for source in stream.sources for file in source.files} - {-1})
    inputs = [plan.inputs[number] for number in read if _is_of(plan, part, plan.inputs[number].path)]
    known = {
        "recipe": {name: value for name, value in chosen.recipe.items() if name not in NOT_OF_THE_RESULT},
        "sources": describe_output(chosen)["sources"],
        "inputs": [[str(source.path.resolve()), source.nbytes, source.mtime_ns] for source in inputs],
        "files": [[output.name, output.nbytes] for _, output in plan.files_of(part)],
        "block_bytes": BLOCK_BYTES,
    }
    return {"identity": hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()} | known


def _is_of(plan: Plan, part: int, path: Path) -> bool:
    """Whether an input belongs to the part's own window, or to none (a file copied beside it)."""
    own = {str(source.path) for source in plan.outputs[part].sources}
    others = {str(source.path) for other in plan.outputs for source in other.sources} - own
    return not any(path.resolve().is_relative_to(other) for other in others)


def make_manifest(plan: Plan, part: int, written: Sequence[Written]) -> dict[str, Any]:
    """Plain data: recipe, sources with steps and coefficients, files with checksums, versions."""
    chosen = plan.outputs[part]
    return {
        "format": FORMAT,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in ("wsm_ds", "numpy")},
        "identity": description(plan, part)["identity"],
        "recipe": chosen.recipe,
        **{name: value for name, value in describe_output(chosen).items() if name != "out"},
        "block_bytes": BLOCK_BYTES,
        "files": {w.name: {"bytes": w.nbytes, "xxh3_128_of_blocks": w.checksum} for w in written}
        | {name: text_entry(text) for name, text in chosen.texts.items()},
    }


def text_entry(text: str) -> dict[str, Any]:
    """The manifest's entry of a small text file."""
    data = text.encode()
    return {"bytes": len(data), "xxh3_128_of_blocks": checksum.of_bytes(data)}


def read_manifest(out: Path) -> dict[str, Any]:
    """The manifest of a merged output.

    Raises:
        VerificationFailed: there is none, or it is not ours.
    """
    path = out / MANIFEST
    try:
        manifest = json.loads(read_small(path))
    except FileNotFoundError as error:
        raise VerificationFailed(f"{out} has no {MANIFEST}: it is not a merge's output, or not whole.") from error
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
