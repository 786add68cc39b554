"""Real training jobs: launch/pretrain.py on ranks that a test may kill."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from training.rank_processes import ENVIRONMENT, ROOT, Launcher


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Starts jobs; the server that ranks are forked from has the environment of a launcher."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        launched = Launcher(tmp_path_factory.mktemp("jobs"))
        try:
            yield launched
        finally:
            launched.finish()


@pytest.fixture(scope="session")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A small model with dropout on the text of this folder; 40 steps, a checkpoint each 10."""
    text = tmp_path_factory.mktemp("text") / "the text.txt"
    text.write_bytes(b"".join(path.read_bytes() for path in sorted((ROOT / "wsm_ds").glob("*.py"))))
    sizes = {"layers": 1, "width": 32, "heads": 2, "context": 32, "dropout": 0.1, "until-step": 40, "save-every": 10}
    return ("--data", str(text), *(word for name, value in sizes.items() for word in (f"--{name}", str(value))))


def config(stage: int) -> str:
    """A config of `configs/`."""
    path = ROOT / f"configs/zero{stage}_bf16.json"
    assert json.loads(path.read_text())["zero_optimization"]["stage"] == stage
    return str(path)
