"""Arrows point one way (the order below), and only two modules may import deepspeed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "wsm_ds"
ORDER = (
    "errors", "sizes", "dtypes", "filesystem", "distributed", "schedules", "torchfile", "layouts", "planning",
    "outputs", "engine", "publishing", "merging", "verification", "inspection", "reporting", "watching", "estimate",
    "training", "cli", "__main__",
)  # fmt: skip
"""Each may import what stands before it."""
MAY_IMPORT = {"deepspeed": {"schedules", "training"}, "torch": {"schedules", "distributed", "training"}}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names if node.module == "wsm_ds")
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_module_has_a_room_and_imports_only_from_rooms_before_it() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path == PACKAGE / "__init__.py":
            continue
        assert room(path) in ORDER, path
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "wsm_ds" or len(parts) < 2 or parts[1] not in ORDER:
                continue
            assert ORDER.index(parts[1]) <= ORDER.index(room(path)), f"{path} imports {name}"


def test_torch_and_deepspeed_are_imported_only_where_they_belong() -> None:
    for path in PACKAGE.rglob("*.py"):
        for name in imports(path):
            allowed = MAY_IMPORT.get(name.split(".")[0])
            assert allowed is None or room(path) in allowed, f"{path} imports {name}"


def test_a_merge_imports_neither_torch_nor_deepspeed() -> None:
    code = "import sys, wsm_ds.merging, wsm_ds.verification; print(sorted({'torch', 'deepspeed'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.torch
def test_public_names_are_what_they_say_whatever_was_imported_before() -> None:
    import wsm_ds
    import wsm_ds.merging
    import wsm_ds.verification

    assert all(callable(getattr(wsm_ds, name)) for name in wsm_ds.__all__ if name != "__version__")
