"""On a file system that shares extents, what a merge carries takes no room on the disk: a real XFS, looped."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from wsm_ds.filesystem.reflink import clone_range
from wsm_ds.merging import merge
from wsm_ds.verification import verify

BLOCK = 4096


@pytest.fixture(scope="module")
def xfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty XFS; skipped where a user may not mount one, failing in CI."""
    folder = tmp_path_factory.mktemp("xfs")
    if not os.environ.get("CI") and (os.geteuid() or not shutil.which("mkfs.xfs")):
        pytest.skip("needs root and mkfs.xfs")
    with (folder / "image").open("wb") as image:
        image.truncate(400 << 20)
    (folder / "mounted").mkdir()
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", folder / "image"], check=True)
    subprocess.run(["mount", "-o", "loop", folder / "image", folder / "mounted"], check=True)
    yield folder / "mounted"
    subprocess.run(["umount", folder / "mounted"], check=True)


def shared_extents(path: Path) -> int:
    """How many of a file's extents other files have, too."""
    os.sync()
    shown = subprocess.run(["filefrag", "-v", path], check=True, capture_output=True, text=True).stdout
    return sum("shared" in line for line in shown.splitlines())


def test_whole_blocks_inside_a_range_are_shared_and_nothing_else(xfs: Path) -> None:
    source, target = xfs / "source", xfs / "target"
    source.write_bytes(os.urandom(10 * BLOCK))
    target.write_bytes(bytes(10 * BLOCK))
    with source.open("rb") as copied, target.open("r+b") as made:
        assert clone_range(copied.fileno(), 100, made.fileno(), 100 + BLOCK, 4 * BLOCK) == (2 * BLOCK, 5 * BLOCK)
        assert clone_range(copied.fileno(), 100, made.fileno(), 101, 4 * BLOCK) is None
        assert clone_range(copied.fileno(), 100, made.fileno(), 100, BLOCK) is None
    expected = bytes(2 * BLOCK) + source.read_bytes()[BLOCK : 4 * BLOCK] + bytes(5 * BLOCK)
    assert target.read_bytes() == expected


def test_another_file_system_is_no_error(xfs: Path, tmp_path: Path) -> None:
    source, target = xfs / "there", tmp_path / "here"
    source.write_bytes(bytes(10 * BLOCK))
    target.write_bytes(bytes(10 * BLOCK))
    with source.open("rb") as copied, target.open("r+b") as made:
        assert clone_range(copied.fileno(), 0, made.fileno(), 0, BLOCK) is None


def test_a_merge_shares_the_moments_and_makes_the_same_bytes(runs: Path, xfs: Path, tmp_path: Path) -> None:
    grown = tmp_path / "run"
    shutil.copytree(runs / "w2_s2_bf16", grown)
    ballast = xfs / "beside.bin"
    ballast.write_bytes(os.urandom(40 * BLOCK + 17))
    shutil.copytree(grown, xfs / "run")
    values: dict[str, Any] = {"last": 2, "curve": "linear", "include": (ballast,)}
    merge(run=grown, out=tmp_path / "copied", **values)
    merge(run=xfs / "run", out=xfs / "shared", **values)
    assert verify(xfs / "shared", full=True).note == ""
    files = [path.relative_to(tmp_path / "copied") for path in (tmp_path / "copied").rglob("*") if path.is_file()]
    for name in files:
        if name.name != "wsm_merge.json":
            assert (xfs / "shared" / name).read_bytes() == (tmp_path / "copied" / name).read_bytes()
    assert shared_extents(xfs / "shared" / "beside.bin") > 0
