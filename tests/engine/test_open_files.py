"""At most so many files are open, and none afterwards."""

import os
from pathlib import Path

import pytest

from wsm_ds.engine.open_files import OpenFiles


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def test_the_least_recently_used_file_is_closed_first_and_all_at_the_end(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}" for number in range(3)]
    for path in paths:
        path.write_text(path.name)
    with OpenFiles(paths.__getitem__, os.O_RDONLY, 2) as files:
        first, second = files.descriptor(0), files.descriptor(1)
        assert files.descriptor(0) == first
        third = files.descriptor(2)  # closes 1, and may get its descriptor
        assert {files.descriptor(0), files.descriptor(2)} == {first, third}
        assert [os.pread(files.descriptor(number), 9, 0) for number in (0, 1, 2)] == [b"0", b"1", b"2"]
        files.close(2)
        files.close(2)
        assert os.pread(files.descriptor(2), 9, 0) == b"2"
    assert not any(map(is_open, {first, second, third}))


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    with (
        OpenFiles(lambda _: tmp_path / "none", os.O_RDONLY, 2) as files,
        pytest.raises(FileNotFoundError, match="none"),
    ):
        files.descriptor(0)
