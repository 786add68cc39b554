"""The merge: recipes → plan → bytes → published outputs. One call from Python, one command from a shell."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from wsm_ds.distributed.ranks import Ranks
from wsm_ds.dtypes import BY_NAME
from wsm_ds.engine.reader import check_unchanged
from wsm_ds.engine.staged_files import StagedFiles, Timings
from wsm_ds.engine.tasks import share, tasks_of
from wsm_ds.engine.worker import run_tasks, workers_for
from wsm_ds.errors import OutputExists, RecipeError, VerificationFailed
from wsm_ds.filesystem.capacity import bytes_held, require_disk, require_memory
from wsm_ds.layouts import Layout, read_layout
from wsm_ds.outputs.resharding.form import RequestedForm
from wsm_ds.outputs.safetensors import plan_safetensors
from wsm_ds.outputs.trainer_files import trainer_files
from wsm_ds.outputs.zero_checkpoint import OutputFiles, OutputWindow, plan_zero_checkpoint
from wsm_ds.planning.plan import CopySegment, InputFile, InputNumber, Output, OutputFile, OutputNumber, Plan, Source
from wsm_ds.planning.recipe import MergeRecipe, make_recipe
from wsm_ds.planning.streams import ElementRequest, SourceTables, carry_streams, element_streams, source_tables
from wsm_ds.planning.window import ReadLayout, Window, recorded_window, select_window, union_of
from wsm_ds.publishing.manifest import description, make_manifest, read_manifest
from wsm_ds.publishing.staging_folder import (
    MANIFEST,
    Staging,
    begun,
    commit,
    discard,
    require_absent,
    staged,
    write_text,
)
from wsm_ds.schedules.coefficients import effective_sample_size, lag

Progress = Callable[[int], None]


def plan_merge(recipes: MergeRecipe | Sequence[MergeRecipe]) -> Plan:
    """What `merge` would do. Reads metadata only, writes nothing.

    Outputs that the very same merge has made already are left out; the plan has no parts if that is all of them.
    A merge that was begun and killed goes on with the window that it began with.

    Raises:
        WsmError: the window, the checkpoints or the budget are not right; see `select_window`, `workers_for`.
        OutputExists: the recipe's `out` is there already, and is not this merge.
    """
    chosen = [recipes] if isinstance(recipes, MergeRecipe) else list(recipes)
    if len({recipe.out.absolute() for recipe in chosen}) < len(chosen):
        raise RecipeError("two outputs have the same folder.")
    read = cache(read_layout)
    windows = [_window(recipe, read) for recipe in chosen]
    plan = plan_windows(chosen, windows)
    left = [part for part, recipe in enumerate(chosen) if not _is_made(plan, part, recipe.out)]
    if len(left) < len(chosen):
        return plan_windows([chosen[part] for part in left], [windows[part] for part in left])
    return plan


def _window(recipe: MergeRecipe, read: ReadLayout) -> Window:
    described = begun(recipe.out)
    if described is not None:
        wanted = recipe.model_dump(mode="json")
        recorded = described.get("recipe")
        if isinstance(recorded, dict) and all(wanted.get(name) == value for name, value in recorded.items()):
            return recorded_window(described["sources"], recipe, read)
    elif not (recipe.out / MANIFEST).is_file():
        require_absent(recipe.out)
    return select_window(recipe, read)


def _is_made(plan: Plan, part: int, out: Path) -> bool:
    """Whether `out` is this merge, made before."""
    if not (out / MANIFEST).is_file():
        require_absent(out)
        return False
    try:
        identity = read_manifest(out).get("identity")
    except VerificationFailed:
        identity = None
    if identity != description(plan, part)["identity"]:
        raise OutputExists(f"{out} exists and is another merge; nothing is ever overwritten. Choose another --out.")
    discard(out)
    return True


def plan_windows(
    recipes: Sequence[MergeRecipe], windows: Sequence[Window], carried: frozenset[str] | None = None
) -> Plan:
    """The plan of recipes whose windows are known; of the files beside them those named in `carried`, if given."""
    if not recipes:
        return Plan((), (), (), (), (), 0, 1)
    layouts = union_of(windows)
    tables = source_tables(layouts)
    numbers = {layout.path: number for number, layout in enumerate(layouts)}
    inputs, outputs, wanted, parts = tables.inputs, list[OutputFile](), list[ElementRequest](), list[Output]()
    for part, (recipe, window) in enumerate(zip(recipes, windows, strict=True)):
        members = tuple(numbers[layout.path] for layout in window.layouts)
        own = OutputWindow(OutputNumber(part), members, tuple(window.coefficients.tolist()), len(outputs))
        files, texts = _files(tables, own, recipe, any(map(_reads_states, recipes)))
        copies, copied = _beside(recipe, window.layouts[-1], own, files, texts, carried, len(inputs))
        outputs += [*files.files, *copies]
        inputs += copied
        wanted += files.requests
        parts.append(_part(recipe, window, texts))
    streams = element_streams(tables, wanted) + carry_streams(inputs, outputs)
    budget = int(recipes[0].memory_budget)
    plan = Plan(tuple(parts), inputs, tuple(outputs), tuple(streams), tables.names, budget, recipes[0].threads)
    workers_for(plan, budget, recipes[0].threads)
    return plan


def _reads_states(recipe: MergeRecipe) -> bool:
    """Whether an output takes optimizer states element by element, not with the bytes of whole files."""
    is_reformed = recipe.format == "universal" or recipe.like is not None
    is_reformed |= any(value is not None for value in (recipe.world_size, recipe.stage, recipe.sub_group_size))
    return recipe.optimizer_states == "merge" or (is_reformed and recipe.optimizer_states == "carry")


def _files(
    tables: SourceTables, window: OutputWindow, recipe: MergeRecipe, reads_states: bool
) -> tuple[OutputFiles, dict[str, str]]:
    """A part's files, those of its texts included."""
    if recipe.format == "safetensors":
        dtype = BY_NAME[recipe.dtype] if recipe.dtype else None
        return plan_safetensors(tables, window, dtype, int(recipe.max_shard_size), recipe.rename)
    is_universal = recipe.format == "universal"
    form = RequestedForm(is_universal, recipe.stage, recipe.world_size, recipe.sub_group_size, recipe.like)
    tag = f"global_step{window.newest(tables).step}" + ("_universal" if is_universal else "")
    allowed = frozenset(recipe.allow_globals)
    files = plan_zero_checkpoint(tables, window, tag, recipe.optimizer_states, allowed, form, reads_states=reads_states)
    return files, {"latest_universal" if is_universal else "latest": tag}


