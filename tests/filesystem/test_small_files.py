"""Files that are read whole are regular files of a bounded size; anything else is an error, and nobody waits."""

import os
import socket
from pathlib import Path

import pytest

from wsm_ds.cli import main
from wsm_ds.errors import BrokenCheckpoint, VerificationFailed
from wsm_ds.filesystem.small_files import read_small
from wsm_ds.layouts.frameworks import MANIFEST
from wsm_ds.layouts.run import DELETED, deleted_steps, find_checkpoints, find_tag, latest_tag
from wsm_ds.publishing.manifest import read_manifest

KINDS = ("pipe", "socket", "device", "folder", "sparse")
SPARSE_BYTES = 64 << 30


def make(path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something at `path` that is no small file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(path.parent)  # the address of a socket has at most 107 bytes
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(SPARSE_BYTES)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_small_file_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    make(tmp_path / "file", kind, monkeypatch)
    with pytest.raises((OSError, ValueError), match="file"):
        read_small(tmp_path / "file")
    make(tmp_path / "run/latest", kind, monkeypatch)
    assert latest_tag(tmp_path / "run") is None
    make(tmp_path / "out" / MANIFEST, kind, monkeypatch)
    with pytest.raises(VerificationFailed, match=MANIFEST):
        read_manifest(tmp_path / "out")
    make(tmp_path / "run" / DELETED, kind, monkeypatch)
    if kind in ("pipe", "device", "sparse"):
        with pytest.raises(BrokenCheckpoint, match=r"deleted\.jsonl"):
            deleted_steps(tmp_path / "run")


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
@pytest.mark.parametrize("command", ["inspect", "merge", "prune", "watch"])
def test_no_command_waits_for_what_is_called_like_a_checkpoints_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, command: str
) -> None:
    run = tmp_path / "run"
    make(run / "global_step2/mp_rank_00_model_states.pt", kind, monkeypatch)
    make(run / "latest", kind, monkeypatch)
    out = ["--out", str(tmp_path / "out")]
    options = {
        "inspect": [],
        "merge": ["--last", "1", *out],
        "prune": ["--keep-window", "1"],
        "watch": ["--last", "1", *out, "--once"],
    }
    code = main([command, str(run), *options[command]])
    assert code == {"inspect": 3, "merge": 3, "prune": 0, "watch": 0}[command], capsys.readouterr().err


@pytest.mark.parametrize("digits", ["9" * 19, "9" * 5000, "٣" * 4000])
def test_a_number_of_thousands_of_digits_is_no_step(tmp_path: Path, digits: str) -> None:
    (tmp_path / "latest").write_text(f"global_step{digits}", encoding="utf-8")
    assert latest_tag(tmp_path) in (f"global_step{digits}", None)
    (tmp_path / "global_step7").mkdir()
    (tmp_path / "global_step7/mp_rank_00_model_states.pt").touch()
    (tmp_path / f"global_step{digits[:100]}").mkdir()
    (tmp_path / f"global_step{digits[:100]}/mp_rank_00_model_states.pt").touch()
    assert {checkpoint.tag for checkpoint in find_checkpoints(tmp_path)} == {
        "global_step7",
        f"global_step{digits[:100]}",
    }
    with pytest.raises(Exception, match="holds no checkpoint"):
        find_tag(tmp_path, digits)
