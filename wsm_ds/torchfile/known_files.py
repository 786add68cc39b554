"""Torch files are understood once: a file that is like an earlier one has the same records and the same object tree.

Reading a rank file takes a tenth of a millisecond, understanding it takes ten. Every rank's model file of ZeRO stage 3
has the same pickle, and so has the optimizer file of one rank at every step, if the optimizer keeps its step in a
tensor. All bytes of the metadata are compared: nothing is taken from a file's name or from a checksum alone.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from wsm_ds.errors import UnsupportedLayout
from wsm_ds.sizes import format_size
from wsm_ds.torchfile.archive import Archive, Directory, archive_of, checked_crc
from wsm_ds.torchfile.frames import Frame, FrameKey, can_frame, key_of, root_of
from wsm_ds.torchfile.raw_file import MOST_PICKLE_BYTES, SMALL_FILE_BYTES, RawFile
from wsm_ds.torchfile.unpickle import unpickle
from wsm_ds.torchfile.zip_entries import read_entries

MOST_OF_A_KEY = 16
"""Each lookup compares with all values of a key."""
Key = TypeVar("Key")
Value = TypeVar("Value")
KEPT_WHOLE_BYTES, KEPT_FRAME_BYTES, KEPT_PICKLE_BYTES = 1 << 24, 1 << 24, 1 << 24
"""Bytes of the files, frames and pickles that are kept. An object tree takes some ten times its pickle."""


@dataclass(eq=False)
class Form:
    """What files that are alike have in common.

    Attributes:
        pickled: the bytes of `data.pkl`.
        tree: what they mean. Nobody may change it.
        memo: results of `once_per_form`.
    """

    pickled: bytes
    tree: Any
    memo: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _WholeFile:
    """A small file, cut at each occurrence of its folder's name."""

    pieces: list[bytes]
    directory: Directory
    crcs: NDArray[np.uint32]
    form: Form


class _Recent(Generic[Key, Value]):
    """The values that were used last, a few for each key. The oldest go when all together are larger than `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit, self.nbytes = limit, 0
        self.values: OrderedDict[Key, list[tuple[Value, int]]] = OrderedDict()

    def find(self, key: Key, is_meant: Callable[[Value], Any]) -> Any:
        """The first result of `is_meant` for the values of a key that is not None."""
        for value, _ in reversed(self.values.get(key, ())):
            found = is_meant(value)
            if found is not None:
                self.values.move_to_end(key)
                return found
        return None

    def add(self, key: Key, value: Value, nbytes: int) -> None:
        of_key = self.values.setdefault(key, [])
        of_key.append((value, nbytes))
        self.values.move_to_end(key)
        self.nbytes += nbytes
        if len(of_key) > MOST_OF_A_KEY:
            self.nbytes -= of_key.pop(0)[1]
        while self.nbytes > self.limit and (len(self.values) > 1 or len(self.values[key]) > 1):
            oldest = next(iter(self.values))
            self.nbytes -= self.values[oldest].pop(0)[1]
            if not self.values[oldest]:
                del self.values[oldest]


_WHOLE: _Recent[tuple[FrameKey, Any], _WholeFile] = _Recent(KEPT_WHOLE_BYTES)
_FRAMES: _Recent[FrameKey, Frame] = _Recent(KEPT_FRAME_BYTES)
_FORMS: _Recent[tuple[Directory, int, int, Any], Form] = _Recent(KEPT_PICKLE_BYTES)
_LOCK = threading.RLock()


def understand(raw: RawFile, allowed_globals: frozenset[str]) -> tuple[Archive, Form]:
    """Returns the records and the object tree of a torch file.

    Args:
        raw: the file.
        allowed_globals: see `unpickle`.

    Raises:
        BrokenCheckpoint, UnsafePickle, UnsupportedLayout: as `read_entries` and `unpickle`.
        UnsupportedLayout: the pickle is larger than `MOST_PICKLE_BYTES`.
    """
    # A subclass may allow more than its names say.
    allowed = (type(allowed_globals), allowed_globals)
    root = root_of(raw)
    key = key_of(raw, root)
    with _LOCK:
        is_small = bool(root) and raw.nbytes <= SMALL_FILE_BYTES
        if is_small and (key, allowed) in _WHOLE.values:
            pieces = raw.head.split(root)
            whole = _WHOLE.find((key, allowed), lambda known: known if known.pieces == pieces else None)
            if whole is not None:
                return _archive(raw, whole.directory, whole.crcs), whole.form
        archive = _read_archive(raw, root, key)
        form = _form(raw, archive, allowed_globals, allowed)
        # A file whose pickle names its own folder means something else than the same pickle of another file.
        is_mostly_metadata = 8 * archive.directory.data_bytes <= archive.nbytes
        if is_small and is_mostly_metadata and root[:-1] not in form.pickled:
            whole = _WholeFile(raw.head.split(root), archive.directory, archive.crcs, form)
            _WHOLE.add((key, allowed), whole, raw.nbytes)
        return archive, form


def _archive(raw: RawFile, directory: Directory, crcs: NDArray[np.uint32]) -> Archive:
    return Archive(raw.path, raw.nbytes, directory, crcs, raw.mtime_ns, raw.ctime_ns)


def _read_archive(raw: RawFile, root: bytes, key: FrameKey) -> Archive:
    def archive_like(frame: Frame) -> Archive | None:
        crcs = frame.crcs_of(raw, root)
        return None if crcs is None else _archive(raw, frame.directory, crcs)

    known: Archive | None = _FRAMES.find(key, archive_like) if root else None
    if known is not None:
        return known
    entries = read_entries(raw)
    archive = archive_of(raw.path, raw.nbytes, [entry.record for entry in entries], raw.mtime_ns, raw.ctime_ns)
    if can_frame(raw, root, entries):
        frame = Frame(raw, root, entries, archive.directory)
        _FRAMES.add(key, frame, frame.nbytes)
    return archive


def _form(raw: RawFile, archive: Archive, allowed_globals: frozenset[str], allowed: Any) -> Form:
    record = archive.records["data.pkl"]
    if record.nbytes > MOST_PICKLE_BYTES:
        raise UnsupportedLayout(
            f"{raw.path}: data.pkl has {format_size(record.nbytes)}, more than {format_size(MOST_PICKLE_BYTES)}: save "
            "client state of that size as tensors."
        )
    pickled = raw.between(record.offset, record.offset + record.nbytes)
    key = (archive.directory, record.nbytes, record.crc, allowed)
    known: Form | None = _FORMS.find(key, lambda form: form if form.pickled == pickled else None)
    if known is not None:
        return known
    form = Form(pickled, unpickle(archive, checked_crc(raw.path, record, pickled), allowed_globals))
    _FORMS.add(key, form, len(pickled))
    return form
