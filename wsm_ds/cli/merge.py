"""Commands that merge: merge, export, reshard."""

import argparse
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wsm_ds.cli.options import (
    FORM,
    RUN,
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
    repeated_values,
    safetensors_options,
    signals_interrupt,
    tag_option,
    window_options,
    with_default_curve,
)
from wsm_ds.cli.window_options import by_option, count_options, counted_window_options, scores_options
from wsm_ds.errors import RecipeError

log = logging.getLogger(__name__)

ALREADY_DONE = "done {} (already made by the same merge)"

MERGE = """\
Merge a window of checkpoints into one, as if the learning rate had decayed over the window. The run is only read."""
MERGE_USAGE = "[RUN] (--last N | --last-tokens D | --from STEP --to STEP | --tags A,B) --out DIR [flags]"
MERGE_EXAMPLES = """\
examples:
  wsm-ds merge RUN --last 3 --out MERGED
  wsm-ds merge RUN --from 2000 --to 6000 --curve 1-sqrt --floor 0.1 --format safetensors --dtype bf16 --out MODEL
  wsm-ds merge RUN --tags global_step2000,global_step6000 --coefficients 0.25,0.75 --out PAIR
  wsm-ds merge RUN --last 2,3 --curve linear,1-sqrt --out SWEEP
  wsm-ds merge RUN --last-samples 12 --spread wsm,qam --out SPREAD
  wsm-ds merge RUN --last 3 --out SHOWN --dry-run"""
EXPORT = """\
Write one checkpoint as safetensors, rounded from the fp32 masters to --dtype (default: the training dtype)."""
EXPORT_EXAMPLES = """\
examples:
  wsm-ds export RUN --out NEWEST
  wsm-ds export RUN --tag global_step4000 --dtype bf16 --max-shard-size 2GB --out OLDER"""
RESHARD = """\
Write one checkpoint again for another number of ranks, or another ZeRO stage, so that training continues there."""
RESHARD_EXAMPLES = """\
examples:
  wsm-ds reshard RUN --world-size 4 --out WIDER
  wsm-ds reshard RUN --tag global_step4000 --stage 3 --sub-group-size 1000000000 --out STAGE3"""


def add_commands(commands: Any) -> None:
    """Adds this module's commands to the parser's."""
    _add_merge(commands)
    export = command(commands, "export", _export, "write one checkpoint as safetensors", EXPORT, EXPORT_EXAMPLES,
                     "RUN --out DIR [flags]")  # fmt: skip
    export.add_argument("run", type=Path, metavar="RUN", help=RUN)
    tag_option(export, "the checkpoint (default: the newest complete one)")
    output = _output_options(export)
    safetensors_options(output)
    include_option(output)
    machine_options(export)
    allow_option(export)

    reshard = command(
        commands, "reshard", _reshard, "write one checkpoint for other ranks, or another ZeRO stage", RESHARD,
        RESHARD_EXAMPLES, "RUN (--world-size W | --stage S | --sub-group-size N | --like RUN/TAG) --out DIR [flags]",
    )  # fmt: skip
    reshard.add_argument("run", type=Path, metavar="RUN", help=RUN)
    tag_option(reshard, "the checkpoint (default: the newest complete one)")
    form_options(reshard)
    output = _output_options(reshard)
    output.add_argument(
        "--optimizer-states", choices=("carry", "drop"),
        help="carry them (default), or drop them: needed where they cannot be cut for other ranks (8-bit moments)",
    )  # fmt: skip
    include_option(output)
    machine_options(reshard)
    allow_option(reshard)


def _add_merge(commands: Any) -> None:
    merge = command(commands, "merge", _merge, "merge a window of checkpoints", MERGE, MERGE_EXAMPLES, MERGE_USAGE)
    merge.add_argument("run", nargs="?", type=Path, metavar="RUN", help=f"{RUN} (or in the recipe)")
    recipe_option(merge)
    window = window_options(merge)
    window.add_argument("--from", dest="from_step", type=int, metavar="STEP", help="first step; together with --to")
    window.add_argument(
        "--to", dest="to_step", metavar="STEP[,...]",
        help="last step; with --last: the newest N up to STEP, and several steps make several outputs",
    )  # fmt: skip
    window.add_argument(
        "--tags", "--tag", dest="tags", action="append", default=[], metavar="A,B,...",
        help="checkpoints by name, in any order",
    )  # fmt: skip
    counted_window_options(window)
    count_options(window)
    scores_options(window)
    allow_option(window, negative=True)
    rename_sources_option(window)
    curve = curve_options(merge)
    by_option(curve)
    coefficients_option(curve)
    output = _output_options(merge)
    format_options(output)
    output.add_argument(
        "--carry-from", type=Path, metavar="RUN[/TAG]",
        help="for a window of snapshots (RUN/snapshots): the full checkpoint that gives all but the masters; of a run, "
        "that of the window's last step",
    )  # fmt: skip
    safetensors_options(output)
    include_option(output)
    form_options(merge)
    machine_options(merge)


