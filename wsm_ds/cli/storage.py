"""The command that counts before a run starts: storage."""

import argparse
import json
from pathlib import Path
from typing import Any

from wsm_ds.cli.options import command, recipe_options, recipe_values, with_default_curve

STORAGE = """What the windows of a recipe cost in disk and traffic, before the run starts. Give the model's size by
--parameters, or --like a checkpoint that exists."""


def add_commands(commands: Any) -> None:
    """Adds this module's command to the parser's."""
    storage = command(commands, "storage", _storage, "what a recipe costs in disk and traffic, before the run starts")
    storage.description = STORAGE
    storage.set_defaults(run=Path("RUN"), out=Path("OUT"))
    storage.add_argument("--parameters", type=float, metavar="N", help="trained parameters, for example 7e9")
    storage.add_argument("--train-dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="default bf16")
    storage.add_argument(
        "--optimizer", choices=("adam", "lion", "momentum", "sgd"), default="adam", help="default adam"
    )
    storage.add_argument("--interval", type=int, required=True, metavar="STEPS", help="between two checkpoints")
    storage.add_argument("--every", type=int, metavar="STEPS", help="between two end points (default: the interval)")
    storage.add_argument("--step-time-s", type=float, metavar="S", help="seconds of a step: for figures a day")
    storage.add_argument("--tokens-per-step", type=float, metavar="N", help="for durations in tokens")
    storage.add_argument("--write-bandwidth", metavar="SIZE", help="of the storage in a second, for example 2GB")
    recipe_options(storage)


def _storage(options: argparse.Namespace) -> int:
    from wsm_ds.estimate import Pace, estimate, estimate_report
    from wsm_ds.planning.recipe import load_values
    from wsm_ds.sizes import parse_size
    from wsm_ds.watching import EndPoints, make_spec

    values = recipe_values(options) | {"like": None, "stage": None, "world_size": None}  # here they are the run's
    values = load_values(options.recipe, **values) if options.recipe else with_default_curve(values)
    bandwidth = float(parse_size(options.write_bandwidth)) if options.write_bandwidth else None
    every = options.every if options.every is not None else options.interval
    pace = Pace(options.interval, every, options.step_time_s, options.tokens_per_step, bandwidth)
    found = estimate(_size(options), make_spec(values, EndPoints()).recipes, pace)
    print(json.dumps(found.to_json(), indent=2) if options.json else estimate_report(found))
    return 0


def _size(options: argparse.Namespace) -> Any:
    from wsm_ds.errors import RecipeError
    from wsm_ds.estimate import checkpoint_size, size_of
    from wsm_ds.layouts import read_layout
    from wsm_ds.layouts.run import checkpoint_at

    if (options.parameters is None) == (options.like is None):
        raise RecipeError("give the model's size by either --parameters or --like RUN/TAG.")
    if options.like is not None:
        return size_of(read_layout(checkpoint_at(options.like), frozenset(options.allow_global)))
    return checkpoint_size(
        options.parameters,
        stage=options.stage or 1,
        world_size=options.world_size or 1,
        dtype=options.train_dtype,
        optimizer=options.optimizer,
    )
