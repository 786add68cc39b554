"""What a watch makes: recipes without an end, the steps at which their windows end, and where each output goes."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wsm_ds.errors import RecipeError, brief, few
from wsm_ds.filesystem.durable import replace_text
from wsm_ds.filesystem.small_files import read_small
from wsm_ds.planning.recipe import MergeRecipe, make_recipe, make_recipes
from wsm_ds.publishing.manifest import read_manifest
from wsm_ds.publishing.staging_folder import MANIFEST
from wsm_ds.watching.windows import EndPoints

NAMED_BY = ("last", "curve")
SPEC = "watch.json"
LOCK = ".wsm-watch.lock"
REFUSED = ".refused.json"
FIXED = ("tags", "from_step", "to_step")


@dataclass(frozen=True)
class WatchSpec:
    """Outputs of a watch: `out/step{end}/{name}` for every end point and every recipe.

    Attributes:
        run: absolute, since the recipe that a merge records must be the same wherever the watch was started.
        recipes: by the name of their output, with neither its folder nor an end.
    """

    run: Path
    out: Path
    ends: EndPoints
    recipes: dict[str, MergeRecipe]

    @property
    def counts(self) -> dict[str, int]:
        """Checkpoints of each window, by name."""
        return {name: recipe.last or 0 for name, recipe in self.recipes.items()}

    def place(self, end: int, name: str) -> Path:
        """Where the window of this end and name is merged to."""
        return self.out / f"step{end}" / name

    def refusal(self, end: int, name: str) -> Path:
        """The file that says why a window was refused; without it, it is tried again."""
        place = self.place(end, name)
        return place.with_name(place.name + REFUSED)

    def recipe_at(self, end: int, name: str) -> MergeRecipe:
        """What `wsm-ds merge` would be asked for the same output."""
        return self.recipes[name].model_copy(update={"to_step": end, "out": self.place(end, name)})

    def is_resolved(self, end: int, name: str) -> bool:
        """Whether nothing is left to be done for a window: it is merged, or was refused."""
        return (self.place(end, name) / MANIFEST).is_file() or self.refusal(end, name).is_file()

    def to_json(self) -> dict[str, Any]:
        """Plain data, from which `read_spec` makes the same."""
        recipes = {name: recipe.model_dump(mode="json") for name, recipe in self.recipes.items()}
        return {"run": str(self.run), "ends": asdict(self.ends), "recipes": recipes}


def make_spec(values: dict[str, Any], ends: EndPoints) -> WatchSpec:
    """The spec of a recipe's values (see `make_recipes`), of which `run` and `out` are needed.

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
    return WatchSpec(run, out, ends, _checked(named))


def _checked(named: dict[str, MergeRecipe]) -> dict[str, MergeRecipe]:
    for name, recipe in named.items():
        if recipe.coefficients is not None and len(recipe.coefficients) != recipe.last:
            raise RecipeError(
                f"{name}: {len(recipe.coefficients)} coefficients for a window of {recipe.last} checkpoints."
            )
    return named


def write_spec(spec: WatchSpec) -> None:
    """Leaves the spec in its folder, where a prune finds it."""
    replace_text(spec.out / SPEC, json.dumps(spec.to_json(), indent=2) + "\n")


def read_spec(out: Path) -> WatchSpec | None:
    """The spec of the watch that wrote, or writes, into `out`; None if there was none.

    Raises:
        RecipeError: it cannot be read.
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
    """The steps of the run's checkpoints that a merge was made of."""
    paths = {int(source["step"]): Path(source["path"]) for source in read_manifest(out)["sources"]}
    return {step for step, path in paths.items() if path.is_relative_to(run.resolve())}


def merged_outputs(spec: WatchSpec) -> Sequence[tuple[int, str]]:
    """End and name of everything that is merged already, by rising end point."""
    ends = sorted(
        int(path.name.removeprefix("step"))
        for path in spec.out.glob("step*")
        if path.name.removeprefix("step").isdecimal()
    )
    return [(end, name) for end in ends for name in spec.recipes if (spec.place(end, name) / MANIFEST).is_file()]
