"""Commands that run beside a training run: watch."""

import argparse
import os
from contextlib import closing
from pathlib import Path
from typing import Any

from wsm_ds.cli.options import EXIT_CODES, command, recipe_options, recipe_values, signals_interrupt, with_default_curve

WATCH = """Merges every window that a new checkpoint completes into DIR/step{N}/NAME, once, and never touches the run.
Killed and started again, it goes on."""
EXEC = """a command for every merge, its output kept in DIR/step{N}/NAME.exec.*; {} in it stands for the merge's folder,
as $WSM_MERGE does in its environment (beside WSM_STEP, WSM_WINDOW, WSM_RUN). No shell runs it; a failure stops nothing"""


def add_commands(commands: Any) -> None:
    """Adds this module's commands to the parser's."""
    watch = command(commands, "watch", _watch, "merge every window as soon as its last checkpoint is there", EXIT_CODES)
    watch.description = WATCH
    watch.add_argument("run", nargs="?", type=Path, help="the run's folder; it may be empty yet")
    recipe_options(watch)
    watch.add_argument("--out", type=Path, metavar="DIR", help="the folder of all merges of this watch")
    end_point_options(watch)
    watch.add_argument("--once", action="store_true", help="merge what is complete now, and end: for cron or a job")
    watch.add_argument("--poll-s", type=float, default=30.0, metavar="S", help="seconds between looks (default 30)")
    watch.add_argument("--exec", dest="exec_command", metavar="CMD", help=EXEC)
    watch.add_argument("--nice", type=int, default=10, metavar="N", help="give way to others: 0 to 19 (default 10)")


def end_point_options(parser: argparse.ArgumentParser) -> None:
    """The steps at which windows end."""
    parser.add_argument("--every", type=int, default=1, metavar="STEPS", help="windows end at multiples of STEPS only")
    parser.add_argument("--since", type=int, default=0, metavar="STEP", help="windows end at STEP or later")
    parser.add_argument("--until-step", type=int, metavar="STEP", help="end when all windows up to STEP are made")


def _watch(options: argparse.Namespace) -> int:
    from wsm_ds.errors import RecipeError
    from wsm_ds.progress import event
    from wsm_ds.watching import WatchOptions, watch
    from wsm_ds.watching.commands import parse_command

    if options.poll_s <= 0:
        raise RecipeError(f"--poll-s {options.poll_s:g} is not a number of seconds above 0.")
    how = WatchOptions(
        poll_s=options.poll_s,
        is_once=options.once,
        command=parse_command(options.exec_command) if options.exec_command is not None else (),
        restart=options.restart,
        style="json" if options.json else "people",
    )
    spec = spec_of(options)
    os.nice(max(0, options.nice))
    with signals_interrupt("what was merged stays.") as check, closing(watch(spec, how, check)) as happening:
        for happened in happening:
            if options.json:
                event(happened.name, **happened.values)
            else:
                print(happened.text, flush=True)
    return 0


def spec_of(options: argparse.Namespace) -> Any:
    """What the options of a recipe and its end points say."""
    from wsm_ds.errors import RecipeError
    from wsm_ds.recipe import load_values
    from wsm_ds.watching import EndPoints, make_spec

    if options.every < 1:
        raise RecipeError(f"--every {options.every} is not a number of steps above 0.")
    values = recipe_values(options)
    values = load_values(options.recipe, **values) if options.recipe else with_default_curve(values)
    return make_spec(values, EndPoints(options.every, options.since, options.until_step))
