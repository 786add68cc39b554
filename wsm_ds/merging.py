"""The merge: recipe → plan → bytes → published output. One call from Python, one command from a shell."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wsm_ds.beside import files_beside
from wsm_ds.coefficients import effective_sample_size, lag
from wsm_ds.dtypes import BY_NAME
from wsm_ds.engine import execute, workers_for
from wsm_ds.errors import RecipeError
from wsm_ds.forms.form import WantedForm
from wsm_ds.layouts import Layout
from wsm_ds.manifest import make_manifest
from wsm_ds.plan import Copy, InputFile, OutputFile, Plan, Source
from wsm_ds.plan_safetensors import safetensors_outputs
from wsm_ds.plan_zero import zero_outputs
from wsm_ds.publish import MANIFEST, commit, require_absent, staged, write_text
from wsm_ds.recipe import MergeRecipe, make_recipe
from wsm_ds.runs import window_tables
from wsm_ds.sizes import format_size
from wsm_ds.window import Window, select_window

Progress = Callable[[int], None]


def plan_merge(recipe: MergeRecipe) -> Plan:
    """What `merge` would do. Reads metadata only, writes nothing.

    Raises:
        WsmError: the window, the checkpoints or the budget are not right; see `select_window`, `workers_for`.
        OutputExists: `recipe.out` is there already.
    """
    require_absent(recipe.out)
    return plan_for_window(recipe, select_window(recipe))


def plan_for_window(recipe: MergeRecipe, window: Window, carried: frozenset[str] | None = None) -> Plan:
    """The plan of a recipe whose window is known; of the files beside it those named in `carried`, if given."""
    budget = int(recipe.memory_budget)
    workers = workers_for(budget, recipe.threads)
    tables, newest = window_tables(window.layouts), window.layouts[-1]
    texts: dict[str, str] = {}
    inputs = tables.inputs
    if recipe.format != "safetensors":
        is_universal = recipe.format == "universal"
        wanted = WantedForm(is_universal, recipe.stage, recipe.world_size, recipe.sub_group_size, recipe.like)
        tag = f"global_step{newest.step}" + ("_universal" if is_universal else "")
        allowed = frozenset(recipe.allow_globals)
        outputs, inputs = zero_outputs(tables, tag, recipe.optimizer_states, allowed, wanted)
        texts["latest_universal" if is_universal else "latest"] = tag
    else:
        dtype = BY_NAME[recipe.dtype] if recipe.dtype else None
        outputs, texts = safetensors_outputs(tables, dtype, int(recipe.max_shard_size), recipe.rename)
    chosen, taken = {path.name for path in recipe.include}, {output.name for output in outputs} | set(texts)
    beside = tuple(
        path
        for path in files_beside(newest, recipe.format)
        if path.name not in chosen and (carried is None or path.name in carried)
    )
    copies, copied = _included(recipe.include + beside, len(inputs), taken)
    steps = [layout.step for layout in window.layouts]
    return Plan(
        out=recipe.out,
        sources=_sources(window.layouts, window.coefficients.tolist()),
        curve=recipe.curve or "given coefficients",
        ess=effective_sample_size(window.coefficients),
        lag_steps=lag(window.coefficients, steps),
        inputs=inputs + copied,
        outputs=outputs + copies,
        names=tables.names,
        texts=texts,
        recipe=recipe.model_dump(mode="json"),
        memory_bytes=budget,
        threads=workers.threads,
    )


def _included(
    paths: tuple[Path, ...], first_input: int, taken: set[str]
) -> tuple[tuple[OutputFile, ...], tuple[InputFile, ...]]:
    """Files to be copied into the output's root, as outputs and as inputs."""
    outputs, inputs = [], []
    for number, path in enumerate(paths):
        if not path.is_file() or path.name in taken | {MANIFEST}:
            raise RecipeError(f"include: {path} is not a file, or the output has a {path.name} already.")
        taken = taken | {path.name}
        status = path.stat()
        inputs.append(InputFile(path.resolve(), status.st_size, status.st_mtime_ns))
        pieces = (Copy(0, status.st_size, first_input + number, 0),) if status.st_size else ()
        outputs.append(OutputFile(path.name, status.st_size, pieces))
    return tuple(outputs), tuple(inputs)


def _sources(layouts: tuple[Layout, ...], coefficients: list[float]) -> tuple[Source, ...]:
    return tuple(
        Source(layout.path.resolve(), layout.tag, layout.step, coefficient)
        for layout, coefficient in zip(layouts, coefficients, strict=True)
    )


def run_plan(plan: Plan, on_bytes: Progress = lambda nbytes: None) -> dict[str, Any]:
    """Writes and publishes a plan's outputs; returns the manifest.

    Nothing appears at `plan.out` unless all of it is there. Sources are opened read-only.

    Raises:
        OutputExists, NonFiniteValue, LayoutMismatch, BrokenCheckpoint: see `execute`.
        OSError: the disk is full or fails.
    """
    with staged(plan.out) as staging:
        free = shutil.disk_usage(staging).free
        if free < plan.bytes_to_write:
            raise RecipeError(
                f"{plan.out.parent} has {format_size(free)} free, the output needs {format_size(plan.bytes_to_write)}."
            )
        written = execute(plan, staging, workers_for(plan.memory_bytes, plan.threads), on_bytes)
        for name, text in plan.texts.items():
            write_text(staging / name, text)
        manifest = make_manifest(plan, written)
        commit(staging, plan.out, manifest)
    return manifest


def merge(recipe: MergeRecipe | None = None, /, **values: Any) -> dict[str, Any]:
    """Merges the checkpoints of a recipe (or of its values as keywords) and returns the output's manifest.

    Example:
        merge(run=Path("run"), last=8, curve="1-sqrt", out=Path("merged"))
    """
    return run_plan(plan_merge(recipe if recipe is not None else make_recipe(**values)))


def plan_one(run: Path, tag: str | None, out: Path | None, **values: Any) -> Plan:
    """The plan of one checkpoint (the newest complete one, if `tag` is None) in another form."""
    chosen: dict[str, Any] = {"tags": (tag,)} if tag else {"last": 1}
    return plan_merge(make_recipe(run=run, out=out, coefficients=(1.0,), **chosen, **values))


def export(run: Path, tag: str | None, out: Path, **values: Any) -> dict[str, Any]:
    """Writes one checkpoint's fp32 masters, rounded to `dtype`, as safetensors; returns the manifest."""
    return run_plan(plan_one(run, tag, out, format="safetensors", **values))


def reshard(run: Path, tag: str | None, out: Path, **values: Any) -> dict[str, Any]:
    """Writes one checkpoint for another `world_size` or ZeRO `stage`, or `like` another; returns the manifest."""
    return run_plan(plan_one(run, tag, out, **values))
