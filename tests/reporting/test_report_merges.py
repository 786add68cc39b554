"""Reports of real merges of a run that DeepSpeed trained. The losses are made up; all else is read from the files."""

from pathlib import Path

from made_results import evaluation
from played_run import PlayedRun, contents

from wsm_ds import inspect_run, merge, write_report
from wsm_ds.cli import main
from wsm_ds.evaluation.records import Records
from wsm_ds.evaluation.subjects import subject_of_folder


def record(file: Path, **losses: list[float]) -> None:
    """Adds an evaluation of folders beside the file, by their names; "__" stands for a slash."""
    for name, nats in losses.items():
        subject = subject_of_folder(file.parent / name.replace("__", "/"))
        Records(file).add(evaluation(subject.name, nats).model_copy(update={"subject": subject}))


def test_curves_come_from_manifests_and_merges_without_evaluation_are_named(runs: Path, tmp_path: Path) -> None:
    run = PlayedRun(runs / "w2_s2_bf16", tmp_path / "run").save(2, 4, 6)
    merges = tmp_path / "merges"
    for name, curve, last in (("a", "linear", 2), ("b", "1-sqrt", 3), ("c", "cosine", 3)):
        merge(run=run.folder, last=last, curve=curve, out=merges / name, tokens_per_step=1000)
    before = contents(merges / "a")
    record(merges / "evaluations.jsonl", a=[30.0, 31.0], b=[30.5, 31.0])
    result = write_report(merges).result
    assert [(c.name, c.curve, c.spread, c.steps, c.tokens) for c in result.candidates] == [
        ("a", "linear", "wsm", (4, 6), (4000, 6000)),
        ("b", "1-sqrt", "wsm", (2, 4, 6), (2000, 4000, 6000)),
    ]
    assert result.waiting == ("c",)
    assert "1 candidate not measured yet (c)" in (merges / "report.md").read_text()
    assert contents(merges / "a") == before


def test_a_watch_goes_on_beside_a_report_and_its_merges_are_told_apart(runs: Path, tmp_path: Path) -> None:
    run = PlayedRun(runs / "w2_s2_bf16", tmp_path / "run").save(2, 4)
    merges = tmp_path / "merges"
    watch = ["watch", str(run.folder), "--last", "2", "--out", str(merges), "--once", "-q"]
    assert main(watch) == 0
    (name,) = [path.parent.name for path in merges.glob("step4/*/wsm_merge.json")]
    record(merges / "evaluations.jsonl", **{f"step4__{name}": [30.0, 31.0]})
    write_report(merges)
    run.save(6)
    assert main(watch) == 0
    assert write_report(merges).result.waiting == (f"step6/{name}",)
    record(merges / "evaluations.jsonl", **{f"step6__{name}": [29.0, 30.0]})
    result = write_report(merges).result
    assert [candidate.name for candidate in result.candidates] == [f"{name}@4", f"{name}@6"]
    assert result.waiting == ()


def test_a_report_in_a_run_leaves_the_run_as_it_was_for_others(runs: Path, tmp_path: Path) -> None:
    run = PlayedRun(runs / "w2_s2_bf16", tmp_path / "run").save(2, 4, 6)
    before = [item.to_json() for item in inspect_run(run.folder)]
    record(run.folder / "evaluations.jsonl", global_step2=[33.0], global_step4=[32.0], global_step6=[31.0])
    files = write_report(run.folder)
    assert [(c.kind, c.steps) for c in files.result.candidates] == [("raw", (2,)), ("raw", (4,)), ("raw", (6,))]
    assert "Along the run" in files.markdown.read_text()
    assert [item.to_json() for item in inspect_run(run.folder)] == before
    merge(run=run.folder, last=2, out=tmp_path / "out")
