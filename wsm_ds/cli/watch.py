"""Commands that run beside a training run: watch, prune."""

import argparse
import json
import os
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsm_ds.cli.options import (
    CURVE_SEPARATOR,
    EXIT_CODES,
    allow_global,
    command,
    recipe_options,
    recipe_values,
    several,
    signals_interrupt,
    with_default_curve,
)

if TYPE_CHECKING:
    from wsm_ds.watching import WatchSpec

WATCH = """Merges every window that a new checkpoint completes into DIR/step{N}/NAME, once, and never touches the run.
Killed and started again, it goes on."""
PRUNE = """Shows which checkpoints of RUN are needed and which are not, and with --delete removes those. Never the
newest complete one, the one that latest names, one that may be being written, nor one that a merge needs which was
begun or is due. At least --keep-window, or the --out DIR of a watch, must say what is needed."""
EXEC = """a command for every merge, its output kept in DIR/step{N}/NAME.exec.*; {} in it stands for the merge's
folder, as $WSM_MERGE does in its environment (beside WSM_STEP, WSM_WINDOW, WSM_RUN). No shell runs it; a failure stops
nothing"""


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

    prune = command(commands, "prune", _prune, "delete the checkpoints that no window can want any more")
    prune.description = PRUNE
    prune.add_argument("run", type=Path, help="the run's folder")
    prune.add_argument("--out", action="append", default=[], type=Path, metavar="DIR",
                       help="a watch's folder: keep what its windows and its merges want")  # fmt: skip
    prune.add_argument("--recipe", type=Path, metavar="FILE.yaml", help="of a watch that will merge into --out DIR")
    prune.add_argument("--last", metavar="N[,N…]", help="the same, by its windows' lengths")
    prune.add_argument("--curve", help="their curves, if not linear")
    end_point_options(prune)
    prune.add_argument("--keep-window", type=int, metavar="N", help="keep the newest N complete checkpoints")
    prune.add_argument("--keep-every", type=int, metavar="STEPS", help="keep checkpoints at multiples of STEPS")
    prune.add_argument("--keep-last", type=int, default=2, metavar="N", help="the same as --keep-window (default 2)")
    prune.add_argument("--delete", action="store_true", help="delete; without it, only show")
    allow_global(prune)


def end_point_options(parser: argparse.ArgumentParser) -> None:
    """The steps at which windows end."""
    parser.add_argument("--every", type=int, default=1, metavar="STEPS", help="windows end at multiples of STEPS only")
    parser.add_argument("--since", type=int, default=0, metavar="STEP", help="windows end at STEP or later")
    parser.add_argument("--until-step", type=int, metavar="STEP", help="end when all windows up to STEP are made")


def _watch(options: argparse.Namespace) -> int:
    from wsm_ds.errors import RecipeError
    from wsm_ds.reporting.progress import event
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
    spec = _spec(recipe_values(options), options)
    os.setpriority(os.PRIO_PROCESS, 0, max(options.nice, os.getpriority(os.PRIO_PROCESS, 0)))
    with signals_interrupt("what was merged stays.") as check, closing(watch(spec, how, check)) as happening:
        for happened in happening:
            if options.json:
                event(happened.name, **happened.values)
            else:
                print(happened.text, flush=True)
    return 0


def _spec(values: dict[str, Any], options: argparse.Namespace) -> "WatchSpec":
    """What the options of a recipe and its end points say."""
    from wsm_ds.planning.recipe import load_values
    from wsm_ds.watching import EndPoints, make_spec

    _require_counts(options, "every")
    values = load_values(options.recipe, **values) if options.recipe else with_default_curve(values)
    return make_spec(values, EndPoints(options.every, options.since, options.until_step))


def _prune(options: argparse.Namespace) -> int:
    from wsm_ds.watching.prune import Retention, left_in_trash, plan_prune, prune, prune_report

    _require_counts(options, "keep_window", "keep_every", "keep_last")
    specs = _pruned_specs(options)
    kept = (options.keep_window, options.keep_every, options.keep_last)
    retention = Retention(specs, tuple(options.out), *kept)
    allowed = frozenset(options.allow_global)

    def show(fates: Any) -> None:
        if not options.json:
            print(prune_report(fates, left_in_trash(options.run), is_deleting=options.delete), flush=True)

    if options.delete:
        with signals_interrupt("what has left the run is removed by the next prune."):
            fates = prune(options.run, retention, allowed, show)
    else:
        fates = plan_prune(options.run, retention, allowed)
        show(fates)
    if options.json:
        found = {"run": str(options.run), "is_deleted": options.delete}
        print(json.dumps(found | {"checkpoints": [fate.to_json() for fate in fates]}, indent=2))
    return 0


def _pruned_specs(options: argparse.Namespace) -> "tuple[WatchSpec, ...]":
    """The watches that the folders of --out are of, and the one that the options describe."""
    from wsm_ds.errors import RecipeError
    from wsm_ds.watching.spec import read_spec

    specs = [spec for out in options.out if (spec := read_spec(out)) is not None]
    if options.recipe or options.last:
        if len(options.out) != 1:
            raise RecipeError("with --recipe or --last, give the one --out DIR where the watch merges them.")
        values = {"run": options.run, "out": options.out[0], "last": several(options.last), "coefficients": None}
        values["curve"] = several(options.curve, separator=CURVE_SEPARATOR)
        specs.append(_spec(values, options))
    elif options.keep_window is None and len(specs) < len(options.out):
        raise RecipeError("no watch has begun in --out DIR; say what it will merge: --recipe or --last.")
    return tuple(specs)


def _require_counts(options: argparse.Namespace, *names: str) -> None:
    from wsm_ds.errors import RecipeError

    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise RecipeError(f"--{name.replace('_', '-')} {value} is not a number above 0.")
