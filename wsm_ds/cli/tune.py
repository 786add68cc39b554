"""The command `tune`: which merge of a run is the best."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsm_ds.cli.evaluate import evaluator_options, evaluators_of
from wsm_ds.cli.options import (
    CURVE_SEPARATOR,
    RUN,
    allow_global,
    allow_option,
    command,
    json_option,
    memory_options,
    progress_style,
    rename_sources_option,
    repeated_values,
    several,
    signals_interrupt,
    source_replacements,
)
from wsm_ds.errors import EvaluationError, RecipeError

if TYPE_CHECKING:
    from wsm_ds.evaluation.evaluator import Evaluator
    from wsm_ds.tuning.request import TuningRequest
    from wsm_ds.tuning.results import TuningResult
    from wsm_ds.tuning.tune import Step

TUNE = """\
Choose the merge of a run by measurement. Merges of a grid (windows × curves × spreads × end points), the newest raw
checkpoint, each checkpoint of the longest window and the baselines are measured on held-out data. The shortest window
that the measurement cannot tell from the best is recommended, in OUT/best.yaml. Killed and started again it goes on."""
TUNE_USAGE = "RUN (--windows N,N,... | --near BEST.yaml) --data FILE [--model MODEL] --out TUNE [flags]"
TUNE_EXAMPLES = """\
examples:
  wsm-ds tune RUN --windows 2,3 --data held_out.bin --sequence-length 64 --model model.py:make --out TUNE
  wsm-ds merge RUN --recipe TUNE/best.yaml --out TUNED

For another run: --near TUNE/best.yaml instead of --windows."""
LM_EVAL, OUTPUTS = "lm-eval:", "outputs"
"""The beginning of --final for tasks of lm-eval, and the folder in OUT where the output of programs is kept."""
DURATION = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def add_command(commands: Any) -> None:
    """Adds the command to the parser's."""
    parser = command(commands, "tune", _tune, "choose the merge of a run by measurement", TUNE, TUNE_EXAMPLES,
                     TUNE_USAGE)  # fmt: skip
    parser.add_argument("run", type=Path, metavar="RUN", help=RUN)
    json_option(parser)
    parser.add_argument("--dry-run", action="store_true", help="show the candidates; read only the run")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder of the tuning")
    candidates = parser.add_argument_group("candidates")
    candidates.add_argument(
        "--windows", metavar="N[,N...]", help="numbers of newest checkpoints (8), or the tokens of the newest part of "
        "the run (100B)",
    )  # fmt: skip
    candidates.add_argument("--near", type=Path, metavar="BEST.yaml",
                            help="instead of --windows: another run's best window, and its neighbours")  # fmt: skip
    candidates.add_argument("--curve", help="linear (default), cosine, 1-sqrt, power:P, ...; several, with commas")
    candidates.add_argument("--spread", help="wsm (default), qam, maxent, or a dial as qam:0.5; several, with commas")
    candidates.add_argument("--to", dest="ends", metavar="STEP[,STEP...]",
                            help="where windows end (default: at the newest checkpoint)")  # fmt: skip
    candidates.add_argument("--baseline", action="append", default=[], metavar="NAME=FOLDER",
                            help="weights to compare with, such as a decayed branch; may be given several "
                            "times")  # fmt: skip
    counts_options(candidates)
    candidates.add_argument("--data-switch", type=int, metavar="STEP",
                            help="last step before the data changed: windows across it are warned of")  # fmt: skip
    allow_option(candidates)
    rename_sources_option(candidates)
    candidates.add_argument("--rename", action="append", default=[], metavar="PATTERN=NEW",
                            help="replace a regular expression in names, to match those of --model")  # fmt: skip
    _stage_options(parser)
    evaluator_options(parser)
    machine = parser.add_argument_group("machine")
    memory_options(machine)
    machine.add_argument("--room", dest="memory_room", metavar="SIZE",
                         help="memory for merges that wait for their turn (default: half of what is free)")  # fmt: skip
    machine.add_argument("--share", metavar="I/N", help="measure every N-th candidate only, from number I on (0/4): "
                         "several processes share a tuning")  # fmt: skip
    allow_global(machine)