def _part(recipe: MergeRecipe, window: Window, texts: dict[str, str]) -> Output:
    steps = [layout.step for layout in window.layouts]
    return Output(
        out=recipe.out,
        sources=_sources(window.layouts, window.coefficients.tolist()),
        curve=recipe.curve or "given coefficients",
        ess=effective_sample_size(window.coefficients),
        lag_steps=lag(window.coefficients, steps),
        texts=texts,
        recipe=recipe.model_dump(mode="json"),
    )


def _beside(
    recipe: MergeRecipe,
    newest: Layout,
    window: OutputWindow,
    files: OutputFiles,
    texts: dict[str, str],
    carried: frozenset[str] | None,
    first_input: int,
) -> tuple[tuple[OutputFile, ...], tuple[InputFile, ...]]:
    """Files to be copied into the output's root: those that are asked for, and what HF Trainer keeps."""
    chosen, taken = {path.name for path in recipe.include}, {output.name for output in files.files} | set(texts)
    beside = tuple(
        path
        for path in trainer_files(newest, recipe.format)
        if path.name not in chosen and (carried is None or path.name in carried)
    )
    return _included(window.output, recipe.include + beside, first_input, taken)


def _included(
    part: OutputNumber, paths: tuple[Path, ...], first_input: int, taken: set[str]
) -> tuple[tuple[OutputFile, ...], tuple[InputFile, ...]]:
    """Files to be copied into the output's root, as outputs and as inputs."""
    outputs, inputs = [], []
    for number, path in enumerate(paths):
        if not path.is_file() or path.name in taken | {MANIFEST}:
            raise RecipeError(f"include: {path} is not a file, or the output has a {path.name} already.")
        taken = taken | {path.name}
        status = path.stat()
        inputs.append(InputFile(path.resolve(), status.st_size, status.st_mtime_ns))
        pieces = (CopySegment(0, status.st_size, InputNumber(first_input + number), 0),) if status.st_size else ()
        outputs.append(OutputFile(part, path.name, status.st_size, pieces, ()))
    return tuple(outputs), tuple(inputs)


def _sources(layouts: tuple[Layout, ...], coefficients: list[float]) -> tuple[Source, ...]:
    return tuple(
        Source(layout.path.resolve(), layout.tag, layout.step, coefficient)
        for layout, coefficient in zip(layouts, coefficients, strict=True)
    )


@dataclass(frozen=True)
class MergeOutcome:
    """What a run of a plan has made: manifests in the plan's order (on rank 0), and where this process's time went."""

    manifests: tuple[dict[str, Any], ...]
    timings: Timings


