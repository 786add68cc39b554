"""What file systems may answer, and what then happens."""

import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from wsm_ds.errors import OutputExists, UnsafePath
from wsm_ds.filesystem.durable import write_text
from wsm_ds.layouts.frameworks import MANIFEST
from wsm_ds.publishing.staging_folder import Staging, commit, staged, unfinished_merges

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


def test_while_it_is_made_nobody_else_can_enter_and_then_the_umask_counts(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with staged(tmp_path / "out", MERGE) as staging:
            assert stat.S_IMODE(staging.folder.stat().st_mode) == 0o700
            write_text(staging.content / "deep" / "file", "content")
            commit(staging, manifest_of(deep__file=7))
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) for name in ("", "deep", "deep/file", MANIFEST)]
    assert modes == [0o750, 0o750, 0o640, 0o640]


@pytest.mark.parametrize("change", ["a file", "a folder", "a link", "longer", "gone"])
def test_what_the_merge_did_not_write_is_not_published(tmp_path: Path, change: str) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(UnsafePath, match=r"holds what this merge did not write.*(foreign|file)"),
        staged(out, MERGE) as s,
    ):
        write_text(s.content / "file", "content")
        if change == "a file":
            write_text(s.content / "foreign", "x")
        elif change == "a folder":
            (s.content / "foreign").mkdir()
        elif change == "longer":
            write_text(s.content / "file", "longer content")
        else:
            (s.content / "file").unlink()
            if change == "a link":
                (s.content / "file").symlink_to("/etc/passwd")
        commit(s, manifest_of(file=7))
    assert not out.exists()
    assert Staging(out).content.is_dir()  # somebody looks at it first


def test_on_a_disk_without_room_for_anything_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opening = os.open

    def full(path: Any, flags: int, *arguments: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opening(path, flags, *arguments)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)), staged(tmp_path / "out", MERGE):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_unfinished_merge_of_another_user_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "a" / "out", MERGE):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "access", lambda *_: False)  # root can read everything
    with pytest.raises(UnsafePath, match="unfinished merge of another user"):
        list(unfinished_merges(tmp_path))
