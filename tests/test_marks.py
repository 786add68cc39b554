"""What is collected: the fast tests without torch and DeepSpeed, those of older DeepSpeed only on request."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

COLLECT = """
import sys
import pytest

class Imported:
    def pytest_collection_finish(self, session):
        print("collected", len(session.items), sorted({"deepspeed", "torch", "transformers"} & set(sys.modules)))

pytest.main(["-qq", "--collect-only", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[Imported()])
"""


def collected(*arguments: str) -> tuple[int, str]:
    """(number of tests, which heavy modules were imported)."""
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, *arguments], cwd=root, capture_output=True, text=True, check=True
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("collected ")]
    _, number, modules = line.split(" ", 2)
    return int(number), modules


def test_collecting_the_tests_that_need_no_torch_imports_none() -> None:
    number, modules = collected("-m", "not torch")
    assert modules == "[]"
    assert number > 400


@pytest.mark.skipif(find_spec("torch") is None, reason="the file that is collected imports torch")
def test_older_deepspeed_is_collected_only_on_request() -> None:
    named = ("--ignore-glob=*/test_[!o]*", "-k", "test_old_deepspeed")
    assert collected(*named)[0] == 0
    assert collected(*named, "-m", "old_deepspeed")[0] == 31
