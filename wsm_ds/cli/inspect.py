"""Commands that only read: inspect, coefficients, verify."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsm_ds.cli.options import (
    RUN,
    allow_global,
    command,
    curve_options,
    json_option,
    memory_options,
    signals_interrupt,
    split,
    tag_option,
)
from wsm_ds.errors import RecipeError

if TYPE_CHECKING:
    from wsm_ds.inspection import Inspected
    from wsm_ds.layouts import Checkpoint

INSPECT = """\
Show every checkpoint of a run: its step, ZeRO stage, dtype, ranks and size, and whether it is complete. Ends with code
3 if one is broken."""
INSPECT_EXAMPLES = """\
examples:
  wsm-ds inspect RUN
  wsm-ds inspect RUN --tag global_step4000 --json"""
COEFFICIENTS = """\
Show which coefficients a decay curve gives to the checkpoints of a window, oldest first. No checkpoint is read."""
COEFFICIENTS_EXAMPLES = """\
examples:
  wsm-ds coefficients --curve 1-sqrt --checkpoints 8
  wsm-ds coefficients --curve linear --steps 2000,4000,6000
  wsm-ds coefficients --curve linear --spread qam --checkpoints 8"""
VERIFY = """\
Check an output: no file is missing, and the checksums are those of the manifest. If the sources still exist, a part of
the output is merged again from them and compared."""
VERIFY_EXAMPLES = """\
examples:
  wsm-ds verify MERGED
  wsm-ds verify MERGED --full"""


def add_inspect(commands: Any) -> None:
    """Adds `inspect` to the parser's commands."""
    inspect = command(commands, "inspect", _inspect, "show the checkpoints of a run", INSPECT, INSPECT_EXAMPLES)
    inspect.add_argument("run", type=Path, metavar="RUN", help=RUN)
    tag_option(inspect, "show this checkpoint only; with --json, its tensors too (default: all)")
    allow_global(inspect)
    json_option(inspect)


def add_coefficients(commands: Any) -> None:
    """Adds `coefficients` to the parser's commands."""
    coefficients = command(commands, "coefficients", _coefficients, "show the coefficients of a decay curve",
                           COEFFICIENTS, COEFFICIENTS_EXAMPLES)  # fmt: skip
    window = coefficients.add_argument_group("window (one of the two)")
    window.add_argument("-n", "--checkpoints", dest="n", type=int, metavar="N",
                        help="number of checkpoints, evenly spaced")  # fmt: skip
    window.add_argument("--steps", metavar="S,S,...", help="the steps (or tokens) of the checkpoints, oldest first")
    curve_options(coefficients, is_required=True)
    json_option(coefficients)


def add_verify(commands: Any) -> None:
    """Adds `verify` to the parser's commands."""
    verify = command(commands, "verify", _verify, "verify an output", VERIFY, VERIFY_EXAMPLES)
    verify.add_argument("out", type=Path, metavar="DIR", help="the folder of an output of merge, export or reshard")
    verify.add_argument("--full", action="store_true", help="merge everything again, not only samples")
    memory_options(verify.add_argument_group("machine"))
    json_option(verify)


def _inspect(options: argparse.Namespace) -> int:
    from wsm_ds.inspection import checkpoints_of, inspect_checkpoints
    from wsm_ds.reporting.tables import inspection_report

    broken: list[str] = []

    def watched(items: "Iterable[Inspected]") -> "Iterator[Inspected]":
        for item in items:
            broken.extend([] if item.is_complete else [item.checkpoint.tag])
            yield item

    # One layout at a time is in the memory: those of a large run take gigabytes together.
    checkpoints = _with_progress(checkpoints_of(options.run, options.tag))
    items = watched(inspect_checkpoints(checkpoints, frozenset(options.allow_globals)))
    if options.json:
        values = [item.details() if options.tag else item.to_json() for item in items]
        print(json.dumps(values, indent=2))
    else:
        print(inspection_report(items))
    return 3 if broken else 0


def _with_progress(checkpoints: "list[Checkpoint]") -> "Iterable[Checkpoint]":
    """The checkpoints; on a terminal, a bar shows how many of them were taken."""
    if len(checkpoints) < 2 or not sys.stderr.isatty():
        return checkpoints
    from tqdm import tqdm

    bar: Iterable[Checkpoint] = tqdm(checkpoints, unit="checkpoint", leave=False)
    return bar


def _coefficients(options: argparse.Namespace) -> int:
    from wsm_ds.reporting.tables import coefficients_report
    from wsm_ds.schedules.coefficients import merge_coefficients
    from wsm_ds.schedules.figures import age_deviation, effective_sample_size, lag

    steps = [_step(text) for text in split(options.steps) or ()] or None
    if steps is not None and options.n is not None:
        raise RecipeError("--checkpoints and --steps cannot be given together")
    if steps is None and options.n is None:
        raise RecipeError("--checkpoints or --steps must be given")
    c = merge_coefficients(
        options.curve,
        n=options.n,
        steps=steps,
        oldest_interval=options.oldest_interval,
        floor=options.floor or 0.0,
        spread=options.spread or "wsm",
    )
    positions = steps if steps is not None else list(range(len(c)))
    ess, lag_steps, deviation_steps = effective_sample_size(c), lag(c, positions), age_deviation(c, positions)
    if options.json:
        figures = {
            "coefficients": c.tolist(),
            "steps": positions,
            "effective_sample_size": ess,
            "lag_steps": lag_steps,
            "deviation_steps": deviation_steps,
        }
        print(json.dumps({"curve": options.curve, "spread": options.spread or "wsm", **figures}, indent=2))
    else:
        print(coefficients_report(c.tolist(), positions, ess, lag_steps, deviation_steps))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from wsm_ds.distributed.launcher import launched_ranks
    from wsm_ds.reporting.tables import counted
    from wsm_ds.sizes import format_size
    from wsm_ds.verification import verify

    with signals_interrupt("nothing was changed."):
        ranks = launched_ranks()
        with ranks.together():
            result = verify(
                options.out,
                full=options.full,
                threads=options.threads,
                memory_budget=options.memory_budget,
                ranks=ranks,
            )
    if ranks.rank != 0:
        return 0
    if options.json:
        print(json.dumps({"files": result.files, "bytes": result.nbytes, "recomputed_bytes": result.recomputed_bytes,
                          "note": result.note}, indent=2))  # fmt: skip
    else:
        print(f"{options.out}: {counted(result.files, 'file')}, {format_size(result.nbytes)}: all checksums match")
        share = f" by rank 0 of {ranks.world_size}" if ranks.world_size > 1 else ""
        print(result.note or f"recomputed {format_size(result.recomputed_bytes)} from the sources{share}: identical")
    return 0


def _step(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise RecipeError(f"--steps must be whole numbers with commas between them, not {text!r}") from None
