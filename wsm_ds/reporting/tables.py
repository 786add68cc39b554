"""Tables for people: plans, coefficients, inspections. The functions return text and print nothing."""

from collections.abc import Iterable, Mapping, Sequence

from wsm_ds.engine.timings import Timings
from wsm_ds.errors import one_line
from wsm_ds.inspection import Inspected
from wsm_ds.layouts.snapshot import Snapshot
from wsm_ds.planning.plan import Output, Plan
from wsm_ds.sizes import format_count, format_size


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table with padded columns. The first column is aligned to the left, the others to the right.

    Characters that are not printable become escapes (`wsm_ds.errors.one_line`).

    Example:
        >>> print(table(["step", "coefficient"], [["1000", "0.25"], ["2000", "0.75"]]))
        step  coefficient
        1000         0.25
        2000         0.75

    Args:
        header: the columns' names.
        rows: cells, as many in each row as in `header`.
    """
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) if not column else cell.rjust(width)
                  for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in [header, *rows]
    ]  # fmt: skip
    return "\n".join(lines)


def counted(count: int, noun: str) -> str:
    """Returns a count and its noun, with a plural s unless the count is 1.

    >>> counted(1, "file"), counted(2, "file")
    ('1 file', '2 files')

    Args:
        count: the number.
        noun: in the singular.
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def plan_report(plan: Plan) -> str:
    """Returns a plan's sources, coefficients and costs, as they are shown before anything is written.

    Args:
        plan: the plan.
    """
    lines = []
    for output in plan.outputs:
        spread = f"  spread {output.spread}" if output.spread not in (None, "wsm") else ""
        lines += [
            _sources_table(output),
            f"curve {output.curve}{spread}  effective sample size {output.ess:.2f} of {len(output.sources)}  "
            f"lag {output.lag_steps:g} steps",
            _window_line(output),
            f"out  {output.out}",
        ]
    lines.append(
        f"read {format_size(plan.bytes_to_read)}  write {format_size(plan.bytes_to_write)} in "
        f"{counted(len(plan.files), 'file')}   memory {format_size(plan.memory_bytes)} (planning "
        f"{format_size(plan.planning_bytes)})   threads {plan.threads}"
    )
    return "\n".join(lines)


def _sources_table(output: Output) -> str:
    """The checkpoints with steps and coefficients, and with tokens, or with samples if the window is measured so."""
    is_by_samples = output.recipe.get("by") == "samples" or output.recipe.get("last_samples") is not None
    unit, counts = ("samples", output.samples) if is_by_samples else ("tokens", output.tokens)
    header, rows = ["checkpoint", "step", "coefficient"], []
    for number, source in enumerate(output.sources):
        middle = [format_count(counts[number])] if counts is not None else []
        rows.append([source.tag, str(source.step), *middle, f"{source.coefficient:.6f}"])
    return table([*header[:2], *([unit] if counts is not None else []), header[2]], rows)


def _window_line(output: Output) -> str:
    """Length, age and width of the window, in every unit that is known, and how it lies around a change of the data."""
    names = {"duration": "window", "mean_age": "mean age", "deviation": "standard deviation"}
    parts = [f"{word} {_amount(output.figures[name])}" for name, word in names.items() if name in output.figures]
    switch = output.figures.get("data_switch")
    if switch is not None:
        parts.append(
            f"after the data switch {switch['weight_after']:.1%} of the weight, {switch['updates_after']:.1%} of the "
            "updates"
        )
    return "   ".join(parts)


def _amount(values: Mapping[str, float]) -> str:
    return " = ".join(f"{format_count(value)} {unit}" for unit, value in values.items() if unit != "samples")


def summary_report(plan: Plan, timings: Timings, wall_s: float, world_size: int) -> str:
    """Returns one line about a finished merge: bytes, speed, and the seconds of each kind of work.

    Args:
        plan: the plan of this rank.
        timings: seconds of each kind of work, summed over the threads of this rank.
        wall_s: duration of the merge in seconds.
        world_size: number of ranks.
    """
    moved = plan.bytes_to_read + plan.bytes_to_write
    ranks = f", rank 0 of {world_size}" if world_size > 1 else ""
    return (
        f"{format_size(moved)} in {wall_s:.1f} s, {format_size(moved / max(wall_s, 1e-9))}/s; seconds of "
        f"{plan.threads} threads{ranks}: "
        f"read {timings.read_s:.1f}, arithmetic {timings.arithmetic_s:.1f}, hash {timings.hash_s:.1f}, "
        f"write {timings.write_s:.1f}"
    )


def inspection_report(checkpoints: Iterable[Inspected]) -> str:
    """Returns a table with one line for each checkpoint, and below it links and the problems of the broken ones.

    Args:
        checkpoints: the inspected checkpoints, oldest first. Only their cells are kept.
    """
    rows, links, problems = [], [], []
    snapshots: dict[str, str] = {}
    for item in checkpoints:
        layout = item.layout
        links += [one_line(f"{link}: a link to {item.checkpoint.tag}") for link in item.checkpoint.links]
        if item.problem is not None:
            problems.append(one_line(f"{item.checkpoint.tag}: {item.problem}"))
        if layout is None:
            rows.append([item.checkpoint.tag, *["-"] * 7, "no", item.checkpoint.saved_by])
            continue
        known = sorted({rate for rate in layout.learning_rates if rate is not None})
        rates = ",".join(f"{rate:g}" for rate in known) or "-"
        stage = "univ" if layout.is_universal else str(layout.stage)
        ranks = str(layout.world_size) + (f"x{layout.model_parallel_size}" if layout.model_parallel_size > 1 else "")
        if layout.snapshot is not None:
            snapshots[item.checkpoint.tag] = _snapshot_words(layout.snapshot)
        rows.append(
            [item.checkpoint.tag, str(layout.step), stage, layout.dtype.name, ranks,
             f"{layout.numel:,}", format_size(layout.nbytes), rates,
             "yes" if item.is_complete else "no", item.checkpoint.saved_by]
        )  # fmt: skip
    header = ["checkpoint", "step", "zero", "dtype", "ranks", "parameters", "size", "lr", "complete", "framework"]
    if snapshots:  # of masters alone, beside full checkpoints or not
        header = [*header, "masters"]
        rows = [[*row, snapshots.get(row[0], "all" if row[1] != "-" else "-")] for row in rows]
    return "\n".join([table(header, rows), *links, *problems])


def _snapshot_words(snapshot: Snapshot) -> str:
    if snapshot.kind == "point":
        return f"point at {snapshot.last}"
    sampled = f", every {snapshot.sample}" if snapshot.sample > 1 else ""
    return f"mean of {snapshot.first}-{snapshot.last}{sampled}"


def coefficients_report(
    coefficients: Sequence[float], steps: Sequence[int], ess: float, lag_steps: float, deviation_steps: float
) -> str:
    """Returns a table of coefficients and the figures that describe them.

    Args:
        coefficients: [N], oldest first.
        steps: [N], the checkpoints' steps.
        ess: effective sample size.
        lag_steps: lag of the merge.
        deviation_steps: standard deviation of the age of its weights.
    """
    rows = [[str(step), f"{c:.6f}"] for step, c in zip(steps, coefficients, strict=True)]
    return "\n".join(
        [
            table(["step", "coefficient"], rows),
            f"effective sample size {ess:.2f}   lag {lag_steps:g} steps   standard deviation {deviation_steps:g} steps",
        ]
    )
