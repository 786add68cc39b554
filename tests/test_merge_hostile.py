"""A run spelled in several ways; sources that are replaced or pruned while they are read; folders open to others."""

import contextlib
import errno
import hashlib
import json
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dying import dies_at
from played_run import contents
from source_reads import Range, record_source_reads

from wsm_ds.cli import main
from wsm_ds.engine import seals, tasks
from wsm_ds.engine.worker import Worker
from wsm_ds.errors import BrokenCheckpoint, OutputExists, UnsafePath
from wsm_ds.layouts.frameworks import MANIFEST
from wsm_ds.merge_planning import plan_merge
from wsm_ds.merging import merge, merge_all, run_plan
from wsm_ds.planning.recipe import make_recipe, make_recipes
from wsm_ds.publishing import manifest
from wsm_ds.publishing.staging_folder import PLAN, Staging
from wsm_ds.watching.prune import Retention, plan_prune, prune

GOLDEN = Path(__file__).with_name("golden") / "zero2_bf16"
MODULES = (seals, tasks, manifest)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in MODULES:
        monkeypatch.setattr(module, "BLOCK_BYTES", 2048)
    (tmp_path / "at").mkdir()
    return Path(shutil.copytree(GOLDEN, tmp_path / "at" / "run"))


def recipe(run: Path, out: Path, **values: Any) -> dict[str, Any]:
    return {"run": run, "last": 2, "curve": "linear", "threads": 1, "out": out} | values


def killed_at_60(values: dict[str, Any]) -> bool:
    """Merges in a process that kills itself in the middle."""
    return dies_at(60, lambda: merge_all(make_recipes(**values)))


def spellings(run: Path) -> list[Path]:
    """Ways to name a run's folder; the process works in the folder above it."""
    link, above = run.with_name("link"), run.parent.with_name("link above")
    link.symlink_to(run)
    above.symlink_to(run.parent)
    return [run, Path("run"), Path("../at/run"), link, Path("link"), above / "run", run / ".." / "run"]


