"""The arguments of a merge: a recipe, or the fields of one."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from wsm_ds.errors import RecipeError, few
from wsm_ds.layouts.frameworks import MANIFEST
from wsm_ds.layouts.run import is_checkpoint_folder
from wsm_ds.planning.recipe import MergeRecipe, make_recipe
from wsm_ds.planning.recipe_options import StrPath

Recipe = MergeRecipe | StrPath
"""A recipe, or the folder of the run whose other fields are keywords."""


def recipe_of(recipe: Recipe | None, options: Mapping[str, Any]) -> MergeRecipe:
    """Returns the recipe that a call describes.

    Args:
        recipe: a recipe, or the run's folder, or None.
        options: fields of a recipe; none if `recipe` is one.

    Raises:
        RecipeError: a value is wrong, or both a recipe and options are given.
    """
    if isinstance(recipe, MergeRecipe):
        if options:
            raise _both_given(options)
        return recipe
    run: dict[str, Any] = {} if recipe is None else {"run": recipe}
    if run and "run" in options:
        raise RecipeError(f"the run is given twice: {recipe} and `run` ({options['run']}).")
    return make_recipe(**run, **options)


def recipes_of(recipes: Recipe | Sequence[MergeRecipe] | None, options: Mapping[str, Any]) -> list[MergeRecipe]:
    """Returns the recipes that a call describes, whose outputs can all be made.

    Args:
        recipes: several recipes, or see `recipe_of`.
        options: fields of one recipe; none if `recipes` are given.

    Raises:
        RecipeError: see `recipe_of`; or two outputs have the same folder, or one lies below a file.
    """
    if recipes is None or isinstance(recipes, MergeRecipe | str | os.PathLike):
        recipes = [recipe_of(recipes, options)]
    elif options:
        raise _both_given(options)
    if len({recipe.out.resolve() for recipe in recipes}) < len(recipes):
        raise RecipeError("two outputs have the same folder.")
    _require_folders_above(recipes)
    return list(recipes)


def _both_given(options: Mapping[str, Any]) -> RecipeError:
    """The error about options beside a recipe, which would be ignored."""
    keys = few(f"`{key}`" for key in options)
    return RecipeError(f"a recipe and {keys} are given; make a recipe that has them, by make_recipe.")


def _require_folders_above(recipes: Sequence[MergeRecipe]) -> None:
    """Raises RecipeError if a folder above an output is a file, a checkpoint of the run, or another output."""
    for recipe in recipes:
        above = next(path for path in recipe.out.absolute().parents if path.exists())
        if not above.is_dir():
            raise RecipeError(f"`out` ({recipe.out}): {above} is not a folder.")
        run = recipe.run.resolve()
        for folder in recipe.out.resolve().parents:
            # A training may go on in the folder of a merge; its own files lie there then.
            if (folder / MANIFEST).is_file() and not run.is_relative_to(folder):
                raise RecipeError(
                    f"`out` ({recipe.out}) lies in {folder}, another merge's output, which would no longer be what its "
                    "manifest says. Choose a folder outside it."
                )
            if folder.is_relative_to(run) and is_checkpoint_folder(folder):
                raise RecipeError(
                    f"`out` ({recipe.out}) lies in the checkpoint {folder}, and sources are only read. Choose a folder "
                    "outside it."
                )
