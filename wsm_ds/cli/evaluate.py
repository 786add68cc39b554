"""The command evaluate: the same measurement for anything that is there."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsm_ds.cli.messages import describe
from wsm_ds.cli.options import command, json_option, signals_interrupt, split
from wsm_ds.errors import EvaluationError, RecipeError

if TYPE_CHECKING:
    from wsm_ds.evaluation.evaluation import Evaluation, Metric
    from wsm_ds.evaluation.evaluator import Evaluator

log = logging.getLogger(__name__)

EVALUATE = """\
Measure models on held-out data, or with a program. A FOLDER is a merge, a checkpoint (RUN/global_step4000), or a folder
of safetensors. With --out, every result is kept, and nothing is measured twice. Several ranks (torchrun, srun) share
the blocks of the data."""
USAGE = "FOLDER... --data FILE [--model CONFIG] [--out FILE.jsonl] [flags]"
EXAMPLES = """\
examples:
  wsm-ds evaluate MERGED RUN/global_step6000 --data held_out.bin --model model.py:make --sequence-length 64
  wsm-ds evaluate HF_MODEL --data web=web.bin@0.7 --data code=code.bin@0.3 --sequence-length 32 --dtype bf16
  wsm-ds evaluate HF_MODEL --command 'python measure.py {}' --metric results.accuracy --maximize"""
LOSS = ("data", "tokenizer", "token_dtype", "sequence_length", "blocks", "vocabulary", "model", "dtype", "batch_size")
GENERATE = ("data", "tokenizer", "token_dtype", "vocabulary", "model", "dtype", "batch_size", "prompts",
            "prompt_tokens", "most_tokens")  # fmt: skip
PROGRAM = ("timeout_s", "retries")
LM_EVAL = ("num_fewshot", "limit", "include_path", "model_args", "dtype")
FEW_BLOCKS = 30
"""With fewer blocks, an error is known to 13 % at best: 1 / (2 (B - 1))^½."""
OUTPUT = ".output"
"""Behind the name of --out without its ending: the folder where the output of programs is kept."""


def add_command(commands: Any) -> None:
    """Adds this module's command to the parser's."""
    evaluate = command(commands, "evaluate", _evaluate, "measure models on held-out data", EVALUATE, EXAMPLES, USAGE)
    evaluate.add_argument("folders", nargs="+", type=Path, metavar="FOLDER",
                          help="a merge, a checkpoint in a run, or a folder of safetensors")  # fmt: skip
    json_option(evaluate)
    evaluate.add_argument("--out", type=Path, metavar="FILE.jsonl", help="add the results to this file")
    evaluate.add_argument("--again", action="store_true", help="measure what --out already has, too")
    evaluate.add_argument("--raw", action="store_true", help="measure the newest checkpoint of each merge, too")
    evaluator_options(evaluate)


def evaluator_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that describe evaluators."""
    parser.add_argument("--evaluator", type=Path, metavar="FILE.yaml", help="instead of the flags below")
    _data_options(parser)
    model = parser.add_argument_group("model (what the weights are filled into)")
    model.add_argument(
        "--model", metavar="CONFIG|MODULE:FUNCTION",
        help="a config.json of transformers or a folder with one, or a function that returns a torch module (default: "
        "the folder has a config.json)",
    )  # fmt: skip
    model.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="in which the model computes (default fp32)")
    model.add_argument("--batch-size", type=int, metavar="N", help="blocks at once (default: as fits the device)")
    model.add_argument("--vocabulary", type=int, metavar="N", help="tokens of the model (default: its config says)")
    generate = parser.add_argument_group("generate (the health of greedy continuations)")
    generate.add_argument("--generate", action="store_true", help="continue the beginnings of blocks, too")
    generate.add_argument("--prompts", type=int, metavar="N", help="prompts of each source (default 100)")
    generate.add_argument("--prompt-tokens", type=int, metavar="N", help="length of a prompt (default 32)")
    generate.add_argument("--most-tokens", type=int, metavar="N", help="length of a continuation (default 128)")
    _program_options(parser)


