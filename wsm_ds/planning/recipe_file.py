"""Reads the YAML file of a recipe as plain data."""

from pathlib import Path
from typing import Any

from wsm_ds.errors import RecipeError
from wsm_ds.filesystem.small_files import read_small

BEST = "best.yaml"
"""The recipe in the folder of a tuning."""


def read_yaml(path: Path, what: str = "the recipe") -> Any:
    """Returns what a YAML file holds.

    Args:
        path: the file.
        what: it is, for an error message.

    Raises:
        RecipeError: it cannot be read, or a mapping has a key twice: PyYAML would take the last value without a word.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that is given twice."""

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    line = key.start_mark.line + 1
                    raise RecipeError(f"{what} {path}: line {line} gives {key.value!r} a second time; remove one.")
                seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
            return node

    try:
        return yaml.load(read_small(path), Loader)
    except RecipeError:
        raise
    except (
        Exception
    ) as error:  # PyYAML's constructors (`yaml/constructor.py`) raise ValueError, OverflowError, TypeError and others
        reason = " ".join(str(error).split())  # PyYAML's messages have several lines
        if path.is_dir():
            best = path / BEST
            reason = f"it is a folder; give {best}" if best.is_file() else "it is a folder"
        elif isinstance(error, FileNotFoundError):
            reason = "there is no such file"
        raise RecipeError(f"{what} {path} cannot be read: {reason}") from error
