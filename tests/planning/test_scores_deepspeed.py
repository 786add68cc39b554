"""The best checkpoints of a window by recorded evaluations, and sums with negative coefficients."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lazy import load_file

from wsm_ds.cli import main
from wsm_ds.cli.scores import read_scores
from wsm_ds.errors import RecipeError, WindowError
from wsm_ds.evaluation.evaluation import Evaluation, Metric, Subject, SubjectSource
from wsm_ds.merge_planning import plan_merge
from wsm_ds.merging import export, merge
from wsm_ds.planning.plan import Output

LOSSES = {"global_step2": 3.0, "global_step4": 1.0, "global_step6": 2.0}


@pytest.fixture
def run(runs: Path) -> Path:
    return runs / "w2_s2_bf16"


def planned(run: Path, **values: Any) -> Output:
    (output,) = plan_merge(run=run, out=run.parent / "not written", **values).outputs
    return output


def evaluation(run: Path, tag: str, metrics: dict[str, Metric], identity: str = "a1", **values: Any) -> str:
    step = int(tag.removeprefix("global_step"))
    source = SubjectSource(tag=tag, step=step, coefficient=1.0)
    subject = Subject(name=tag, kind="checkpoint", identity="0" * 64, path=str(run), sources=(source,))
    return Evaluation(
        subject=subject, evaluator={"kind": "loss", "identity": identity}, metrics=metrics, **values
    ).model_dump_json()


def records(path: Path, run: Path, losses: dict[str, float], *more: str) -> Path:
    lines = [evaluation(run, tag, {"loss": Metric(value=value)}) for tag, value in losses.items()]
    path.write_text("".join(f"{line}\n" for line in (*lines, *more)))
    return path


def test_the_best_of_a_window_are_averaged(run: Path) -> None:
    best = planned(run, last=3, top=2, scores=LOSSES)
    assert [source.step for source in best.sources] == [4, 6]
    assert best.coefficients == (0.5, 0.5)
    worst = planned(run, last=3, top=2, scores=LOSSES, maximize=True)
    assert [source.step for source in worst.sources] == [2, 6]
    assert worst.coefficients == (0.5, 0.5)  # whatever lies between
    assert planned(run, last=3, top=1, scores=dict.fromkeys(LOSSES, 1.0)).sources[0].step == 6  # of equals the newest


def test_a_checkpoint_without_a_score_and_a_window_that_is_too_short_are_refused(run: Path) -> None:
    with pytest.raises(WindowError, match=r"global_step2 has no score"):
        planned(run, last=3, top=1, scores={"global_step4": 1.0, "global_step6": 1.0})
    with pytest.raises(WindowError, match=r"3 checkpoints were asked for, but the window has 2"):
        planned(run, last=2, top=3, scores=LOSSES)
    for values in ({"top": 2}, {"scores": LOSSES}):
        with pytest.raises(RecipeError, match="`top` needs `scores`"):
            planned(run, last=3, **values)
    with pytest.raises(RecipeError, match="as evenly spaced"):
        planned(run, last=3, top=2, scores=LOSSES, by="samples")
    with pytest.raises(RecipeError, match="`scores`"):
        planned(run, last=3, top=2, scores=LOSSES | {"global_step2": float("nan")})


def test_the_command_reads_the_scores_from_the_records(run: Path, tmp_path: Path) -> None:
    failed = evaluation(run, "global_step2", {}, failure="it crashed")
    again = evaluation(run, "global_step6", {"loss": Metric(value=0.5)})
    other_run = evaluation(tmp_path / "other", "global_step4", {"loss": Metric(value=9.0)})
    path = records(tmp_path / "evaluations.jsonl", run, LOSSES, failed, again, other_run)
    path.write_text(path.read_text() + again[:40])  # a torn last line
    out = tmp_path / "out"
    flags = ["--last", "3", "--top", "2", "--scores", str(path), "--metric", "loss", "--out", str(out)]
    assert main(["merge", str(run), *flags]) == 0
    manifest = json.loads((out / "wsm_merge.json").read_text())
    assert [source["step"] for source in manifest["sources"]] == [4, 6]
    assert manifest["recipe"]["scores"] == LOSSES | {"global_step6": 0.5}
    assert main(["verify", str(out), "--full"]) == 0
    assert main(["merge", str(run), *flags[:2], "--top", "1,3", *flags[4:8], "--out", str(tmp_path / "several")]) == 0
    assert sorted(path.name for path in (tmp_path / "several").iterdir()) == ["top1", "top3"]


def test_the_records_must_name_one_measurement(run: Path, tmp_path: Path) -> None:
    accuracy = {"loss": Metric(value=1.0), "acc": Metric(value=0.5, maximize=True)}
    more = [evaluation(run, "global_step2", accuracy, "b2")]
    path = records(tmp_path / "evaluations.jsonl", run, LOSSES, *more)
    with pytest.raises(RecipeError, match=r"choose by --metric one of loss@a1 \(3 checkpoints\), loss@b2 \(1"):
        read_scores(path, run, "loss")
    assert read_scores(path, run, "loss@a").values == LOSSES
    assert read_scores(path, run, "acc").maximize
    with pytest.raises(RecipeError, match=r"no metric 'bleu'"):
        read_scores(path, run, "bleu")
    with pytest.raises(RecipeError, match="no evaluation of a single checkpoint of"):
        read_scores(path, tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--metric", "loss"], "give --scores FILE.jsonl"),
        (["--top", "2"], "--top needs --scores"),
        (["--top", "2", "--scores", "absent.jsonl"], "absent.jsonl cannot be read"),
        (["--top", "2", "--scores", "broken.jsonl"], "broken.jsonl: line 1 is not an evaluation"),
    ],
)
def test_wrong_flags_name_what_is_missing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str],
    words: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("broken.jsonl").write_text('{"loss": 2.5}\n')
    assert main(["merge", str(run), "--last", "3", *flags, "--out", "out"]) == 2
    assert words in capsys.readouterr().err
    assert not Path("out").exists()


def test_negative_coefficients_are_taken_on_request_alone(run: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"last": 2, "coefficients": (-0.5, 1.5), "format": "safetensors", "dtype": "fp32"}
    with pytest.raises(RecipeError, match=r"found -0\.5: .* allow it \(--allow negative\)"):
        merge(run, **values, out=tmp_path / "refused")
    out = merge(run, **values, allow=("negative",), out=tmp_path / "out").out
    parts = []
    for step in (4, 6):
        export(run, tag=f"global_step{step}", dtype="fp32", out=tmp_path / str(step))
        parts.append(load_file(tmp_path / f"{step}/model.safetensors"))
    merged = load_file(out / "model.safetensors")
    weights = [name for name in merged if merged[name].is_floating_point()]
    assert weights
    for name in weights:
        older, newer = (part[name].double().numpy() for part in parts)
        assert np.array_equal(merged[name].numpy(), (-0.5 * older + 1.5 * newer).astype(np.float32)), name
    with pytest.raises(RecipeError, match="could give negative second moments"):
        merge(run, last=2, coefficients=(-0.5, 1.5), allow=("negative",), optimizer_states="merge", out=tmp_path / "m")
    assert main(["verify", str(out), "--full"]) == 0


def test_a_change_of_the_data_is_shown_and_warned_of_and_changes_no_byte(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = merge(run, last=3, data_switch=4, out=tmp_path / "out").out
    assert "1 of 3 checkpoints are from after it, with 33.3% of the weight" in caplog.text
    assert json.loads((out / "wsm_merge.json").read_text())["window"]["data_switch"]["step"] == 4
    again = merge(run, last=3, out=tmp_path / "out")
    assert not again.is_new  # the same bytes
