"""Which package may import which; torch and deepspeed are imported only where they are needed, and only then."""

import ast
import inspect
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import wsm_ds
from wsm_ds.planning.recipe import SWEPT, MergeRecipe
from wsm_ds.planning.recipe_options import RecipeOptions, SweepOptions, WindowOptions
from wsm_ds.planning.window_recipe import WindowRecipe

PACKAGE = Path(wsm_ds.__file__).parent
ORDER = (
    "errors", "sizes", "dtypes", "filesystem", "distributed", "schedules", "torchfile", "layouts", "planning",
    "outputs", "engine", "publishing", "merge_planning", "merging", "loading", "averaging", "verification",
    "inspection", "evaluation", "tuning", "reporting", "watching", "estimate", "doctor", "training", "cli", "__main__",
)  # fmt: skip
"""The packages and top-level modules; each may import those before it."""
MAY_IMPORT = {
    "deepspeed": {"averaging", "schedules", "training"},
    "torch": {"averaging", "schedules", "distributed", "engine", "evaluation", "loading", "training", "tuning"},
}
MAY_IMPORT_AT_ONCE = {"schedules/lr_schedules.py", "schedules/optimizer_hooks.py"}
"""Modules whose classes need torch; all others import it inside a function."""
MOST_TOP_LEVEL_MODULES = 12


def imported_names(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names if node.module == "wsm_ds")
    return names


def immediate_imports(path: Path) -> set[str]:
    """What a module imports when it is imported itself."""
    tree = ast.parse(path.read_text())
    deferred = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    for node in deferred:
        node.body = [ast.Pass()]
    return imported_names(tree)


def modules() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def arrows() -> dict[str, set[str]]:
    """The packages that each package imports."""
    found: dict[str, set[str]] = {}
    for path in modules():
        parts = [name.split(".") for name in imported_names(ast.parse(path.read_text()))]
        targets = {part[1] for part in parts if part[0] == "wsm_ds" and len(part) > 1}
        found.setdefault(package_of(path), set()).update(targets - {"__version__", package_of(path)})
    return found


def test_every_package_is_in_the_list_and_imports_only_those_before_it() -> None:
    found = arrows()
    assert set(found) == set(ORDER)
    back = [(a, b) for a, targets in found.items() for b in targets if ORDER.index(b) > ORDER.index(a)]
    assert back == []


def test_no_package_imports_itself_through_others() -> None:
    TopologicalSorter(arrows()).prepare()  # raises CycleError, which names the circle


def test_modules_of_a_package_do_not_import_each_other_in_a_circle() -> None:
    names = {path: ".".join(("wsm_ds", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in modules()}
    graph = {
        name: {target for target in immediate_imports(path) if target in names.values()} for path, name in names.items()
    }
    TopologicalSorter(graph).prepare()


def test_few_modules_lie_outside_a_package() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_TOP_LEVEL_MODULES


def test_torch_and_deepspeed_are_imported_only_where_they_belong() -> None:
    for path in modules():
        for name in imported_names(ast.parse(path.read_text())):
            allowed = MAY_IMPORT.get(name.split(".")[0])
            assert allowed is None or package_of(path) in allowed, f"{path} imports {name}"


def test_torch_and_deepspeed_are_imported_when_they_are_used() -> None:
    at_once = {
        path.relative_to(PACKAGE).as_posix()
        for path in modules()
        if {name.split(".")[0] for name in immediate_imports(path)} & set(MAY_IMPORT)
    }
    assert at_once <= MAY_IMPORT_AT_ONCE


def test_a_merge_imports_neither_torch_nor_deepspeed() -> None:
    code = (
        "import sys, wsm_ds; [getattr(wsm_ds, name) for name in wsm_ds.__all__ if name not in ('WSMLR', 'WSDLR')]\n"
        "import wsm_ds.distributed.launcher; print(sorted({'torch', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_package_loads_nothing_heavy_and_dir_names_everything() -> None:
    code = (
        "import sys, wsm_ds; print(set(wsm_ds.__all__) <= set(dir(wsm_ds)), "
        "sorted({'torch', 'deepspeed', 'numpy', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True []"


@pytest.mark.torch
def test_public_names_are_what_they_say_whatever_was_imported_before() -> None:
    import wsm_ds.merging
    import wsm_ds.verification

    assert set(wsm_ds.__all__) == {*wsm_ds._MODULES, "__version__"}
    assert all(callable(getattr(wsm_ds, name)) for name in wsm_ds._MODULES)


def test_the_typed_keywords_are_the_fields_of_a_recipe() -> None:
    assert set(WindowOptions.__annotations__) == set(WindowRecipe.model_fields)
    assert set(RecipeOptions.__annotations__) == set(MergeRecipe.model_fields)
    assert set(SweepOptions.__annotations__) == {*MergeRecipe.model_fields, "outputs"}
    several = {
        name for name, kind in SweepOptions.__annotations__.items() if kind != RecipeOptions.__annotations__.get(name)
    }
    assert several == {*SWEPT, "outputs"}


def test_no_function_takes_untyped_keywords() -> None:
    for name in (
        "merge",
        "plan_merge",
        "export",
        "reshard",
        "make_recipe",
        "make_recipes",
        "load_merge",
        "load_merges",
        "load_each",
        "load_recipe",
        "load_recipes",
    ):
        parameters = inspect.signature(getattr(wsm_ds, name)).parameters.values()
        (keywords,) = [parameter for parameter in parameters if parameter.kind is parameter.VAR_KEYWORD]
        assert "Unpack" in str(keywords.annotation) or "Options" in str(keywords.annotation), name
