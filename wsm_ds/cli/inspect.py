"""Commands that look and change nothing: inspect, coefficients, verify."""

import argparse
import json
from pathlib import Path
from typing import Any

from wsm_ds.cli.options import allow_global, command, split
from wsm_ds.errors import RecipeError


def add_commands(commands: Any) -> None:
    """Adds this module's commands to the parser's."""
    inspect = command(commands, "inspect", _inspect, "what a run's folder holds")
    inspect.add_argument("run", type=Path)
    inspect.add_argument("--tag", help="one checkpoint; with --json, its tensors too")
    allow_global(inspect)

    coefficients = command(commands, "coefficients", _coefficients, "coefficients of a curve")
    coefficients.add_argument("--curve", required=True)
    coefficients.add_argument("-n", type=int, help="number of evenly spaced checkpoints")
    coefficients.add_argument("--steps", metavar="S,S,…", help="their steps or tokens, if uneven")
    coefficients.add_argument("--oldest-interval", type=int, metavar="STEPS")
    coefficients.add_argument("--floor", type=float, metavar="M")

    verify = command(commands, "verify", _verify, "prove that an output is right")
    verify.add_argument("out", type=Path)
    verify.add_argument("--full", action="store_true", help="recompute everything from the sources, not samples")


def _inspect(options: argparse.Namespace) -> int:
    from wsm_ds.inspection import inspect_run
    from wsm_ds.reporting.tables import inspection_report

    found = inspect_run(options.run, options.tag, frozenset(options.allow_global))
    if options.json:
        print(json.dumps([item.details() if options.tag else item.to_json() for item in found], indent=2))
    else:
        print(inspection_report(found))
    return 0 if all(item.layout for item in found) else 3


def _coefficients(options: argparse.Namespace) -> int:
    from wsm_ds.reporting.tables import coefficients_report
    from wsm_ds.schedules.coefficients import effective_sample_size, lag, merge_coefficients

    steps = [_number(step) for step in split(options.steps) or ()] or None
    if steps is not None and options.n not in (None, len(steps)):
        raise RecipeError(f"-n {options.n} contradicts the {len(steps)} steps given")
    count = None if steps is not None else options.n
    c = merge_coefficients(
        options.curve,
        n=count,
        steps=steps,
        oldest_interval=options.oldest_interval,
        floor=options.floor or 0.0,
    )
    positions = steps if steps is not None else list(range(len(c)))
    ess, behind = effective_sample_size(c), lag(c, positions)
    if options.json:
        figures = {
            "coefficients": c.tolist(),
            "steps": positions,
            "effective_sample_size": ess,
            "lag_steps": behind,
        }
        print(json.dumps({"curve": options.curve, **figures}, indent=2))
    else:
        print(coefficients_report(c.tolist(), positions, ess, behind))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from wsm_ds.sizes import format_size
    from wsm_ds.verification import verify

    proof = verify(options.out, full=options.full)
    if options.json:
        print(json.dumps({"files": proof.files, "bytes": proof.nbytes, "recomputed_bytes": proof.recomputed_bytes,
                          "note": proof.note}, indent=2))  # fmt: skip
    else:
        print(f"{options.out}: {proof.files} files, {format_size(proof.nbytes)}: all checksums match")
        print(proof.note or f"recomputed {format_size(proof.recomputed_bytes)} from the sources: identical")
    return 0


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise RecipeError(f"{text!r} is not a step") from None