def counts_options(group: argparse._ActionsContainer) -> None:
    """Adds what tells the tokens of a run whose files do not."""
    group.add_argument("--tokens-per-step", metavar="N", help="tokens of a step, for a run whose batch never changed")
    group.add_argument("--run-sequence-length", type=int, metavar="N", help="tokens of each training sample")


def _stage_options(parser: argparse.ArgumentParser) -> None:
    stages = parser.add_argument_group("stages")
    stages.add_argument("--budget", metavar="TIME", help="begin no measurement after this time (90m, 4h, 2d)")
    stages.add_argument("--final", metavar="CMD", help="a second, dearer measurement of the best merges: a command "
                        "with {} for the folder, lm-eval:TASK,..., or evaluators in a FILE.yaml")  # fmt: skip
    stages.add_argument(
        "--finalists", type=int, default=3, metavar="K", help="merges that --final measures (default 3)"
    )
    stages.add_argument("--confirm", action="append", default=[], metavar="[NAME=]FILE",
                        help="second held-out data, for an honest figure of the recommended merge")  # fmt: skip
    stages.add_argument("--keep", choices=("best", "finalists", "all"),
                        help="exported models that stay (default: best with --final, else none)")  # fmt: skip
    stages.add_argument("--disk-room", metavar="SIZE", help="most bytes of exported models (default: no limit)")
    stages.add_argument("--include", action="append", default=[], type=Path, metavar="FILE",
                        help="copy FILE into exported models; config.json and tokenizer are copied")  # fmt: skip


def _tune(options: argparse.Namespace) -> int:
    from wsm_ds.distributed.launcher import launched_ranks
    from wsm_ds.tuning.candidates import candidates_of
    from wsm_ds.tuning.tune import tune

    request = _request(options)
    if options.dry_run:
        _show_candidates(candidates_of(request), is_json=options.json)
        return 0
    with signals_interrupt("what was measured is kept.") as check:
        ranks = launched_ranks()

        def show(step: "Step") -> None:
            check()
            if ranks.rank == 0:
                _show_step(step, progress_style(options))

        with ranks.together():
            result = tune(request, ranks, show)
        if ranks.rank == 0:
            _show_result(result, options)
        _require_a_value(result)
    return 0


def _request(options: argparse.Namespace) -> "TuningRequest":
    """What the flags ask for."""
    from wsm_ds.tuning.request import make_tuning_request

    near = _near(options)
    repeated = repeated_values(options)
    recipe = {
        "allow": repeated["allow"],
        "allow_globals": repeated["allow_globals"],
        "memory_budget": options.memory_budget,
        "threads": options.threads,
        "tokens_per_step": options.tokens_per_step,
        "sequence_length": options.run_sequence_length,
        "data_switch": options.data_switch,
        "rename_sources": source_replacements(options.rename_sources) or None,
    }
    screening, *finals = _evaluators(options)
    return make_tuning_request(
        run=options.run,
        out=options.out,
        windows=near.get("windows") or _list(options.windows),
        curves=_list(options.curve, CURVE_SEPARATOR) or near.get("curves"),
        spreads=_list(options.spread) or near.get("spreads"),
        ends=_list(options.ends),
        baselines=dict(_named("--baseline", text) for text in options.baseline) or None,
        options={key: value for key, value in recipe.items() if value is not None},
        screening=screening,
        model=options.model,
        rename=repeated["rename"],
        finals=tuple(finals),
        finalists=options.finalists,
        confirm=_confirming(options, screening),
        budget_s=_seconds(options.budget),
        memory_room=options.memory_room,
        disk_room=options.disk_room,
        keep=options.keep,
        include=tuple(options.include) + model_files(options.model),
        share=_share(options.share),
    )


def _evaluators(options: argparse.Namespace) -> "list[Evaluator]":
    """What measures every candidate, and then what measures the finalists."""
    from wsm_ds.evaluation.evaluators import load_evaluators

    final: str | None = options.final
    if final is not None and final.endswith((".yaml", ".yml")):
        return [*evaluators_of(options, options.out / OUTPUTS), *load_evaluators(Path(final))]
    if final is not None and (options.program or options.lm_eval):
        raise RecipeError("--final and --command or --lm-eval say the same; remove one")
    if final is not None and final.startswith(LM_EVAL):
        options.lm_eval = final.removeprefix(LM_EVAL)
    elif final is not None:
        options.program = final
    return list(evaluators_of(options, options.out / OUTPUTS))


