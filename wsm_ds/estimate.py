"""What a run's checkpoints and the merges of its windows cost in disk and traffic, before the run starts.

Bytes a trained parameter, as DeepSpeed writes them (`tests/test_storage.py` compares them with real checkpoints):

    master        4, in every stage
    states        as many as the optimizer keeps: 8 for Adam
    module        2 (bf16, fp16) or 4 (fp32) in stages 1 and 2; none in stage 3, where the masters are all there is

A merge reads the masters of its window and, where it carries or merges optimizer states, those; never the rest.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from wsm_ds.dtypes import BY_NAME
from wsm_ds.errors import RecipeError
from wsm_ds.layouts import Layout
from wsm_ds.planning.intersect import ITEMSIZES
from wsm_ds.planning.recipe import MergeRecipe
from wsm_ds.reporting.tables import table
from wsm_ds.sizes import format_size

MASTER_BYTES = 4
STATE_BYTES = {"adam": 8, "lion": 4, "momentum": 4, "sgd": 0}
KEEP_LAST = 2
DAY_S = 86400.0


@dataclass(frozen=True)
class CheckpointSize:
    """One checkpoint on disk, in bytes by what they are.

    Attributes:
        parameters, trained: all of them, and those that are trained.
        master, states, module: see above; a frozen parameter's weights count as module.
        weights: of all parameters in the training dtype, stored or not.
        rest: everything else.
        files: how many.
    """

    parameters: int
    trained: int
    master: int
    states: int
    module: int
    weights: int
    rest: int
    files: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole checkpoint."""
        return self.master + self.states + self.module + self.rest


def checkpoint_size(
    parameters: float, *, stage: int, world_size: int = 1, dtype: str = "bf16", optimizer: str = "adam"
) -> CheckpointSize:
    """The size of a checkpoint of so many trained parameters.

    Raises:
        RecipeError: a number is not positive.
    """
    if parameters < 1 or world_size < 1:
        raise RecipeError(f"{parameters:g} parameters on {world_size} ranks make no checkpoint.")
    numel = int(parameters)
    weights = numel * BY_NAME[dtype].itemsize
    module, files = (0, 2 * world_size) if stage == 3 else (weights, world_size + 1)
    return CheckpointSize(numel, numel, numel * MASTER_BYTES, numel * STATE_BYTES[optimizer], module, weights, 0, files)


def size_of(layout: Layout) -> CheckpointSize:
    """The size of a real checkpoint."""
    kinds = {
        kind: int((rows["numel"] * ITEMSIZES[rows["dtype"].astype(np.int64)]).sum())
        for kind, rows in layout.fragments.items()
    }
    states = sum(kinds[kind] for kind in layout.state_names)
    module = sum(kinds.get(kind, 0) for kind in ("module", "frozen", "buffer"))
    infos = [info for info in layout.tensors.values() if info.role != "buffer"]
    return CheckpointSize(
        parameters=layout.numel,
        trained=sum(info.numel for info in infos if info.role == "parameter"),
        master=kinds.get("master", 0),
        states=states,
        module=module,
        weights=sum(info.numel * info.dtype.itemsize for info in infos),
        rest=layout.nbytes - kinds.get("master", 0) - states - module,
        files=len(layout.files),
    )


@dataclass(frozen=True)
class Pace:
    """How fast a run goes: steps between two checkpoints and two end points, and what is known of time and tokens."""

    interval: int
    every: int
    step_time_s: float | None = None
    tokens_per_step: float | None = None
    bandwidth: float | None = None  # bytes a second


@dataclass(frozen=True)
class Estimate:
    """What it costs.

    Attributes:
        kept: checkpoints that a prune leaves when all windows are merged.
        peak: with the one whose windows are being merged, and the one that is being written.
        outputs: bytes of each output of an end point.
        read_bytes: bytes that the pass of one end point reads: every source once for all outputs.
    """

    size: CheckpointSize
    pace: Pace
    kept: int
    peak: int
    outputs: dict[str, int]
    counts: dict[str, int]
    read_bytes: int

    @property
    def written_bytes(self) -> int:
        """Bytes that the pass of one end point writes."""
        return sum(self.outputs.values())

    @property
    def merge_s(self) -> float | None:
        """Seconds of a pass, if the bandwidth is its limit."""
        return (self.read_bytes + self.written_bytes) / self.pace.bandwidth if self.pace.bandwidth else None

    @property
    def per_day(self) -> dict[str, float]:
        """Checkpoints, and bytes that training and merging move."""
        if not self.pace.step_time_s:
            return {}
        steps = DAY_S / self.pace.step_time_s
        ends = steps / self.pace.every
        return {
            "checkpoints": round(steps / self.pace.interval, 2),
            "checkpoint_bytes_written": int(steps / self.pace.interval * self.size.nbytes),
            "merge_bytes_read": int(ends * self.read_bytes),
            "merge_bytes_written": int(ends * self.written_bytes),
        }

    def to_json(self) -> dict[str, Any]:
        """Plain data; bytes, steps, seconds."""
        tokens = self.pace.tokens_per_step
        return {
            "checkpoint": asdict(self.size) | {"bytes": self.size.nbytes},
            "checkpoints_kept": self.kept,
            "checkpoints_peak": self.peak,
            "disk_peak_bytes": self.peak * self.size.nbytes,
            "windows": [
                {
                    "name": name,
                    "checkpoints": count,
                    "steps": count * self.pace.interval,
                    "tokens": count * self.pace.interval * tokens if tokens else None,
                    "output_bytes": self.outputs[name],
                }
                for name, count in self.counts.items()
            ],
            "merge": {"bytes_read": self.read_bytes, "bytes_written": self.written_bytes, "seconds": self.merge_s},
            "per_day": self.per_day or None,
        }


