"""An output is written into a staging folder, synced, and appears by one rename: whole, or not at all.

While OUT is being made, the folder `.OUT.wsm-staging` lies next to it. Only its owner can enter it:

    output/       will be renamed to OUT; the manifest is the last file that is written into it
    plan.json     the merge: after a kill the same merge continues here, and any other merge is refused
    journal.*     the blocks that are finished (`engine.journal`)
    lock          locked by the process that makes OUT
"""

import errno
import json
import logging
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from wsm_ds.engine.journal import journals_to_claims, require_no_writers
from wsm_ds.errors import OutputExists, UnsafePath, WsmError, few
from wsm_ds.filesystem.durable import move_into_place, replace_text, require_absent, write_text
from wsm_ds.filesystem.locks import hold_lock
from wsm_ds.filesystem.own_files import make_private
from wsm_ds.filesystem.small_files import read_small
from wsm_ds.layouts.frameworks import MANIFEST
from wsm_ds.publishing.identity import NOT_OF_THE_IDENTITY, is_same_merge, is_same_recipe

log = logging.getLogger(__name__)

PLAN = "plan.json"
LOCK = "lock"
STAGING = ".wsm-staging"
OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Staging:
    """The staging folder of one output.

    Attributes:
        out: the output's final folder.
    """

    out: Path

    @property
    def folder(self) -> Path:
        """The staging folder itself."""
        return self.out.parent / f".{self.out.name}{STAGING}"

    @property
    def content(self) -> Path:
        """The folder in it that becomes the output."""
        return self.folder / "output"


class RecordedSource(TypedDict):
    """A source, as a manifest and the plan of an unfinished merge record it."""

    path: str
    tag: str
    step: Annotated[int, Field(strict=True, ge=0)]
    coefficient: float


class _RecordedPlan(TypedDict):
    """What plan.json must hold, so that its merge can be continued."""

    identity: str
    recipe: dict[str, Any]
    sources: Annotated[list[RecordedSource], Field(min_length=1)]


def unfinished_merge(out: Path) -> dict[str, Any] | None:
    """The description of an unfinished merge to `out` (its plan.json); None if it is missing or cannot be read."""
    try:
        recorded: dict[str, Any] = json.loads(read_small(Staging(out).folder / PLAN))
        TypeAdapter(_RecordedPlan).validate_python(recorded)
    except (OSError, ValueError, RecursionError):
        return None
    return recorded


def unfinished_merges(folder: Path) -> Iterator[dict[str, Any]]:
    """The descriptions of all unfinished merges to folders at any depth below `folder`.

    Raises:
        UnsafePath: one of them cannot be read.
    """
    for root, folders, files in os.walk(folder):
        if MANIFEST in files:
            folders.clear()  # a finished output: nothing is staged inside
        for name in [name for name in folders if name.endswith(STAGING)]:
            folders.remove(name)
            out = Path(root) / name.removeprefix(".").removesuffix(STAGING)
            if not os.access(Path(root, name), os.R_OK | os.X_OK):
                raise UnsafePath(
                    f"{Path(root, name)} is the unfinished merge of another user, whose sources cannot be told. Let "
                    "that user finish or remove it."
                )
            recorded = unfinished_merge(out)
            if recorded is not None and not (out / MANIFEST).is_file():
                yield recorded


