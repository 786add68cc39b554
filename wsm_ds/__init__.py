"""wsm_ds: warmup-stable-and-merge for DeepSpeed.

Importing it makes `WSMLR` and `WSDLR` known to DeepSpeed and imports nothing heavy: every name below is
loaded when it is first used.
"""

from typing import TYPE_CHECKING, Any

from wsm_ds.deepspeed_registration import register

__version__ = "0.1.0"

_HOMES = {
    "WSMLR": "lr_schedules",
    "WSDLR": "lr_schedules",
    "MergeRecipe": "recipe",
    "load_recipe": "recipe",
    "load_recipes": "recipe",
    "make_recipes": "recipe",
    "merge": "merging",
    "merge_all": "merging",
    "plan_merge": "merging",
    "run_plan": "merging",
    "export": "merging",
    "reshard": "merging",
    "verify": "verification",
    "inspect_run": "inspect",
    "parse_curve": "curves",
    "merge_coefficients": "coefficients",
    "coefficients_from_decay_factors": "coefficients",
    "decay_factors_from_coefficients": "coefficients",
    "weight_decay_aware_coefficients": "coefficients",
    "effective_sample_size": "coefficients",
    "lag": "coefficients",
    "WsmError": "errors",
}
__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from wsm_ds.coefficients import (
        coefficients_from_decay_factors,
        decay_factors_from_coefficients,
        effective_sample_size,
        lag,
        merge_coefficients,
        weight_decay_aware_coefficients,
    )
    from wsm_ds.curves import parse_curve
    from wsm_ds.errors import WsmError
    from wsm_ds.inspect import inspect_run
    from wsm_ds.lr_schedules import WSDLR, WSMLR
    from wsm_ds.merging import export, merge, merge_all, plan_merge, reshard, run_plan
    from wsm_ds.recipe import MergeRecipe, load_recipe, load_recipes, make_recipes
    from wsm_ds.verification import verify


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'wsm_ds' has no attribute {name!r}")
    value = getattr(import_module(f"wsm_ds.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


register()
