"""A watch that measures what it merges: merged beside raw, in one file, each once."""

import json
from pathlib import Path

import numpy as np
import pytest
from played_run import PlayedRun

from wsm_ds.cli import main
from wsm_ds.evaluation.records import Records


@pytest.fixture
def evaluators(tmp_path: Path) -> Path:
    data, file = tmp_path / "held.bin", tmp_path / "evaluators.yaml"
    data.write_bytes(np.random.default_rng(1).integers(0, 13, 200).astype("<u2").tobytes())
    loss = {"kind": "loss", "data": str(data), "sequence_length": 16, "vocabulary": 13}
    file.write_text(json.dumps([loss | {"model": f"{Path(__file__).parents[1] / 'ds_models.py'}:TinyModel"}]))
    return file


def test_merged_and_raw_appear_beside_each_other(runs: Path, tmp_path: Path, evaluators: Path) -> None:
    run, out = PlayedRun(runs / "w2_s2_bf16", tmp_path / "run").save(2, 4), tmp_path / "merges"
    command = ["watch", str(run.folder), "--last", "1,2", "--out", str(out), "--once", "--nice", "0"]
    assert main([*command, "--evaluate", str(evaluators)]) == 0
    run.save(6)
    assert main([*command, "--evaluate", str(evaluators)]) == 0
    made = Records(out / "evaluations.jsonl").all()
    assert [one.failure for one in made] == [None] * 8
    merges = sorted(one.subject.path.removeprefix(f"{out.resolve()}/") for one in made if one.subject.kind == "merge")
    assert merges == [f"step{name}-linear" for name in ("2/last1", "4/last1", "4/last2", "6/last1", "6/last2")]
    assert {one.subject.name for one in made if one.subject.kind == "merge"} == set(merges)
    raw = {one.subject.name.split("/")[-1]: one for one in made if one.subject.kind == "checkpoint"}
    assert sorted(raw) == ["global_step2", "global_step4", "global_step6"]
    by_path = {one.subject.path: one for one in made}
    for step in (2, 4, 6):  # a merge of one checkpoint is that checkpoint
        assert by_path[str(out.resolve() / f"step{step}/last1-linear")].blocks == raw[f"global_step{step}"].blocks
    assert len({one.evaluator["identity"] for one in made}) == 1


def test_evaluators_are_checked_before_anything_is_merged(
    runs: Path, tmp_path: Path, evaluators: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = PlayedRun(runs / "w2_s2_bf16", tmp_path / "run").save(2), tmp_path / "merges"
    command = ["watch", str(run.folder), "--last", "1", "--out", str(out), "--once", "--nice", "0"]
    (tmp_path / "held.bin").unlink()
    assert main([*command, "--evaluate", str(evaluators)]) == 3
    assert "does not exist" in capsys.readouterr().err
    evaluators.write_text("kind: lossy")
    assert main([*command, "--evaluate", str(evaluators)]) == 2
    assert "did you mean 'loss'" in capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(SystemExit):
        main([*command, "--evaluate", str(evaluators), "--exec", "echo"])
    assert "--evaluate and --exec cannot be given together" in capsys.readouterr().err.replace(
        "--exec and --evaluate", "--evaluate and --exec"
    )