@contextmanager
def staged(out: Path, described: dict[str, Any], *, restart: bool = False) -> Iterator[Staging]:
    """Makes and locks the staging folder of `out`, or continues in the one that a killed attempt of this merge left.

    If the context ends with an error that the next attempt would meet again, or with a full disk, the staging folder is
    removed. After any other error it stays for the next attempt. `commit` publishes its content.

    Args:
        out: the output's final folder.
        described: the merge as plain data; `described["identity"]` differs from that of every other merge.
        restart: whether to remove what another, unfinished merge has left.

    Raises:
        OutputExists: `out` exists, or an unfinished merge of another identity has its staging folder there.
        OutputLocked: another process is making `out` now, or a rank of an earlier attempt still writes there.
        UnsafePath: the staging folder is a link, another user's, or on another file system.
    """
    require_absent(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Staging(out)
    make_private(staging.folder)
    with ExitStack() as stack:
        try:
            stack.enter_context(hold_lock(staging.folder / LOCK, f"another merge is writing {out}"))
        except OSError:  # a full disk
            with suppress(OSError):
                staging.folder.rmdir()  # not if anything is in it
            raise
        require_no_writers(staging.folder)
        continues = not restart and _continues(staging, described)
        try:
            if not continues:
                _begin(staging, described)
            yield staging
        except BaseException as error:
            if not _may_succeed_later(error):
                shutil.rmtree(staging.folder, ignore_errors=True)
            raise


def _continues(staging: Staging, described: dict[str, Any]) -> bool:
    """Whether the same merge was begun before. Its finished blocks are then ready to be used.

    Raises:
        OutputExists: another merge was begun.
    """
    recorded = unfinished_merge(staging.out)
    if recorded is None:
        return False
    if not is_same_merge(recorded, described):
        raise OutputExists(
            f"{staging.folder} holds a merge that was begun with other arguments or sources "
            f"({few(_differing(recorded, described))} differ). "
            "Run that one again to finish it, or pass --restart to throw it away."
        )
    # 0.1.0 did not record the times.
    if recorded.get("source_times", described["source_times"]) != described["source_times"]:
        log.warning(
            "%s: begun anew, because a source was replaced, or its mode or owner was changed, since the merge was "
            "interrupted", staging.out,
        )  # fmt: skip
        return False
    if not staging.content.is_dir() or staging.content.is_symlink():
        return False
    journals_to_claims(staging.folder)
    log.warning("%s: continuing the merge that was begun there", staging.out)
    return True


def _differing(recorded: dict[str, Any], described: dict[str, Any]) -> list[str]:
    """The parts in which two merges differ."""
    names = [name for name in described if name not in (*NOT_OF_THE_IDENTITY, "recipe")]
    recipe = [] if is_same_recipe(recorded["recipe"], described["recipe"]) else ["recipe"]
    return recipe + [name for name in names if recorded.get(name) != described[name]]


def _begin(staging: Staging, described: dict[str, Any]) -> None:
    """Empties the staging folder for a new merge."""
    # The lock file stays: a process that had opened a removed one would hold a lock that nobody else sees.
    for path in staging.folder.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    staging.content.mkdir()
    replace_text(staging.folder / PLAN, json.dumps(described, indent=2) + "\n")


def _may_succeed_later(error: BaseException) -> bool:
    """Whether the next attempt of the same merge may succeed. It cannot after wrong input or with a full disk."""
    if isinstance(error, WsmError):
        return error.may_pass
    if isinstance(error, OSError):
        return error.errno not in OUT_OF_SPACE
    return isinstance(error, KeyboardInterrupt | SystemExit)


def commit(staging: Staging, manifest: dict[str, Any]) -> None:
    """Writes the manifest, moves the content to its final place, and removes the staging folder.

    Args:
        staging: of a finished output; all its files are synced.
        manifest: the output's manifest, plain data; its `files` are all that the output may hold.

    Raises:
        OutputExists: something has appeared at `staging.out`.
        UnsafePath: the content is not exactly those files.
    """
    _require_only(staging.content, {name: entry["bytes"] for name, entry in manifest["files"].items()})
    write_text(staging.content / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    move_into_place(staging.content, staging.out)
    discard(staging.out)


def _require_only(content: Path, sizes: Mapping[str, int]) -> None:
    """Raises UnsafePath unless a folder holds exactly the files of `sizes` (bytes by name), and folders for them."""
    folders = {parent.as_posix() for name in sizes for parent in PurePath(name).parents}
    found: dict[str, int] = {}
    for path in content.rglob("*"):
        name, status = path.relative_to(content).as_posix(), path.lstat()
        if not (stat.S_ISDIR(status.st_mode) and name in folders) and name != MANIFEST:
            found[name] = status.st_size if stat.S_ISREG(status.st_mode) else -1
    faults = sorted(name for name in found.keys() | sizes.keys() if found.get(name) != sizes.get(name))
    if faults:
        raise UnsafePath(
            f"{content} holds what this merge did not write, or lacks what it wrote: {few(faults)}. Nothing was "
            "published. Find out who changes it and remove what is foreign; then run the same command again."
        )


def discard(out: Path) -> None:
    """Removes the staging folder of a finished output, if a kill has left it."""
    shutil.rmtree(Staging(out).folder, ignore_errors=True)
