"""The layouts that a watch has read, in the memory and in a folder of its own: an unchanged checkpoint is read once.

A window of N checkpoints shares N - 1 of them with the next one, and a watch that is started again meets the same
checkpoints. So a layout is kept with the fingerprint of its checkpoint's files, and counts as long as that is the same.

OUT/.wsm-watch.layouts holds one file for each checkpoint that an open or a future window needs. Only the watch that
holds the lock of OUT writes there. Everything in it may be deleted at any time: it is read from the checkpoints again.
See `kept_objects` for why reading it is safe.
"""

import errno
import logging
import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from wsm_ds import dtypes
from wsm_ds.errors import Interrupted, WsmError
from wsm_ds.filesystem.kept_objects import read_object, write_object
from wsm_ds.filesystem.own_files import make_private
from wsm_ds.layouts import Checkpoint, Layout, fragments, read_layout
from wsm_ds.layouts import layout as layout_module
from wsm_ds.planning.one_save import problem_of
from wsm_ds.torchfile import archive

log = logging.getLogger(__name__)

KEPT = ".wsm-watch.layouts"
"""The folder in that of a watch."""
SUFFIX = ".layout"
MODULES = (dtypes, archive, fragments, layout_module)
"""Where the classes of a layout are defined."""
NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
"""What `stat` gives for a link to nothing, and for a file that is deleted now."""
Key = tuple[str, str, tuple[str, ...]]
"""Path and tag of a checkpoint, and the globals that its files may name: what a layout depends on beside the files."""
Fingerprint = tuple[tuple[str, int, int, int, int], ...]


def fingerprint(folder: Path) -> Fingerprint:
    """Name, size in bytes, times of change (mtime, ctime; ns) and inode of every file of a checkpoint, at any depth.

    Each folder is listed once, and each file has one `stat`.
    """
    return tuple(sorted(_states(folder)))


def _states(folder: str | Path) -> Iterator[tuple[str, int, int, int, int]]:
    try:
        listed = os.scandir(folder)
    except (FileNotFoundError, NotADirectoryError, PermissionError):  # who reads the files will say so
        return
    with listed as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _states(entry.path)
                continue
            try:
                status = entry.stat()
            except OSError as error:
                if error.errno in NO_FILE:
                    continue
                raise
            if stat.S_ISREG(status.st_mode):
                yield entry.path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


@dataclass(frozen=True)
class _Kept:
    """One checkpoint as it was read.

    Attributes:
        fingerprint: of its files, before they were read.
        layout: its layout.
        problem: what `problem_of` says about the layout, in a list; empty if it was not asked yet.
    """

    fingerprint: Fingerprint
    layout: Layout
    problem: tuple[str | None, ...] = ()


class KeptLayouts:
    """Reads layouts, each once as long as the files of its checkpoint do not change.

    Args:
        folder: where layouts are kept on the disk; None: only in the memory.
        is_written: whether new layouts are written there.
    """

    def __init__(self, folder: Path | None = None, *, is_written: bool = True) -> None:
        self.folder, self.is_written = folder, is_written
        self._kept: dict[Key, _Kept] = {}

    def read(self, checkpoint: Checkpoint, allowed_globals: frozenset[str]) -> Layout:
        """Returns the layout of a checkpoint, as `read_layout` does.

        Args:
            checkpoint: the folder.
            allowed_globals: see `read_layout`.

        Raises:
            BrokenCheckpoint, UnsupportedLayout, UnsafePickle: see `read_layout`.
            OSError: the folder is gone, or the file system fails.
        """
        key = (str(checkpoint.path), checkpoint.tag, tuple(sorted(allowed_globals)))
        current = fingerprint(checkpoint.path)  # before the reading, so that a change meanwhile is seen the next time
        kept = self._kept.get(key) or self._load(key)
        if kept is None or kept.fingerprint != current:
            kept = _Kept(current, read_layout(checkpoint, allowed_globals))
            self._store(key, kept)
        self._kept[key] = kept
        return kept.layout

    def read_and_forget(self, checkpoint: Checkpoint, allowed_globals: frozenset[str]) -> Layout:
        """Like `read`, but nothing new stays in the memory: for a caller that needs each layout once."""
        layout = self.read(checkpoint, allowed_globals)
        self._kept.clear()
        return layout

    def problem_of(self, layout: Layout) -> str | None:
        """Returns what shows that the files of a checkpoint are not of one save, as `one_save.problem_of` does.

        Args:
            layout: as `read` has returned it.
        """
        key = next((key for key, kept in self._kept.items() if kept.layout is layout), None)
        if key is None:
            return problem_of(layout)
        kept = self._kept[key]
        if not kept.problem:
            kept = self._kept[key] = replace(kept, problem=(problem_of(layout),))
            self._store(key, kept)
        return kept.problem[0]

    def forget_all_but(self, needed: Collection[Path]) -> None:
        """Forgets the checkpoints that are not needed any more, and deletes their files.

        Args:
            needed: folders of the checkpoints that are still needed.
        """
        paths = set(map(str, needed))
        self._kept = {key: kept for key, kept in self._kept.items() if key[0] in paths}
        if self.folder is None or not self.is_written or not self.folder.is_dir():
            return
        begins = tuple(map(_begin_of_name, paths))
        try:
            for file in self.folder.iterdir():
                if not file.name.startswith(begins):  # also what a kill has left while it was being written
                    file.unlink(missing_ok=True)
        except OSError as error:
            _raise_if_interrupted(error)
            log.debug("%s is not cleared: %s", self.folder, error)

    def _load(self, key: Key) -> _Kept | None:
        """What is kept on the disk for a checkpoint; None if there is nothing, or nothing that can be read."""
        if self.folder is None:
            return None
        try:
            found_key, state, layout, problem = read_object(self.folder / _name(key), MODULES)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            _raise_if_interrupted(error)
            log.debug("%s is read again: %s", key[0], error)
            return None
        if found_key != key:
            return None
        # Checkpoints that are alike share their tables.
        return _Kept(state, replace(layout, fragments=fragments.shared(layout.fragments)), problem)

    def _store(self, key: Key, kept: _Kept) -> None:
        if self.folder is None or not self.is_written:
            return
        try:
            make_private(self.folder)
            write_object(self.folder / _name(key), (key, kept.fingerprint, kept.layout, kept.problem))
        except (OSError, WsmError) as error:
            _raise_if_interrupted(error)
            log.debug("the layout of %s is not kept: %s", key[0], error)


def _raise_if_interrupted(error: Exception) -> None:
    if isinstance(error, Interrupted):
        raise error


def _begin_of_name(path: str) -> str:
    return xxhash.xxh3_64_hexdigest(path.encode(errors="surrogateescape"))


def _name(key: Key) -> str:
    """The name of a checkpoint's file."""
    path, *rest = key
    return f"{_begin_of_name(path)}-{xxhash.xxh3_64_hexdigest(repr(rest).encode(errors='surrogateescape'))}{SUFFIX}"