def estimate(size: CheckpointSize, recipes: dict[str, MergeRecipe], pace: Pace) -> Estimate:
    """What the windows of recipes cost, by name, if they end at every `pace.every` steps.

    Raises:
        RecipeError: the pace is not possible.
    """
    rates = (pace.step_time_s, pace.tokens_per_step, pace.bandwidth)
    if pace.interval < 1 or any(rate is not None and rate <= 0 for rate in rates):
        raise RecipeError("interval, step time, tokens and bandwidth must be above 0.")
    if pace.every % pace.interval:
        raise RecipeError(f"windows cannot end every {pace.every} steps with a checkpoint every {pace.interval}.")
    counts = {name: recipe.last or 0 for name, recipe in recipes.items()}
    longest = max(counts.values())
    kept = max(longest - 1, KEEP_LAST)
    outputs = {name: _output_bytes(size, recipe) for name, recipe in recipes.items()}
    return Estimate(size, pace, kept, kept + 2, outputs, counts, _read_bytes(size, recipes.values(), longest))


def _output_bytes(size: CheckpointSize, recipe: MergeRecipe) -> int:
    if recipe.format == "safetensors":
        return size.weights if recipe.dtype is None else size.parameters * BY_NAME[recipe.dtype].itemsize
    has_weights = recipe.format == "universal" or recipe.stage in (1, 2)
    module = size.weights if has_weights else 0 if recipe.stage == 3 else size.module
    states = 0 if recipe.optimizer_states == "drop" else size.states
    return size.master + states + module + size.rest


def _read_bytes(size: CheckpointSize, recipes: Any, longest: int) -> int:
    """Masters of the longest window; states of the newest if they are carried, of a window if they are merged."""
    states = 0
    for recipe in recipes:
        if recipe.format != "safetensors" and recipe.optimizer_states != "drop":
            states = max(states, recipe.last or 0 if recipe.optimizer_states == "merge" else 1)
    return size.master * longest + size.states * states


def estimate_report(found: Estimate) -> str:
    """The estimate for people."""
    size, pace = found.size, found.pace
    rows = [
        ["checkpoint", f"{format_size(size.nbytes)} in {size.files} files"],
        ["kept by prune", f"{found.kept} checkpoints, {format_size(found.kept * size.nbytes)}"],
        ["at most, while one is merged and one written", f"{found.peak}, {format_size(found.peak * size.nbytes)}"],
        [f"merging, every {pace.every} steps", f"reads {format_size(found.read_bytes)}"],
        ["", f"writes {format_size(found.written_bytes)}"],
    ]
    if found.merge_s is not None:
        saving_s = size.nbytes / (pace.bandwidth or 1)
        rows.append(["time, if the bandwidth is the limit", f"save {saving_s:.0f} s, merge {found.merge_s:.0f} s"])
    for name, value in found.per_day.items():
        text = f"{value:g}" if name == "checkpoints" else format_size(value)
        rows.append([f"a day: {name.replace('_bytes', '').replace('_', ' ')}", text])
    lines = [table(["window", "checkpoints", "duration", "output"], _window_rows(found)), table(["", ""], rows)]
    if found.merge_s is not None and pace.step_time_s and found.merge_s > pace.every * pace.step_time_s:
        lines.append("a merge takes longer than the run needs to its next end point: more bandwidth, or --every")
    return "\n".join(lines)


def _window_rows(found: Estimate) -> Sequence[Sequence[str]]:
    rows = []
    for name, count in found.counts.items():
        steps = count * found.pace.interval
        tokens = f", {steps * found.pace.tokens_per_step:.3g} tokens" if found.pace.tokens_per_step else ""
        rows.append([name, str(count), f"{steps} steps{tokens}", format_size(found.outputs[name])])
    return rows
