"""wsm_ds: warmup-stable-and-merge for DeepSpeed.

Importing it makes `WSMLR` and `WSDLR` known to DeepSpeed and imports nothing heavy: every name below is
loaded when it is first used.
"""

from typing import TYPE_CHECKING, Any

from wsm_ds.schedules.deepspeed_registration import register

__version__ = "0.1.0"

_HOMES = {
    "WSMLR": "schedules.lr_schedules",
    "WSDLR": "schedules.lr_schedules",
    "MergeRecipe": "planning.recipe",
    "load_recipe": "planning.recipe",
    "load_recipes": "planning.recipe",
    "make_recipes": "planning.recipe",
    "merge": "merging",
    "merge_all": "merging",
    "plan_merge": "merging",
    "run_plan": "merging",
    "export": "merging",
    "reshard": "merging",
    "verify": "verification",
    "inspect_run": "inspection",
    "parse_curve": "schedules.curves",
    "merge_coefficients": "schedules.coefficients",
    "coefficients_from_decay_factors": "schedules.coefficients",
    "decay_factors_from_coefficients": "schedules.coefficients",
    "weight_decay_aware_coefficients": "schedules.coefficients",
    "effective_sample_size": "schedules.coefficients",
    "lag": "schedules.coefficients",
    "WsmError": "errors",
}
__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from wsm_ds.errors import WsmError
    from wsm_ds.inspection import inspect_run
    from wsm_ds.merging import export, merge, merge_all, plan_merge, reshard, run_plan
    from wsm_ds.planning.recipe import MergeRecipe, load_recipe, load_recipes, make_recipes
    from wsm_ds.schedules.coefficients import (
        coefficients_from_decay_factors,
        decay_factors_from_coefficients,
        effective_sample_size,
        lag,
        merge_coefficients,
        weight_decay_aware_coefficients,
    )
    from wsm_ds.schedules.curves import parse_curve
    from wsm_ds.schedules.lr_schedules import WSDLR, WSMLR
    from wsm_ds.verification import verify


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'wsm_ds' has no attribute {name!r}")
    value = getattr(import_module(f"wsm_ds.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


register()
