"""Findings in a ds_config, and what DeepSpeed itself says to the same one."""

import json
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from wsm_ds.doctor import examine
from wsm_ds.doctor.config_checks import check_config
from wsm_ds.doctor.run_checks import Intent
from wsm_ds.errors import RecipeError

CONFIGS = Path(__file__).parents[2] / "configs"
SCHEDULER = {"type": "WSMLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 100}}
QUIET = {"scheduler": SCHEDULER, "gradient_clipping": 1.0, "fp16": {"enabled": True}}
NOW = Version("0.19.8")


def found(changes: dict[str, Any], version: str = "0.19.8") -> dict[str, str]:
    """Levels by name, without the note that every config gets."""
    findings = check_config(QUIET | changes, Version(version))
    return {finding.name: finding.level for finding in findings if finding.name != "process-group-timeout"}


def test_a_config_that_says_what_matters_has_no_findings() -> None:
    assert found({}) == {}


@pytest.mark.parametrize("name", ["WSDLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest"])
def test_a_scheduler_that_is_not_constant_is_an_error(name: str) -> None:
    assert found({"scheduler": {"type": name, "params": {}}}) == {"scheduler-decays": "error"}


def test_schedulers_that_cannot_start_are_errors() -> None:
    assert found({"scheduler": {"type": "StepLR", "params": {"step_size": 3}}}) == {"scheduler-fails": "error"}
    assert found({"scheduler": {"type": "WSMLR"}}) == {"scheduler-params": "error"}


def test_warmup_lr_is_named_for_its_first_and_its_resumed_updates() -> None:
    assert found({"scheduler": {"type": "WarmupLR", "params": {}}}) == {"warmup-lr": "warning"}
    assert found({"scheduler": {}}) == {"no-scheduler": "note"}


def test_clipping_is_reported_with_the_version_that_turned_it_on() -> None:
    config = {key: value for key, value in QUIET.items() if key != "gradient_clipping"}
    before, after = (check_config(config, Version(version))[0] for version in ("0.19.2", "0.19.3"))
    assert before.name == after.name == "clipping-by-default"
    assert "an update of DeepSpeed changes the training" in before.effect
    assert "an update" not in after.effect
    assert found({"gradient_clipping": "auto"}) == {}


@pytest.mark.parametrize(
    ("version", "level"),
    [
        ("0.17.5", {}),
        ("0.17.6", {"optimizer-not-saved": "error"}),
        ("0.18.4", {"optimizer-not-saved": "error"}),
        ("0.18.5", {}),
    ],
)
def test_versions_that_save_no_optimizer_of_bf16_at_stage_1_are_named(version: str, level: dict[str, str]) -> None:
    stage1 = {"fp16": {}, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    fp32 = {"data_types": {"grad_accum_dtype": "fp32"}}
    assert found(stage1 | fp32, version) == level
    assert found(stage1, version) == {}
    assert found(stage1 | fp32 | {"zero_optimization": {"stage": 2}}, version) == {}


def test_the_overflow_check_of_bf16_is_reported_since_it_is_on() -> None:
    bf16 = {"fp16": {}, "bf16": {"enabled": True}}
    assert found(bf16) == {"bf16-overflow-check": "note"}
    assert found(bf16, "0.19.2") == {}
    assert found({"fp16": {}, "bf16": {"enabled": True, "check_grad_overflow": False}}) == {}


@pytest.mark.parametrize(("version", "minutes"), [("0.19.5", 30), ("0.19.6", 10)])
def test_the_timeout_is_that_of_the_version(version: str, minutes: int) -> None:
    (note,) = (f for f in check_config(QUIET, Version(version)) if f.name == "process-group-timeout")
    assert f"waits {minutes} minutes" in note.found


@pytest.mark.parametrize(
    "changes",
    [
        {"nebula": {"enabled": True}},
        {"elasticity": {"enabled": True}},
        {"zero_optimization": {"stage": 3, "mics_shard_size": 8}},
        {"optimizer": {"type": "OneBitAdam"}},
    ],
)
def test_a_removed_feature_is_an_error_now_and_a_warning_before(changes: dict[str, Any]) -> None:
    assert found(changes) == {"removed-feature": "error"}
    assert found(changes, "0.19.6") == {"removed-feature": "warning"}


def test_settings_whose_files_cannot_be_loaded_or_merged_are_errors() -> None:
    assert found({"checkpoint": {"writer": {"type": "fast"}}}) == {"writer-cannot-load": "error"}
    assert found({"checkpoint": {"writer": {"decoupled": True}}}) == {"writer-cannot-load": "error"}
    assert found({"checkpoint": {"checkpoint_serialization": False}}) == {"legacy-files": "error"}
    nvme = {"stage": 3, "offload_optimizer": {"device": "nvme"}}
    assert found({"zero_optimization": nvme}) == {"nvme-offload": "error"}


def test_settings_that_matter_for_a_merge_are_named() -> None:
    checkpoint = {"use_node_local_storage": True, "load_universal": True}
    assert found({"checkpoint": checkpoint}) == {"node-local-storage": "warning", "loads-universal": "warning"}
    assert found({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}) == {"round-robin": "note"}


def test_odd_blocks_are_no_traceback() -> None:
    odd = {key: [1] for key in ("scheduler", "bf16", "zero_optimization", "checkpoint", "optimizer")}
    assert "no-scheduler" in {finding.name for finding in check_config(odd, NOW)}
    assert found({"scheduler": {"type": ["WSMLR"]}}) == {"scheduler-fails": "error"}


def test_a_key_that_is_given_twice_is_refused_as_by_deepspeed(tmp_path: Path) -> None:
    config = tmp_path / "ds_config.json"
    config.write_text('{"bf16": {"enabled": true, "enabled": false}}')
    with pytest.raises(RecipeError, match="it has 'enabled' twice"):
        examine(config)


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.name)
def test_our_own_configs_have_no_errors_and_no_warnings(config: Path) -> None:
    assert {finding.level for finding in examine(config, deepspeed="0.19.8").findings} <= {"note"}


def test_a_window_that_does_not_fit_the_plan_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(QUIET))
    report = examine(path, intent=Intent(interval_steps=100, every_steps=250, last=4, steps=300))
    assert report.exit_code == 1
    by_name = {finding.name: finding for finding in report.findings}
    assert "from step 400 on" in by_name["first-window"].found
    assert "multiple of 100" in by_name["interval-does-not-fit"].cure
    fits = examine(path, intent=Intent(interval_steps=100, every_steps=200, last=4, steps=400))
    assert fits.exit_code == 0
    assert {finding.name for finding in fits.findings} == {"first-window", "process-group-timeout"}


def test_bad_requests_name_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text("[1]")
    with pytest.raises(RecipeError, match=r"not a ds_config: it holds .*, not an object"):
        examine(path)
    path.write_text("{")
    with pytest.raises(RecipeError, match="not a ds_config"):
        examine(path)
    with pytest.raises(RecipeError, match=r"'new' is not a version"):
        examine(CONFIGS / "zero2_bf16.json", deepspeed="new")
