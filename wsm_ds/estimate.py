"""Estimates, before a run starts, the disk space of its checkpoints and the traffic of its merges.

DeepSpeed writes for each trained parameter (`tests/test_estimate.py` compares this with real checkpoints):

    master        4 bytes, in every ZeRO stage
    states        the optimizer's states: 8 bytes for Adam
    module        2 bytes (bf16, fp16) or 4 (fp32) in stages 1 and 2; 0 in stage 3, which stores the masters alone

A merge reads the masters of its window. It reads optimizer states only if it carries or merges them.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from wsm_ds.dtypes import BY_NAME, ITEMSIZES
from wsm_ds.errors import RecipeError
from wsm_ds.layouts import Layout
from wsm_ds.planning.recipe import MergeRecipe
from wsm_ds.reporting.tables import table
from wsm_ds.sizes import format_size

MASTER_BYTES = 4
STATE_BYTES = {"adam": 8, "lion": 4, "momentum": 4, "sgd": 0}
"""Bytes of optimizer states for each parameter: two fp32 moments for Adam, one for Lion and momentum."""
KEEP_LAST = 2
"""Checkpoints that `wsm-ds prune` always keeps by default, for restarting training (`--keep-last`)."""
DAY_S = 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSize:
    """The size of one checkpoint on disk.

    Attributes:
        parameters: number of parameters; tied ones count once.
        trained: number of trained parameters.
        master: bytes of the fp32 masters.
        states: bytes of the optimizer's states.
        module: bytes of the module's weights and buffers, and of frozen parameters.
        weights: bytes of all parameters in the training dtype, whether the checkpoint stores them or not.
        rest: bytes of everything else.
        files: number of files.
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
        """Bytes of all files of the checkpoint."""
        return self.master + self.states + self.module + self.rest


def checkpoint_size(
    parameters: float, *, stage: int, world_size: int = 1, dtype: str = "bf16", optimizer: str = "adam"
) -> CheckpointSize:
    """Returns the size of a checkpoint that DeepSpeed would write.

    Example:
        >>> checkpoint_size(1e9, stage=2, world_size=8).nbytes
        14000000000

    Args:
        parameters: number of trained parameters, 1 or more; a float for numbers such as 7e9.
        stage: ZeRO stage, 1 to 3.
        world_size: number of data-parallel ranks.
        dtype: training dtype: "bf16", "fp16" or "fp32".
        optimizer: a key of `STATE_BYTES`.

    Raises:
        RecipeError: `parameters` is below 1 or not finite, or `world_size` is below 1; names both.
    """
    if not (1 <= parameters < math.inf and world_size >= 1):
        raise RecipeError(
            f"parameters and world size must be 1 or more, found {parameters:g} parameters on {world_size} ranks."
        )
    numel = int(parameters)
    weights = numel * BY_NAME[dtype].itemsize
    # Each rank writes its optimizer file. In stage 3 it writes a model file too, else rank 0 alone does
    # (deepspeed/runtime/engine.py, _get_ckpt_name).
    module, files = (0, 2 * world_size) if stage == 3 else (weights, world_size + 1)
    return CheckpointSize(
        parameters=numel,
        trained=numel,
        master=numel * MASTER_BYTES,
        states=numel * STATE_BYTES[optimizer],
        module=module,
        weights=weights,
        rest=0,
        files=files,
    )


def size_of(layout: Layout) -> CheckpointSize:
    """Returns the size of a real checkpoint.

    Args:
        layout: the checkpoint's layout.
    """
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


@dataclass(frozen=True, slots=True)
class Pace:
    """How often a run saves and merges, and how fast it is.

    Attributes:
        interval_steps: steps between two checkpoints.
        every_steps: steps between two end points, at which the windows are merged.
        step_time_s: seconds of a training step, or None if unknown.
        tokens_per_step: tokens of a training step, or None if unknown.
        bandwidth_bytes_per_s: of the storage, or None if unknown.
    """

    interval_steps: int
    every_steps: int
    step_time_s: float | None = None
    tokens_per_step: float | None = None
    bandwidth_bytes_per_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The cost of a run's checkpoints and merges.

    Attributes:
        size: the size of one checkpoint.
        pace: how often the run saves and merges.
        kept: number of checkpoints that `wsm-ds prune` keeps when all windows are merged.
        peak: the largest number of checkpoints on disk: those kept, one whose windows are being merged, and one that
            is being written.
        outputs: bytes of each output of an end point, by the window's name.
        counts: number of checkpoints of each window, by its name.
        read_bytes: bytes that the merges of one end point read. Each source is read once for all outputs.
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
        """Bytes that the merges of one end point write."""
        return sum(self.outputs.values())

    @property
    def merge_s(self) -> float | None:
        """Seconds of the merges of one end point, if the bandwidth is the limit; None if it is unknown."""
        bandwidth = self.pace.bandwidth_bytes_per_s
        return (self.read_bytes + self.written_bytes) / bandwidth if bandwidth else None

    @property
    def per_day(self) -> dict[str, float]:
        """Checkpoints and bytes that training and merging write and read in a day; empty if the time is unknown."""
        if not self.pace.step_time_s:
            return {}
        steps = DAY_S / self.pace.step_time_s
        ends = steps / self.pace.every_steps
        return {
            "checkpoints": round(steps / self.pace.interval_steps, 2),
            "checkpoint_bytes_written": int(steps / self.pace.interval_steps * self.size.nbytes),
            "merge_bytes_read": int(ends * self.read_bytes),
            "merge_bytes_written": int(ends * self.written_bytes),
        }

    def to_json(self) -> dict[str, Any]:
        """Returns plain data for JSON; sizes in bytes, durations in steps, times in seconds."""
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
                    "steps": count * self.pace.interval_steps,
                    "tokens": count * self.pace.interval_steps * tokens if tokens else None,
                    "output_bytes": self.outputs[name],
                }
                for name, count in self.counts.items()
            ],
            "merge": {"bytes_read": self.read_bytes, "bytes_written": self.written_bytes, "seconds": self.merge_s},
            "per_day": self.per_day or None,
        }


