"""Windows in samples and tokens, on runs of DeepSpeed whose batch grows and whose ranks change."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deepspeed_runs import launch
from lazy import load_file

from wsm_ds.cli import main
from wsm_ds.errors import RecipeError, WindowError
from wsm_ds.layouts.run import DELETED
from wsm_ds.layouts.saved_counts import SavedCounts
from wsm_ds.layouts.saved_step import saved_counts
from wsm_ds.merge_planning import plan_merge
from wsm_ds.merging import export, merge, reshard
from wsm_ds.verification import verify
from wsm_ds.watching.spec import make_spec
from wsm_ds.watching.windows import EndPoints

STEPS, SAMPLES = [2, 4, 6, 8, 10], [8, 24, 40, 44, 76]
Shares = Callable[[list[int]], list[float]]


@pytest.fixture(scope="module")
def ramped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`RUNS/run` with batches of 4 and 8 from two ranks, then of 2 and 16 from one; `RUNS/megatron` with own counts."""
    root, folder = tmp_path_factory.mktemp("ramped"), tmp_path_factory.mktemp("train")
    job: dict[str, Any] = {"do": "ramp", "stage": 2, "dtype": "bf16", "run": str(root / "run")}
    megatron = job | {"run": str(root / "megatron"), "megatron": True, "batches": [4, 4, 8, 8]}
    two = launch(
        [job | {"batches": [4, 4, 8, 8, 8, 8]}, megatron], world_size=2, folder=folder, worker="ramp_worker.py"
    )
    assert [report["samples"] for report in two[0]] == [40, 24]
    reshard(root / "run", world_size=1, out=root / "one")
    resumed = job | {"load": str(root / "one"), "batches": [2, 2, 16, 16]}
    one = launch([resumed], world_size=1, folder=tmp_path_factory.mktemp("train"), worker="ramp_worker.py")
    assert one[0][0]["samples"] == SAMPLES[-1]
    return root


def coefficients(run: Path, **values: Any) -> list[float]:
    """Of a plan's only output."""
    (output,) = plan_merge(run=run, out=run.parent / "out", **values).outputs
    return list(output.coefficients)


def shares(intervals: list[int]) -> list[float]:
    return [interval / sum(intervals) for interval in intervals]


def test_deepspeeds_counts_follow_the_ramp_and_the_ranks(ramped: Path) -> None:
    found = [saved_counts(ramped / f"run/global_step{step}") for step in STEPS]
    assert found == [SavedCounts(step, samples) for step, samples in zip(STEPS, SAMPLES, strict=True)]


def test_the_unit_decides_what_a_linear_merge_weighs(ramped: Path) -> None:
    run = ramped / "run"
    assert coefficients(run, last=5) == [0.2] * 5
    assert coefficients(run, last=5, by="samples") == shares(
        [16, 16, 16, 4, 32]
    )  # the oldest: the median of the others
    assert coefficients(run, last=5, by="tokens", sequence_length=6) == shares([16, 16, 16, 4, 32])
    assert coefficients(run, last=5, by="samples", oldest_interval="8") == shares([8, 16, 16, 4, 32])


@pytest.mark.parametrize(
    ("length", "intervals"),
    [(76, [8, 16, 16, 4, 32]), (75, [7, 16, 16, 4, 32]), (68, [16, 16, 4, 32]), (36, [4, 32]), (37, [1, 4, 32]),
     (32, [32]), (1, [1])],
)  # fmt: skip
def test_a_window_of_samples_or_tokens_holds_what_lies_within_and_its_oldest_stands_for_the_rest(
    ramped: Path, length: int, intervals: list[int]
) -> None:
    assert coefficients(ramped / "run", last_samples=length) == shares(intervals)
    assert coefficients(ramped / "run", last_tokens=6 * length, sequence_length=6) == shares(intervals)


def test_a_window_of_tokens_may_end_earlier(ramped: Path) -> None:
    (output,) = plan_merge(run=ramped / "run", last_samples=20, to_step=6, out=ramped / "out").outputs
    assert [source.step for source in output.sources] == [4, 6]
    assert list(output.coefficients) == shares([4, 16])


