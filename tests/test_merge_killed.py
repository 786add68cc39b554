"""A merge that was killed goes on where it stopped and ends in the same bytes. Another merge never goes on with it."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dying import dies_at
from source_reads import Range, record_source_reads

from wsm_ds.cli import main
from wsm_ds.engine import arithmetic, reader, seals, staged_files, tasks
from wsm_ds.errors import BrokenCheckpoint, InsufficientCapacity, OutputExists
from wsm_ds.layouts.frameworks import MANIFEST
from wsm_ds.merge_planning import plan_merge
from wsm_ds.merging import merge, merge_all
from wsm_ds.planning.recipe import make_recipe, make_recipes
from wsm_ds.publishing import manifest
from wsm_ds.publishing.staging_folder import Staging
from wsm_ds.verification import verify

MODULES = (seals, tasks, manifest)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes files of a few KB have several blocks."""
    for module in MODULES:
        monkeypatch.setattr(module, "BLOCK_BYTES", 2048)


def killed_at(count: int, recipe: dict[str, Any]) -> bool:
    """Merges in a process that kills itself in its operation number `count`. Returns whether it reached it."""
    return dies_at(count, lambda: merge_all(make_recipes(**recipe)))


def contents(out: Path) -> dict[str, bytes]:
    """The bytes of every file except the manifest, which holds the time."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }


@pytest.mark.parametrize(
    ("stage", "values"),
    [
        (2, {}),
        (3, {"optimizer_states": "merge"}),
        (2, {"format": ["zero", "safetensors"]}),
    ],
    ids=["zero2", "zero3-states", "two-formats"],
)
def test_a_merge_killed_at_any_operation_and_started_again_ends_in_the_same_bytes(
    runs: Path, tmp_path: Path, stage: int, values: dict[str, Any]
) -> None:
    recipe: dict[str, Any] = {"run": runs / f"w2_s{stage}_bf16", "last": 3, "curve": "1-sqrt", "threads": 1} | values
    merge_all(make_recipes(**recipe | {"out": tmp_path / "right"}))
    right = contents(tmp_path / "right")
    count = 0
    while True:
        count += 1 if count < 30 else 7
        place = tmp_path / f"n{count}"
        if not killed_at(count, recipe | {"out": place / "out"}):
            break
        merge_all(make_recipes(**recipe | {"out": place / "out"}))
        assert contents(place / "out") == right, count
        assert [path.name for path in place.iterdir()] == ["out"], count
        assert not [path for path in place.rglob("*") if path.name.endswith(".wsm-staging")]
        shutil.rmtree(place)
    assert count > 60


def test_a_merge_killed_again_and_again_comes_to_its_end(runs: Path, tmp_path: Path) -> None:
    recipe: dict[str, Any] = {"run": runs / "w2_s2_bf16", "last": 3, "curve": "linear", "threads": 2}
    merge(make_recipe(**recipe | {"out": tmp_path / "right"}))
    dice = random.Random(1)
    for _ in range(50):
        if not killed_at(dice.randint(20, 80), recipe | {"out": tmp_path / "out"}):
            break
    assert contents(tmp_path / "out") == contents(tmp_path / "right")
    assert verify(tmp_path / "out", full=True).recomputed_bytes > 0


@pytest.fixture
def source_reads(monkeypatch: pytest.MonkeyPatch) -> list[Range]:
    """(path, begin, end) of every range of a source that is read."""
    return record_source_reads(monkeypatch)


@pytest.mark.parametrize("name", ["w3_s2", "w3_s3"])
def test_what_was_done_before_the_kill_is_not_read_again(
    other_world_sizes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source_reads: list[Range], name: str
) -> None:
    monkeypatch.setattr(staged_files, "NEAR_NUMEL", 0)
    for module in MODULES:
        monkeypatch.setattr(module, "BLOCK_BYTES", 128)
    recipe: dict[str, Any] = {"run": other_world_sizes / name, "last": 2, "curve": "linear", "threads": 1,
                              "out": tmp_path / "out", "format": "safetensors", "dtype": "fp32"}  # fmt: skip
    plan = plan_merge(make_recipe(**recipe))
    assert plan.streams[0].follows_source is (name == "w3_s3")
    blocks, done, count = plan.bytes_to_write // 128, 0, 10
    while done < blocks * 0.6:
        shutil.rmtree(Staging(tmp_path / "out").folder, ignore_errors=True)
        assert killed_at(count, recipe)
        journal = Staging(tmp_path / "out").folder / "journal.0"
        done, count = len(journal.read_text().splitlines()) if journal.exists() else 0, count + 4
    merge(make_recipe(**recipe))
    bytes_read = sum(end - begin for _, begin, end in source_reads)
    assert 0 < bytes_read < plan.bytes_to_read * 0.6
    merge(make_recipe(**recipe | {"out": tmp_path / "right"}))
    assert contents(tmp_path / "out") == contents(tmp_path / "right")


def test_the_same_merge_again_is_done_and_another_one_is_refused(
    runs: Path, tmp_path: Path, source_reads: list[Range], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["merge", str(runs / "w2_s2_bf16"), "--last", "3", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    source_reads.clear()
    assert main([*command, "--threads", "1", "--memory-budget", "100MiB"]) == 0
    assert "already made by the same merge" in capsys.readouterr().out
    assert source_reads == []
    assert main([*command, "--curve", "1-sqrt"]) == 2
    assert "exists and is another merge" in capsys.readouterr().err


def test_a_merge_with_other_arguments_goes_on_only_from_the_start_and_only_if_told_to(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe: dict[str, Any] = {"run": runs / "w2_s2_bf16", "last": 3, "curve": "linear", "out": tmp_path / "out"}
    assert killed_at(30, recipe)
    command = ["merge", str(runs / "w2_s2_bf16"), "--last", "3", "--curve", "1-sqrt", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "begun with other arguments or sources (recipe, sources differ)" in error
    assert "--restart" in error
    assert main([*command, "--restart"]) == 0
    merge(make_recipe(**recipe | {"curve": "1-sqrt", "out": tmp_path / "right"}))
    assert contents(tmp_path / "out") == contents(tmp_path / "right")


def test_a_killed_merge_goes_on_with_its_own_window_although_training_went_on(runs: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs / "w2_s2_bf16", tmp_path / "run"))
    later = run / "global_step6"
    later.rename(tmp_path / "later")
    recipe: dict[str, Any] = {"run": run, "last": 2, "curve": "linear", "out": tmp_path / "out"}
    assert killed_at(30, recipe)
    (tmp_path / "later").rename(later)
    merged = merge(make_recipe(**recipe))
    assert [source["step"] for source in merged.manifest["sources"]] == [2, 4]


def test_a_killed_merge_goes_on_although_its_run_is_a_relative_path_or_a_link(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to(runs / "w2_s2_bf16")
    recipe: dict[str, Any] = {"run": Path("link"), "last": [2, 3], "curve": "linear", "out": Path("out")}
    assert killed_at(30, recipe)
    merge_all(make_recipes(**recipe))
    for last in (2, 3):
        merge(run=runs / "w2_s2_bf16", last=last, curve="linear", out=tmp_path / f"alone{last}")
        assert contents(tmp_path / f"out/last{last}") == contents(tmp_path / f"alone{last}")


def test_a_source_that_changed_since_the_kill_is_noticed(runs: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs / "w2_s2_bf16", tmp_path / "run"))
    recipe: dict[str, Any] = {"run": run, "last": 3, "curve": "linear", "out": tmp_path / "out"}
    assert killed_at(30, recipe)
    os.utime(next((run / "global_step4").glob("*rank_1*")), (1, 1))
    with pytest.raises(OutputExists, match=r"inputs differ.*--restart"):
        merge(make_recipe(**recipe))


def test_staged_bytes_that_are_not_those_of_the_journal_are_made_again(runs: Path, tmp_path: Path) -> None:
    recipe: dict[str, Any] = {"run": runs / "w2_s2_bf16", "last": 3, "curve": "linear", "threads": 1}
    merge(make_recipe(**recipe | {"out": tmp_path / "right"}))
    assert killed_at(80, recipe | {"out": tmp_path / "out"})
    staged = Staging(tmp_path / "out")
    # As after a power failure: the journal reached the disk, the data did not.
    for path in staged.content.rglob("*.pt"):
        path.write_bytes(bytes(path.stat().st_size))
    journal = staged.folder / "journal.0"
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([*lines, '["torn', "{}", "[1,2,3,4]", '["no/such/file",0,"00",[]]', lines[0][:-9]]))
    merge(make_recipe(**recipe | {"out": tmp_path / "out"}))
    assert contents(tmp_path / "out") == contents(tmp_path / "right")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_read_that_fails_for_a_moment_is_tried_again(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    recipe: dict[str, Any] = {"run": runs / "w2_s2_bf16", "last": 3, "curve": "linear", "threads": 1}
    merge(make_recipe(**recipe | {"out": tmp_path / "right"}))
    monkeypatch.setattr(reader, "PAUSES_S", (0.0, 0.0))
    failing(monkeypatch, number, every=3)
    merge(make_recipe(**recipe | {"out": tmp_path / "out"}))
    assert contents(tmp_path / "out") == contents(tmp_path / "right")
    assert "reading it again" in caplog.text


def failing(monkeypatch: pytest.MonkeyPatch, number: int, every: int) -> None:
    """Makes one of `every` reads of a source fail, and all reads of the compiled kernel."""
    monkeypatch.setattr(arithmetic, "fused_sums", lambda *_: None)
    read, calls = reader.Reader._read, [0]

    def sometimes(self: reader.Reader, file: int, offset: int, into: memoryview) -> None:
        calls[0] += 1
        if calls[0] % every == 0:
            raise OSError(number, os.strerror(number))
        read(self, file, offset, into)

    monkeypatch.setattr(reader.Reader, "_read", sometimes)


def test_read_errors_that_stay_end_the_merge_and_the_next_one_goes_on(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe: dict[str, Any] = {"run": runs / "w2_s2_bf16", "last": 3, "curve": "linear", "out": tmp_path / "out"}
    with monkeypatch.context() as patch:
        patch.setattr(reader, "PAUSES_S", (0.0, 0.0))
        failing(patch, errno.EIO, every=1)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            merge(make_recipe(**recipe))
    assert [path.name for path in tmp_path.iterdir()] == [".out.wsm-staging"]
    merge(make_recipe(**recipe))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_source_that_vanishes_is_named(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Path(shutil.copytree(runs / "w2_s2_bf16", tmp_path / "run"))
    read = reader.Reader._read
    victim = run / "global_step4/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"

    def vanishing(self: reader.Reader, file: int, offset: int, into: memoryview) -> None:
        victim.unlink(missing_ok=True)
        read(self, file, offset, into)

    monkeypatch.setattr(reader.Reader, "_read", vanishing)
    monkeypatch.setattr(reader.Reader, "will_read", lambda *_: None)
    monkeypatch.setattr(arithmetic, "fused_sums", lambda *_: None)
    with pytest.raises(BrokenCheckpoint, match=f"{victim.name} vanished"):
        merge(make_recipe(run=run, last=3, curve="linear", out=tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_merge_that_fills_the_disk_removes_what_it_wrote(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    pwrite, calls = os.pwrite, [0]

    def full(*arguments: Any) -> int:
        calls[0] += 1
        if calls[0] > 10:
            raise OSError(number, os.strerror(number))
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match=os.strerror(number)):
        merge(make_recipe(run=runs / "w2_s2_bf16", last=3, curve="linear", out=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_or_memory_that_is_too_small_is_an_error_before_anything_is_written(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe: dict[str, Any] = {"run": runs / "w2_s2_bf16", "last": 3, "curve": "linear", "out": tmp_path / "out"}
    found = os.statvfs(tmp_path)

    def with_free(blocks: int, inodes: int) -> Any:
        values = list(found)
        values[4], values[7], values[8] = blocks, inodes, inodes
        return lambda _: os.statvfs_result(values)

    for free, words in ((with_free(0, 10**6), "0 B free, the merge needs"), (with_free(10**9, 3), "3 inodes free")):
        monkeypatch.setattr(os, "statvfs", free)
        with pytest.raises(InsufficientCapacity, match=words):
            merge(make_recipe(**recipe))
        assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    with pytest.raises(InsufficientCapacity, match=r"of memory are available.*--memory-budget"):
        merge(make_recipe(**recipe | {"memory_budget": "1000GiB"}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_merge_at_once_and_the_same_command_finishes_it(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.undo()  # the command runs in a process of its own
    code = (
        "import sys, time; from wsm_ds import cli; from wsm_ds.engine import worker; run = worker.Worker.run\n"
        "def slow(*a):\n    run(*a); print('done one', flush=True); time.sleep(0.3)\n"
        "worker.Worker.run = slow\n"
        "sys.exit(cli.main(['merge', sys.argv[1], '--last', '3', '--out', sys.argv[2], '--json', '--threads', '1']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(runs / "w2_s2_bf16"), str(tmp_path / "out")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["event"] == "plan"
    assert process.stdout.readline() == "done one\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"{number.name}; nothing was published. Run the same command again" in errors
    assert [path.name for path in tmp_path.iterdir()] == [".out.wsm-staging"]
    assert main(["merge", str(runs / "w2_s2_bf16"), "--last", "3", "--out", str(tmp_path / "out")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_folder_that_cannot_be_written_to_is_an_error(runs: Path) -> None:
    with pytest.raises(OSError, match="proc"):
        merge(make_recipe(run=runs / "w2_s2_bf16", last=3, curve="linear", out=Path("/proc/out")))


def test_a_deferred_write_that_fails_in_an_early_sync_stops_the_merge(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staged_files, "SYNC_BYTES", 1)
    monkeypatch.setattr(staged_files, "SYNC_POLL_S", 0.0)
    fsync, calls = os.fsync, [0]

    def once(descriptor: int) -> None:  # the kernel reports a lost write once, and never again
        calls[0] += 1
        if calls[0] == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", once)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        merge(make_recipe(run=runs / "w2_s2_bf16", last=3, curve="linear", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
