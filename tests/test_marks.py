"""Collecting the fast tests imports neither torch nor DeepSpeed."""

import subprocess
import sys
from pathlib import Path

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


def test_collecting_the_fast_tests_imports_no_torch() -> None:
    number, modules = collected("-m", "not deepspeed and not cluster")
    assert modules == "[]"
    assert number > 400
