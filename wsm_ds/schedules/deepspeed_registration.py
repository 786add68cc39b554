"""Makes "WSMLR" and "WSDLR" names that a ds_config may use, whichever of wsm_ds and deepspeed is imported first.

DeepSpeed looks a scheduler up as an attribute of `deepspeed.runtime.lr_schedules` (`runtime/engine.py:1923-1937`);
accelerate asks whether `VALID_LR_SCHEDULES` has its name. Nothing is imported here until DeepSpeed is.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

TARGET = "deepspeed.runtime.lr_schedules"
NAMES = ("WSMLR", "WSDLR")


def register() -> None:
    """Registers now if DeepSpeed is there, else as soon as it comes. Calling it again changes nothing."""
    module = sys.modules.get(TARGET)
    if module is not None and hasattr(module, "VALID_LR_SCHEDULES"):
        add_names(module)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def add_names(module: ModuleType) -> None:
    """Puts the schedulers into DeepSpeed's module."""
    from wsm_ds.schedules import lr_schedules

    for name in NAMES:
        setattr(module, name, getattr(lr_schedules, name))
        if name not in module.VALID_LR_SCHEDULES:
            module.VALID_LR_SCHEDULES.append(name)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds TARGET where the other finders do, and adds the names after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != TARGET:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                add_names(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
