"""The library's calls as a user writes them: paths as text, keywords, results as data."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest

import wsm_ds
from wsm_ds.errors import RecipeError


def test_every_call_takes_paths_as_text(runs: Path, tmp_path: Path) -> None:
    run = str(runs / "w2_s2_bf16")
    assert [item.checkpoint.tag for item in wsm_ds.inspect_run(run)] == ["global_step2", "global_step4", "global_step6"]
    merged = wsm_ds.merge(run=run, last=2, out=str(tmp_path / "merged"))
    assert wsm_ds.verify(str(merged.out)).recomputed_bytes > 0
    exported = wsm_ds.export(run, out=str(tmp_path / "model"), dtype="bf16")
    resharded = wsm_ds.reshard(run, out=str(tmp_path / "w3"), tag="global_step4", world_size=3)
    assert [result.manifest["sources"][0]["step"] for result in (exported, resharded)] == [6, 4]
    (tmp_path / "recipe.yaml").write_text(f"run: {run}\nlast: 2\nout: {tmp_path / 'other'}\n")
    assert wsm_ds.load_recipe(str(tmp_path / "recipe.yaml")).last == 2
    assert [recipe.last for recipe in wsm_ds.make_recipes(run=run, last=[2, 3], out=tmp_path)] == [2, 3]


def test_a_result_says_what_was_made_and_whether_it_was_there(runs: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"run": runs / "w2_s2_bf16", "last": 2, "out": tmp_path / "out"}
    first, again = wsm_ds.merge(**options), wsm_ds.merge(**options)
    assert (first.out, first.is_new, again.is_new) == (tmp_path / "out", True, False)
    assert first.manifest == again.manifest == json.loads((tmp_path / "out/wsm_merge.json").read_text())
    assert first.timings.write_s > 0 == again.timings.write_s


def test_the_curve_is_linear_unless_something_else_is_given(runs: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"run": runs / "w2_s2_bf16", "last": 3, "out": tmp_path / "out"}
    default, linear = wsm_ds.plan_merge(**options), wsm_ds.plan_merge(**options, curve="linear")
    assert default.to_json() == linear.to_json()
    assert default.outputs[0].curve == "linear"
    assert wsm_ds.make_recipe(**options, coefficients=(0.5, 0.25, 0.25)).curve is None


def test_a_wrong_keyword_is_named(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="lsat"):
        wsm_ds.merge(run=runs / "w2_s2_bf16", lsat=2, out=tmp_path / "out")  # type: ignore[call-arg]


def test_merge_takes_the_run_first_like_export_and_reshard(runs: Path, tmp_path: Path) -> None:
    run, out = str(runs / "w2_s2_bf16"), tmp_path / "out"
    assert wsm_ds.plan_merge(run, last=2, out=out).outputs[0].out == out
    assert wsm_ds.merge(run, last=2, out=out).manifest["recipe"]["last"] == 2
    recipe = wsm_ds.make_recipe(run=run, last=2, out=out)
    for call in (cast(Any, wsm_ds.merge), cast(Any, wsm_ds.plan_merge)):
        with pytest.raises(RecipeError, match="a recipe and `floor` are given"):
            call(recipe, floor=0.5)


def test_export_and_reshard_name_an_option_that_is_not_theirs(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"`format` \(zero\): export writes safetensors"):
        wsm_ds.export("RUN", out=tmp_path / "out", format="zero")  # type: ignore[call-arg]
    for call in (cast(Any, wsm_ds.export), cast(Any, wsm_ds.reshard)):
        with pytest.raises(RecipeError, match="`last` is an option of merge"):
            call("RUN", out=tmp_path / "out", last=3)


def test_an_output_below_a_file_is_refused(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match=r"`out` \(.*file/below/out\): .*/file is not a folder"):
        wsm_ds.merge(runs / "w2_s2_bf16", last=2, out=tmp_path / "file/below/out")


def test_an_output_inside_a_source_is_refused_however_it_is_spelled(tmp_path: Path) -> None:
    run = Path(shutil.copytree(Path(__file__).with_name("golden") / "zero2_bf16", tmp_path / "run"))
    (tmp_path / "link").symlink_to(run / "global_step2")
    for out in (run / "global_step2/out", tmp_path / "link/deeper/out"):
        with pytest.raises(RecipeError, match=r"lies in the checkpoint .*run/global_step2, and sources are only read"):
            wsm_ds.merge(run, last=2, out=out)
    assert len(list((run / "global_step2").iterdir())) == 3


def test_an_output_inside_another_output_is_refused(tmp_path: Path) -> None:
    run = Path(shutil.copytree(Path(__file__).with_name("golden") / "zero2_bf16", tmp_path / "run"))
    wsm_ds.merge(run, last=2, allow=["warmup"], out=tmp_path / "first")
    with pytest.raises(RecipeError, match=r"lies in .*/first, another merge's output"):
        wsm_ds.merge(run, last=2, allow=["warmup"], out=tmp_path / "first/second")
    assert wsm_ds.verify(tmp_path / "first").files > 0
    wsm_ds.export(tmp_path / "first", out=tmp_path / "first/job/weights")  # a run that goes on in this folder
