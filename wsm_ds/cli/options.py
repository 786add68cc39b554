"""What several commands share: their options, and how a recipe's values are read from them."""

import argparse
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EXIT_CODES = (
    "exit codes: 0 done; 2 a wrong request; 3 a broken or unsupported checkpoint, a full disk or an I/O error; "
    "130 interrupted by SIGINT or SIGTERM (run the same command again to go on)"
)
FORM = ("world_size", "stage", "sub_group_size", "like")
CURVE_SEPARATOR = r",(?=\s*(?:1-sqrt|[A-Za-z]))"
"""A comma before the name of a curve; others separate the numbers of a table."""


def command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], int], text: str, epilog: str = EXIT_CODES
) -> argparse.ArgumentParser:
    """A command's parser; `text` is its line in the help."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, epilog=epilog)
    parser.set_defaults(function=function)
    parser.add_argument("--json", action="store_true", help="print JSON, a merge one event a line")
    return parser


def recipe_options(parser: argparse.ArgumentParser) -> None:
    """What a merge is, but for the run, the ends of its window and its output."""
    parser.add_argument("--recipe", type=Path, metavar="FILE.yaml", help="a recipe; other options count before its own")
    parser.add_argument(
        "--last", metavar="N[,N…]", help="the newest N complete checkpoints; several make several outputs"
    )
    parser.add_argument(
        "--curve", help="linear (default), cosine, 1-sqrt, power:P, ema:R, …; several, with commas, too"
    )
    parser.add_argument("--floor", metavar="M", help="final rate as a fraction of the peak (default 0)")
    parser.add_argument("--coefficients", metavar="C,C,…", help="instead of a curve: oldest first, summing to 1")
    parser.add_argument("--oldest-interval", type=int, metavar="STEPS", help="steps the oldest checkpoint stands for")
    parser.add_argument("--format", metavar="F[,F…]", help="zero (default: DeepSpeed loads it), universal, safetensors")
    form_options(parser)
    parser.add_argument("--optimizer-states", choices=("carry", "merge", "drop"), help="default carry")
    parser.add_argument(
        "--allow", action="append", default=[], choices=("warmup", "lr-change"), help="pass over a check"
    )
    content_options(parser)
    work_options(parser)


def form_options(parser: argparse.ArgumentParser) -> None:
    """The form of a zero output."""
    parser.add_argument("--world-size", type=int, metavar="W", help="data-parallel ranks; default: as in the newest")
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), help="ZeRO stage; default: as in the newest")
    parser.add_argument(
        "--sub-group-size", type=int, metavar="N", help="of stage 3, as in the ds_config that will load"
    )
    parser.add_argument("--like", type=Path, metavar="RUN/TAG", help="the form of another checkpoint")


def content_options(parser: argparse.ArgumentParser) -> None:
    """What an output holds."""
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="of safetensors; default: as trained")
    parser.add_argument("--max-shard-size", metavar="SIZE", help="of a safetensors file (default 5GB)")
    parser.add_argument("--rename", action="append", default=[], metavar="PATTERN=NEW",
                        help="in names of safetensors: a regular expression and what replaces it")  # fmt: skip
    parser.add_argument("--include", action="append", default=[], type=Path, metavar="FILE",
                        help="copy FILE into the output: config.json, tokenizer files")  # fmt: skip
    allow_global(parser)


def work_options(parser: argparse.ArgumentParser) -> None:
    """What a merge takes of the machine, and how it treats what it finds."""
    parser.add_argument("--memory-budget", metavar="SIZE", help="of all buffers (default 512MiB)")
    parser.add_argument("--threads", type=int, metavar="N", help="default: all cores")
    parser.add_argument("--restart", action="store_true", help="throw away what another merge left")


def allow_global(parser: argparse.ArgumentParser) -> None:
    """Classes in checkpoints that are not known."""
    parser.add_argument("--allow-global", action="append", default=[], metavar="MODULE.NAME",
                        help="a class in the checkpoints' client state to carry along; it is not imported")  # fmt: skip


def recipe_values(options: argparse.Namespace) -> dict[str, Any]:
    """The values of a recipe that `recipe_options` were given; None where not."""
    names = ("run", "out", "oldest_interval", "dtype", "optimizer_states", *FORM, "memory_budget", "threads",
             "max_shard_size")  # fmt: skip
    values = {name: getattr(options, name) for name in names}
    values |= {name: several(getattr(options, name)) for name in ("last", "floor", "format")}
    values["curve"] = several(options.curve, separator=CURVE_SEPARATOR)
    values["coefficients"] = split(options.coefficients)
    values["allow"] = tuple(options.allow) or None
    return values | naming(options)


def with_default_curve(values: dict[str, Any]) -> dict[str, Any]:
    """A linear curve where nothing says what the coefficients are."""
    if values["curve"] is None and values["coefficients"] is None:
        return values | {"curve": "linear"}
    return values


def naming(options: argparse.Namespace) -> dict[str, Any]:
    """Options that may be given more than once."""
    pairs = [text.rpartition("=") for text in options.rename]
    return {
        "rename": {pattern: replacement for pattern, _, replacement in pairs} or None,
        "include": tuple(options.include) or None,
        "allow_globals": tuple(options.allow_global) or None,
    }


def several(text: str | None, separator: str = ",") -> Any:
    """One value, or a list of them."""
    parts = [part.strip() for part in re.split(separator, text)] if text else []
    return parts if len(parts) > 1 else parts[0] if parts else None


def split(text: str | None) -> tuple[str, ...] | None:
    """The parts between commas."""
    return tuple(part.strip() for part in text.split(",")) if text else None


REPEAT_S = 15.0
"""Launchers send a signal more than once; one that comes so soon after another is the same."""


@contextmanager
def signals_interrupt(what_remains: str) -> Iterator[Callable[[], None]]:
    """SIGTERM and SIGINT end the work at once, and leave what is staged for the next attempt.

    Yields a check that raises the interruption again, if code that passes over errors has swallowed it.
    """
    from wsm_ds.errors import Interrupted

    received: list[tuple[int, float]] = []

    def check() -> None:
        if received:
            name = signal.Signals(received[-1][0]).name
            raise Interrupted(f"{name}; {what_remains} Run the same command again to go on.")

    def stop(number: int, _: object) -> None:
        is_repeated = bool(received) and time.monotonic() - received[-1][1] < REPEAT_S
        if not is_repeated:
            received.append((number, time.monotonic()))
            check()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
