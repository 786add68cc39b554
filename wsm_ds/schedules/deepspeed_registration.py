"""Registers "WSMLR" and "WSDLR" with DeepSpeed, so that a ds_config can name them.

It works whichever of wsm_ds and deepspeed is imported first. DeepSpeed looks a scheduler up as an attribute of
`deepspeed.runtime.lr_schedules` (`runtime/engine.py`, `_scheduler_from_config`); accelerate looks for its name in
`VALID_LR_SCHEDULES` (`accelerate/accelerator.py`). This module imports torch and the schedulers only after DeepSpeed
was imported.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

TARGET = "deepspeed.runtime.lr_schedules"
NAMES = ("WSMLR", "WSDLR")


def register() -> None:
    """Registers the names now if DeepSpeed is imported, or else when it is. A second call changes nothing."""
    module = sys.modules.get(TARGET)
    # A module that is still being executed is in sys.modules, but has no VALID_LR_SCHEDULES yet.
    if module is not None and hasattr(module, "VALID_LR_SCHEDULES"):
        add_names(module)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def add_names(module: ModuleType) -> None:
    """Adds the scheduler classes to DeepSpeed's module.

    Args:
        module: `deepspeed.runtime.lr_schedules`, after it was executed.
    """
    from wsm_ds.schedules import lr_schedules  # imports torch

    for name in NAMES:
        setattr(module, name, getattr(lr_schedules, name))
        if name not in module.VALID_LR_SCHEDULES:
            module.VALID_LR_SCHEDULES.append(name)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds TARGET as Python's own finder does, and adds the names after the module was executed."""

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
