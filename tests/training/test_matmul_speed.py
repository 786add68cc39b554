"""Which dtype a machine multiplies fast is measured, not looked up."""

import logging

import pytest

from wsm_ds.training import matmul_speed
from wsm_ds.training.matmul_speed import MatmulSpeed, measure_matmul, warn_if_dtype_is_slow

pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def speed_of(ratio: float) -> MatmulSpeed:
    return MatmulSpeed("bf16", "CPU", seconds=ratio * 1e-3, fp32_seconds=1e-3)


def test_a_dtype_is_slow_if_it_takes_more_than_twice_the_time_of_fp32() -> None:
    assert speed_of(2.01).is_slow
    assert not speed_of(1.99).is_slow
    assert not speed_of(0.5).is_slow


def test_what_was_measured_is_said_in_one_line() -> None:
    assert str(speed_of(79)) == "a 512x256 by 256x256 product takes 79 ms in bf16 and 1 ms in fp32 on this CPU"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_measurement_is_of_this_machine(dtype: str) -> None:
    speed = measure_matmul(dtype)
    assert (speed.dtype, speed.device) == (dtype, "CPU")
    assert 0 < speed.fp32_seconds < 1
    assert 0 < speed.seconds < 10


@pytest.mark.parametrize(("ratio", "expected"), [(30, True), (0.5, False)])
def test_only_a_slow_dtype_is_warned_of(
    ratio: float, expected: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(matmul_speed, "measure_matmul", lambda dtype: speed_of(ratio))
    with caplog.at_level(logging.WARNING):
        assert warn_if_dtype_is_slow("bf16") is expected
    assert ("bf16 is slow here: a 512x256" in caplog.text) is expected
    assert ("configs/zero2_fp32.json" in caplog.text) is expected


def test_fp32_is_never_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul_speed, "measure_matmul", lambda dtype: pytest.fail("nothing to measure"))
    assert not warn_if_dtype_is_slow("fp32")
