"""What file systems may answer, and what then happens."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from wsm_ds.errors import OutputExists
from wsm_ds.filesystem.durable import write_text
from wsm_ds.publishing.staging_folder import MANIFEST, commit, staged

MERGE = {"identity": "a merge", "recipe": {}, "source_times": "then"}


def manifest_of(**sizes: int) -> dict[str, Any]:
    return {"files": {name.replace("__", "/"): {"bytes": nbytes} for name, nbytes in sizes.items()}}


def test_nothing_is_there_before_the_commit_and_everything_after_it(tmp_path: Path) -> None:
    out = tmp_path / "a folder" / "out"
    with staged(out, MERGE) as staging:
        write_text(staging.content / "deep" / "file", "content")
        assert not out.exists()
        commit(staging, manifest_of(deep__file=7))
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*")) == ["deep", "deep/file", MANIFEST]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputExists), staged(out, MERGE) as staging:
        out.mkdir()
        commit(staging, manifest_of())
    assert list(out.iterdir()) == []
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_warned_of_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with staged(tmp_path / "out", MERGE) as staging:
        commit(staging, manifest_of())
    assert (tmp_path / "out" / MANIFEST).is_file()
    assert "without locks" in caplog.text


def test_an_error_inside_removes_what_was_staged(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staged(tmp_path / "out", MERGE) as staging:
        write_text(staging.content / "file", "x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