def test_a_run_spelled_otherwise_is_resumed_and_known_as_done(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    ways = spellings(run)
    reads: list[Range] = record_source_reads(monkeypatch)
    for begun in ways:
        for ended in ways:
            out = tmp_path / "out"
            assert killed_at_60(recipe(begun, out))
            assert (Staging(out).folder / PLAN).is_file()
            assert merge(make_recipe(**recipe(ended, out))).is_new
            reads.clear()
            assert not merge(make_recipe(**recipe(begun, out))).is_new
            assert not reads
            shutil.rmtree(out)


def test_another_run_is_another_merge_although_everything_else_is_equal(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    out = tmp_path / "out"
    assert killed_at_60(recipe(run, out))
    with pytest.raises(OutputExists, match=r"\(sources, inputs differ\).*--restart"):
        merge(make_recipe(**recipe(other, out)))
    merge(make_recipe(**recipe(run, out)))
    with pytest.raises(OutputExists, match="is another merge"):
        merge(make_recipe(**recipe(other, out)))


def as_recorded_by_0_1_0(recorded: dict[str, Any], spelled: dict[str, Any]) -> dict[str, Any]:
    """What version 0.1.0 wrote for a merge: it hashed the recipe as it was spelled, and had fewer fields."""
    fields = {name: value for name, value in spelled.items() if name not in ("out", "memory_budget", "threads")}
    content = {name: recorded[name] for name in ("sources", "inputs", "files", "block_bytes")} | {"recipe": fields}
    return {"identity": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()} | content


def test_merges_of_version_0_1_0_are_resumed_and_known_as_done(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    out = tmp_path / "out"
    fields = make_recipe(**recipe(Path("run"), out)).model_dump(mode="json")
    for name in (
        "sub_group_size",
        "rename",
        "spread",
        "by",
        "last_tokens",
        "scores",
        "maximize",
        "data_switch",
        "tuned",
    ):  # as if the version had not had them
        assert not fields.pop(name)
    assert killed_at_60(recipe(Path("run"), out))
    recorded = Staging(out).folder / PLAN
    old = as_recorded_by_0_1_0(json.loads(recorded.read_text()), fields)
    recorded.write_text(json.dumps(old))
    made = merge(make_recipe(**recipe(run, out)))
    assert made.is_new
    finished = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps(finished | {"identity": old["identity"], "recipe": fields}))
    assert not merge(make_recipe(**recipe(run.parent / "run", out))).is_new
    (out / MANIFEST).write_text(json.dumps(finished | {"identity": old["identity"], "recipe": fields | {"floor": 0.5}}))
    with pytest.raises(OutputExists, match="is another merge"):
        merge(make_recipe(**recipe(run, out)))


def replace_keeping_times(path: Path) -> None:
    """As `rsync -t`: a new file with other bytes, of the same size and modification time."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    new = path.with_name(".new")
    new.write_bytes(data)
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
    new.replace(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


@pytest.mark.parametrize("victim", ["global_step1", "included"])
def test_a_source_that_is_replaced_with_size_and_time_kept_is_noticed(run: Path, tmp_path: Path, victim: str) -> None:
    included = tmp_path / "config.json"
    included.write_text("{ }")
    plan = plan_merge(make_recipe(**recipe(run, tmp_path / "out", include=[included])))
    replace_keeping_times(included if victim == "included" else next((run / victim).glob("*optim*")))
    with pytest.raises(BrokenCheckpoint, match="changed while it was read; nothing was published"):
        run_plan(plan)
    assert not (tmp_path / "out").exists()


def test_after_a_kill_nothing_that_was_made_of_a_replaced_source_is_kept(run: Path, tmp_path: Path) -> None:
    out, allow = tmp_path / "out", ("foreign-files",)  # the new masters do not fit the module weights
    assert killed_at_60(recipe(run, out, allow=allow))
    assert (Staging(out).folder / "journal.0").stat().st_size
    for path in run.rglob("*optim_states.pt"):
        resave_other_numbers(path)
    merge(make_recipe(**recipe(run, out, allow=allow)))
    merge(make_recipe(**recipe(run, tmp_path / "right", allow=allow)))
    assert contents(out) == contents(tmp_path / "right")


def resave_other_numbers(path: Path) -> None:
    """Other masters with a right CRC-32, in a file of the same size and modification time."""
    torch = pytest.importorskip("torch")
    status, content = path.stat(), torch.load(path, weights_only=False)
    for partition in content["optimizer_state_dict"]["single_partition_of_fp32_groups"]:
        partition.data.mul_(2)
    torch.save(content, path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size


@pytest.fixture
def reading(run: Path, tmp_path: Path) -> Iterator[int]:
    """The process of a merge of step 1 that has begun to read, and goes on when it gets SIGCONT."""
    pid = os.fork()
    if pid == 0:
        work = Worker.run

        def stopping(*arguments: Any) -> None:
            os.kill(os.getpid(), signal.SIGSTOP)
            work(*arguments)

        Worker.run = stopping  # type: ignore[method-assign,assignment]
        code = 1
        try:
            merge(make_recipe(**recipe(run, tmp_path / "out", last=None, tags=["global_step1"], coefficients=[1.0],
                                       curve=None)))  # fmt: skip
            code = 0
        finally:
            os._exit(code)
    os.waitpid(pid, os.WUNTRACED)
    yield pid
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def states(folder: Path) -> dict[Path, tuple[int, ...]]:
    status = {path: path.stat() for path in folder.rglob("*")}
    return {path: (s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in status.items()}


def test_prune_without_an_output_folder_keeps_what_a_merge_reads(run: Path, tmp_path: Path, reading: int) -> None:
    retention = Retention(keep_window=1, keep_last=1)
    before = states(run / "global_step1")
    assert {v.step: v.kept_because for v in plan_prune(run, retention)}[1] == "a merge reads it now"
    prune(run, retention)
    assert states(run / "global_step1") == before
    while True:
        os.kill(reading, signal.SIGCONT)
        _, status = os.waitpid(reading, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            break
    assert os.waitstatus_to_exitcode(status) == 0
    prune(run, retention)
    assert not (run / "global_step1").exists()


@pytest.mark.parametrize("name", ["lock", "output/global_step2/mp_rank_00_model_states.pt", "journal.0", "plan.json"])
def test_links_that_another_user_was_first_to_make_are_not_followed(run: Path, tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("of great value")
    out = tmp_path / "out"
    assert killed_at_60(recipe(run, out))
    path = Staging(out).folder / name
    path.unlink(missing_ok=True)
    path.symlink_to(victim)
    if name == "plan.json":  # made anew
        merge(make_recipe(**recipe(run, out)))
        assert not any(path.is_symlink() for path in out.rglob("*"))
    else:
        with pytest.raises(UnsafePath, match=path.name):
            merge(make_recipe(**recipe(run, out)))
        assert not out.exists()
    assert victim.read_text() == "of great value"


def test_a_staging_folder_of_another_user_or_behind_a_link_is_refused_at_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Range] = record_source_reads(monkeypatch)
    (tmp_path / "elsewhere").mkdir()
    Staging(tmp_path / "out").folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafePath, match=r"\.out\.wsm-staging is a link"):
        merge(make_recipe(**recipe(run, tmp_path / "out")))
    assert not reads
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("values", [{"format": "universal"}, {"format": "zero", "optimizer_states": "merge"}])
@pytest.mark.parametrize("threads", [1, 16])
def test_few_open_files_are_enough(run: Path, tmp_path: Path, values: dict[str, Any], threads: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    merge(make_recipe(**recipe(run, tmp_path / "right", **values)))
    opened = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 32, hard))
    try:
        merge(make_recipe(**recipe(run, tmp_path / "out", **values | {"threads": threads})))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert contents(tmp_path / "out") == contents(tmp_path / "right")


def test_a_tmpfs_of_a_few_pages_is_left_empty(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    small = tmp_path / "small"
    small.mkdir()
    for size in ("4k", "8k", "16k"):
        if os.system(f"mount -t tmpfs -o size={size} tmpfs '{small}' 2>/dev/null"):
            pytest.skip("no right to mount a tmpfs")
        try:
            assert main(["merge", str(run), "--last", "2", f"--out={small}/out"]) == 3
            assert list(small.iterdir()) == []
        finally:
            os.system(f"umount '{small}'")
    assert os.strerror(errno.ENOSPC) in (error := capfd.readouterr().err) or "free" in error