def _confirming(options: argparse.Namespace, screening: "Evaluator") -> "Evaluator | None":
    """What measures the recommended candidate on data that have chosen nothing."""
    from wsm_ds.evaluation.evaluators import make_evaluator

    if not options.confirm:
        return None
    if not options.data:
        raise RecipeError("--confirm is a second set of held-out data, so it needs --data, the first one")
    return make_evaluator(screening.model_dump() | {"data": options.confirm})


def _near(options: argparse.Namespace) -> dict[str, Any]:
    """Windows, curves and spreads that another run's best.yaml leads to."""
    if (options.near is None) == (options.windows is None):
        raise RecipeError("give --windows or --near" + (", not both" if options.near is not None else ""))
    if options.near is None:
        return {}
    from wsm_ds.tuning.transfer import near

    return near(options.near, options.run, options.tokens_per_step, options.run_sequence_length)


def model_files(model: str | None) -> tuple[Path, ...]:
    """The files beside a model's config that programs need to load exported weights."""
    if model is None or not Path(model).exists():
        return ()
    folder = Path(model) if Path(model).is_dir() else Path(model).parent
    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
             "special_tokens_map.json", "tokenizer.model", "vocab.json", "merges.txt")  # fmt: skip
    return tuple(folder / name for name in names if (folder / name).is_file())


def _list(text: str | None, separator: str = ",") -> list[str] | None:
    values = several(text, separator)
    return values if isinstance(values, list) or values is None else [values]


def _named(flag: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise RecipeError(f"{flag} must be NAME=FOLDER, not {text!r}")
    return name, value


def _seconds(text: str | None) -> float | None:
    """Seconds of a time such as 90m."""
    if text is None:
        return None
    unit = DURATION.get(text[-1:].lower(), 0.0)
    try:
        return float(text[:-1]) * unit if unit else float(text)
    except ValueError as error:
        raise RecipeError(f"--budget must be a time such as 90m, 4h or 2d, not {text!r}") from error


def _share(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    number, slash, count = text.partition("/")
    if not slash or not number.isdecimal() or not count.isdecimal():
        raise RecipeError(f"--share must be I/N, such as 0/4, not {text!r}")
    return int(number), int(count)


def _show_candidates(candidates: Any, *, is_json: bool) -> None:
    from wsm_ds.reporting.tuning_tables import candidates_report

    results = [candidate.described() for candidate in candidates]
    if is_json:
        print(json.dumps([result.model_dump(mode="json") for result in results], indent=2))
    else:
        print(candidates_report(results))


def _show_step(step: "Step", style: str) -> None:
    from wsm_ds.reporting.progress import event
    from wsm_ds.reporting.tuning_tables import step_line

    if style == "json":
        event("evaluation", done=step.done, total=step.total, left_s=round(step.left_s, 1),
              **step.evaluation.model_dump(mode="json", exclude={"blocks"}))  # fmt: skip
    elif style == "people":
        print(step_line(step), flush=True)


def _require_a_value(result: "TuningResult") -> None:
    """Raises EvaluationError if every measurement failed."""
    failures = [f"{one.name}: {one.failure}" for one in result.candidates if one.failure is not None]
    if failures and not any(one.metrics for one in result.candidates):
        raise EvaluationError(f"none of {len(failures)} models could be measured. {failures[0].rstrip('.')}.")


def _show_result(result: Any, options: argparse.Namespace) -> None:
    from wsm_ds.reporting.progress import event
    from wsm_ds.reporting.report.writing import write_report
    from wsm_ds.reporting.tuning_tables import result_report

    page = write_report(options.out).html if result.candidates else None
    if options.json:
        event("result", report=None if page is None else str(page), **result.model_dump(mode="json"))
    else:
        print(result_report(result, options.out))
        print(f"report  {page}")
