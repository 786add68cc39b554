"""Trackers, each with its real package: what was sent can be read again, late points included, and nothing twice."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_results import evaluation, made_tuning

from wsm_ds.cli import main
from wsm_ds.errors import TrackingFailed
from wsm_ds.evaluation.evaluation import Evaluation
from wsm_ds.reporting.trackers import TrackedPoint, send_new, tracked_points

TOKENS = 1_000_000


def records(folder: Path, *evaluations: Evaluation) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "evaluations.jsonl").write_text("".join(f"{one.model_dump_json()}\n" for one in evaluations))
    return folder


def raw(step: int, loss: float) -> Evaluation:
    return evaluation(f"step{step}", [loss * 10], kind="checkpoint", steps=(step,))


def merged(step: int, loss: float) -> Evaluation:
    return evaluation(f"last2@{step}", [loss * 10], steps=(step - 100, step))


def report(folder: Path, *flags: str) -> None:
    """In a process of its own, as a user runs it: trackers hold state in theirs."""
    command = [
        sys.executable,
        "-m",
        "wsm_ds",
        "report",
        str(folder),
        "--tokens-per-step",
        str(TOKENS),
        "--json",
        *flags,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)


def test_points_are_those_with_a_place_in_the_run_by_rising_step() -> None:
    points = tracked_points(made_tuning())
    assert [point.step for point in points] == sorted(point.step for point in points)
    assert {point.series for point in points} >= {"raw", "last 8, linear", "last 32, cosine"}
    assert TrackedPoint("raw", 17_000, 68_000_000_000, "loss", 9.7) in points


class Kept:
    """A tracker that keeps what it gets, and fails once it is told to."""

    def __init__(self) -> None:
        self.points: list[TrackedPoint] = []
        self.is_broken = False

    def send(self, points: Any) -> None:
        if self.is_broken:
            raise ConnectionError("no network")
        self.points += points


def test_a_point_is_sent_once_and_a_failed_one_again(tmp_path: Path) -> None:
    points = tracked_points(made_tuning())
    tracker, sent = Kept(), tmp_path / "new" / "sent"
    assert send_new(points[:4], tracker, sent) == 4
    tracker.is_broken = True
    with pytest.raises(TrackingFailed, match="Kept did not take the values: ConnectionError: no network"):
        send_new(points[:6], tracker, sent)
    tracker.is_broken = False
    assert send_new(points, tracker, sent) == len(points) - 4
    assert send_new(points, tracker, sent) == 0
    assert sorted(map(hash, tracker.points)) == sorted(map(hash, points))


def test_a_package_that_is_missing_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    folder = records(tmp_path / "run", raw(100, 3.0))
    assert main(["report", str(folder), "--wandb", "project"]) == 2
    assert "pip install 'wsm_ds[wandb]'" in capsys.readouterr().err
    assert not (folder / "report.html").exists()


def test_tensorboard_shows_raw_and_merged_and_takes_late_points(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    folder, logs = tmp_path / "run", tmp_path / "logs"
    report(records(folder, raw(200, 3.0), raw(300, 2.5)), "--tensorboard", str(logs))
    report(records(folder, raw(200, 3.0), raw(300, 2.5), raw(100, 3.5), merged(200, 2.75)), "--tensorboard", str(logs))
    report(folder, "--tensorboard", str(logs))
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(logs)).Reload()
    assert multiplexer.Runs().keys() == {"raw", "last 2, linear"}
    found = {(event.step, event.value) for event in multiplexer.Scalars("raw", "wsm/loss")}
    assert found == {(100 * TOKENS, 3.5), (200 * TOKENS, 3.0), (300 * TOKENS, 2.5)}
    assert len(multiplexer.Scalars("raw", "wsm/loss")) == 3
    assert [(e.step, e.value) for e in multiplexer.Scalars("last 2, linear", "wsm/loss")] == [(200 * TOKENS, 2.75)]


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of an offline run: LevelDB's log format, in blocks of 32 KiB after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, whole = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield Record.FromString(whole)
            whole = b""


def test_wandb_offline_has_an_axis_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "wandb"))
    (tmp_path / "wandb").mkdir()
    folder = records(tmp_path / "run", raw(300, 2.5), raw(200, 3.0))
    report(folder, "--wandb", "project")
    report(records(folder, raw(300, 2.5), raw(200, 3.0), merged(200, 2.75)), "--wandb", "project")
    files = sorted((tmp_path / "wandb").rglob("*.wandb"), key=lambda file: file.stat().st_mtime)
    assert len(files) == 2
    rows, axes = [], {}
    for file in files:
        for record in wandb_records(file):
            if record.HasField("history"):
                items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                rows.append({name: value for name, value in items.items() if name.startswith("wsm/")})
            if record.HasField("metric"):
                axes[record.metric.name] = record.metric.step_metric
    assert rows == [
        {"wsm/step": 200, "wsm/tokens": 200 * TOKENS, "wsm/loss/raw": 3.0},
        {"wsm/step": 300, "wsm/tokens": 300 * TOKENS, "wsm/loss/raw": 2.5},
        {"wsm/step": 200, "wsm/tokens": 200 * TOKENS, "wsm/loss/last 2, linear": 2.75},
    ]
    assert axes["wsm/loss/raw"] == axes["wsm/loss/last 2, linear"] == "wsm/tokens"


def test_trackio_keeps_late_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    folder = records(tmp_path / "run", raw(300, 2.5))
    report(folder, "--trackio", "project")
    report(records(folder, raw(300, 2.5), merged(200, 2.75)), "--trackio", "project")
    code = (
        "import json, sys; from trackio.sqlite_storage import SQLiteStorage as S\n"
        "print(json.dumps(S.get_logs('project', 'run')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout.splitlines()[-1])
    found = sorted((row["step"], {k: v for k, v in row.items() if k.startswith("wsm/loss")}.popitem()) for row in rows)
    assert found == [(200, ("wsm/loss/last 2, linear", 2.75)), (300, ("wsm/loss/raw", 2.5))]
