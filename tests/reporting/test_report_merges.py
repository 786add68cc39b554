"""Reports of real merges of a run that DeepSpeed trained. The losses are made up; all else is read from the files."""

from pathlib import Path

from made_results import evaluation
from played_run import PlayedRun, contents

from wsm_ds import inspect_run, merge, write_report
from wsm_ds.cli import main
from wsm_ds.evaluation.evaluation import Evaluation


def evaluation_of(out: Path, nats: list[float], steps: tuple[int, ...]) -> Evaluation:
    made = evaluation(out.name, nats, steps=steps)
    return made.model_copy(update={"subject": made.subject.model_copy(update={"path": str(out)})})


def write(file: Path, *evaluations: Evaluation) -> None:
    file.write_text("".join(f"{one.model_dump_json()}\n" for one in evaluations))


def test_curves_come_from_manifests_and_merges_without_evaluation_are_named(runs: Path, tmp_path: Path) -> None:
    run = PlayedRun(runs / "w2_s2_bf16", tmp_path / "run").save(2, 4, 6)
    merges = tmp_path / "merges"
    for name, curve, last in (("a", "linear", 2), ("b", "1-sqrt", 3), ("c", "cosine", 3)):
        merge(run=run.folder, last=last, curve=curve, out=merges / name)
    before = contents(merges / "a")
    write(
        merges / "evaluations.jsonl",
        evaluation_of(merges / "a", [30.0, 31.0], (4, 6)),
        evaluation_of(merges / "b", [30.5, 31.0], (2, 4, 6)),
    )
    result = write_report(merges).result
    assert [(c.name, c.curve) for c in result.candidates] == [("a", "linear"), ("b", "1-sqrt")]
    assert result.waiting == ("c",)
    assert "1 candidate not measured yet (c)" in (merges / "report.md").read_text()
    assert contents(merges / "a") == before


def test_a_watch_goes_on_beside_a_report_and_its_merges_are_told_apart(runs: Path, tmp_path: Path) -> None:
    run = PlayedRun(runs / "w2_s2_bf16", tmp_path / "run").save(2, 4)
    merges = tmp_path / "merges"
    watch = ["watch", str(run.folder), "--last", "2", "--out", str(merges), "--once", "-q"]
    assert main(watch) == 0
    first = next(path.parent for path in merges.glob("step4/*/wsm_merge.json"))
    write(merges / "evaluations.jsonl", evaluation_of(first, [30.0, 31.0], (2, 4)))
    write_report(merges)
    run.save(6)
    assert main(watch) == 0
    second = next(path.parent for path in merges.glob("step6/*/wsm_merge.json"))
    assert write_report(merges).result.waiting == (f"step6/{second.name}",)
    later = evaluation_of(second, [29.0, 30.0], (4, 6))
    later = later.model_copy(update={"subject": later.subject.model_copy(update={"identity": "0" * 64})})
    write(merges / "evaluations.jsonl", evaluation_of(first, [30.0, 31.0], (2, 4)), later)
    names = [candidate.name for candidate in write_report(merges).result.candidates]
    assert names == [f"{first.name}@4", f"{second.name}@6"]


def test_a_report_in_a_run_leaves_the_run_as_it_was_for_others(runs: Path, tmp_path: Path) -> None:
    run = PlayedRun(runs / "w2_s2_bf16", tmp_path / "run").save(2, 4, 6)
    before = [item.to_json() for item in inspect_run(run.folder)]
    raw = [evaluation(f"step{step}", [30.0 - step], kind="checkpoint", steps=(step,)) for step in (2, 4, 6)]
    write(run.folder / "evaluations.jsonl", *raw)
    files = write_report(run.folder)
    assert "Along the run" in files.markdown.read_text()
    assert [item.to_json() for item in inspect_run(run.folder)] == before
    merge(run=run.folder, last=2, out=tmp_path / "out")
