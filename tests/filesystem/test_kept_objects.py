"""A kept object comes back as it was, or its file is refused: it is never trusted."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from wsm_ds import dtypes
from wsm_ds.filesystem.kept_objects import HEADER, read_object, write_object

ALLOWED = (dtypes,)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kept"


def forge(path: Path, data: bytes) -> None:
    """A file with a right header and checksum around any pickle."""
    path.write_bytes(HEADER + xxhash.xxh3_128_digest(data) + data)
    path.chmod(0o600)


class Called:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def test_classes_arrays_and_paths_come_back(path: Path) -> None:
    rows = np.zeros(3, dtype=[("a", "i8"), ("b", "i1")])
    rows["a"] = [1, 2, 3]
    write_object(path, {"type": dtypes.BY_NAME["bf16"], "rows": rows, "every second": rows["a"][::2], "path": path})
    found = read_object(path, ALLOWED)
    assert found["type"] == dtypes.BY_NAME["bf16"]
    assert found["rows"].dtype == rows.dtype
    assert found["rows"].tolist() == [(1, 0), (2, 0), (3, 0)]
    assert found["every second"].tolist() == [1, 3]
    assert found["path"] == path
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["kept"]


def test_a_new_object_replaces_the_old_one_and_a_failed_one_does_not(path: Path) -> None:
    write_object(path, 1)
    write_object(path, 2)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        write_object(path, lambda: 3)
    assert read_object(path, ()) == 2
    assert [file.name for file in path.parent.iterdir()] == ["kept"]


@pytest.mark.parametrize(
    "obj",
    [
        Called(os.system, "true"),
        Called(eval, "1"),
        Called(dtypes.narrow, 1, 2),  # a function of an allowed module
        Called(np.load, "x"),
        Called(getattr, 1, "real"),
        pickle.PickleBuffer,
    ],
)
def test_nothing_else_is_named(path: Path, obj: object) -> None:
    forge(path, pickle.dumps(obj, protocol=5))
    with pytest.raises(ValueError, match="is not allowed"):
        read_object(path, ALLOWED)


def test_a_module_that_an_allowed_one_imports_is_not_allowed(path: Path) -> None:
    forge(path, b"\x80\x04\x8c\x0dwsm_ds.dtypes\x8c\x06np.lib\x93.")
    with pytest.raises(ValueError, match="is not allowed"):
        read_object(path, ALLOWED)


def test_a_damaged_file_is_refused_at_any_byte(path: Path) -> None:
    write_object(path, {"a": 1})
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(ValueError, match=r"damaged|version"):
            read_object(path, ())
        path.write_bytes(whole[:position])
        with pytest.raises(ValueError, match=r"damaged|version"):
            read_object(path, ())


def test_a_file_of_others_and_no_plain_file_are_refused(path: Path, tmp_path: Path) -> None:
    write_object(path, 1)
    path.chmod(0o620)
    with pytest.raises(ValueError, match="mode 0620"):
        read_object(path, ())
    path.chmod(0o600)
    (tmp_path / "second").hardlink_to(path)
    with pytest.raises(ValueError, match="one name"):
        read_object(path, ())
    (tmp_path / "second").unlink()
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OSError, match="symbolic"):
        read_object(tmp_path / "link", ())
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="plain file"):
        read_object(tmp_path / "pipe", ())
    with pytest.raises(FileNotFoundError):
        read_object(tmp_path / "nothing", ())


def test_a_pickle_of_the_wrong_form_is_refused(path: Path) -> None:
    for data in (b"", b".", b"\x80\x05]", b"\x80\x05\x94\x94"):
        forge(path, data)
        with pytest.raises(ValueError, match="cannot be read"):
            read_object(path, ())
