"""A node that is not fit is named with the reason, one that is fit with what was found."""

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from wsm_ds.training.node_check import main

HOST = socket.gethostname()


@pytest.fixture
def listener() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_fit_node_says_so_in_one_line(tmp_path: Path, listener: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "new 'run'"
    assert main([str(run), "--free-bytes", "1MB", "--rendezvous", listener]) == 0
    said = capsys.readouterr().out
    assert re.fullmatch(rf"{HOST}: fit: folder writable, [\d.]+ \w+ free, {listener} reached\n", said)
    assert not list((run / "job").iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main([str(tmp_path / "file/run")]) == 3
    said = capsys.readouterr().out
    assert said.startswith(f"{HOST}: unfit: {tmp_path / 'file/run/job'} cannot be written: ")
    assert said.count("\n") == 1


def test_too_little_space_is_named_with_both_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--free-bytes", "1000TB"]) == 3
    assert re.search(r"has [\d.]+ \w+ free, 909.5 TiB are needed", capsys.readouterr().out)


def test_an_unreachable_rendezvous_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--rendezvous", "no-such-host.invalid:29500"]) == 3
    assert "no-such-host.invalid:29500" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ("--free-bytes", "lots"),
        ("--rendezvous", "127.0.0.1"),
        ("--rendezvous", "127.0.0.1:99999"),
        ("--rendezvous", "127.0.0.1:²"),
    ],
)
def test_a_wrong_request_does_not_make_the_node_unfit(
    arguments: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch(rf"{HOST}: {arguments[0]}.*{arguments[1]}.*\n", shown.err)


def test_a_host_where_nobody_listens_yet_is_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert main([str(tmp_path), "--rendezvous", f"127.0.0.1:{port}"]) == 0
    assert "reached, nobody listens" in capsys.readouterr().out


@pytest.mark.torch
def test_missing_accelerators_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    command = [sys.executable, "-m", "wsm_ds.training.node_check", str(tmp_path), "--accelerators", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert re.search(r"unfit: \d+ accelerators \(\w+\) are visible, 1000 are needed", done.stdout)
