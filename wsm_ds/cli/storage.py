"""The command storage: the disk space and traffic of a run's checkpoints and merges, before the run starts."""

import argparse
import json
from pathlib import Path
from typing import Any

from wsm_ds.cli.options import (
    allow_global,
    command,
    dtype_option,
    format_options,
    json_option,
    recipe_option,
    recipe_values,
    require_last,
    window_options,
    with_default_curve,
)

STORAGE = """\
Show what the windows of a recipe cost in disk and traffic, before the run starts: the size of a checkpoint, how many
are kept, and what a merge reads and writes."""
STORAGE_USAGE = "(--parameters N | --like RUN/TAG) --interval STEPS (--last N | --recipe FILE.yaml) [flags]"
STORAGE_EXAMPLES = """\
examples:
  wsm-ds storage --parameters 7e9 --stage 3 --world-size 64 --interval 1000 --last 4,8,16 --step-time-s 8
  wsm-ds storage --like RUN/global_step4000 --interval 1000 --last 8 --write-bandwidth 2GB"""


def add_command(commands: Any) -> None:
    """Adds this module's command to the parser's."""
    storage = command(commands, "storage", _storage, "show what a recipe costs in disk and traffic", STORAGE,
                      STORAGE_EXAMPLES, STORAGE_USAGE)  # fmt: skip
    storage.set_defaults(run=Path("RUN"), out=Path("OUT"))
    json_option(storage)
    recipe_option(storage)
    _checkpoint_options(storage)
    pace = storage.add_argument_group("pace (how often the run saves and merges)")
    pace.add_argument("--interval", type=int, required=True, metavar="STEPS", help="steps between two checkpoints")
    pace.add_argument("--every", type=int, metavar="STEPS", help="steps between two merges (default: --interval)")
    pace.add_argument("--step-time-s", type=float, metavar="S", help="seconds of a step; adds figures a day")
    pace.add_argument("--tokens-per-step", type=float, metavar="N", help="tokens of a step; adds durations in tokens")
    pace.add_argument("--write-bandwidth", metavar="SIZE",
                      help="bytes that the storage moves per second, for example 2GB; adds durations")  # fmt: skip
    window = window_options(storage)
    window.add_argument("--curve", help="curves of the windows (default linear); several, with commas")
    output = storage.add_argument_group("output (what is written)")
    format_options(output)
    dtype_option(output)


def _checkpoint_options(storage: argparse.ArgumentParser) -> None:
    size = storage.add_argument_group("checkpoint (its size, from --parameters or --like)")
    size.add_argument("--parameters", type=float, metavar="N", help="trained parameters, for example 7e9")
    size.add_argument("--stage", type=int, choices=(1, 2, 3), help="ZeRO stage of the run (default 1)")
    size.add_argument("--world-size", type=int, metavar="W", help="data-parallel ranks of the run (default 1)")
    size.add_argument(
        "--train-dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="training dtype (default bf16)"
    )
    size.add_argument(
        "--optimizer", choices=("adam", "lion", "momentum", "sgd"), default="adam", help="optimizer (default adam)"
    )
    size.add_argument("--like", type=Path, metavar="RUN/TAG", help="the size of this checkpoint")
    allow_global(size)


def _storage(options: argparse.Namespace) -> int:
    from wsm_ds.estimate import Pace, estimate, estimate_report
    from wsm_ds.planning.recipe import load_values
    from wsm_ds.sizes import parse_size
    from wsm_ds.watching import EndPoints, make_spec

    # The flags of these names describe the run here, not the form of an output.
    values = recipe_values(options) | {"like": None, "stage": None, "world_size": None, "tokens_per_step": None}
    require_last(values, options)
    values = load_values(options.recipe, **values) if options.recipe else with_default_curve(values)
    bandwidth = float(parse_size(options.write_bandwidth)) if options.write_bandwidth else None
    every = options.every if options.every is not None else options.interval
    pace = Pace(options.interval, every, options.step_time_s, options.tokens_per_step, bandwidth)
    costs = estimate(_size(options), make_spec(values, EndPoints()).recipes, pace)
    print(json.dumps(costs.to_json(), indent=2) if options.json else estimate_report(costs))
    return 0


def _size(options: argparse.Namespace) -> Any:
    """The size of a checkpoint: computed from its parameters, or read from one that exists."""
    from wsm_ds.errors import RecipeError
    from wsm_ds.estimate import checkpoint_size, size_of
    from wsm_ds.layouts import read_layout
    from wsm_ds.layouts.run import checkpoint_at

    if (options.parameters is None) == (options.like is None):
        raise RecipeError("either --parameters or --like RUN/TAG must be given")
    if options.like is not None:
        return size_of(read_layout(checkpoint_at(options.like), frozenset(options.allow_globals)))
    return checkpoint_size(
        options.parameters,
        stage=options.stage or 1,
        world_size=options.world_size or 1,
        dtype=options.train_dtype,
        optimizer=options.optimizer,
    )
