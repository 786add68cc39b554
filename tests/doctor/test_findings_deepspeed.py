"""What DeepSpeed itself does with the ds_configs that doctor warns of."""

from typing import Any

import pytest
from deepspeed_runs import launch
from packaging.version import Version

from wsm_ds.doctor.config_checks import check_config

ADAM = {"optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}}, "bf16": {"enabled": True}}
ZERO = ADAM | {"zero_optimization": {"stage": 2}}
CASES: dict[str, dict[str, Any]] = {
    "quiet": ZERO | {"scheduler": {"type": "WSMLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 2}}},
    "scheduler-fails": ZERO | {"scheduler": {"type": "StepLR", "params": {"step_size": 3}}},
    "scheduler-params": ZERO | {"scheduler": {"type": "WSMLR"}},
    "removed-feature": ZERO | {"nebula": {"enabled": True}},
    "removed-optimizer": ZERO | {"optimizer": {"type": "OneBitAdam", "params": {"lr": 1e-3}}},
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    jobs = [{"config": config} for config in CASES.values()]
    (reported,) = launch(jobs, world_size=1, folder=tmp_path_factory.mktemp("doctor"), worker="doctor_worker.py")
    return dict(zip(CASES, reported, strict=True))


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("scheduler-fails", "TypeError"),
        ("scheduler-params", "TypeError"),
        ("removed-feature", "DeepSpeedConfigError"),
        ("removed-optimizer", "AssertionError"),
    ],
)
def test_what_doctor_calls_an_error_ends_deepspeed(reports: dict[str, dict[str, Any]], name: str, error: str) -> None:
    found = {finding.name: finding.level for finding in check_config(CASES[name], Version("0.19.8"))}
    assert found[name.replace("optimizer", "feature")] == "error"
    assert reports[name]["error"] == error, reports[name]


def test_a_config_without_gradient_clipping_clips(reports: dict[str, dict[str, Any]]) -> None:
    assert reports["quiet"]["clipping"] == 1.0
    assert {finding.level for finding in check_config(CASES["quiet"], Version("0.19.8"))} == {"warning", "note"}
