"""A reader never sees a part of a text; a killed writer does no harm; nothing is overwritten by a move."""

import os
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dying import dies_at

from wsm_ds.errors import OutputExists
from wsm_ds.filesystem import durable


def test_a_write_that_writes_less_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: pwrite(descriptor, data[:3], offset))
    with (tmp_path / "file").open("wb") as file:
        durable.write_all(file.fileno(), memoryview(b"0123456789"), 2)
    assert (tmp_path / "file").read_bytes() == b"\0\0" + b"0123456789"


def test_a_text_is_synced_before_its_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def noting(owner: Any, name: str) -> Callable[..., None]:
        operation = getattr(owner, name)

        def perform(*arguments: Any) -> None:
            calls.append(name)
            operation(*arguments)

        return perform

    for owner, name in ((os, "fsync"), (Path, "replace")):
        monkeypatch.setattr(owner, name, noting(owner, name))
    durable.replace_text(tmp_path / "a folder" / "file", "text\n")
    assert calls == ["fsync", "replace"]
    assert [path.name for path in (tmp_path / "a folder").iterdir()] == ["file"]


def test_a_replacement_killed_at_any_operation_leaves_the_old_text_or_the_new_one(tmp_path: Path) -> None:
    path, count, texts = tmp_path / "file", 1, set()
    while True:
        durable.replace_text(path, "old")
        if not dies_at(count, lambda: durable.replace_text(path, "new")):
            break
        texts.add(path.read_text())
        count += 1
    assert texts <= {"old", "new"}
    assert path.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_writers_at_once_replace_whole_texts(tmp_path: Path) -> None:
    path, texts = tmp_path / "file", {str(number) * 10_000 for number in range(4)}
    durable.replace_shared_text(path, max(texts))

    def write(text: str) -> None:
        for _ in range(50):
            durable.replace_shared_text(path, text)
            assert path.read_text() in texts

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_lines_are_appended(tmp_path: Path) -> None:
    durable.append_line(tmp_path / "file", "a")
    durable.append_line(tmp_path / "file", "ä")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "a\nä\n"


def test_a_folder_is_moved_only_to_where_nothing_is(tmp_path: Path) -> None:
    durable.write_text(tmp_path / "content" / "deep" / "file", "x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputExists, match="nothing is ever overwritten"):
        durable.move_into_place(tmp_path / "content", tmp_path / "link")
    durable.move_into_place(tmp_path / "content", tmp_path / "out")
    assert (tmp_path / "out/deep/file").read_text() == "x"
    assert not (tmp_path / "content").exists()


def test_an_error_of_the_disk_names_the_file_and_leaves_none_of_its_own(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))  # as a disk that is full
    try:
        for write in (durable.replace_shared_text, durable.write_text):
            with pytest.raises(OSError, match=r"File too large: '.*/file'"):
                write(tmp_path / "file", "x" * 1000)
            assert [path.name for path in tmp_path.iterdir()] == (["file"] if write is durable.write_text else [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
