"""A run of many ranks, each with files of its own, is merged on few open files and little memory."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.counted import ROOT
from benchmarks.many_ranks.run import INTERVAL
from benchmarks.many_ranks.values import invented_values, llama_shapes

RANKS, LAYERS, HIDDEN, CHECKPOINTS = 64, 2, 64, 4
OPEN_FILES, MEMORY_MIB = 256, 32


def test_a_run_of_64_ranks_is_merged_killed_resumed_and_verified_within_its_limits(forms: Path, tmp_path: Path) -> None:
    values = {"ranks": RANKS, "layers": LAYERS, "hidden": HIDDEN, "checkpoints": CHECKPOINTS,
              "open-files": OPEN_FILES, "memory-mib": MEMORY_MIB}  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.large_run", "--folder", str(tmp_path), "--forms", str(forms)]
    command += [word for name, value in values.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    used = json.loads(done.stdout.splitlines()[-1])
    assert list(used)[:3] == ["modules", "merge", "resumed"]
    assert len(used) == 5, "two outputs are verified"
    assert used["merge"]["open_at_once"] < OPEN_FILES
    assert_values_are_right(tmp_path / "whole")


def assert_values_are_right(out: Path) -> None:
    """The safetensors hold the weighted sums of the masters that the generator invented, in every element."""
    (weights,) = out.rglob("*.safetensors")
    manifest = json.loads((weights.parent / "wsm_merge.json").read_text())
    coefficients = [source["coefficient"] for source in manifest["sources"]]
    shapes = llama_shapes(LAYERS, HIDDEN, vocabulary=4 * HIDDEN)
    steps = range(INTERVAL, INTERVAL * CHECKPOINTS + 1, INTERVAL)
    sources = [invented_values(shapes, step).states["master"] for step in steps]
    merged = load_file(weights)
    assert set(merged) == set(shapes)
    for name, shape in shapes.items():
        parts = [c * source[name].numpy().astype(np.float64) for c, source in zip(coefficients, sources, strict=True)]
        expected = torch.from_numpy(np.add.reduce(parts).astype(np.float32)).bfloat16().view(shape)
        assert torch.equal(merged[name], expected), name
