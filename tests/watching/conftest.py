"""A run that is played step by step, and watches beside it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from played_run import PlayedRun
from watches import Watching


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> PlayedRun:
    return PlayedRun(runs / "w2_s2_bf16", tmp_path / "a run" / "it's here")


@pytest.fixture
def start() -> Iterator[Any]:
    """Starts watches, and leaves none behind."""
    started: list[Watching] = []

    def starting(*arguments: object, code: str = "") -> Watching:
        started.append(Watching(*arguments, code=code))
        return started[-1]

    yield starting
    for one in started:
        one.process.kill()
        one.patience.cancel()
        one.process.wait()
        one.out.close()
        one.err.close()
