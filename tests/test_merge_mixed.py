"""A window whose checkpoints were written at different world sizes and stages."""

from pathlib import Path

import pytest
import torch
from reference import average, load_all, parameters, partitions
from safetensors.torch import load_file

from wsm_ds.merging import merge
from wsm_ds.verification import verify


@pytest.mark.parametrize("newest", ["w1_s1", "w3_s2", "w4_s3"])
@pytest.mark.parametrize("output", ["zero", "safetensors"])
def test_a_mixed_window_equals_the_reference_in_the_newest_layout(
    runs: Path, other_world_sizes: Path, tmp_path: Path, newest: str, output: str
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    sources = [runs / "w2_s3_bf16/global_step2", other_world_sizes / newest / "global_step4"]
    for path in sources:
        (run / path.name).symlink_to(path)
    merge(run=run, last=2, coefficients=(0.7, 0.3), out=tmp_path / "out", format=output, dtype=None)
    wanted = {}
    loaded = [whole_parameters(path, stage) for path, stage in zip(sources, (3, int(newest[-1])), strict=True)]
    for name in loaded[0]:
        wanted[name] = average([weights[name] for weights in loaded], [0.7, 0.3])
    if output == "safetensors":
        tensors = load_file(tmp_path / "out/model.safetensors")
        assert all(torch.equal(tensors[name], value.bfloat16()) for name, value in wanted.items())
    else:
        got = whole_parameters(tmp_path / "out/global_step4", int(newest[-1]))
        assert all(torch.equal(got[name], value) for name, value in wanted.items())
    assert verify(tmp_path / "out", full=True).note == ""


def whole_parameters(checkpoint: Path, stage: int) -> dict[str, torch.Tensor]:
    models, optims = load_all(checkpoint)
    return parameters(models, {rank: partitions(optim) for rank, optim in optims.items()}, stage)
