"""The `wsm-ds` command: parse, one library call, print. The library is imported when a command needs it."""

import argparse
import logging
import sys
from collections.abc import Sequence

from wsm_ds import __version__
from wsm_ds.cli import doctor, evaluate, inspect, jobs, merge, report, storage, tune, watch
from wsm_ds.cli.command_parser import CommandParser
from wsm_ds.cli.completion import SHELLS, PrintCompletion
from wsm_ds.cli.messages import describe
from wsm_ds.cli.options import EXIT_CODES, level_options
from wsm_ds.cli.streams import Printed, standard_streams
from wsm_ds.distributed.parent import STARTER  # noqa: F401  remembers the parent, as early as possible
from wsm_ds.errors import WsmError, one_line
from wsm_ds.filesystem.capacity import require_address_space

log = logging.getLogger(__name__)

LEVELS = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO, 2: logging.DEBUG}
"""Level of logging by verbosity: -1 is -q, 1 is -v, 2 is -vv."""

ONLY_PRINT = ("inspect", "coefficients", "storage")
"""Commands whose only result is what they print."""
LEAST_ADDRESS_SPACE = 192 << 20
"""Bytes. With less, numpy's OpenBLAS ends the process while it is imported, or no thread can be started."""

EPILOG = f"""\
example, a first merge:
  wsm-ds inspect RUN
  wsm-ds merge RUN --last 3 --out MERGED
  wsm-ds verify MERGED

`wsm-ds COMMAND --help` shows the flags and examples of a command.

{EXIT_CODES}"""


def parser() -> CommandParser:
    """The parser of the whole command line, with one subparser per command. docs/cli.md is made from it."""
    top = CommandParser(
        prog="wsm-ds",
        usage="wsm-ds COMMAND ...",
        description="Merge DeepSpeed ZeRO checkpoints instead of decaying the learning rate.",
        epilog=EPILOG,
    )
    level_options(top)
    top.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    top.add_argument("--version", action="version", version=f"wsm-ds {__version__}", help="print the version and exit")
    top.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=SHELLS,
        help="print the completion script of a shell and exit; needs pip install 'wsm_ds[completion]'",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands", prog="wsm-ds")
    inspect.add_inspect(commands)
    doctor.add_command(commands)
    merge.add_commands(commands)
    inspect.add_verify(commands)
    inspect.add_coefficients(commands)
    evaluate.add_command(commands)
    tune.add_command(commands)
    report.add_command(commands)
    storage.add_command(commands)
    watch.add_commands(commands)
    jobs.add_commands(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: the words after `wsm-ds`; those of the process if None.

    Returns:
        The exit code; EXIT_CODES says what it means.
    """
    with standard_streams() as printed:
        try:
            options = _parsed(arguments)
        except SystemExit as end:  # --help and --version have printed, or an error is on stderr
            sys.stdout.flush()
            if printed.failure is not None and not end.code:
                raise SystemExit(_not_printed(printed)) from end
            raise
        code = _run(options)
        sys.stdout.flush()
        if printed.failure is not None:
            exit_code = _not_printed(printed)
            return exit_code if code == 0 and _only_prints(options) else code
        return code


def _not_printed(printed: Printed) -> int:
    """Says that not everything was printed, and returns the exit code of a command that does nothing but print."""
    what = "stdout was closed" if printed.is_closed else f"stdout cannot be written ({printed.failure})"
    print(f"wsm-ds: {what} before everything was printed", file=sys.stderr)
    return 3


def _only_prints(options: argparse.Namespace) -> bool:
    """Whether a command has done nothing, if nobody could read what it printed."""
    is_prune_list = getattr(options, "delete", None) is False
    return options.command in ONLY_PRINT or getattr(options, "dry_run", False) or is_prune_list


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    # `parse_known_args`: the parser of the command, not the top parser, must report unknown flags.
    options, unknown = parser().parse_known_args(arguments)
    if unknown:
        options.parser.refuse_unknown(unknown)
    if options.quiet and options.verbose:
        options.parser.error("-q/--quiet and -v/--verbose cannot be given together")
    return options


def _run(options: argparse.Namespace) -> int:
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("wsm_ds").setLevel(LEVELS[-1 if options.quiet else min(options.verbose, 2)])
    try:
        require_address_space(LEAST_ADDRESS_SPACE)
        return int(options.function(options))
    except WsmError as error:
        log.debug("the error came from here", exc_info=True)
        print(one_line(f"wsm-ds: {type(error).__name__}: {describe(error, options)}"), file=sys.stderr)
        return error.exit_code
    except OSError as error:
        log.debug("the error came from here", exc_info=True)
        print(one_line(f"wsm-ds: {error}"), file=sys.stderr)
        return 3
    except MemoryError as error:
        log.debug("the error came from here", exc_info=True)
        reason = f" ({error})" if str(error) else ""
        print(one_line(f"wsm-ds: the machine, or a limit (ulimit -v), has too little memory{reason}"), file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("wsm-ds: interrupted; nothing was published", file=sys.stderr)
        return 130
