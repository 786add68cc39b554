"""Completion for shells: `wsm-ds --print-completion bash`, written by the package shtab."""

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

SHELLS = ("bash", "zsh")


class PrintCompletion(argparse.Action):
    """A flag that prints a shell's completion script and ends the process."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Prints the script for the shell `values`."""
        try:
            shtab = import_module("shtab")
        except ImportError:
            parser.error("--print-completion needs the package shtab: pip install 'wsm_ds[completion]'")
        _mark_paths(parser, shtab.FILE, shtab.DIRECTORY)
        print(shtab.complete(parser, shell=str(values)))
        parser.exit()


def _mark_paths(parser: argparse.ArgumentParser, file: Any, folder: Any) -> None:
    """Tells shtab, by the attribute that it reads, which values are paths."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _mark_paths(command, file, folder)
        elif action.type is Path:
            action.complete = file if "FILE" in str(action.metavar) else folder  # type: ignore[attr-defined]
