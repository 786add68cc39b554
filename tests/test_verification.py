"""`verify` finds the same with any number of threads and ranks, and samples a large output by its bytes."""

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from wsm_ds import verification
from wsm_ds.cli import main
from wsm_ds.distributed.ranks import Ranks
from wsm_ds.engine.tasks import Task, tasks_of
from wsm_ds.errors import BudgetTooSmall, RecipeError, VerificationFailed
from wsm_ds.filesystem import checksum
from wsm_ds.merge_planning import plan_merge
from wsm_ds.merging import merge
from wsm_ds.verification import SAMPLED_BYTES, sampled, verify


class Share(Ranks):
    """One of several ranks that wait for nobody."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size


@pytest.fixture(params=["zero", "safetensors"])
def out(request: pytest.FixtureRequest, runs: Path, tmp_path: Path) -> Path:
    """A merge of three checkpoints."""
    made = tmp_path / "out"
    merge(run=runs / "w2_s2_bf16", last=3, curve="1-sqrt", out=made, format=request.param)
    return made


def forge(out: Path, name: str, at: int) -> None:
    """Changes a byte of a file, and the manifest so that its checksum is right."""
    content = bytearray((out / name).read_bytes())
    content[at] ^= 1
    (out / name).write_bytes(content)
    manifest = json.loads((out / "wsm_merge.json").read_text())
    manifest["files"][name]["xxh3_128_of_blocks"] = checksum.of_file(out / name, manifest["block_bytes"])
    (out / "wsm_merge.json").write_text(json.dumps(manifest))


def problem_of(out: Path, ranks: Ranks, threads: int) -> str:
    """What a rank finds wrong in an output."""
    try:
        verify(out, threads=threads, ranks=ranks)
    except VerificationFailed as error:
        return str(error)
    return ""


def test_threads_and_ranks_make_all_bytes_again_once(out: Path) -> None:
    alone = verify(out, full=True, threads=1)
    assert alone.recomputed_bytes > 0
    assert verify(out, full=True, threads=4, memory_budget="64MiB") == alone
    shares = [verify(out, full=True, threads=2, ranks=Share(rank, 3)) for rank in range(3)]
    assert {(share.files, share.nbytes, share.note) for share in shares} == {(alone.files, alone.nbytes, "")}
    assert sum(share.recomputed_bytes for share in shares) == alone.recomputed_bytes


def test_each_file_has_its_checksum_compared_by_one_rank(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: Counter[str] = Counter()
    of_file = checksum.of_file

    def counting(path: Path, block_bytes: int) -> str:
        compared[path.relative_to(out).as_posix()] += 1
        return of_file(path, block_bytes)

    monkeypatch.setattr(checksum, "of_file", counting)
    for rank in range(2):
        verify(out, ranks=Share(rank, 2))
    assert compared == dict.fromkeys(json.loads((out / "wsm_merge.json").read_text())["files"], 1)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_wrong_byte_is_found_by_the_rank_that_makes_it_again(out: Path, threads: int) -> None:
    weights = (path for path in out.rglob("*") if path.suffix in (".pt", ".safetensors"))
    name = max(weights, key=lambda path: path.stat().st_size)
    at = name.stat().st_size // 2
    forge(out, name.relative_to(out).as_posix(), at)
    with pytest.raises(VerificationFailed, match=f"byte {at} is not what the sources make"):
        verify(out, threads=threads)
    messages = [message for rank in range(2) if (message := problem_of(out, Share(rank, 2), threads))]
    assert len(messages) == 1
    assert f"byte {at} is not what" in messages[0]


def test_every_file_is_opened_once_to_be_made_again(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = runs / "w2_s3_bf16", tmp_path / "out"
    merge(run=run, last=3, curve="1-sqrt", out=out, format="safetensors")
    opened: Counter[str] = Counter()
    real_open = os.open

    def counting(path: Any, *arguments: Any, **options: Any) -> int:
        opened[str(path)] += 1
        return real_open(path, *arguments, **options)

    monkeypatch.setattr(verification, "raise_limit", lambda: monkeypatch.setattr(os, "open", counting))
    verify(out, full=True, threads=4)
    assert {count for path, count in opened.items() if path.startswith(str(out))} == {1}
    assert max(opened.values()) == 1


def test_what_the_machine_gets_is_checked(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RecipeError, match=r"--threads\) must be at least 1, not 0"):
        verify(out, threads=0)
    with pytest.raises(RecipeError, match="'much' is not a size"):
        verify(out, memory_budget="much")
    with pytest.raises(BudgetTooSmall, match="the least is"):
        verify(out, memory_budget=1000)
    assert main(["verify", str(out), "--threads", "0"]) == 2
    assert "--threads" in capsys.readouterr().err
    assert main(["verify", str(out), "--threads", "2", "--memory-budget", "64MiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["note"] == ""


def made_up(counts: dict[int, int], nbytes: int) -> list[Task]:
    """Tasks of equal size, `counts` by stream."""
    return [Task(stream, at, at + 1, nbytes) for stream, count in counts.items() for at in range(count)]


def test_a_small_output_is_made_again_whole(out: Path, runs: Path, tmp_path: Path) -> None:
    tasks = tasks_of(plan_merge(run=runs / "w2_s2_bf16", last=3, out=tmp_path / "other"))
    assert sampled(tasks, SAMPLED_BYTES) == tasks
    assert verify(out) == verify(out, full=True)


def test_samples_have_a_number_of_bytes_and_lie_evenly() -> None:
    tasks = made_up({0: 10_000, 1: 5_000}, 1 << 20)
    chosen = sampled(tasks, 150 << 20)
    assert sampled(tasks, 150 << 20) == chosen
    assert Counter(task.stream for task in chosen) == {0: 100, 1: 50}
    # One of each hundred tasks: no file of a hundred tasks or more is left out.
    assert [task.begin // 100 for task in chosen if task.stream == 0] == list(range(100))
    assert len({task.begin % 100 for task in chosen}) > 30


def test_each_stream_has_a_sample_and_large_tasks_do_not_exceed_the_bytes() -> None:
    tasks = made_up({0: 1000, 1: 1, 2: 3}, 1000)
    assert {task.stream for task in sampled(tasks, 1)} == {0, 1, 2}
    assert len(sampled(tasks, 1)) == 3
    mixed = [Task(0, at, at + 1, 10_000 if at % 10 else 10) for at in range(1000)]
    for nbytes in (100_000, 1_000_000, 5_000_000):
        chosen = sampled(mixed, nbytes)
        assert math.floor(0.8 * nbytes) <= sum(task.nbytes for task in chosen) <= nbytes
