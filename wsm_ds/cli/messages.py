"""Error messages in the words of the command line: flags where the library names recipe keys."""

import argparse
import re

from wsm_ds.errors import RecipeError, WsmError

INVALID = "the recipe is not valid: "
"""The beginning of all messages of `wsm_ds.planning.recipe` about values."""
LENGTH = re.compile(r"\blast(_tokens)? \(--last(-tokens)?\)")
"""A window's length in messages. A tuning has one flag for both forms."""
OF_A_GRID = {"last": "--windows", "last_tokens": "--windows", "curves": "--curve", "spreads": "--spread"}
"""The flags of a tuning for keys of recipes and of the tuning."""


def describe(error: WsmError, options: argparse.Namespace) -> str:
    """An error's message for the user of a command.

    The library writes recipe keys in backticks. A key becomes its flag, except where the value comes from a recipe
    file: then the key stays, and the message names the file.

    Args:
        error: the error that ended a command.
        options: the parsed arguments of the command.
    """
    text = str(error)
    recipe_file = getattr(options, "recipe", None)
    flags = options.parser.flags()
    if recipe_file is not None:
        flags = {key: flag for key, flag in flags.items() if getattr(options, key, None) not in (None, [])}
        text = re.sub(f"^{INVALID}", f"the recipe {recipe_file} is not valid: ".replace("\\", r"\\"), text)
    else:
        text = text.removeprefix(INVALID)
    if "run_sequence_length" in flags:  # the command has another --sequence-length: that of the held-out blocks
        text = text.replace("--sequence-length", flags["run_sequence_length"])
    if "windows" in flags:
        text = LENGTH.sub(flags["windows"], text)
        flags = OF_A_GRID | flags
    text = re.sub(r"`(\w+)`", lambda match: flags.get(match[1], match[0]), text)
    return f"{text.rstrip('.')}; see {options.parser.prog} --help" if isinstance(error, RecipeError) else text
