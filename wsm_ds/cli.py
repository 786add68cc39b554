"""The `wsm-ds` command: parse, one library call, print. The library is imported when a command needs it."""

import argparse
import io
import json
import logging
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wsm_ds import __version__
from wsm_ds.errors import RecipeError, WsmError, one_line

EXIT_CODES = (
    "exit codes: 0 done; 2 a wrong request; 3 a broken or unsupported checkpoint, a full disk or an I/O error; "
    "130 interrupted by SIGINT or SIGTERM (run the same command again to go on)"
)


FORM = ("world_size", "stage", "sub_group_size", "like")


def _merge(options: argparse.Namespace) -> int:
    from wsm_ds.recipe import load_recipes, make_recipes

    names = ("run", "out", "from_step", "oldest_interval", "dtype",
             "optimizer_states", *FORM, "memory_budget", "threads", "max_shard_size")  # fmt: skip
    values = {name: getattr(options, name) for name in names}
    values |= {name: _several(getattr(options, name)) for name in ("last", "to_step", "floor", "format")}
    values["curve"] = _several(options.curve, separator=CURVE_SEPARATOR)
    values["tags"] = _split(options.tags)
    values["coefficients"] = _split(options.coefficients)
    values["allow"] = tuple(options.allow) or None
    values |= _naming(options)
    if options.recipe:
        return _carry_out(load_recipes(options.recipe, **values), options)
    return _carry_out(make_recipes(**_with_default_curve(values)), options)


def _with_default_curve(values: dict[str, Any]) -> dict[str, Any]:
    if values["curve"] is None and values["coefficients"] is None:
        return values | {"curve": "linear"}
    return values


def _carry_out(recipes: Sequence[Any], options: argparse.Namespace) -> int:
    """Plans and runs the merge: all ranks of a launcher do."""
    from wsm_ds.merging import plan_merge
    from wsm_ds.ranks import launched_ranks
    from wsm_ds.report import plan_report

    if options.dry_run:
        plan = plan_merge(recipes)
        print(json.dumps(plan.to_json(), indent=2) if options.json else plan_report(plan))
        return 0
    with _signals_interrupt():
        ranks = launched_ranks()
        with ranks.together():
            return _run(recipes, ranks, options)


