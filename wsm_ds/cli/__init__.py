"""The `wsm-ds` command: parse, one library call, print. The library is imported when a command needs it."""

import argparse
import io
import logging
import sys
from collections.abc import Sequence

from wsm_ds import __version__
from wsm_ds.cli import inspect, merge, storage, watch
from wsm_ds.cli.options import EXIT_CODES
from wsm_ds.errors import WsmError, one_line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wsm-ds", description="Merge ZeRO checkpoints instead of decaying the "
                                     "learning rate.", epilog=EXIT_CODES)  # fmt: skip
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("--version", action="version", version=f"wsm-ds {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    merge.add_commands(commands)
    watch.add_commands(commands)
    storage.add_commands(commands)
    inspect.add_commands(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files and tensors may be no text
    options = _parser().parse_args(arguments)
    try:
        return int(options.function(options))
    except WsmError as error:
        print(one_line(f"wsm-ds: {type(error).__name__}: {error}"), file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(one_line(f"wsm-ds: {error}"), file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("wsm-ds: interrupted; nothing was published", file=sys.stderr)
        return 130
