"""The forms of large runs, which DeepSpeed trains once."""

from pathlib import Path

import pytest

from benchmarks.many_ranks.forms import ARGUMENTS, Form, form


@pytest.fixture(scope="session")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which runs of two ranks are kept."""
    return tmp_path_factory.mktemp("forms")


@pytest.fixture(scope="session")
def written(forms: Path) -> dict[str, Form]:
    """By kind, a checkpoint of two ranks that DeepSpeed wrote."""
    return {kind: form(kind, forms) for kind in ARGUMENTS}
