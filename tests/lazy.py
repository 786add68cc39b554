"""torch and launch/tokens.py, imported when a test first uses them. So collecting the tests stays fast."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokens as tokens
    import torch as torch
else:

    class _LazyModule:
        """Stands for a module; the first attribute that is asked for imports it."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            if attribute.startswith(("_", "pytest")):  # pytest looks for marks and fixtures on every name of a file
                raise AttributeError(attribute)
            return getattr(import_module(self._name), attribute)

    tokens, torch = _LazyModule("tokens"), _LazyModule("torch")


def load_file(path: Any) -> "dict[str, torch.Tensor]":
    """safetensors' function of this name."""
    from safetensors.torch import load_file as load

    return load(path)
