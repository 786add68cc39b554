"""What is said of wrong calls, and of engines whose masters cannot be averaged."""

from pathlib import Path

from deepspeed_runs import launch


def test_forgotten_and_doubled_calls_are_told_with_both_counts(tmp_path: Path) -> None:
    job = {"do": "mistakes", "stage": 2, "dtype": "bf16", "engine": "noisy"}
    ((report,),) = launch([job], world_size=1, folder=tmp_path, worker="averaging_worker.py")
    unfit, early, unknown, empty, good, twice, forgotten, again, trained = report["said"]
    assert unfit == "RecipeError: every (10) must be a multiple of sample (3), and both at least 1."
    assert "update() has seen 0 updates (step 0), the engine has made 0 (step 0): it was called twice" in early
    assert unknown == "RecipeError: average: there is no 'ema'; there are: none."
    assert empty == "RecipeError: this slot has no sample yet (step 0)."
    assert good == again == "nothing"
    assert "update() has seen 1 updates (step 1), the engine has made 1 (step 1): it was called twice" in twice
    assert "update() has seen 1 updates (step 1), the engine has made 3 (step 3): a call was forgotten" in forgotten
    assert "the engine was trained while its weights were swapped: 4 updates before, 5 after" in trained
    assert (report["count"], report["first"]) == (1, 4)


def test_engines_whose_masters_are_elsewhere_are_refused_by_name(tmp_path: Path) -> None:
    pretended = {
        "ZenFlow": {"class": "ZenFlowZeroOptimizer"},
        "SuperOffload": {"class": "SuperOffloadOptimizer_Stage3"},
        "NVMe": {"swap_optimizer": True},
        "Twin-Flow (offload_optimizer.ratio 0.5)": {"offload_optimizer": True, "partial_offload": 0.5},
    }
    jobs = [{"do": "refused", "stage": 3, "dtype": "bf16", "pretend": pretend} for pretend in pretended.values()]
    (reports,) = launch(jobs, world_size=1, folder=tmp_path, worker="averaging_worker.py")
    for name, report in zip(pretended, reports, strict=True):
        assert report["said"].startswith("RecipeError: averages in the running engine do not work with")
        assert name in report["said"]
