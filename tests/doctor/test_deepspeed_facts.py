"""The facts about DeepSpeed, compared with the DeepSpeed that is installed."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.version import Version

from wsm_ds.doctor.config_checks import CONSTANT, DECAYING
from wsm_ds.doctor.deepspeed_facts import NEWEST_READ, REMOVED_KEYS, REMOVED_OPTIMIZERS, timeout_minutes

SPEC = find_spec("deepspeed")
pytestmark = pytest.mark.skipif(SPEC is None, reason="DeepSpeed is not installed")


def source(name: str) -> str:
    assert SPEC is not None
    assert SPEC.origin is not None
    return (Path(SPEC.origin).parent / name).read_text()


def test_the_installed_version_is_not_newer_than_the_one_that_was_read() -> None:
    match = re.search(r"version='([\d.]+)'", source("git_version_info_installed.py"))
    assert match is not None
    assert Version(match[1]) <= NEWEST_READ


def test_the_removed_keys_are_those_that_deepspeed_refuses() -> None:
    tables = {
        node.targets[0].id: {str(key.value) for key in node.value.keys if isinstance(key, ast.Constant)}
        for node in ast.parse(source("runtime/config.py")).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Dict)
    }
    zero = {f"zero_optimization.{key}" for key in tables["_REMOVED_ZERO_CONFIG_KEYS"]}
    assert set(REMOVED_KEYS) == tables["_REMOVED_TOP_LEVEL_CONFIG_KEYS"] | zero


def test_no_removed_optimizer_is_left() -> None:
    config = source("runtime/config.py").lower()
    assert [name for name in REMOVED_OPTIMIZERS if f"'{name}'" in config] == []


def test_the_defaults_are_those_of_the_source() -> None:
    assert "GRADIENT_CLIPPING_DEFAULT = 1.0" in source("runtime/constants.py")
    assert "check_grad_overflow: bool = True" in source("runtime/precision_config.py")
    assert f'"DEEPSPEED_TIMEOUT", default={timeout_minutes(NEWEST_READ)}' in source("constants.py")


def test_every_scheduler_of_deepspeed_is_known() -> None:
    names = re.findall(r"^class (\w+)\(object\)|^class (\w+)\(Warmup\w+\)", source("runtime/lr_schedules.py"), re.M)
    found = {first or second for first, second in names}
    assert found == {*CONSTANT, *DECAYING} - {"WSMLR", "WSDLR"}


def test_the_fast_writers_load_without_saying_weights_only() -> None:
    for engine in ("fast", "decoupled"):
        assert "torch.load(path, map_location=map_location)" in source(
            f"runtime/checkpoint_engine/{engine}_checkpoint_engine.py"
        )
