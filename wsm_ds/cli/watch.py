"""Commands that run beside a training run: watch, prune."""

import argparse
import json
import os
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsm_ds.cli.options import (
    CURVE_SEPARATOR,
    RUN,
    allow_global,
    allow_option,
    coefficients_option,
    command,
    curve_options,
    form_options,
    format_options,
    include_option,
    json_option,
    machine_options,
    progress_style,
    recipe_option,
    recipe_values,
    rename_sources_option,
    require_last,
    safetensors_options,
    several,
    signals_interrupt,
    window_options,
    with_default_curve,
)
from wsm_ds.cli.window_options import by_option, count_options

if TYPE_CHECKING:
    from wsm_ds.watching import WatchSpec

WATCH = """\
Watch a training run, and merge every window as soon as its last checkpoint is complete, into DIR/step{N}/NAME. Each
window is merged once. The run is only read. The command may be killed and started again at any time."""
WATCH_USAGE = "[RUN] --last N --out DIR [flags]"
WATCH_EXAMPLES = """\
examples:
  wsm-ds watch RUN --last 2,3 --curve linear,1-sqrt --out MERGES --once
  wsm-ds watch RUN --last 3 --out MERGES3 --until-step 6000
  wsm-ds watch RUN --last 3 --out EVALUATED --once --exec 'ls {}'"""
PRUNE = """\
Show which checkpoints of a run are needed and which are not; with --delete, delete those that are not. Always kept: the
newest complete checkpoint and newer ones, the one that `latest` names, what links name, and the sources of unfinished
and future merges. In the folder that a framework writes for one save, the whole folder is deleted.
Give --keep-window, or --out with the folder of a watch: they say which checkpoints windows need."""
PRUNE_USAGE = "RUN (--keep-window N | --out DIR) [flags]"
PRUNE_EXAMPLES = """\
examples:
  wsm-ds prune RUN --keep-window 3
  wsm-ds prune RUN --out MERGES --last 3
  wsm-ds prune RUN --keep-window 3 --keep-every 4000 --delete"""
EXEC = """run this command for every merge, without a shell; {} in it, and $WSM_MERGE, stand for the folder of the merge
(also set: WSM_STEP, WSM_WINDOW, WSM_RUN). What it prints is kept in DIR/step{N}/NAME.exec.*. If it fails, the watch
continues"""
EVALUATE = """measure every merge, and the newest checkpoint in it, by the evaluators of this file; the results go to
DIR/evaluations.jsonl. The watch merges on meanwhile"""


def add_commands(commands: Any) -> None:
    """Adds this module's commands to the parser's."""
    _add_watch(commands)
    _add_prune(commands)


def _add_watch(commands: Any) -> None:
    watch = command(commands, "watch", _watch, "merge every window as soon as it is complete", WATCH, WATCH_EXAMPLES,
                    WATCH_USAGE)  # fmt: skip
    watch.add_argument("run", nargs="?", type=Path, metavar="RUN",
                       help=f"{RUN}; it may still be empty (or in the recipe)")  # fmt: skip
    recipe_option(watch)
    json_option(watch)
    watch.add_argument("--once", action="store_true", help="merge what is complete now, and end: for cron or a job")
    watch.add_argument(
        "--poll-s", type=float, default=30.0, metavar="S", help="seconds between two looks at the run (default 30)"
    )
    then = watch.add_mutually_exclusive_group()
    then.add_argument("--exec", dest="exec_command", metavar="CMD", help=" ".join(EXEC.split()))
    then.add_argument("--evaluate", type=Path, metavar="FILE.yaml", help=" ".join(EVALUATE.split()))
    watch.add_argument("--nice", type=int, default=10, metavar="N",
                       help="lower the priority of this process: 0 to 19 (default 10)")  # fmt: skip
    window = window_options(watch)
    end_point_options(window, "end when all windows up to STEP are merged (default: never)")
    count_options(window)
    allow_option(window, negative=True)
    rename_sources_option(window)
    curve = curve_options(watch)
    by_option(curve)
    coefficients_option(curve)
    output = watch.add_argument_group("output (what is written)")
    output.add_argument("--out", type=Path, metavar="DIR", help="the folder of all merges of this watch")
    format_options(output)
    safetensors_options(output)
    include_option(output)
    form_options(watch)
    machine_options(watch)


def _add_prune(commands: Any) -> None:
    prune = command(commands, "prune", _prune, "delete checkpoints that no window needs", PRUNE, PRUNE_EXAMPLES,
                    PRUNE_USAGE)  # fmt: skip
    prune.add_argument("run", type=Path, metavar="RUN", help=RUN)
    json_option(prune)
    prune.add_argument("--delete", action="store_true", help="delete (default: only show)")
    allow_global(prune)
    keep = prune.add_argument_group("keep (checkpoints that are kept, besides those that a watch needs)")
    keep.add_argument("--keep-window", type=int, metavar="N",
                      help="keep the newest N complete checkpoints, for future windows")  # fmt: skip
    keep.add_argument("--keep-every", type=int, metavar="STEPS", help="keep checkpoints at multiples of STEPS")
    keep.add_argument("--keep-last", type=int, default=2, metavar="N",
                      help="keep the newest N complete checkpoints, for restarting training (default 2)")  # fmt: skip
    watch = prune.add_argument_group("watch (keep what its windows and its merges need)")
    watch.add_argument("--out", action="append", default=[], type=Path, metavar="DIR",
                       help="the folder of a watch, or of merges; may be given several times")  # fmt: skip
    watch.add_argument("--recipe", type=Path, metavar="FILE.yaml",
                       help="the recipe of a watch that has not begun in --out DIR yet")  # fmt: skip
    watch.add_argument("--last", metavar="N[,N...]", help="instead of --recipe: the lengths of its windows")
    watch.add_argument("--curve", help="with --last: its curves (default linear)")
    end_point_options(watch, "no window ends after STEP (default: no limit)")


