"""The file of evaluations loses nothing: not by a killed writer, and not by several at once."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from wsm_ds.errors import EvaluationError, UnsafePath
from wsm_ds.evaluation.evaluation import Evaluation, Metric, Subject
from wsm_ds.evaluation.records import Records


def evaluation(subject: str, evaluator: str = "e", value: float = 1.0, failure: str | None = None) -> Evaluation:
    return Evaluation(
        subject=Subject(name=subject, kind="folder", identity=subject, path=f"/{subject}"),
        evaluator={"kind": "loss", "identity": evaluator},
        metrics={} if failure else {"loss": Metric(value=value, error=0.1)},
        failure=failure,
    )


def add_many(path: Path, first: int) -> None:
    records = Records(path)
    for number in range(first, first + 25):
        records.add(evaluation(f"m{number}"))


def test_what_was_added_is_found_by_model_and_evaluator(tmp_path: Path) -> None:
    path = tmp_path / "new" / "evaluations.jsonl"
    records, other = Records(path), Records(path)
    assert records.find("a", "e") is None
    for made in (evaluation("a"), evaluation("b"), evaluation("a", "f", 2.0), evaluation("a", value=3.0)):
        records.add(made)
    for seen in (records, other, Records(path)):
        assert seen.find("a", "e") == evaluation("a", value=3.0)  # the newest
        assert seen.find("a", "f") == evaluation("a", "f", 2.0)
        assert seen.find("b", "f") is None
        assert len(seen.all()) == 4
    assert [json.loads(line)["subject"]["name"] for line in path.read_text().splitlines()] == ["a", "b", "a", "a"]


def test_a_failure_is_kept_and_is_no_result(tmp_path: Path) -> None:
    records = Records(tmp_path / "e.jsonl")
    records.add(evaluation("a", failure="out of memory"))
    assert records.find("a", "e") is None
    found = records.find("a", "e", failed=True)
    assert found is not None
    assert found.failure == "out of memory"
    records.add(evaluation("a"))
    records.add(evaluation("a", failure="again"))
    assert records.find("a", "e") == evaluation("a")


def test_a_line_that_a_kill_cut_short_costs_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    records = Records(path)
    records.add(evaluation("a"))
    whole = path.read_bytes()
    for length in (1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole + whole[:length])
        survivor = Records(path)
        assert len(survivor.all()) == 1
        survivor.add(evaluation("b"))
        assert path.read_bytes().startswith(whole + whole[:length] + b"\n")
        seen = [made.subject.name for made in Records(path).all()]
        # A line that lacks only its end is whole.
        assert seen == (["a", "a", "b"] if length == len(whole) - 1 else ["a", "b"])


def test_processes_that_add_at_once_lose_no_line(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=add_many, args=(path, 25 * number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    names = {made.subject.name for made in Records(path).all()}
    assert names == {f"m{number}" for number in range(75)}
    assert len(path.read_text().splitlines()) == 75


def test_whether_something_can_be_added_is_known_before(tmp_path: Path) -> None:
    path = tmp_path / "new/folder/e.jsonl"
    Records(path).require_writable()
    assert list(tmp_path.iterdir()) == []
    Records(path).add(evaluation("a"))
    Records(path).require_writable()
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"file/e.jsonl"):
        Records(tmp_path / "file/e.jsonl")
    os.mkfifo(tmp_path / "pipe")
    for path_of_none in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(EvaluationError, match="is a folder, a pipe or a device"):
            Records(path_of_none)
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    with pytest.raises(UnsafePath):
        Records(link).require_writable()


def test_nothing_is_added_to_what_is_no_file_of_evaluations(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("my notes\n")
    with pytest.raises(EvaluationError, match=r"notes.txt is not a file of evaluations"):
        Records(text)
    with pytest.raises(EvaluationError, match="is a folder"):
        Records(tmp_path)
    link = tmp_path / "link.jsonl"
    link.symlink_to(text)
    with pytest.raises(EvaluationError):
        Records(link)
    broken = tmp_path / "broken.jsonl"
    broken.symlink_to(tmp_path / "absent")
    with pytest.raises(UnsafePath):
        Records(broken).add(evaluation("a"))
    assert text.read_text() == "my notes\n"
