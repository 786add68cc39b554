"""Error messages about a recipe's values, as plain sentences instead of pydantic's texts.

Names of recipe keys stand in backticks, so that the command line can show its flags in their place.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from wsm_ds.errors import brief, did_you_mean

KINDS = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "string_type": "a text",
    "path_type": "a path",
    "tuple_type": "a list",
    "dict_type": "a mapping",
}
"""The expected kind of value, by pydantic's name of the error."""


def validation_sentences(error: ValidationError, known: Iterable[str]) -> str:
    """Every fault that pydantic found: the key, the value, and what is allowed.

    Args:
        error: of a recipe's model.
        known: all keys of a recipe, from which a mistyped key is corrected.
    """
    faults = error.errors(include_url=False)
    return "; ".join(dict.fromkeys(_sentence(dict(fault), known) for fault in faults))


def _sentence(fault: dict[str, Any], known: Iterable[str]) -> str:
    kind, context, value = fault["type"], fault.get("ctx", {}), fault["input"]
    if kind == "value_error":
        text = str(context["error"])
        return f"`{fault['loc'][0]}`: {text.rstrip('.')}" if fault["loc"] else text
    key = str(fault["loc"][0]) if fault["loc"] else "recipe"
    if kind == "missing":
        return f"`{key}` is missing"
    if kind == "extra_forbidden":
        return unknown_key(key, known)
    rule, suggestion = f"`{key}`: {fault['msg']}", ""
    if kind in KINDS:
        rule = f"`{key}` must be {KINDS[kind]}"
    elif kind == "greater_than_equal":
        rule = f"`{key}` must be at least {context['ge']:g}"
    elif kind == "less_than_equal":
        rule = f"`{key}` must be at most {context['le']:g}"
    elif kind == "literal_error":
        allowed = context["expected"].replace("'", "")
        rule = f"`{key}` must be {allowed}"
        choices = allowed.replace(" or ", ", ").split(", ")
        suggestion = did_you_mean(value, choices) if value not in choices else ""  # the text '2' is not the number 2
    return f"{rule}, not {brief(value)}{suggestion}"


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The sentence about a key that no recipe has. It suggests a similar key.

    Args:
        key: the unknown key.
        known: all keys of a recipe.
    """
    suggestion = did_you_mean(key, known)
    return f"{brief(key)} is not a key of a recipe" + (suggestion or f" (the keys are {', '.join(sorted(known))})")


def check_replacements(replacements: Mapping[str, str]) -> None:
    """Checks regular expressions and what replaces them.

    Raises:
        ValueError: a pattern is empty or not a regular expression, or its replacement does not fit it.
    """
    for pattern, replacement in replacements.items():
        if not pattern:
            raise ValueError(f"the pattern of {replacement!r} is empty, and would match between all characters")
        try:
            re.compile(pattern)
            re.sub(pattern, replacement, "")
        except (re.error, IndexError) as error:
            raise ValueError(f"{pattern!r} → {replacement!r} is not a regular expression: {error}") from error
