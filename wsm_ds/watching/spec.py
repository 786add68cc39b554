"""What a watch merges: recipes, the steps at which their windows end, and the folder of each output."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wsm_ds.errors import RecipeError, brief, few
from wsm_ds.filesystem.durable import replace_text
from wsm_ds.filesystem.small_files import read_small
from wsm_ds.layouts.frameworks import MANIFEST
from wsm_ds.planning.recipe import MergeRecipe, make_recipe, make_recipes
from wsm_ds.publishing.manifest import read_manifest
from wsm_ds.watching.windows import EndPoints

NAMED_BY = ("last", "curve")
"""Recipe keys that are always in the name of a window."""
SPEC = "watch.json"
LOCK = ".wsm-watch.lock"
REFUSED = ".refused.json"
FIXED = ("tags", "from_step", "to_step", "last_tokens", "last_samples", "top")
"""Recipe keys that would choose the same window again and again, or one whose checkpoints no prune could know."""


@dataclass(frozen=True)
class WatchSpec:
    """Outputs of a watch: `out/step{end}/{name}` for every end point and every recipe.

    Attributes:
        run: the run's folder. It is absolute, because the recipe that a merge records must not depend on the working
            directory of the watch.
        out: the folder of all outputs, absolute.
        ends: where windows end.
        recipes: by the name of their output. Their `out` and `to_step` are set by `recipe_at`.
    """

    run: Path
    out: Path
    ends: EndPoints
    recipes: dict[str, MergeRecipe]

    @property
    def counts(self) -> dict[str, int]:
        """Checkpoints of each window, by name."""
        return {name: recipe.last or 0 for name, recipe in self.recipes.items()}

    def output_folder(self, end: int, name: str) -> Path:
        """The folder of the output for this end point and name of a window."""
        return self.out / f"step{end}" / name

    def refusal(self, end: int, name: str) -> Path:
        """The file that says why a window was refused. If it is removed, the window is tried again."""
        folder = self.output_folder(end, name)
        return folder.with_name(folder.name + REFUSED)

    def recipe_at(self, end: int, name: str) -> MergeRecipe:
        """The recipe of one output, as `wsm-ds merge` would need it for the same output."""
        return self.recipes[name].model_copy(update={"to_step": end, "out": self.output_folder(end, name)})

    def is_resolved(self, end: int, name: str) -> bool:
        """Whether a window is merged or refused, so that nothing remains to be done."""
        return (self.output_folder(end, name) / MANIFEST).is_file() or self.refusal(end, name).is_file()

    def to_json(self) -> dict[str, Any]:
        """Plain data, from which `read_spec` makes an equal spec."""
        recipes = {name: recipe.model_dump(mode="json") for name, recipe in self.recipes.items()}
        return {"run": str(self.run), "ends": asdict(self.ends), "recipes": recipes}


def make_spec(values: dict[str, Any], ends: EndPoints) -> WatchSpec:
    """Makes the spec of a watch from the values of a recipe.

    Args:
        values: as for `make_recipes`; `run` and `out` must be set.
        ends: where windows end.

    Raises:
        RecipeError: a value is wrong, or a window has a fixed end.
    """
    missing = [name for name in ("run", "out") if values.get(name) is None]
    if missing:
        raise RecipeError(f"{' and '.join(f'`{name}`' for name in missing)} must be given.")
    entries = [values, *(entry for entry in values.get("outputs") or () if isinstance(entry, dict))]
    fixed = sorted({name for entry in entries for name in FIXED if entry.get(name) is not None})
    if fixed:
        raise RecipeError(
            "the windows of a watch end at every new checkpoint, so they are chosen by `last`, not by "
            f"{few(f'`{name}`' for name in fixed)}."
        )
    wrong = [name for name in ("run", "out") if not isinstance(values[name], str | os.PathLike)]
    if wrong:
        raise RecipeError(
            f"the recipe is not valid: `{wrong[0]}`: the path of a folder is needed, found {brief(values[wrong[0]])}."
        )
    run, out = Path(values["run"]).absolute(), Path(values["out"]).absolute()
    recipes = make_recipes(**values | {"run": run, "out": out}, always_named=NAMED_BY)
    for recipe in recipes:
        if not recipe.out.is_relative_to(out) or ".." in recipe.out.relative_to(out).parts:
            raise RecipeError(
                f"the recipe is not valid: `out` of an entry of `outputs` must be a folder below {out}, found "
                f"{recipe.out}."
            )
    named = {recipe.out.relative_to(out).as_posix(): recipe for recipe in recipes}
    if len(named) < len(recipes):
        raise RecipeError("two outputs have the same name; give each entry of outputs an out of its own.")
    return WatchSpec(run, out, ends, _with_checked_coefficients(named))


def _with_checked_coefficients(named: dict[str, MergeRecipe]) -> dict[str, MergeRecipe]:
    for name, recipe in named.items():
        if recipe.coefficients is not None and len(recipe.coefficients) != recipe.last:
            raise RecipeError(
                f"{name}: {len(recipe.coefficients)} coefficients for a window of {recipe.last} checkpoints."
            )
    return named


def write_spec(spec: WatchSpec) -> None:
    """Writes the spec into its folder, where a prune reads it."""
    replace_text(spec.out / SPEC, json.dumps(spec.to_json(), indent=2) + "\n")


def require_own_folder(spec: WatchSpec) -> None:
    """Checks that `spec.out` is a folder for this watch, before anything is written there.

    A prune keeps the checkpoints that the watch in OUT/watch.json needs. A second watch that replaced that file by
    other windows would let a prune delete checkpoints that the first one still needs.

    Raises:
        RecipeError: OUT is the run, a finished merge, or the folder of a watch of another run or of windows that this
            one does not make. The message names them.
    """
    out = spec.out
    if out.resolve() == spec.run.resolve():
        raise RecipeError(f"`out` ({out}) is the run itself, which a watch only reads. Choose another folder.")
    if (out / MANIFEST).is_file():
        raise RecipeError(f"`out` ({out}) is a finished merge. Choose another folder.")
    earlier = read_spec(out)
    if earlier is None:
        return
    if earlier.run.resolve() != spec.run.resolve():
        if not merged_outputs(earlier):
            return  # as after a misspelt run
        raise RecipeError(
            f"`out` ({out}) has the merges of {earlier.run}, not of {spec.run}. Choose another folder."
            f"{_if_moved(earlier)}"
        )
    dropped = sorted(earlier.recipes.keys() - spec.recipes.keys())
    if dropped:
        raise RecipeError(
            f"`out` ({out}) is the folder of a watch that makes {few(dropped)}, which this one does not make. A prune "
            f"would no longer keep the checkpoints that they need. Add these windows, choose another folder, or, if "
            f"that watch has ended for good, remove {out / SPEC}."
        )


def require_run(spec: WatchSpec, run: Path) -> None:
    """Raises RecipeError if a watch is of another run than `run`."""
    if spec.run.resolve() != run.resolve():
        raise RecipeError(f"{spec.out} has the merges of {spec.run}, not of {run}.{_if_moved(spec)}")


def _if_moved(spec: WatchSpec) -> str:
    """What to do if the run of a watch was moved: nothing in the folders tells whether it was."""
    if spec.run.is_dir():
        return ""
    return f" {spec.run} does not exist any more: if it was moved, write its new place into `run` of {spec.out / SPEC}."


def read_spec(out: Path) -> WatchSpec | None:
    """The spec of the watch that wrote, or writes, into `out`; None if no watch did.

    Raises:
        RecipeError: the file of the spec cannot be read; it is named.
    """
    path = out / SPEC
    try:
        values = json.loads(read_small(path))
        recipes = {name: make_recipe(**recipe) for name, recipe in values["recipes"].items()}
        return WatchSpec(Path(values["run"]), out.absolute(), EndPoints(**values["ends"]), recipes)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RecipeError(f"{path} is not what a watch has written: {error}") from error


def source_steps(run: Path, out: Path) -> set[int]:
    """The steps of the run's checkpoints that are the sources of a finished merge.

    Args:
        run: the run's folder.
        out: the output's folder.

    Raises:
        VerificationFailed: see `read_manifest`.
    """
    paths = {int(source["step"]): Path(source["path"]) for source in read_manifest(out)["sources"]}
    return {step for step, path in paths.items() if path.is_relative_to(run.resolve())}


def merged_outputs(spec: WatchSpec) -> Sequence[tuple[int, str]]:
    """End and name of everything that is merged already, by rising end point."""
    ends = sorted(
        int(path.name.removeprefix("step"))
        for path in spec.out.glob("step*")
        if path.name.removeprefix("step").isdecimal()
    )
    outputs = [(end, name) for end in ends for name in spec.recipes]
    return [(end, name) for end, name in outputs if (spec.output_folder(end, name) / MANIFEST).is_file()]