def _data_options(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data (the held-out set)")
    data.add_argument(
        "--data", action="append", default=[], metavar="[NAME=]FILE[@WEIGHT]",
        help="tokens (.bin, .npy, Megatron's .bin with .idx) or text (.txt, .jsonl, .parquet); may be given several "
        "times",
    )  # fmt: skip
    data.add_argument("--tokenizer", metavar="DIR|bytes", help="for text; for tokens it adds bits per byte")
    data.add_argument("--token-dtype", choices=("uint8", "uint16", "uint32", "int32", "int64"),
                      help="of bare token files (default uint16)")  # fmt: skip
    data.add_argument("--sequence-length", type=int, metavar="N", help="tokens of a block (default 1024)")
    data.add_argument("--blocks", type=int, metavar="N", help="blocks of each source (default 256)")


def _program_options(parser: argparse.ArgumentParser) -> None:
    program = parser.add_argument_group("program (a measurement of your own, or lm-eval)")
    program.add_argument("--command", dest="program", metavar="CMD",
                         help="run this for every folder, without a shell; {} in it stands for the folder")  # fmt: skip
    program.add_argument("--metric", action="append", default=[], metavar="A.B.C",
                         help="path of a value in its JSON (default: a number); TASK/METRIC of lm-eval")  # fmt: skip
    program.add_argument("--maximize", action="store_true", help="more of --metric is better")
    program.add_argument("--result", metavar="FILE.json",
                         help="the JSON that it writes, {out}/FILE (default: its last line)")  # fmt: skip
    program.add_argument("--lm-eval", metavar="TASK,...", help="tasks of the lm-evaluation-harness")
    program.add_argument("--include-path", type=Path, metavar="DIR", help="folder of your own lm-eval tasks")
    program.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question of lm-eval")
    program.add_argument("--limit", type=int, metavar="N", help="questions of each task of lm-eval")
    program.add_argument("--model-args", metavar="K=V,...", help="more of lm-eval's model_args")
    program.add_argument("--timeout-s", type=float, metavar="S", help="seconds that a program may take (default: any)")
    program.add_argument("--retries", type=int, metavar="N", help="attempts after a failed one (default 0)")


def evaluators_of(options: argparse.Namespace, keep: Path | None) -> "tuple[Evaluator, ...]":
    """The evaluators that the flags of `evaluator_options` describe.

    Args:
        options: the parsed arguments.
        keep: where the output of programs is kept.

    Raises:
        RecipeError: there are none, or flags contradict each other.
    """
    from wsm_ds.evaluation.evaluators import load_evaluators, make_evaluator

    def given(names: Sequence[str]) -> dict[str, Any]:
        values = {name: getattr(options, name) for name in names}
        return {name: value for name, value in values.items() if value not in (None, [])}

    flags = given(("data", "program", "lm_eval"))
    if options.evaluator is not None:
        if flags or options.generate:
            raise RecipeError(
                "--evaluator says what is measured; leave out --data, --generate, --command and --lm-eval"
            )
        return load_evaluators(options.evaluator)
    if not flags:
        raise RecipeError("one of --data, --command, --lm-eval and --evaluator must say what is measured")
    if options.generate and not options.data:
        raise RecipeError("--generate needs --data, from which the prompts are taken")
    metrics = options.metric
    if metrics and options.program and options.lm_eval:
        raise RecipeError("--metric could be of --command or of --lm-eval; give one of both, or an --evaluator file")
    values: list[dict[str, Any]] = []
    if options.data:
        values.append({"kind": "loss"} | given(LOSS))
    if options.generate:
        values.append({"kind": "generate"} | given(GENERATE))
    if options.program:
        own = {"command": options.program, "metrics": metrics, "maximize": options.maximize, "result": options.result}
        values.append({"kind": "command", "keep": keep} | own | given(PROGRAM))
    if options.lm_eval:
        if len(metrics) > 1:
            raise RecipeError("--metric can be given once with --lm-eval, as TASK/METRIC")
        tasks = {"tasks": split(options.lm_eval), "metric": metrics[0] if metrics else None}
        values.append({"kind": "lm-eval", "keep": keep} | tasks | given((*PROGRAM, *LM_EVAL)))
    return tuple(make_evaluator(entry) for entry in values)


def _evaluate(options: argparse.Namespace) -> int:
    from wsm_ds.distributed.launcher import launched_ranks
    from wsm_ds.evaluation.records import Records

    keep = None if options.out is None else options.out.with_name(options.out.stem + OUTPUT)
    evaluators = evaluators_of(options, keep)
    records = None if options.out is None else Records(options.out)
    with signals_interrupt("what was measured is kept." if records else "nothing was kept."):
        ranks = launched_ranks()
        with ranks.together():
            made = _run(options, evaluators, records, ranks)
    failed = [f"{one.subject.name}: {one.failure.rstrip('.')}" for one in made if one.failure is not None]
    if failed and ranks.rank == 0:
        shown = "; ".join(failed[:3]) + ("; …" if len(failed) > 3 else "")
        raise EvaluationError(f"{len(failed)} of {len(made)} measurements failed: {shown}.")
    return EvaluationError.exit_code if failed else 0


def _run(
    options: argparse.Namespace, evaluators: "tuple[Evaluator, ...]", records: Any, ranks: Any
) -> "list[Evaluation]":
    """Measures on one rank. Rank 0 prints."""
    from wsm_ds.evaluation.evaluating import evaluate_folders

    made = []
    flags = {"again": options.again, "with_raw": options.raw}
    for measured in evaluate_folders(options.folders, evaluators, records=records, ranks=ranks, **flags):
        made.append(measured.evaluation)
        if ranks.rank == 0:
            text = measured.evaluation.model_dump_json() if options.json else _line(measured, options)
            print(text, flush=True)
    few = min((len(one.blocks.nats) for one in made if one.blocks is not None), default=FEW_BLOCKS)
    if ranks.rank == 0 and few < FEW_BLOCKS:
        log.warning("the held-out set has only %d blocks, so the errors are rough; give more data, or --blocks", few)
    if ranks.rank == 0 and not options.json:
        for evaluator in evaluators:
            identity = evaluator.identity()
            compared = [one for one in made if one.evaluator["identity"] == identity]
            if len(compared) > 1:
                print(f"\n{_comparison(evaluator, compared)}")
    return made


def _line(measured: Any, options: argparse.Namespace) -> str:
    """One evaluation, as it is printed when it is made."""
    evaluation: Evaluation = measured.evaluation
    if evaluation.failure is not None:
        figures = f"failed: {describe(EvaluationError(evaluation.failure), options)}"
    else:
        figures = ", ".join(f"{name} {_figure(metric)}" for name, metric in list(evaluation.metrics.items())[:4])
    origin = f"{evaluation.seconds:.1f} s" if measured.is_new else f"measured before, {evaluation.at}"
    return f"{evaluation.subject.name}: {evaluation.evaluator['kind']}: {figures} ({origin})"


def _figure(metric: "Metric") -> str:
    error = "" if metric.error is None else f" ± {metric.error:.2g}"
    return f"{metric.value:.6g}{error}{f' {metric.unit}' if metric.unit else ''}"


def _comparison(evaluator: "Evaluator", made: "Sequence[Evaluation]") -> str:
    """A table of the models by one evaluator; losses with their paired differences to the first model."""
    from wsm_ds.evaluation.statistics import paired_difference
    from wsm_ds.reporting.tables import table

    name = evaluator.main_metric
    weights = getattr(evaluator, "weights", None)
    first = next((evaluation for evaluation in made if evaluation.blocks is not None), None)
    rows = []
    for evaluation in made:
        metric = evaluation.metrics.get(name)
        row = [evaluation.subject.name, "failed" if metric is None else _figure(metric)]
        if first is not None and first.blocks is not None:
            blocks = None if evaluation is first else evaluation.blocks
            row.append("" if blocks is None else _signed(paired_difference(blocks, first.blocks, weights)))
        rows.append(row)
    header = ["model", name]
    return table(header if first is None else [*header, f"less {first.subject.name}"], rows)


def _signed(metric: "Metric") -> str:
    error = "" if metric.error is None else f" ± {metric.error:.2g}"
    return f"{metric.value:+.3g}{error}"
