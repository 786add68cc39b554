"""All or nothing: an output is staged beside its place, synced, and appears by one rename.

Beside OUT lies, while it is being made, `.OUT.wsm-staging` with

    output/       what will be renamed to OUT; the manifest is the last file written into it
    plan.json     what is being made, so that the same merge goes on here after a kill, and no other
    journal.*     the blocks that are finished (`journal`)
    lock          held by the process that makes it
"""

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from wsm_ds.engine.journal import journals_to_claims
from wsm_ds.errors import OutputExists, WsmError, few
from wsm_ds.filesystem.durable import move_into_place, replace_text, require_absent, write_text
from wsm_ds.filesystem.locks import hold_lock
from wsm_ds.filesystem.small_files import read_small

log = logging.getLogger(__name__)

MANIFEST = "wsm_merge.json"
PLAN = "plan.json"
LOCK = "lock"
STAGING = ".wsm-staging"
OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Staging:
    """Where an output is made."""

    out: Path

    @property
    def folder(self) -> Path:
        """Everything that belongs to the merge until it is done."""
        return self.out.parent / f".{self.out.name}{STAGING}"

    @property
    def content(self) -> Path:
        """What becomes the output."""
        return self.folder / "output"


class RecordedSource(TypedDict):
    """A source, as a manifest and the plan of a merge that was begun have it."""

    path: str
    tag: str
    step: Annotated[int, Field(strict=True, ge=0)]
    coefficient: float


class _Begun(TypedDict):
    """What a plan must hold for its merge to be gone on with."""

    identity: str
    recipe: dict[str, Any]
    sources: Annotated[list[RecordedSource], Field(min_length=1)]


def begun(out: Path) -> dict[str, Any] | None:
    """What a merge that did not end was making at `out`."""
    try:
        described: dict[str, Any] = json.loads(read_small(Staging(out).folder / PLAN))
        TypeAdapter(_Begun).validate_python(described)
    except (OSError, ValueError, RecursionError):
        return None
    return described


def begun_below(folder: Path) -> Iterator[dict[str, Any]]:
    """What all merges that have begun and not ended are making, at any depth below `folder`."""
    for root, folders, files in os.walk(folder):
        if MANIFEST in files:
            folders.clear()  # a finished output: nothing is staged inside
        for name in [name for name in folders if name.endswith(STAGING)]:
            folders.remove(name)
            out = Path(root) / name.removeprefix(".").removesuffix(STAGING)
            described = begun(out)
            if described is not None and not (out / MANIFEST).is_file():
                yield described


@contextmanager
def staged(out: Path, described: dict[str, Any], *, restart: bool = False) -> Iterator[Staging]:
    """A staging folder for `out`, exclusively ours.

    After an error that the same merge would meet again, or a full disk, it is removed; after any other it stays for the
    next attempt. `commit` has to be called to publish it.

    Args:
        out: the folder to be.
        described: the merge, plain data; `described["identity"]` tells it from any other.
        restart: whether to throw away what another merge has left.

    Raises:
        OutputExists: `out` exists, or another merge has begun there.
        OutputLocked: another process is making it.
    """
    require_absent(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Staging(out)
    staging.folder.mkdir(exist_ok=True)
    with hold_lock(staging.folder / LOCK, f"another merge is writing {out}"):
        _take_over(staging, described, restart)
        try:
            yield staging
        except BaseException as error:
            if not _is_worth_going_on(error):
                shutil.rmtree(staging.folder, ignore_errors=True)
            raise


def _take_over(staging: Staging, described: dict[str, Any], restart: bool) -> None:
    """Goes on with what the same merge has left, or begins anew."""
    left = begun(staging.out)
    if left is not None and not restart:
        if left.get("identity") == described["identity"]:
            journals_to_claims(staging.folder)
            log.warning("%s: going on with the merge that was begun there", staging.out)
            return
        unlike = [key for key in described if key != "identity" and left.get(key) != described[key]]
        raise OutputExists(
            f"{staging.folder} holds a merge that was begun with other arguments or sources ({few(unlike)} differ). "
            "Run that one again to finish it, or pass --restart to throw it away."
        )
    for path in staging.folder.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    staging.content.mkdir()
    replace_text(staging.folder / PLAN, json.dumps(described, indent=2) + "\n")


def _is_worth_going_on(error: BaseException) -> bool:
    """Whether the same merge, started again, may get further: not after a wrong input or a full disk."""
    if isinstance(error, WsmError):
        return error.may_pass
    if isinstance(error, OSError):
        return error.errno not in OUT_OF_SPACE
    return isinstance(error, KeyboardInterrupt | SystemExit)


def commit(staging: Staging, manifest: dict[str, Any]) -> None:
    """Writes the manifest, syncs the folders, renames the content to its place and removes the rest."""
    write_text(staging.content / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    move_into_place(staging.content, staging.out)
    discard(staging.out)


def discard(out: Path) -> None:
    """Removes what a merge has left beside its finished output."""
    shutil.rmtree(Staging(out).folder, ignore_errors=True)