def estimate(size: CheckpointSize, recipes: dict[str, MergeRecipe], pace: Pace) -> Estimate:
    """Returns the cost of merging windows at every end point of a run.

    Args:
        size: the size of one checkpoint.
        recipes: the recipes by the windows' names; each has `last`, the number of checkpoints of its window.
        pace: how often the run saves and merges.

    Raises:
        RecipeError: a number of `pace` is not above 0, or `every_steps` is not a multiple of `interval_steps`.
    """
    rates = (pace.step_time_s, pace.tokens_per_step, pace.bandwidth_bytes_per_s)
    if pace.interval_steps < 1 or any(rate is not None and rate <= 0 for rate in rates):
        raise RecipeError("interval, step time, tokens and bandwidth must be above 0.")
    if pace.every_steps % pace.interval_steps:
        raise RecipeError(
            f"windows cannot end every {pace.every_steps} steps with a checkpoint every {pace.interval_steps}; "
            "--every must be a multiple of --interval."
        )
    counts = {name: recipe.last or 0 for name, recipe in recipes.items()}
    longest = max(counts.values())
    # The next window of this length needs all but its own newest checkpoint.
    kept = max(longest - 1, KEEP_LAST)
    return Estimate(
        size=size,
        pace=pace,
        kept=kept,
        peak=kept + 2,
        outputs={name: _output_bytes(size, recipe) for name, recipe in recipes.items()},
        counts=counts,
        read_bytes=_read_bytes(size, recipes.values(), longest),
    )


def _output_bytes(size: CheckpointSize, recipe: MergeRecipe) -> int:
    if recipe.format == "safetensors":
        return size.weights if recipe.dtype is None else size.parameters * BY_NAME[recipe.dtype].itemsize
    has_weights = recipe.format == "universal" or recipe.stage in (1, 2)
    module = size.weights if has_weights else 0 if recipe.stage == 3 else size.module
    states = 0 if recipe.optimizer_states == "drop" else size.states
    return size.master + states + module + size.rest


def _read_bytes(size: CheckpointSize, recipes: Any, longest: int) -> int:
    """Bytes of the masters of the longest window, and of the optimizer states that are read.

    A recipe that carries the states reads those of the newest checkpoint; one that merges them, those of its window.
    """
    states = 0
    for recipe in recipes:
        if recipe.format != "safetensors" and recipe.optimizer_states != "drop":
            states = max(states, recipe.last or 0 if recipe.optimizer_states == "merge" else 1)
    return size.master * longest + size.states * states


def estimate_report(costs: Estimate) -> str:
    """Returns the estimate as tables for people.

    Args:
        costs: the estimate.
    """
    size, pace = costs.size, costs.pace
    rows = [
        ["checkpoint", f"{format_size(size.nbytes)} in {size.files} files"],
        ["kept by prune", f"{costs.kept} checkpoints, {format_size(costs.kept * size.nbytes)}"],
        ["at most, while one is merged and one written", f"{costs.peak}, {format_size(costs.peak * size.nbytes)}"],
        [f"merging, every {pace.every_steps} steps", f"reads {format_size(costs.read_bytes)}"],
        ["", f"writes {format_size(costs.written_bytes)}"],
    ]
    if costs.merge_s is not None:
        saving_s = size.nbytes / (pace.bandwidth_bytes_per_s or 1)
        rows.append(["time, if the bandwidth is the limit", f"save {saving_s:.0f} s, merge {costs.merge_s:.0f} s"])
    for name, value in costs.per_day.items():
        text = f"{value:g}" if name == "checkpoints" else format_size(value)
        rows.append([f"a day: {name.replace('_bytes', '').replace('_', ' ')}", text])
    lines = [table(["window", "checkpoints", "duration", "output"], _window_rows(costs)), table(["", ""], rows)]
    if costs.merge_s is not None and pace.step_time_s and costs.merge_s > pace.every_steps * pace.step_time_s:
        lines.append(
            "A merge takes longer than the run needs to its next end point: use more bandwidth, or a larger --every."
        )
    return "\n".join(lines)


def _window_rows(costs: Estimate) -> Sequence[Sequence[str]]:
    rows = []
    for name, count in costs.counts.items():
        steps = count * costs.pace.interval_steps
        tokens = f", {steps * costs.pace.tokens_per_step:.3g} tokens" if costs.pace.tokens_per_step else ""
        rows.append([name, str(count), f"{steps} steps{tokens}", format_size(costs.outputs[name])])
    return rows