def end_point_options(group: argparse._ActionsContainer, until: str) -> None:
    """Adds the steps at which windows end; `until` is the help of --until-step."""
    group.add_argument("--every", type=int, default=1, metavar="STEPS",
                       help="windows end only at multiples of STEPS (default 1)")  # fmt: skip
    group.add_argument("--since", type=int, default=0, metavar="STEP", help="windows end at STEP or later (default 0)")
    group.add_argument("--until-step", type=int, metavar="STEP", help=until)


def _watch(options: argparse.Namespace) -> int:
    from wsm_ds.errors import RecipeError
    from wsm_ds.reporting.progress import event
    from wsm_ds.watching import WatchOptions, watch
    from wsm_ds.watching.commands import evaluation_command, parse_command

    if not options.poll_s > 0:
        raise RecipeError(f"--poll-s must be above 0, not {options.poll_s:g}")
    spec = _spec(recipe_values(options), options)
    words: tuple[str, ...] = ()
    if options.exec_command is not None:
        words = parse_command(options.exec_command)
    elif options.evaluate is not None:
        words = evaluation_command(options.evaluate.absolute(), spec.out)
    watch_options = WatchOptions(
        poll_s=options.poll_s,
        is_once=options.once,
        command=words,
        restart=options.restart,
        style=progress_style(options),
    )
    os.setpriority(os.PRIO_PROCESS, 0, max(options.nice, os.getpriority(os.PRIO_PROCESS, 0)))
    with (
        signals_interrupt("what was merged stays.") as check,
        closing(watch(spec, watch_options, check)) as events,
    ):
        for watch_event in events:
            if options.json:
                event(watch_event.name, **watch_event.values)
            else:
                print(watch_event.text, flush=True)
    return 0


def _spec(values: dict[str, Any], options: argparse.Namespace) -> "WatchSpec":
    """The watch that recipe values and the flags of its end points describe."""
    from wsm_ds.planning.recipe import load_values
    from wsm_ds.watching import EndPoints, make_spec

    _require_counts(options, "every")
    require_last(values, options)
    values = load_values(options.recipe, **values) if options.recipe else with_default_curve(values)
    return make_spec(values, EndPoints(options.every, options.since, options.until_step))


def _prune(options: argparse.Namespace) -> int:
    from wsm_ds.watching.prune import Retention, plan_prune, prune, prune_report, trash_content

    _require_counts(options, "keep_window", "keep_every", "keep_last")
    specs = _pruned_specs(options)
    retention = Retention(specs, tuple(options.out), options.keep_window, options.keep_every, options.keep_last)
    allowed = frozenset(options.allow_globals)

    def show(verdicts: Any) -> None:
        if not options.json:
            print(prune_report(verdicts, trash_content(options.run), is_deleting=options.delete), flush=True)

    if options.delete:
        with signals_interrupt("the next prune deletes what is in the trash."):
            verdicts = prune(options.run, retention, allowed, show)
    else:
        verdicts = plan_prune(options.run, retention, allowed)
        show(verdicts)
    if options.json:
        values = {"run": str(options.run), "is_deleted": options.delete}
        print(json.dumps(values | {"checkpoints": [verdict.to_json() for verdict in verdicts]}, indent=2))
    return 0


def _pruned_specs(options: argparse.Namespace) -> "tuple[WatchSpec, ...]":
    """The watches that wrote into the folders of --out, and the one that the flags describe."""
    from wsm_ds.errors import RecipeError
    from wsm_ds.watching.spec import read_spec

    specs = [spec for out in options.out if (spec := read_spec(out)) is not None]
    if options.recipe or options.last:
        if len(options.out) != 1:
            raise RecipeError("--recipe and --last need exactly one --out DIR: the folder where that watch will merge")
        values = {"run": options.run, "out": options.out[0], "last": several(options.last), "coefficients": None}
        values["curve"] = several(options.curve, separator=CURVE_SEPARATOR)
        specs.append(_spec(values, options))
    elif options.keep_window is None and len(specs) < len(options.out):
        raise RecipeError("no watch has begun in --out DIR; say by --recipe or --last what it will merge")
    return tuple(specs)


def _require_counts(options: argparse.Namespace, *names: str) -> None:
    """Raises RecipeError for a value below 1."""
    from wsm_ds.errors import RecipeError

    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise RecipeError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
