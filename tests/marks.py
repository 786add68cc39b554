"""What a test needs, as marks that are set from its fixtures and its file: nobody has to remember them.

    torch      the file imports torch, or a module that does
    deepspeed  the test trains with DeepSpeed, or reads what such a training wrote
    cluster    the test runs on the Slurm cluster
    old_deepspeed  the test installs older versions of DeepSpeed

Where a mark is deselected (`-m "not torch"`), files that need torch as soon as they are imported are not collected.
What is marked old_deepspeed takes minutes and needs PyPI. It is collected only if `-m old_deepspeed` or the file's name
asks for it.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

TRAINED = {
    "compiled_ops", "converted", "even_runs", "launcher", "long_runs", "megatron", "named", "other_world_sizes",
    "reports", "request_of", "runs", "sharing", "states_runs", "trained", "went_back", "whole_runs", "wrapping",
    "written",
}  # fmt: skip
"""Fixtures that train with DeepSpeed."""
TORCH = {
    "accelerate",
    "deepspeed",
    "gpt",
    "loaded_models",
    "made_models",
    "made_tokenizers",
    "pretrain",
    "reference",
    "safetensors.torch",
    "tokens",
    "torch",
    "transformers",
}
"""Modules that import torch."""
LAZY = {"lazy", "recording_optimizer", "reference"}
"""Modules that import torch when a test uses them."""
OLD_DEEPSPEED = "test_old_deepspeed"
"""The file that installs older versions of DeepSpeed."""
MARKS = {
    "torch": "the test needs torch",
    "deepspeed": "the test trains with DeepSpeed, or reads what such a training wrote",
    "cluster": "the test runs on the Slurm cluster",
    "old_deepspeed": "the test installs older versions of DeepSpeed",
}


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}; set by tests/marks.py")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    is_test = collection_path.suffix == ".py" and collection_path.name.startswith("test_")
    if not is_test:
        return None
    expression = config.getoption("markexpr", "")
    if collection_path.stem == OLD_DEEPSPEED and "old_deepspeed" not in expression.replace("not old_deepspeed", ""):
        return True
    if "not torch" in expression and imports_torch(collection_path, at_top=True):
        return True
    if "not deepspeed" in expression and collection_path.stem.endswith("_deepspeed"):
        return True
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if "cluster" in fixtures:
            item.add_marker("cluster")
        if fixtures & TRAINED or item.path.stem.endswith("_deepspeed"):
            item.add_marker("deepspeed")
        if item.path.stem == OLD_DEEPSPEED:
            item.add_marker("old_deepspeed")
        if item.path.suffix == ".py" and imports_torch(item.path, at_top=False):
            item.add_marker("torch")


@cache
def imports_torch(path: Path, *, at_top: bool) -> bool:
    """Whether a file names a module of TORCH in an import; `at_top`: in one that runs when the file is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if at_top:
        return any(_imported(node) & TORCH for node in tree.body)
    return any(_imported(node) & (TORCH | LAZY) for node in ast.walk(tree))


def _imported(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    else:
        return set()
    return {".".join(name.split(".")[:depth]) for name in names for depth in (1, 2)}
