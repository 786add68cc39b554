"""A run of many ranks: its checkpoints, each with its own step and values."""

from pathlib import Path

from benchmarks.many_ranks.forms import Form
from benchmarks.many_ranks.rank_files import write_moe, write_zero2, write_zero3
from benchmarks.many_ranks.values import invented_values, llama_shapes

INTERVAL = 100
"""Steps between two checkpoints."""


def make_run(
    run: Path,
    form: Form,
    kind: str,
    *,
    world_size: int,
    layers: int,
    hidden: int,
    experts: int,
    ep: int,
    checkpoints: int,
    all_real: bool,
) -> None:
    """Makes a run, or the checkpoints of it that are missing.

    Args:
        run: the run's folder.
        form: of two ranks.
        kind: "zero2", "zero3" or "moe".
        world_size: number of ranks.
        layers: of the model.
        hidden: its width. ZeRO-3 takes a model wide enough that each rank has 1 element or more of a matrix.
        experts: of each layer, for "moe".
        ep: expert-parallel ranks, for "moe".
        checkpoints: how many.
        all_real: see `write_zero3`.
    """
    shapes = llama_shapes(layers, hidden, vocabulary=4 * hidden, experts=experts)
    for step in range(INTERVAL, INTERVAL * checkpoints + 1, INTERVAL):
        folder = run / f"global_step{step}"
        if folder.exists():
            continue
        partial = run / f".{folder.name}"
        if kind == "zero3":
            write_zero3(partial, form, invented_values(shapes, step), world_size, all_real=all_real)
        elif kind == "zero2":
            write_zero2(partial, form, invented_values(shapes, step), world_size)
        else:
            # The weights of all steps are those of the first: the experts' files hold no step, and can be shared.
            first = run / f"global_step{INTERVAL}"
            values = invented_values(shapes, INTERVAL)
            at_step = type(values)(step, values.shapes, values.states)
            write_moe(partial, form, at_step, world_size, ep, first if first.exists() else None)
        partial.rename(folder)
        (run / "latest").write_text(folder.name)
