"""A parser whose errors are one plain line: the flag, the wrong value, and a suggestion."""

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from wsm_ds.errors import did_you_mean, one_line


def _choice(match: re.Match[str]) -> str:
    flag, value, choices = match[1], match[2].strip("'"), re.findall(r"[\w.-]+", match[3])
    return f"{flag} must be one of {', '.join(choices)}, not {value!r}{did_you_mean(value, choices)}"


PLAIN: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"argument (\S+): invalid int value: (.*)", r"\1 must be a whole number, not \2"),
    (r"argument (\S+): invalid float value: (.*)", r"\1 must be a number, not \2"),
    (r"argument (\S+): invalid choice: (.*?) \(choose from (.*)\)", _choice),
    (r"argument (\S+): expected one argument", r"\1 needs a value"),
    (r"argument (\S+): not allowed with argument (\S+)", r"\1 and \2 cannot be given together"),
    (r"the following arguments are required: (.*)", r"\1 must be given"),
    (r"argument (\S+): (.*)", r"\1: \2"),
)
"""Patterns of argparse's messages (CPython's argparse.py) and their replacements. The first match counts."""


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser with plain errors, which shows descriptions and epilogs without new line breaks.

    Flags must be spelled out: `--del` must not delete, and must not change its meaning when a flag is added.
    """

    def __init__(self, **options: Any) -> None:
        defaults: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(**(defaults | options))

    def error(self, message: str) -> NoReturn:
        """Ends the process with code 2 and one line. argparse would print its usage first, which hides the error.

        Args:
            message: argparse's message.
        """
        for pattern, replacement in PLAIN:
            if re.fullmatch(pattern, message, re.DOTALL):
                message = re.sub(pattern, replacement, message, count=1, flags=re.DOTALL)
                break
        self.exit(2, one_line(f"{self.prog}: {message}; see {self.prog} --help") + "\n")

    def refuse_unknown(self, arguments: Sequence[str]) -> NoReturn:
        """Ends the process with an error about unknown arguments.

        Args:
            arguments: those that argparse did not recognize; the first flag among them is named.
        """
        flag = next((text for text in arguments if text.startswith("-")), arguments[0])
        name = flag.split("=")[0]
        if name in self._option_string_actions:
            self.error(f"{name} must stand after the command")
        suggestion = did_you_mean(name.replace("_", "-"), self._option_string_actions)
        kind = "flag" if name.startswith("-") else "argument"
        self.error(f"{name!r} is not a {kind} of this command{suggestion}".replace("a argument", "an argument"))

    def flags(self) -> dict[str, str]:
        """Returns the flag (or the name of the positional argument) of each recipe key."""
        names = {}
        for action in self._actions:
            long = [option for option in action.option_strings if option.startswith("--")]
            names[action.dest] = long[0] if long else str(action.metavar or action.dest)
        return names
