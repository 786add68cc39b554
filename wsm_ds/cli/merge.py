"""Commands that merge: merge, export, reshard."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wsm_ds.cli.options import (
    FORM,
    command,
    content_options,
    form_options,
    naming,
    recipe_options,
    recipe_values,
    several,
    signals_interrupt,
    split,
    with_default_curve,
    work_options,
)
from wsm_ds.errors import RecipeError


def add_commands(commands: Any) -> None:
    """Adds this module's commands to the parser's."""
    merge = command(commands, "merge", _merge, "merge a window of checkpoints")
    merge.add_argument("run", nargs="?", type=Path, help="the run's folder (save_dir, or HF Trainer's output_dir)")
    merge.add_argument("--from", dest="from_step", type=int, metavar="STEP", help="first step of the window")
    merge.add_argument("--to", dest="to_step", metavar="STEP[,…]", help="last step of the window (also with --last)")
    merge.add_argument("--tags", metavar="A,B,…", help="checkpoints by name")
    recipe_options(merge)
    _output_options(merge)

    export = command(commands, "export", _export, "one checkpoint to safetensors")
    export.add_argument("run", type=Path)
    export.add_argument("--tag", help="default: the newest complete one")

    reshard = command(commands, "reshard", _reshard, "one checkpoint for another number of ranks, or ZeRO stage")
    reshard.add_argument("run", type=Path)
    reshard.add_argument("--tag", help="default: the newest complete one")
    form_options(reshard)
    for parser in (export, reshard):
        content_options(parser)
        work_options(parser)
        _output_options(parser)


def _output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder to make; it must not exist")
    parser.add_argument("--dry-run", action="store_true", help="show the plan and write nothing")


def _merge(options: argparse.Namespace) -> int:
    from wsm_ds.planning.recipe import load_recipes, make_recipes

    values = recipe_values(options) | {"from_step": options.from_step, "to_step": several(options.to_step)}
    values["tags"] = split(options.tags)
    if options.recipe:
        return _carry_out(load_recipes(options.recipe, **values), options)
    return _carry_out(make_recipes(**with_default_curve(values)), options)


def _carry_out(recipes: Sequence[Any], options: argparse.Namespace) -> int:
    """Plans and runs the merge: all ranks of a launcher do."""
    from wsm_ds.distributed.launcher import launched_ranks
    from wsm_ds.merging import plan_merge
    from wsm_ds.reporting.tables import plan_report

    if options.dry_run:
        plan = plan_merge(recipes)
        print(json.dumps(plan.to_json(), indent=2) if options.json else plan_report(plan))
        return 0
    with signals_interrupt("nothing was published."):
        ranks = launched_ranks()
        with ranks.together():
            return _run(recipes, ranks, options)


def _run(recipes: Sequence[Any], ranks: Any, options: argparse.Namespace) -> int:
    """One rank's part of a merge; rank 0 speaks."""
    from wsm_ds.merging import plan_merge, run_plan
    from wsm_ds.publishing.manifest import read_manifest
    from wsm_ds.reporting.progress import Progress, event
    from wsm_ds.reporting.tables import plan_report, summary_report

    plan = plan_merge(recipes)
    is_first = ranks.rank == 0
    if is_first and plan.outputs:
        if options.json:
            event("plan", **plan.to_json())
        else:
            print(plan_report(plan), flush=True)
    style: Any = "quiet" if not is_first else "json" if options.json else "people"
    moved = (plan.bytes_to_read + plan.bytes_to_write) // ranks.world_size
    with Progress(moved, style) as progress:
        done = run_plan(plan, progress.add, ranks=ranks, restart=options.restart)
    if not is_first:
        return 0
    made = {part.out for part in plan.outputs}
    if options.json:
        for recipe in recipes:
            event("done", out=str(recipe.out), is_new=recipe.out in made, manifest=read_manifest(recipe.out))
        seconds = {name: round(value, 3) for name, value in vars(done.timings).items()} | {"wall_s": progress.wall_s}
        event("summary", bytes_read=plan.bytes_to_read, bytes_written=plan.bytes_to_write, **seconds)
        return 0
    for recipe in recipes:
        print(f"done {recipe.out}" if recipe.out in made else f"done {recipe.out} (by this same merge, before)")
    if plan.outputs:
        print(summary_report(plan, done.timings, progress.wall_s, ranks.world_size))
    return 0


def _export(options: argparse.Namespace) -> int:
    return _one_checkpoint(options, format="safetensors")


def _reshard(options: argparse.Namespace) -> int:
    wanted = {name: getattr(options, name) for name in FORM}
    if all(value is None for value in wanted.values()):
        raise RecipeError("reshard needs --world-size, --stage, --sub-group-size or --like.")
    return _one_checkpoint(options, format="zero", **wanted)


def _one_checkpoint(options: argparse.Namespace, **values: Any) -> int:
    from wsm_ds.merging import one_recipe

    recipe = one_recipe(
        options.run,
        out=options.out,
        tag=options.tag,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        memory_budget=options.memory_budget,
        threads=options.threads,
        **naming(options),
        **values,
    )
    return _carry_out([recipe], options)