def _run(recipes: Sequence[Any], ranks: Any, options: argparse.Namespace) -> int:
    """One rank's part of a merge; rank 0 speaks."""
    from wsm_ds.manifest import read_manifest
    from wsm_ds.merging import plan_merge, run_plan
    from wsm_ds.progress import Progress, event
    from wsm_ds.report import plan_report, summary_report

    plan = plan_merge(recipes)
    is_first = ranks.rank == 0
    if is_first and plan.parts:
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
    made = {part.out for part in plan.parts}
    if options.json:
        for recipe in recipes:
            event("done", out=str(recipe.out), is_new=recipe.out in made, manifest=read_manifest(recipe.out))
        seconds = {name: round(value, 3) for name, value in vars(done.spent).items()} | {"wall_s": progress.wall_s}
        event("summary", bytes_read=plan.bytes_to_read, bytes_written=plan.bytes_to_write, **seconds)
        return 0
    for recipe in recipes:
        print(f"done {recipe.out}" if recipe.out in made else f"done {recipe.out} (by this same merge, before)")
    if plan.parts:
        print(summary_report(plan, done.spent, progress.wall_s, ranks.world_size))
    return 0


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGINT end the merge at once, and leave what is staged for the next attempt."""
    from wsm_ds.errors import Interrupted

    def stop(number: int, _: object) -> None:
        raise Interrupted(f"{signal.Signals(number).name}; nothing was published. Run the same command again to go on.")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
        options.tag,
        options.out,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        memory_budget=options.memory_budget,
        threads=options.threads,
        **_naming(options),
        **values,
    )
    return _carry_out([recipe], options)


def _inspect(options: argparse.Namespace) -> int:
    from wsm_ds.inspect import inspect_run
    from wsm_ds.report import inspection_report

    found = inspect_run(options.run, options.tag, frozenset(options.allow_global))
    if options.json:
        print(json.dumps([item.details() if options.tag else item.to_json() for item in found], indent=2))
    else:
        print(inspection_report(found))
    return 0 if all(item.layout for item in found) else 3


def _coefficients(options: argparse.Namespace) -> int:
    from wsm_ds.coefficients import effective_sample_size, lag, merge_coefficients
    from wsm_ds.report import coefficients_report

    steps = [_number(step) for step in _split(options.steps) or ()] or None
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


def _naming(options: argparse.Namespace) -> dict[str, Any]:
    """Options that may be given more than once."""
    pairs = [text.rpartition("=") for text in options.rename]
    return {
        "rename": {pattern: replacement for pattern, _, replacement in pairs} or None,
        "include": tuple(options.include) or None,
        "allow_globals": tuple(options.allow_global) or None,
    }


CURVE_SEPARATOR = r",(?=\s*(?:1-sqrt|[A-Za-z]))"
"""A comma before the name of a curve; others separate the numbers of a table."""


def _several(text: str | None, separator: str = ",") -> Any:
    """One value, or a list of them."""
    parts = [part.strip() for part in re.split(separator, text)] if text else []
    return parts if len(parts) > 1 else parts[0] if parts else None


def _split(text: str | None) -> tuple[str, ...] | None:
    return tuple(part.strip() for part in text.split(",")) if text else None


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise RecipeError(f"{text!r} is not a step") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wsm-ds", description="Merge ZeRO checkpoints instead of decaying the "
                                     "learning rate.", epilog=EXIT_CODES)  # fmt: skip
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("--version", action="version", version=f"wsm-ds {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    merge = _command(commands, "merge", _merge, "merge a window of checkpoints")
    merge.add_argument("run", nargs="?", type=Path, help="the run's folder (save_dir, or HF Trainer's output_dir)")
    merge.add_argument("--recipe", type=Path, metavar="FILE.yaml", help="a recipe; other options count before its own")
    merge.add_argument(
        "--last", metavar="N[,N…]", help="the newest N complete checkpoints; several make several outputs"
    )
    merge.add_argument("--from", dest="from_step", type=int, metavar="STEP", help="first step of the window")
    merge.add_argument("--to", dest="to_step", metavar="STEP[,…]", help="last step of the window (also with --last)")
    merge.add_argument("--tags", metavar="A,B,…", help="checkpoints by name")
    merge.add_argument("--curve", help="linear (default), cosine, 1-sqrt, power:P, ema:R, …; several, with commas, too")
    merge.add_argument("--floor", metavar="M", help="final rate as a fraction of the peak (default 0)")
    merge.add_argument("--coefficients", metavar="C,C,…", help="instead of a curve: oldest first, summing to 1")
    merge.add_argument("--oldest-interval", type=int, metavar="STEPS", help="steps the oldest checkpoint stands for")
    merge.add_argument("--format", metavar="F[,F…]", help="zero (default: DeepSpeed loads it), universal, safetensors")
    _form_options(merge)
    merge.add_argument("--optimizer-states", choices=("carry", "merge", "drop"), help="default carry")
    merge.add_argument(
        "--allow", action="append", default=[], choices=("warmup", "lr-change"), help="pass over a check"
    )
    _writing_options(merge)

    export = _command(commands, "export", _export, "one checkpoint to safetensors")
    export.add_argument("run", type=Path)
    export.add_argument("--tag", help="default: the newest complete one")
    _writing_options(export)

    reshard = _command(commands, "reshard", _reshard, "one checkpoint for another number of ranks, or ZeRO stage")
    reshard.add_argument("run", type=Path)
    reshard.add_argument("--tag", help="default: the newest complete one")
    _form_options(reshard)
    _writing_options(reshard)

    inspect = _command(commands, "inspect", _inspect, "what a run's folder holds")
    inspect.add_argument("run", type=Path)
    inspect.add_argument("--tag", help="one checkpoint; with --json, its tensors too")
    _allow_global(inspect)

    coefficients = _command(commands, "coefficients", _coefficients, "coefficients of a curve")
    coefficients.add_argument("--curve", required=True)
    coefficients.add_argument("-n", type=int, help="number of evenly spaced checkpoints")
    coefficients.add_argument("--steps", metavar="S,S,…", help="their steps or tokens, if uneven")
    coefficients.add_argument("--oldest-interval", type=int, metavar="STEPS")
    coefficients.add_argument("--floor", type=float, metavar="M")

    verify = _command(commands, "verify", _verify, "prove that an output is right")
    verify.add_argument("out", type=Path)
    verify.add_argument("--full", action="store_true", help="recompute everything from the sources, not samples")
    return parser


def _command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, epilog=EXIT_CODES)
    parser.set_defaults(function=function)
    parser.add_argument("--json", action="store_true", help="print JSON, a merge one event a line")
    return parser


def _form_options(parser: argparse.ArgumentParser) -> None:
    """The form of a zero output."""
    parser.add_argument("--world-size", type=int, metavar="W", help="data-parallel ranks; default: as in the newest")
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), help="ZeRO stage; default: as in the newest")
    parser.add_argument(
        "--sub-group-size", type=int, metavar="N", help="of stage 3, as in the ds_config that will load"
    )
    parser.add_argument("--like", type=Path, metavar="RUN/TAG", help="the form of another checkpoint")


def _writing_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder to make; it must not exist")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="of safetensors; default: as trained")
    parser.add_argument("--max-shard-size", metavar="SIZE", help="of a safetensors file (default 5GB)")
    parser.add_argument("--rename", action="append", default=[], metavar="PATTERN=NEW",
                        help="in names of safetensors: a regular expression and what replaces it")  # fmt: skip
    parser.add_argument("--include", action="append", default=[], type=Path, metavar="FILE",
                        help="copy FILE into the output: config.json, tokenizer files")  # fmt: skip
    parser.add_argument("--memory-budget", metavar="SIZE", help="of all buffers (default 512MiB)")
    parser.add_argument("--threads", type=int, metavar="N", help="default: all cores")
    parser.add_argument("--restart", action="store_true", help="throw away what another merge left")
    parser.add_argument("--dry-run", action="store_true", help="show the plan and write nothing")
    _allow_global(parser)


def _allow_global(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--allow-global", action="append", default=[], metavar="MODULE.NAME",
                        help="a class in the checkpoints' client state to carry along; it is not imported")  # fmt: skip


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
