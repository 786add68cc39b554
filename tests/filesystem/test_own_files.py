"""In a folder where everybody may write, nothing that another user has put there is followed or taken over."""

import os
import stat
from pathlib import Path

import pytest

from wsm_ds.errors import OutputLocked, UnsafePath
from wsm_ds.filesystem.durable import append_line, replace_shared_text, replace_text, write_text
from wsm_ds.filesystem.locks import hold_lock, hold_shared, is_held
from wsm_ds.filesystem.own_files import make_private, open_own

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's folder")


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_text("of great value")
    return path


def put_there(kind: str, path: Path, victim: Path) -> None:
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "hard link":
        path.hardlink_to(victim)
    elif kind == "broken link":
        path.symlink_to(victim.with_name("not there"))
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()


@pytest.mark.parametrize("kind", ["link", "hard link", "broken link", "pipe", "folder"])
def test_what_is_no_plain_file_is_refused_and_its_target_untouched(tmp_path: Path, victim: Path, kind: str) -> None:
    path = tmp_path / "lock"
    put_there(kind, path, victim)
    with pytest.raises(UnsafePath, match=r"lock is a link, or no regular file"), hold_lock(path, "conflict"):
        pass
    with pytest.raises(UnsafePath):
        append_line(path, "line")
    with pytest.raises(UnsafePath):
        open_own(path, os.O_WRONLY)
    assert victim.read_text() == "of great value"
    assert sorted(tmp_path.iterdir()) == sorted([path, victim])


def test_a_file_that_is_made_anew_replaces_a_link_and_not_its_target(tmp_path: Path, victim: Path) -> None:
    for number, write in enumerate((write_text, replace_text)):
        path = tmp_path / f"{number}"
        path.symlink_to(victim)
        path.with_name(f".{path.name}.new").symlink_to(victim)
        write(path, "new")
        assert (path.read_text(), path.is_symlink()) == ("new", False)
    replace_shared_text(tmp_path / "shared", "new")
    assert (tmp_path / "shared").read_text() == "new"
    assert victim.read_text() == "of great value"


def test_a_private_folder_is_the_owners_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_private(tmp_path / "made")
        (tmp_path / "old").mkdir(0o2775)  # a staging folder of 0.1.0 in a set-group-ID folder
        (tmp_path / "old").chmod(0o2775)
        make_private(tmp_path / "old")
        (tmp_path / "open").mkdir(0o777)
        with pytest.raises(UnsafePath, match="can be written by everybody"):
            make_private(tmp_path / "open")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"made": 0o700, "old": 0o2700, "open": 0o777}


def test_a_link_or_a_folder_of_another_file_system_is_no_place_to_stage(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(UnsafePath, match="link is a link, or no folder"):
        make_private(tmp_path / "link")
    with pytest.raises(UnsafePath, match=r"/proc is on another file system than /"):
        make_private(Path("/proc"))


@as_root
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir(0o700)
    os.chown(folder, NOBODY, -1)
    with pytest.raises(UnsafePath, match=f"theirs belongs to user {NOBODY}"):
        make_private(folder)
    assert list(tmp_path.iterdir()) == [folder]


def test_a_lock_whose_file_was_removed_meanwhile_is_not_held(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    flock = os.open

    def removed_after_open(*arguments: object) -> int:
        descriptor = flock(*arguments)  # type: ignore[arg-type]
        path.unlink()
        return descriptor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", removed_after_open)
        with pytest.raises(OutputLocked), hold_lock(path, "conflict"):
            pass


def test_a_file_is_held_as_long_as_a_process_reads_it(tmp_path: Path, victim: Path) -> None:
    victim.chmod(0o444)
    before = victim.stat()
    assert not is_held(victim)
    with hold_shared([victim]), hold_shared([victim]):
        assert is_held(victim)
    assert not is_held(victim)
    reading, ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        with hold_shared([victim]):
            os.write(ready, b"x")
            os.kill(os.getpid(), 19)  # SIGSTOP
    os.read(reading, 1)
    assert is_held(victim)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    assert not is_held(victim)
    after = victim.stat()
    assert (before.st_mtime_ns, before.st_ctime_ns, before.st_size) == (
        after.st_mtime_ns,
        after.st_ctime_ns,
        after.st_size,
    )
