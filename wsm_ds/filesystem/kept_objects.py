"""Python objects that this tool keeps in a file of its own, to make them only once: layouts, for example.

A kept object is never needed: whoever reads one can make it again. So a reader accepts nothing doubtful.

Safety. The file is a pickle, and a pickle may call what it names. Three things keep it from doing harm:

- the file must be this user's own: no link, one name, owner and mode 0600. Whoever could write it could also change
  what else this user runs;
- its bytes must have the checksum that stands before them, so a damaged file is not unpickled at all;
- the unpickler knows no names but the classes that are defined in the modules which the caller gives, numpy's arrays
  and dtypes, and pathlib's paths. No function that runs code, opens a file or imports a module is among them.

The file names the version of this package, and no other version reads it.
"""

import io
import os
import pickle
import socket
import stat
import threading
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import xxhash
from typing_extensions import override

from wsm_ds import __version__
from wsm_ds.errors import Interrupted
from wsm_ds.filesystem.own_files import NO_LINKS, create_anew

HEADER = f"wsm_ds {__version__} kept object\n".encode()
OWNER_ONLY = 0o600
DIGEST_BYTES = 16
FOREIGN = frozenset(
    [(f"numpy.{core}.{module}", name) for core in ("_core", "core") for module, name in
     (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))]
    + [("numpy", "ndarray"), ("numpy", "dtype")]
    + [(module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")]
)  # fmt: skip
"""What a kept object may name beside the caller's classes: arrays, dtypes and paths."""


def write_object(path: Path, obj: object) -> None:
    """Writes an object into a file that only this user can read. A reader sees the old file or the new one, whole.

    Several processes may write the same file at once. The file is not synced: if a crash of the machine cuts it short,
    its checksum tells.

    Args:
        path: the file; the folder above it must exist.
        obj: anything that can be pickled.

    Raises:
        OSError: the file cannot be written.
    """
    data = dumps(obj)
    new = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}.new")
    try:
        with os.fdopen(create_anew(new), "wb") as file:
            os.fchmod(file.fileno(), OWNER_ONLY)
            file.write(HEADER + xxhash.xxh3_128_digest(data))
            file.write(data)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def read_object(path: Path, allowed: Sequence[ModuleType]) -> Any:
    """Reads an object that `write_object` has written.

    Args:
        path: the file.
        allowed: the modules whose classes the object may be made of.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a file that this version has written for this user, it is damaged, or it names something
            that is not allowed. The message says what.
        OSError: it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | NO_LINKS)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise ValueError(f"{path} is not a plain file with one name")
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & ~OWNER_ONLY:
            raise ValueError(f"{path} is of user {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o}")
        content = memoryview(file.read())
    start = len(HEADER) + DIGEST_BYTES
    if content[: len(HEADER)] != HEADER:
        raise ValueError(f"{path} is of another version")
    if xxhash.xxh3_128_digest(content[start:]) != content[len(HEADER) : start]:
        raise ValueError(f"{path} is damaged: its checksum differs")
    return loads(content[start:], allowed, str(path))


def dumps(obj: object) -> bytes:
    """Returns an object as bytes for `loads`."""
    return pickle.dumps(obj, protocol=5)


def loads(data: bytes | memoryview, allowed: Sequence[ModuleType], name: str = "what was sent") -> Any:
    """Returns the object that `dumps` has made bytes of. Nothing that the bytes name is run, see the module.

    Args:
        data: the bytes.
        allowed: the modules whose classes the object may be made of.
        name: what the bytes are, for the message.

    Raises:
        ValueError: they name something that is not allowed, or are damaged.
    """
    try:
        return _Unpickler(memoryview(data), allowed).load()
    except Interrupted:
        raise
    except Exception as error:  # a pickle of another Python or numpy may fail in any way
        raise ValueError(f"{name} cannot be read: {type(error).__name__}: {error}") from error


class _Unpickler(pickle.Unpickler):
    """Unpickles objects of the classes that are defined in some modules, arrays and paths."""

    def __init__(self, data: memoryview, allowed: Sequence[ModuleType]) -> None:
        super().__init__(io.BytesIO(data))
        self.allowed = {module.__name__: module for module in allowed}

    @override
    def find_class(self, module_name: str, name: str) -> Any:
        if (module_name, name) in FOREIGN:
            return super().find_class(module_name, name)
        found = vars(self.allowed[module_name]).get(name) if module_name in self.allowed else None
        if not isinstance(found, type) or found.__module__ != module_name:
            raise pickle.UnpicklingError(f"{module_name}.{name} is not allowed")
        return found