def _output_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds --json, --dry-run, and the group of --out, to which the caller adds more flags."""
    json_option(parser)
    parser.add_argument("--dry-run", action="store_true", help="show the plan and write nothing")
    output = parser.add_argument_group("output (what is written)")
    output.add_argument("--out", type=Path, metavar="DIR", help="the folder to create; it must not exist")
    return output


def _merge(options: argparse.Namespace) -> int:
    from wsm_ds.cli.scores import score_values
    from wsm_ds.planning.recipe import load_recipes, load_values, make_recipes

    values = recipe_values(options)
    if options.scores is not None and options.run is None and options.recipe:
        options.run = load_values(options.recipe).get("run")
    values |= score_values(options, options.run and Path(options.run))
    if options.recipe:
        return _carry_out(load_recipes(options.recipe, **values), options)
    return _carry_out(make_recipes(**with_default_curve(values)), options)


def _carry_out(recipes: Sequence[Any], options: argparse.Namespace) -> int:
    """Plans the merge, shows the plan, and runs it, together with the other ranks of a launcher."""
    from wsm_ds.distributed.launcher import launched_ranks
    from wsm_ds.merge_planning import plan_merge
    from wsm_ds.reporting.progress import PlanningProgress
    from wsm_ds.reporting.tables import plan_report

    if options.dry_run:
        with PlanningProgress(progress_style(options)) as planning:
            plan = plan_merge(recipes, on_files=planning.show)
        if options.json:
            print(json.dumps(plan.to_json(), indent=2))
            return 0
        if plan.outputs:
            print(plan_report(plan))
        new_outputs = {output.out for output in plan.outputs}
        for recipe in recipes:
            if recipe.out not in new_outputs:
                print(ALREADY_DONE.format(recipe.out))
        return 0
    with signals_interrupt("nothing was published."):
        ranks = launched_ranks()
        with ranks.together():
            return _run(recipes, ranks, options)


def _run(recipes: Sequence[Any], ranks: Any, options: argparse.Namespace) -> int:
    """Runs one rank's share of a merge. Rank 0 prints."""
    from wsm_ds.merge_planning import shared_plan
    from wsm_ds.merging import run_plan
    from wsm_ds.publishing.manifest import read_manifest
    from wsm_ds.reporting.progress import PlanningProgress, Progress, event
    from wsm_ds.reporting.tables import counted, plan_report, summary_report

    started_s = time.monotonic()
    is_first = ranks.rank == 0
    style = progress_style(options) if is_first else "quiet"
    with PlanningProgress(style, ranks.tell) as planning:
        plan = shared_plan(recipes, ranks, planning.show)
    log.info("planned %s in %.1f s", counted(len(plan.outputs), "output"), time.monotonic() - started_s)
    if is_first and plan.outputs:
        if options.json:
            event("plan", **plan.to_json())
        else:
            print(plan_report(plan), flush=True)
    share_bytes = (plan.bytes_to_read + plan.bytes_to_write) // ranks.world_size
    with Progress(share_bytes, style) as progress:
        outcome = run_plan(plan, progress.add, ranks=ranks, restart=options.restart)
    if not is_first:
        return 0
    new_outputs = {output.out for output in plan.outputs}
    if options.json:
        for recipe in recipes:
            event("done", out=str(recipe.out), is_new=recipe.out in new_outputs, manifest=read_manifest(recipe.out))
        seconds = {name: round(value, 3) for name, value in vars(outcome.timings).items()} | {"wall_s": progress.wall_s}
        event("summary", bytes_read=plan.bytes_to_read, bytes_written=plan.bytes_to_write, **seconds)
        return 0
    for recipe in recipes:
        print(f"done {recipe.out}" if recipe.out in new_outputs else ALREADY_DONE.format(recipe.out))
    if plan.outputs:
        print(summary_report(plan, outcome.timings, progress.wall_s, ranks.world_size))
    return 0


def _export(options: argparse.Namespace) -> int:
    return _one_checkpoint(options, format="safetensors", dtype=options.dtype, max_shard_size=options.max_shard_size)


def _reshard(options: argparse.Namespace) -> int:
    form = {key: getattr(options, key) for key in FORM}
    if all(value is None for value in form.values()):
        raise RecipeError("one of --world-size, --stage, --sub-group-size and --like must be given")
    return _one_checkpoint(options, format="zero", optimizer_states=options.optimizer_states, **form)


def _one_checkpoint(options: argparse.Namespace, **values: Any) -> int:
    from wsm_ds.planning.recipe import one_recipe

    recipe = one_recipe(
        options.run,
        out=options.out,
        tag=options.tag,
        memory_budget=options.memory_budget,
        threads=options.threads,
        **repeated_values(options),
        **values,
    )
    return _carry_out([recipe], options)
