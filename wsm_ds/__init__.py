"""wsm_ds: warmup-stable-and-merge for DeepSpeed.

Merge the checkpoints of a run instead of decaying its learning rate:

    import wsm_ds

    print(wsm_ds.plan_merge(run="RUN", last=8, out="MERGED").to_json())  # what would be done
    result = wsm_ds.merge(run="RUN", last=8, out="MERGED")
    wsm_ds.verify(result.out)

What is stable: the names in `__all__`, with their parameters and attributes, the exit codes of errors, the command
line, and the format of a manifest. Within a major version they only grow. Everything else, the modules' places
included, may change at any time: import from `wsm_ds`, not from its modules.

Importing the package makes `WSMLR` and `WSDLR` known to DeepSpeed and imports neither torch nor deepspeed. A name is
loaded when it is first used.
"""

from typing import TYPE_CHECKING, Any

from wsm_ds.schedules.deepspeed_registration import register

__version__ = "0.1.0"

# The same names three times: type checkers read neither a computed `__all__` nor __getattr__. A test compares them.
_MODULES = {
    "WSMLR": "schedules.lr_schedules",
    "WSDLR": "schedules.lr_schedules",
    "MergeRecipe": "planning.recipe",
    "WindowRecipe": "planning.window_recipe",
    "make_window_recipe": "planning.window_recipe",
    "make_recipe": "planning.recipe",
    "make_recipes": "planning.recipe",
    "load_recipe": "planning.recipe",
    "load_recipes": "planning.recipe",
    "Plan": "planning.plan",
    "Output": "planning.plan",
    "Source": "planning.plan",
    "merge": "merging",
    "merge_all": "merging",
    "plan_merge": "merge_planning",
    "run_plan": "merging",
    "export": "merging",
    "load_merge": "loading",
    "load_merges": "loading",
    "load_each": "loading",
    "LoadedMerge": "loading",
    "reshard": "merging",
    "MergeResult": "merging",
    "MergeOutcome": "merging",
    "verify": "verification",
    "VerificationResult": "verification",
    "inspect_run": "inspection",
    "Inspected": "inspection",
    "parse_curve": "schedules.curves",
    "merge_coefficients": "schedules.coefficients",
    "coefficients_from_decay_factors": "schedules.coefficients",
    "decay_factors_from_coefficients": "schedules.coefficients",
    "weight_decay_aware_coefficients": "schedules.coefficients",
    "evaluate_folders": "evaluation.evaluating",
    "make_evaluator": "evaluation.evaluators",
    "load_evaluators": "evaluation.evaluators",
    "LossEvaluator": "evaluation.loss",
    "GenerateEvaluator": "evaluation.generation",
    "CommandEvaluator": "evaluation.commands",
    "LmEvalEvaluator": "evaluation.lm_eval",
    "Evaluation": "evaluation.evaluation",
    "Subject": "evaluation.evaluation",
    "Metric": "evaluation.evaluation",
    "Records": "evaluation.records",
    "build_model": "evaluation.models",
    "subject_of_folder": "evaluation.subjects",
    "paired_difference": "evaluation.statistics",
    "effective_sample_size": "schedules.figures",
    "lag": "schedules.figures",
    "age_deviation": "schedules.figures",
    "ReportFiles": "reporting.report.writing",
    "write_report": "reporting.report.writing",
    "tune": "tuning.tune",
    "make_tuning_request": "tuning.request",
    "TuningRequest": "tuning.request",
    "TuningResult": "tuning.results",
    "WsmError": "errors",
}
__all__ = [
    "WSDLR",
    "WSMLR",
    "CommandEvaluator",
    "Evaluation",
    "GenerateEvaluator",
    "Inspected",
    "LmEvalEvaluator",
    "LoadedMerge",
    "LossEvaluator",
    "MergeOutcome",
    "MergeRecipe",
    "MergeResult",
    "Metric",
    "Output",
    "Plan",
    "Records",
    "ReportFiles",
    "Source",
    "Subject",
    "TuningRequest",
    "TuningResult",
    "VerificationResult",
    "WindowRecipe",
    "WsmError",
    "__version__",
    "age_deviation",
    "build_model",
    "coefficients_from_decay_factors",
    "decay_factors_from_coefficients",
    "effective_sample_size",
    "evaluate_folders",
    "export",
    "inspect_run",
    "lag",
    "load_each",
    "load_evaluators",
    "load_merge",
    "load_merges",
    "load_recipe",
    "load_recipes",
    "make_evaluator",
    "make_recipe",
    "make_recipes",
    "make_tuning_request",
    "make_window_recipe",
    "merge",
    "merge_all",
    "merge_coefficients",
    "paired_difference",
    "parse_curve",
    "plan_merge",
    "reshard",
    "run_plan",
    "subject_of_folder",
    "tune",
    "verify",
    "weight_decay_aware_coefficients",
    "write_report",
]

if TYPE_CHECKING:
    from wsm_ds import averaging as averaging
    from wsm_ds.errors import WsmError
    from wsm_ds.evaluation.commands import CommandEvaluator
    from wsm_ds.evaluation.evaluating import evaluate_folders
    from wsm_ds.evaluation.evaluation import Evaluation, Metric, Subject
    from wsm_ds.evaluation.evaluators import load_evaluators, make_evaluator
    from wsm_ds.evaluation.generation import GenerateEvaluator
    from wsm_ds.evaluation.lm_eval import LmEvalEvaluator
    from wsm_ds.evaluation.loss import LossEvaluator
    from wsm_ds.evaluation.models import build_model
    from wsm_ds.evaluation.records import Records
    from wsm_ds.evaluation.statistics import paired_difference
    from wsm_ds.evaluation.subjects import subject_of_folder
    from wsm_ds.inspection import Inspected, inspect_run
    from wsm_ds.loading import LoadedMerge, load_each, load_merge, load_merges
    from wsm_ds.merge_planning import plan_merge
    from wsm_ds.merging import (
        MergeOutcome,
        MergeResult,
        export,
        merge,
        merge_all,
        reshard,
        run_plan,
    )
    from wsm_ds.planning.plan import Output, Plan, Source
    from wsm_ds.planning.recipe import MergeRecipe, load_recipe, load_recipes, make_recipe, make_recipes
    from wsm_ds.planning.window_recipe import WindowRecipe, make_window_recipe
    from wsm_ds.reporting.report.writing import ReportFiles, write_report
    from wsm_ds.schedules.coefficients import (
        coefficients_from_decay_factors,
        decay_factors_from_coefficients,
        merge_coefficients,
        weight_decay_aware_coefficients,
    )
    from wsm_ds.schedules.curves import parse_curve
    from wsm_ds.schedules.figures import age_deviation, effective_sample_size, lag
    from wsm_ds.schedules.lr_schedules import WSDLR, WSMLR
    from wsm_ds.tuning.request import TuningRequest, make_tuning_request
    from wsm_ds.tuning.results import TuningResult
    from wsm_ds.tuning.tune import tune
    from wsm_ds.verification import VerificationResult, verify


def __getattr__(name: str) -> Any:
    """Loads a public name from its module."""
    from importlib import import_module

    if name == "averaging":  # wsm_ds.averaging.SlotMeans, without an import of its own
        return import_module("wsm_ds.averaging")
    if name not in _MODULES:
        raise AttributeError(f"module 'wsm_ds' has no attribute {name!r}")
    value = getattr(import_module(f"wsm_ds.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not, for completion."""
    return sorted({*globals(), *__all__})


register()
