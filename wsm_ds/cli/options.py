"""Flags that several commands have, and the recipe values that they give."""

import argparse
import atexit
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsm_ds.cli.command_parser import CommandParser
from wsm_ds.errors import RecipeError

if TYPE_CHECKING:
    from wsm_ds.reporting.progress import Style

EXIT_CODES = """\
exit codes: 0 done; 2 a wrong request; 3 a broken or unsupported checkpoint, a full disk or an I/O error;
130 interrupted by SIGINT or SIGTERM (run the same command again to continue)"""
RUN = "the run's folder: DeepSpeed's save_dir, or the folder in which HF Trainer, Accelerate or Lightning saves"
FORM = ("world_size", "stage", "sub_group_size", "like")
LISTS = ("last", "last_tokens", "last_samples", "to_step", "top", "floor", "spread", "format")
"""Recipe keys whose flag takes values between commas; each makes an output."""
RECIPE = (
    "run", "out", "from_step", "oldest_interval", "by", "tokens_per_step", "sequence_length", "data_switch",
    "dtype", "optimizer_states", "carry_from", *FORM, "memory_budget", "threads", "max_shard_size",
)  # fmt: skip
"""Recipe keys whose flag takes one value. The `dest` of a flag must be its recipe key: `messages` relies on it."""
CURVE_SEPARATOR = r",(?=\s*(?:1-sqrt|[A-Za-z]))"
"""A comma before the name of a curve; other commas separate the numbers of a table."""


def command(
    commands: Any,
    name: str,
    function: Callable[[argparse.Namespace], int],
    summary: str,
    description: str,
    examples: str,
    usage: str | None = None,
) -> CommandParser:
    """Adds a command with the flags that every command has.

    Args:
        commands: what `add_subparsers` returned.
        name: of the command.
        function: runs it, and returns its exit code.
        summary: its line in `wsm-ds --help`, without a capital and a full stop.
        description: what it does, in lines of at most 120 columns.
        examples: the end of its help; EXIT_CODES are added unless it has its own.
        usage: replaces the list of all flags, if that list would be too long.
    """
    epilog = examples if "exit codes:" in examples else f"{examples}\n\n{EXIT_CODES}"
    parser: CommandParser = commands.add_parser(
        name, help=summary, description=description, epilog=epilog, usage=usage and f"wsm-ds {name} {usage}"
    )
    parser.set_defaults(function=function, parser=parser)
    # The top parser has these flags too. A default would hide what was given there (argparse.py, _SubParsersAction).
    level_options(parser, verbose=argparse.SUPPRESS, quiet=argparse.SUPPRESS)
    return parser


def level_options(parser: argparse.ArgumentParser, *, verbose: Any = 0, quiet: Any = False) -> None:
    """Adds -v and -q with these defaults."""
    level = parser.add_mutually_exclusive_group()
    level.add_argument("-v", "--verbose", action="count", default=verbose,
                       help="log more; -vv also shows where an error came from")  # fmt: skip
    level.add_argument("-q", "--quiet", action="store_true", default=quiet,
                       help="log errors only, and show no progress")  # fmt: skip


def json_option(parser: argparse.ArgumentParser) -> None:
    """Adds --json."""
    parser.add_argument("--json", action="store_true", help="print JSON; long commands print one event a line")


def recipe_option(parser: argparse.ArgumentParser) -> None:
    """Adds --recipe."""
    parser.add_argument("--recipe", type=Path, metavar="FILE.yaml", help="YAML recipe; flags given here override it")


def tag_option(parser: argparse.ArgumentParser, text: str) -> None:
    """Adds --tag, for commands that take one checkpoint."""
    parser.add_argument("--tag", "--tags", dest="tag", metavar="TAG", help=text)


