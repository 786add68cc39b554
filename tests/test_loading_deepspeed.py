"""A merge into a model in memory, of runs that DeepSpeed wrote, and into DeepSpeed's engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ds_models import TinyModel
from loaded_models import loaded_from_files, same_model
from reference import merged_parameters, same_bits

import wsm_ds
from wsm_ds.planning.window_recipe import make_window_recipe

CURVES = ("linear", "1-sqrt", "cosine")


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_model_gets_the_bits_of_the_way_through_files(runs: Path, tmp_path: Path, stage: int, dtype: str) -> None:
    run = runs / f"w2_s{stage}_{dtype}"
    for number, to in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        curve = CURVES[number]
        wanted = loaded_from_files(TinyModel().to(to), tmp_path / f"{number}", run=run, last=3, curve=curve)
        model = TinyModel().to(to)
        wsm_ds.load_merge(model, run=run, last=3, curve=curve)
        assert same_model(model, wanted)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_model_in_fp32_gets_the_literal_merge_of_the_masters(runs: Path, stage: int) -> None:
    run, coefficients = runs / f"w2_s{stage}_bf16", [0.25, 0.25, 0.5]
    model = TinyModel()
    wsm_ds.load_merge(model, run=run, last=3, coefficients=coefficients, dtype="fp32")
    wanted = merged_parameters([run / f"global_step{step}" for step in (2, 4, 6)], coefficients, stage)
    assert set(wanted) == {name for name, p in TinyModel().named_parameters() if p.requires_grad}
    for name, parameter in wanted.items():
        assert same_bits(model.get_parameter(name), parameter), name


def test_runs_of_several_world_sizes_and_stages_fill_models_alike(runs: Path, other_world_sizes: Path) -> None:
    for run in (other_world_sizes / "w1_s2", other_world_sizes / "w4_s3"):
        recipes = [make_window_recipe(run=run, last=last, curve=curve) for last in (1, 2) for curve in CURVES]
        together, model = [TinyModel() for _ in recipes], TinyModel()
        wsm_ds.load_merges(together, recipes)
        each = wsm_ds.load_each(model, recipes, room=0)
        for wanted, loaded in zip(together, each, strict=True):
            assert isinstance(loaded, wsm_ds.LoadedMerge)
            assert same_model(model, wanted)


def test_an_engine_of_deepspeed_is_a_module_like_any_other(runs: Path, engine: Any) -> None:
    wanted = TinyModel()
    run = runs / "w2_s2_bf16"
    wsm_ds.load_merge(wanted, run=run, last=2)
    wsm_ds.load_merge(engine, run=run, last=2)
    assert same_model(engine.module, wanted)


@pytest.fixture
def engine() -> Any:
    """DeepSpeed's inference engine around a model in fp32."""
    deepspeed = pytest.importorskip("deepspeed")
    return deepspeed.init_inference(TinyModel(), dtype=torch.float32)
