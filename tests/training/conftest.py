"""Real training jobs: launch/pretrain.py on ranks that a test may kill."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import ROOT
from training.rank_processes import Launcher


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Starts jobs, and ends what is left of them."""
    launched = Launcher(tmp_path_factory.mktemp("jobs"))
    yield launched
    launched.finish()


@pytest.fixture(scope="session")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A small model with dropout on the text of the package; 24 steps, a checkpoint each 6."""
    text = tmp_path_factory.mktemp("text") / "the text.txt"
    text.write_bytes(b"".join(path.read_bytes() for path in sorted((ROOT / "wsm_ds").glob("*.py"))))
    sizes = {"layers": 1, "width": 32, "heads": 2, "context": 32, "dropout": 0.1, "until-step": 24, "save-every": 6}
    return ("--data", str(text), *(word for name, value in sizes.items() for word in (f"--{name}", str(value))))


def config(stage: int) -> str:
    """A config of `configs/`: fp32, which every CPU multiplies fast."""
    path = ROOT / f"configs/zero{stage}_fp32.json"
    assert json.loads(path.read_text())["zero_optimization"]["stage"] == stage
    return str(path)


@pytest.fixture(scope="session")
def whole_runs(
    launcher: Launcher, arguments: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Path]:
    """Runs that nothing interrupted, by ZeRO stage, from two ranks."""
    runs = {stage: tmp_path_factory.mktemp("whole") / f"zero{stage}" for stage in (2, 3)}
    for stage, run in runs.items():
        started = launcher.start(run, "--config", config(stage), *arguments)
        assert started.wait() == [0, 0], started.output
    return runs
