"""Windows whose checkpoints were written at different world sizes and stages, into every form of output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lazy import load_file, torch
from reference import average, whole

from wsm_ds.merging import export, merge
from wsm_ds.verification import verify

SIX = [0.3, 0.25, 0.2, 0.1, 0.1, 0.05]


@pytest.fixture
def six(runs: Path, other_world_sizes: Path, tmp_path: Path) -> tuple[Path, list[tuple[Path, int]]]:
    """A run whose six checkpoints were written at world sizes 3, 2, 4, 3, 4, 2 and stages 2 and 3 in turn."""
    paths = [
        (other_world_sizes / "w3_s2/global_step2", 2),
        (runs / "w2_s3_bf16/global_step4", 3),
        (other_world_sizes / "w4_s2/global_step4", 2),
        (other_world_sizes / "w3_s3/global_step4", 3),
        (other_world_sizes / "w4_s3/global_step2", 3),
        (runs / "w2_s2_bf16/global_step6", 2),
    ]
    run = tmp_path / "six"
    for number, (path, _) in enumerate(paths, start=1):
        copy = run / f"global_step{number}"
        copy.mkdir(parents=True)
        for file in path.iterdir():
            if file.name.endswith("model_states.pt"):
                model = torch.load(file, weights_only=False)
                torch.save(model | {"global_steps": number}, copy / file.name)
            else:
                (copy / file.name).symlink_to(file)
    return run, [(run / f"global_step{number}", stage) for number, (_, stage) in enumerate(paths, start=1)]


def expected(sources: list[tuple[Path, int]], kind: str) -> dict[str, torch.Tensor]:
    held = [whole(path, stage)[kind] for path, stage in sources]
    return {name: average([values[name] for values in held], SIX) for name in held[0]}


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"world_size": 3, "stage": 3, "sub_group_size": 100},
        {"world_size": 1, "stage": 1},
        {"format": "universal"},
        {"format": "safetensors"},
    ],
    ids=lambda form: "-".join(f"{key}={value}" for key, value in form.items()) or "newest",
)
def test_six_checkpoints_of_three_world_sizes_and_two_stages_merge_into_every_form(
    six: tuple[Path, list[tuple[Path, int]]], tmp_path: Path, form: dict[str, Any]
) -> None:
    run, sources = six
    states: dict[str, Any] = {} if form.get("format") == "safetensors" else {"optimizer_states": "merge"}
    # The engine's steps were put in by hand and contradict the optimizers' steps: hence "foreign-files".
    states["allow"] = ("warmup", "foreign-files")
    merge(run=run, last=6, coefficients=SIX, out=tmp_path / "out", **form, **states)
    assert verify(tmp_path / "out", full=True).note == ""
    wanted = expected(sources, "master")
    if "format" not in form:
        got = whole(tmp_path / "out/global_step6", form.get("stage", 2))
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            values = expected(sources, kind)
            assert all(torch.equal(got[kind][name], value) for name, value in values.items()), kind
        return
    if form["format"] == "universal":
        for name, value in wanted.items():
            held = torch.load(tmp_path / f"out/global_step6_universal/zero/{name}/fp32.pt")
            assert torch.equal(held["param"], value), name
        export(tmp_path / "out", out=tmp_path / "model")
    model = tmp_path / ("model" if form["format"] == "universal" else "out")
    tensors = load_file(model / "model.safetensors")
    assert all(torch.equal(tensors[name], value.bfloat16()) for name, value in wanted.items())


@pytest.mark.parametrize("newest", ["w1_s1", "w3_s2", "w4_s3"])
@pytest.mark.parametrize("output", ["zero", "safetensors"])
def test_a_mixed_window_equals_the_reference_in_the_newest_layout(
    runs: Path, other_world_sizes: Path, tmp_path: Path, newest: str, output: Any
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    sources = [runs / "w2_s3_bf16/global_step2", other_world_sizes / newest / "global_step4"]
    for path in sources:
        (run / path.name).symlink_to(path)
    merge(run=run, last=2, coefficients=(0.7, 0.3), out=tmp_path / "out", format=output, dtype=None)
    loaded = [whole(path, stage)["master"] for path, stage in zip(sources, (3, int(newest[-1])), strict=True)]
    wanted = {name: average([weights[name] for weights in loaded], [0.7, 0.3]) for name in loaded[0]}
    if output == "safetensors":
        tensors = load_file(tmp_path / "out/model.safetensors")
        assert all(torch.equal(tensors[name], value.bfloat16()) for name, value in wanted.items())
    else:
        got = whole(tmp_path / "out/global_step4", int(newest[-1]))["master"]
        assert all(torch.equal(got[name], value) for name, value in wanted.items())
    assert verify(tmp_path / "out", full=True).note == ""