def test_the_sum_is_that_of_the_masters_with_these_coefficients(ramped: Path, tmp_path: Path) -> None:
    run = ramped / "run"
    merge(run=run, last_tokens=226, sequence_length=6, format="safetensors", dtype="fp32", out=tmp_path / "out")
    c, parts = shares([10, 24, 192]), []
    for step in (6, 8, 10):
        export(run, tag=f"global_step{step}", dtype="fp32", out=tmp_path / str(step))
        parts.append(load_file(tmp_path / f"{step}/model.safetensors"))
    merged = load_file(tmp_path / "out/model.safetensors")
    for name in merged:
        if merged[name].is_floating_point():
            expected = sum(part[name].double() * weight for part, weight in zip(parts, c, strict=True))
            assert np.array_equal(merged[name].numpy(), expected.float().numpy()), name
    assert verify(tmp_path / "out", full=True).recomputed_bytes > 0


def test_the_plan_and_the_manifest_tell_length_age_and_width_in_every_unit(
    ramped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = ["--last-tokens", "408", "--sequence-length", "6", "--data-switch", "5"]
    assert main(["merge", str(ramped / "run"), *flags, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "global_step10    10     456     0.470588" in shown
    assert "window 8 steps = 408 tokens" in shown
    window = json.loads((out / "wsm_merge.json").read_text())["window"]
    c, counts = np.array(shares([16, 16, 4, 32])), np.array(SAMPLES[1:])
    mean = float((c * (counts[-1] - counts)).sum())
    deviation = float(np.sqrt((c * (counts[-1] - counts - mean) ** 2).sum()))
    assert window["duration"] == {"steps": 8.0, "samples": 68.0, "tokens": 408}
    assert window["end"] == {"steps": 10, "samples": 76, "tokens": 456}
    assert window["mean_age"]["samples"] == pytest.approx(mean)
    assert window["mean_age"]["tokens"] == pytest.approx(6 * mean)
    assert window["deviation"]["tokens"] == pytest.approx(6 * deviation)
    assert window["tokens"] == [144, 240, 264, 456]
    assert window["data_switch"]["checkpoints_after"] == 3
    assert window["data_switch"]["weight_after"] == pytest.approx(52 / 68)


def test_a_constant_number_of_tokens_per_step_is_refused_where_the_batch_changes(ramped: Path) -> None:
    with pytest.raises(WindowError, match=r"change from 8 to 2 after global_step6\. Give --sequence-length"):
        coefficients(ramped / "run", last=4, tokens_per_step=24)
    assert coefficients(ramped / "run", last_tokens="0.3K", to_step=6, tokens_per_step="0.1K") == shares([100, 200])


def test_megatrons_own_counts_go_before_deepspeeds(ramped: Path) -> None:
    run = ramped / "megatron"
    assert saved_counts(run / "global_step4") == SavedCounts(4, samples=240, tokens=1440, sequence_length=6)
    assert coefficients(run, last_tokens="1.2K") == shares([1200 - 960, 960])
    assert coefficients(run, last_samples=200) == shares([40, 160])


def test_a_window_whose_unit_is_not_known_asks_for_what_is_missing(ramped: Path) -> None:
    run = ramped / "run"
    for values in ({"last_tokens": 100}, {"last": 2, "by": "tokens"}):
        with pytest.raises(WindowError, match=r"measured in tokens, but no file tells them.*--sequence-length"):
            coefficients(run, **values)
    with pytest.raises(WindowError, match=r"the newest 77 samples were asked for.*the run has only 76"):
        coefficients(run, last_samples=77)


def test_one_checkpoint_does_not_stand_for_the_run_before_it(ramped: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (6, 8):
        shutil.copytree(ramped / f"run/global_step{step}", run / f"global_step{step}")
    words = r"newest 20 samples begin 16 before global_step6.*at most 4 apart.*Ask for 8 or less"
    with pytest.raises(WindowError, match=words):
        coefficients(run, last_samples=20)
    assert coefficients(run, last_samples=8) == [0.5, 0.5]


def test_a_deleted_checkpoint_is_missed_in_a_window_of_samples(ramped: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(ramped / "run", tmp_path / "run"))
    shutil.rmtree(run / "global_step8")
    (run / DELETED).parent.mkdir()
    (run / DELETED).write_text(json.dumps({"step": 8}) + "\n")
    with pytest.raises(WindowError, match=r"newest 40 samples of .* not all there any more.*deleted step 8"):
        coefficients(run, last_samples=40)


def test_counts_that_fall_are_refused_where_they_count_and_passed_over_elsewhere(ramped: Path, tmp_path: Path) -> None:
    """A resume that set DeepSpeed's counters back: the second checkpoint has fewer samples than the first."""
    run = tmp_path / "run"
    shutil.copytree(ramped / "megatron/global_step2", run / "global_step2")  # 80 samples
    shutil.copytree(ramped / "run/global_step4", run / "global_step4")  # 24 samples
    (output,) = plan_merge(run=run, last=2, out=tmp_path / "out").outputs
    assert output.samples is None
    with pytest.raises(WindowError, match=r"do not rise: 80 at global_step2, 24 at global_step4"):
        coefficients(run, last=2, by="samples")
    with pytest.raises(WindowError, match="80 at global_step2 and 24 at global_step4, a later one"):
        coefficients(run, last_samples=20)


def test_a_jobs_records_tell_tokens_that_no_file_tells(ramped: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(ramped / "run", tmp_path / "run"))
    (run / "job").mkdir()
    lines = [{"attempt": 1, "step": step, "tokens_seen": 100 * step} for step in STEPS]
    lines += [{"attempt": 2, "step": 10, "tokens_seen": 1500}]
    torn = '{"attempt": 2, "step": 12, "tokens_seen": 17'
    (run / "job/steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    assert coefficients(run, last_tokens=1100) == shares([200, 200, 700])


def test_trainers_own_count_of_tokens_is_read(ramped: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (8, 10):
        shutil.copytree(ramped / f"run/global_step{step}", run / f"checkpoint-{step}/global_step{step}")
        state = {"global_step": step, "num_input_tokens_seen": 1000 * step}
        (run / f"checkpoint-{step}/trainer_state.json").write_text(json.dumps(state))
    assert coefficients(run, last_tokens=2500) == shares([500, 2000])


def test_lists_of_lengths_make_outputs_that_say_so(
    ramped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--last-samples", "36,68", "--spread", "wsm,qam:0.5", "--dry-run", "--json", "--out", str(tmp_path)]
    assert main(["merge", str(ramped / "run"), *flags]) == 0
    outputs = json.loads(capsys.readouterr().out)["outputs"]
    assert [(Path(output["out"]).name, output["spread"], len(output["sources"])) for output in outputs] == [
        ("last36-samples-wsm", "wsm", 2),
        ("last36-samples-qam-0.5", "qam:0.5", 2),
        ("last68-samples-wsm", "wsm", 4),
        ("last68-samples-qam-0.5", "qam:0.5", 4),
    ]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"last_tokens": "ten"}, "`last_tokens`: 'ten' is not a count"),
        ({"last_tokens": "1.5"}, "not a whole number"),
        ({"last_tokens": 0}, "at least 1 is needed"),
        ({"last_tokens": 5, "last": 2}, r"exactly one way.*found `last`=2, `last_tokens`=5"),
        ({"last_tokens": 5, "by": "steps"}, r"has its distances in tokens; remove `by` \(steps\)"),
        ({"last_samples": 5, "oldest_interval": 3}, "is what is left of the window's length"),
        ({"last": 2, "tokens_per_step": 5, "sequence_length": 6}, "each says how many tokens there are"),
        ({"last": 2, "spread": "qma"}, "`spread`: unknown spread 'qma'"),
        ({"last": 2, "spread": "qam", "coefficients": (0.5, 0.5)}, "`spread`=qam belongs to a curve"),
    ],
)
def test_what_contradicts_itself_is_refused_before_anything_is_read(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        plan_merge(run="nowhere", out="out", **values)


def test_a_watch_takes_no_window_whose_checkpoints_a_prune_could_not_know() -> None:
    with pytest.raises(RecipeError, match="chosen by `last`, not by `last_tokens`"):
        make_spec({"run": "run", "out": "out", "last_tokens": 5}, EndPoints())