def run_plan(
    plan: Plan, on_bytes: Progress = lambda nbytes: None, *, ranks: Ranks | None = None, restart: bool = False
) -> MergeOutcome:
    """Writes and publishes a plan's outputs.

    Nothing appears at a part's `out` unless all of it is there. Sources are opened read-only. Killed and called again
    with the same plan, it goes on where it stopped.

    Ranks: all, inside `ranks.together()`; each runs its share of the plan, rank 0 publishes.

    Args:
        plan: the same on every rank.
        on_bytes: gets the bytes that were read and written since the last call.
        ranks: those of a launcher; one process alone, if not given.
        restart: whether to throw away what another merge, begun and not ended, has left at the same place.

    Raises:
        OutputExists, NonFiniteValue, LayoutMismatch, BrokenCheckpoint, InsufficientCapacity: see `staged`, `run_tasks`.
        PeerFailed: another rank failed.
        OSError: the disk is full or fails.
    """
    ranks = ranks or Ranks()
    if not plan.outputs:
        return MergeOutcome((), Timings())
    stagings = [Staging(part.out) for part in plan.outputs]
    descriptions = [description(plan, number) for number in range(len(plan.outputs))]
    workers = workers_for(plan, plan.memory_bytes, plan.threads)
    ranks.barrier("planned")  # what rank 0 stages would look, to a rank that still plans, like another merge's
    with ExitStack() as stack:
        require_memory(plan.memory_bytes)
        files = StagedFiles(plan, [s.content for s in stagings], [s.folder for s in stagings], ranks.rank)
        if ranks.rank == 0:
            for part, described in zip(plan.outputs, descriptions, strict=True):
                stack.enter_context(staged(part.out, described, restart=restart))
            _require_disk(plan, stagings)
            files.create()
        ranks.barrier("start")
        for part, described in zip(plan.outputs, descriptions, strict=True):
            ranks.agree(str(part.out), described["identity"])  # each rank has made its plan by itself
        files.open()
        stack.callback(files.close)
        tasks = share(tasks_of(plan), ranks.rank, ranks.world_size)
        timings = run_tasks(plan, tasks, files, workers, on_bytes, ranks.check)
        ranks.barrier("written")
        files.seal_rest(ranks.rank, ranks.world_size)
        files.sync()
        check_unchanged(plan.inputs)
        ranks.barrier("synced")
        manifests = _publish(plan, files, stagings) if ranks.rank == 0 else ()
        ranks.barrier("published")
    return MergeOutcome(manifests, timings)


def _publish(plan: Plan, files: StagedFiles, stagings: Sequence[Staging]) -> tuple[dict[str, Any], ...]:
    """Every part is finished before the first appears."""
    manifests = []
    for number, (part, staging) in enumerate(zip(plan.outputs, stagings, strict=True)):
        written = files.finish(number)
        for name, text in part.texts.items():
            write_text(staging.content / name, text)
        manifests.append(make_manifest(plan, number, written))
    for staging, manifest in zip(stagings, manifests, strict=True):
        commit(staging, manifest)
    return tuple(manifests)


def _require_disk(plan: Plan, stagings: Sequence[Staging]) -> None:
    """Parts may lie on different file systems; those on one share its room."""
    needs: dict[int, tuple[Path, int, int]] = {}
    for number, staging in enumerate(stagings):
        files = [output for _, output in plan.files_of(number)]
        device = staging.folder.stat().st_dev
        folder, nbytes, count = needs.get(device, (staging.folder.parent, 0, 0))
        missing = max(0, sum(output.nbytes for output in files) - bytes_held(staging.content))
        needs[device] = (folder, nbytes + missing, count + len(files))
    for folder, nbytes, count in needs.values():
        require_disk(folder, nbytes, count, "the merge")


def merge(recipe: MergeRecipe | None = None, /, **values: Any) -> dict[str, Any]:
    """Merges the checkpoints of a recipe (or of its values as keywords) and returns the output's manifest.

    Example:
        merge(run=Path("run"), last=8, curve="1-sqrt", out=Path("merged"))
    """
    (manifest,) = merge_all([recipe if recipe is not None else make_recipe(**values)])
    return manifest


def merge_all(recipes: Sequence[MergeRecipe]) -> tuple[dict[str, Any], ...]:
    """Makes several outputs in one pass, every source read once; returns their manifests."""
    run_plan(plan_merge(recipes))
    return tuple(read_manifest(recipe.out) for recipe in recipes)


def one_recipe(run: Path, tag: str | None, out: Path | None, **values: Any) -> MergeRecipe:
    """The recipe that puts one checkpoint (the newest complete one, if `tag` is None) into another form."""
    chosen: dict[str, Any] = {"tags": (tag,)} if tag else {"last": 1}
    return make_recipe(run=run, out=out, coefficients=(1.0,), **chosen, **values)


def export(run: Path, tag: str | None, out: Path, **values: Any) -> dict[str, Any]:
    """Writes one checkpoint's fp32 masters, rounded to `dtype`, as safetensors; returns the manifest."""
    return merge(one_recipe(run, tag, out, format="safetensors", **values))


def reshard(run: Path, tag: str | None, out: Path, **values: Any) -> dict[str, Any]:
    """Writes one checkpoint for another `world_size` or ZeRO `stage`, or `like` another; returns the manifest."""
    return merge(one_recipe(run, tag, out, **values))