def window_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds the group of the window with --last, and returns the group for more flags."""
    window = parser.add_argument_group("window (which checkpoints are merged)")
    window.add_argument(
        "--last",
        metavar="N[,N...]",
        help="the newest N checkpoints; an incomplete newest one is passed over, "
        "an incomplete one among them is an error; several numbers make several outputs",
    )
    return window


def allow_option(group: argparse._ActionsContainer, *, negative: bool = False) -> None:
    """Adds --allow.

    Args:
        group: of the parser.
        negative: whether the command takes coefficients, which may be negative on request.
    """
    refused = (
        "the window begins in the warmup, the learning rate changes in it, or files of a checkpoint are not of one save"
    )
    if negative:
        refused += ", or --coefficients are negative (an extrapolation)"
    group.add_argument(
        "--allow", action="append", default=[],
        choices=("warmup", "lr-change", "foreign-files", "missing-slots", *(("negative",) if negative else ())),
        help=f"go on although {refused} (default: refuse); may be given several times",
    )  # fmt: skip


def rename_sources_option(group: argparse._ActionsContainer) -> None:
    """Adds --rename-sources."""
    group.add_argument(
        "--rename-sources", action="append", default=[], metavar="TAG:PATTERN=NEW",
        help="replace a regular expression in tensor names of an older checkpoint, to match those of the newest; TAG "
        "may have * and ?; may be given several times, in order (names with known wrappers, such as those of "
        "torch.compile, match without it)",
    )  # fmt: skip


def curve_options(parser: argparse.ArgumentParser, *, is_required: bool = False) -> argparse._ArgumentGroup:
    """Adds the group of the curve, and returns it for more flags.

    Args:
        parser: of the command.
        is_required: whether --curve has no default.
    """
    several = "" if is_required else " (default linear); several, with commas, make several outputs"
    curve = parser.add_argument_group("curve (how much each checkpoint counts)")
    curve.add_argument("--curve", required=is_required, help=f"linear, cosine, 1-sqrt, power:P, ema:R, ...{several}")
    floor: dict[str, Any] = {"type": float} if is_required else {}
    curve.add_argument(
        "--floor", metavar="M", help="the curve's final learning rate as a fraction of the peak (default 0)", **floor
    )
    curve.add_argument(
        "--spread", metavar="S" if is_required else "S[,S...]",
        help="how far the coefficients spread: wsm (default), qam or maxent (narrower, with the same centre), or a "
        f"dial between, as qam:0.5{'' if is_required else '; several make several outputs'}",
    )  # fmt: skip
    interval: dict[str, Any] = {"type": int} if is_required else {}
    curve.add_argument(
        "--oldest-interval", metavar="STEPS", **interval,
        help="the interval before the oldest checkpoint, in steps or in the unit of --by (default: the median of the "
        "other intervals)",
    )  # fmt: skip
    return curve


def coefficients_option(group: argparse._ActionsContainer) -> None:
    """Adds --coefficients."""
    group.add_argument(
        "--coefficients", metavar="C,C,...", help="instead of a curve: a number for each checkpoint, oldest first, "
        "summing to 1; with --allow negative some may be below 0 (write --coefficients=-0.5,1.5)",
    )  # fmt: skip


def format_options(group: argparse._ActionsContainer) -> None:
    """Adds --format and --optimizer-states."""
    group.add_argument(
        "--format", metavar="F[,F...]",
        help="zero (default: DeepSpeed loads it), universal (for load_universal) or safetensors; several make several "
        "outputs",
    )  # fmt: skip
    group.add_argument(
        "--optimizer-states", choices=("carry", "merge", "drop"),
        help="carry those of the newest checkpoint (default), merge them like the parameters, or drop them",
    )  # fmt: skip


def dtype_option(group: argparse._ActionsContainer) -> None:
    """Adds --dtype."""
    group.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="of parameters in safetensors (default: the training dtype)"
    )


def safetensors_options(group: argparse._ActionsContainer) -> None:
    """Adds the flags of safetensors outputs."""
    dtype_option(group)
    group.add_argument("--max-shard-size", metavar="SIZE", help="largest safetensors file (default 5GB)")
    group.add_argument(
        "--rename", action="append", default=[], metavar="PATTERN=NEW",
        help="replace a regular expression in tensor names of safetensors; may be given several times, in order",
    )  # fmt: skip


def include_option(group: argparse._ActionsContainer) -> None:
    """Adds --include."""
    group.add_argument(
        "--include", action="append", default=[], type=Path, metavar="FILE",
        help="copy FILE into the output, for example config.json; may be given several times",
    )  # fmt: skip


def form_options(parser: argparse.ArgumentParser) -> None:
    """Adds the group of the form of a zero output."""
    form = parser.add_argument_group("form (which ranks and ZeRO stage a zero output is for)")
    form.add_argument(
        "--world-size", type=int, metavar="W", help="data-parallel ranks (default: those of the newest checkpoint)"
    )
    form.add_argument(
        "--stage", type=int, choices=(1, 2, 3), help="ZeRO stage (default: that of the newest checkpoint)"
    )
    form.add_argument(
        "--sub-group-size", type=int, metavar="N",
        help="sub_group_size of stage 3, as in the ds_config that will load the output (default: that of the newest "
        "checkpoint)",
    )  # fmt: skip
    form.add_argument("--like", type=Path, metavar="RUN/TAG", help="take all three from this checkpoint")


def machine_options(parser: argparse.ArgumentParser) -> None:
    """Adds memory, threads, --restart and --allow-global."""
    machine = parser.add_argument_group("machine")
    memory_options(machine)
    machine.add_argument(
        "--restart", action="store_true",
        help="remove the staging folder of another, unfinished merge to the same output (default: refuse)",
    )  # fmt: skip
    allow_global(machine)


def memory_options(group: argparse._ActionsContainer) -> None:
    """Adds --memory-budget and --threads."""
    group.add_argument("--memory-budget", metavar="SIZE", help="memory for all buffers of a process (default 512MiB)")
    group.add_argument("--threads", type=int, metavar="N", help="threads of a process (default: all cores)")


def allow_global(group: argparse._ActionsContainer) -> None:
    """Adds --allow-global."""
    group.add_argument(
        "--allow-global", dest="allow_globals", action="append", default=[], metavar="MODULE.NAME",
        help="accept this class in the client state of checkpoints; it is carried as data and never imported; may be "
        "given several times",
    )  # fmt: skip


def recipe_values(options: argparse.Namespace) -> dict[str, Any]:
    """The values of a recipe, by key, from the flags of a command; None for a flag that is not given.

    Args:
        options: the parsed arguments. The command may lack some of the flags.
    """
    values = {key: getattr(options, key, None) for key in RECIPE}
    values |= {key: several(getattr(options, key, None)) for key in LISTS}
    values["curve"] = several(options.curve, separator=CURVE_SEPARATOR)
    values["coefficients"] = split(getattr(options, "coefficients", None))
    tags = [tag for text in getattr(options, "tags", []) for tag in split(text) or ()]
    values["tags"] = tuple(tags) or None
    values["rename_sources"] = source_replacements(getattr(options, "rename_sources", ())) or None
    return values | repeated_values(options)


def require_last(values: dict[str, Any], options: argparse.Namespace) -> None:
    """Raises RecipeError if neither --last nor a recipe file says how long the windows are."""
    if values["last"] is None and not options.recipe:
        raise RecipeError("--last N must be given, the number of checkpoints of a window, or a recipe, by --recipe")


def with_default_curve(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values with a linear curve, if they have neither a curve nor coefficients."""
    if values["curve"] is None and values["coefficients"] is None:
        return values | {"curve": "linear"}
    return values


def repeated_values(options: argparse.Namespace) -> dict[str, Any]:
    """The recipe values, by key, of flags that may be given several times."""
    return {
        "rename": dict(_replacement("--rename", text) for text in getattr(options, "rename", ())) or None,
        "allow": tuple(getattr(options, "allow", ())) or None,
        "include": tuple(getattr(options, "include", ())) or None,
        "allow_globals": tuple(options.allow_globals) or None,
    }


def _replacement(flag: str, text: str) -> tuple[str, str]:
    pattern, _, replacement = text.rpartition("=")
    if not pattern:
        raise RecipeError(f"{flag} must be PATTERN=NEW, with a pattern before the last '=', not {replacement!r}")
    return pattern, replacement


def source_replacements(texts: Iterable[str]) -> dict[str, dict[str, str]]:
    """What --rename-sources says, by tag.

    Args:
        texts: the values of the flag.
    """
    by_tag: dict[str, dict[str, str]] = {}
    for text in texts:
        tag, colon, rest = text.partition(":")
        if not tag or not colon:
            raise RecipeError(f"--rename-sources must be TAG:PATTERN=NEW, not {text!r}")
        pattern, replacement = _replacement("--rename-sources TAG:", rest)
        by_tag.setdefault(tag, {})[pattern] = replacement
    return by_tag


def several(text: str | None, separator: str = ",") -> Any:
    """One value, or the list of values between separators; None for no text.

    >>> several("4"), several("4, 8")
    ('4', ['4', '8'])

    Args:
        text: the value of a flag.
        separator: a regular expression.
    """
    values = [value.strip() for value in re.split(separator, text)] if text else []
    return values if len(values) > 1 else values[0] if values else None


def split(text: str | None) -> tuple[str, ...] | None:
    """The values between commas; None for no text."""
    return tuple(value.strip() for value in text.split(",")) if text else None


def progress_style(options: argparse.Namespace) -> "Style":
    """How the progress of a merge is shown."""
    return "quiet" if options.quiet else "json" if options.json else "people"


REPEAT_S = 15.0
"""Launchers send a signal several times. A signal within this time after another one counts as the same."""
INTERRUPTING = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def signals_interrupt(consequence: str) -> Iterator[Callable[[], None]]:
    """Makes SIGTERM and SIGINT raise Interrupted, at once, until the context ends.

    After an interruption the handler stays, and both signals are ignored when Python shuts down. Otherwise a launcher's
    second signal would end the process before it can return its exit code.

    Args:
        consequence: a sentence for the message: what happens to the interrupted work.

    Yields:
        A check that raises the interruption again, in case code that ignores errors has swallowed it.
    """
    from wsm_ds.errors import Interrupted

    received: list[tuple[int, float]] = []

    def check() -> None:
        if received:
            name = signal.Signals(received[-1][0]).name
            raise Interrupted(f"{name}; {consequence} Run the same command again to continue.")

    def stop(number: int, _: object) -> None:
        # Not an interruption of its own: it could end the clean-up that the first signal has started.
        is_repeated = bool(received) and time.monotonic() - received[-1][1] < REPEAT_S
        if not is_repeated:
            received.append((number, time.monotonic()))
            atexit.register(_ignore_signals)
            check()

    previous_handlers = {number: signal.signal(number, stop) for number in INTERRUPTING}
    try:
        yield check
    finally:
        if not received:
            for number, handler in previous_handlers.items():
                signal.signal(number, handler)


def _ignore_signals() -> None:
    # The end of Py_FinalizeEx restores the default of every signal that has a handler (CPython's
    # Modules/signalmodule.c, `_PySignal_Fini`), but not of those that are ignored.
    for number in INTERRUPTING:
        signal.signal(number, signal.SIG_IGN)
