"""Several outputs of one pass: each as if it were alone, and no byte of a source read twice."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from source_reads import record_source_reads

from wsm_ds.cli import main
from wsm_ds.engine import source_crcs
from wsm_ds.errors import LayoutMismatch, OutputExists, RecipeError, WindowError
from wsm_ds.layouts.frameworks import MANIFEST
from wsm_ds.merge_planning import plan_merge
from wsm_ds.merging import merge, merge_all
from wsm_ds.planning.recipe import MergeRecipe, load_recipes, make_recipe, make_recipes
from wsm_ds.verification import verify


def contents(out: Path) -> dict[str, bytes]:
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }


def alone(recipe: MergeRecipe, out: Path) -> dict[str, bytes]:
    merge(recipe.model_copy(update={"out": out}))
    return contents(out)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """(path, begin, end) of every range of a source that is read, without the padding that only CRC-32s need."""
    monkeypatch.setattr(source_crcs, "MOST_REST_BYTES", -1)
    return record_source_reads(monkeypatch)


SWEEPS: dict[str, dict[str, Any]] = {
    "windows": {"last": [1, 2, 3], "curve": ["linear", "1-sqrt"]},
    "end points": {"last": 2, "to_step": [4, 6], "optimizer_states": "merge"},
    "formats": {"last": [2, 3], "curve": "cosine", "format": ["zero", "safetensors", "universal"]},
    "unlike": {
        "outputs": [
            {"last": 3, "curve": "linear", "out": "a"},
            {"tags": ["global_step2", "global_step6"], "coefficients": [0.25, 0.75], "out": "b", "world_size": 3},
            {"from_step": 2, "to_step": 4, "curve": "1-sqrt", "out": "c", "stage": 1, "optimizer_states": "drop"},
            {"last": 2, "curve": "linear", "format": "safetensors", "dtype": "fp32", "max_shard_size": 700, "out": "d"},
        ]
    },
}


@pytest.mark.parametrize("sweep", SWEEPS)
@pytest.mark.parametrize("run", ["w2_s2_bf16", "w2_s3_fp16"])
def test_every_output_is_that_of_a_merge_alone_and_no_byte_is_read_twice(
    runs: Path, tmp_path: Path, read: list[tuple[str, int, int]], run: str, sweep: str
) -> None:
    common = {"run": runs / run, "out": tmp_path / "all", "curve": None if sweep == "unlike" else "linear"}
    recipes = make_recipes(**common | SWEEPS[sweep])
    plan = plan_merge(recipes)
    merge_all(recipes)
    together = list(read)
    assert sum(end - begin for _, begin, end in together) == plan.bytes_to_read
    apart = []
    for number, recipe in enumerate(recipes):
        read.clear()
        assert contents(recipe.out) == alone(recipe, tmp_path / f"alone{number}"), recipe.out
        apart += read
        assert verify(recipe.out, full=True).recomputed_bytes > 0
    assert sum(end - begin for _, begin, end in together) == sum(end - begin for _, begin, end in union(apart))
    assert together == [*dict.fromkeys(together)]


def union(ranges: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Disjoint ranges that hold the same bytes."""
    merged: list[tuple[str, int, int]] = []
    for path, begin, end in sorted(ranges):
        if merged and merged[-1][0] == path and begin <= merged[-1][2]:
            merged[-1] = (path, merged[-1][1], max(end, merged[-1][2]))
        else:
            merged.append((path, begin, end))
    return merged


def test_lists_of_the_command_line_name_the_outputs(runs: Path, tmp_path: Path) -> None:
    command = ["merge", str(runs / "w2_s2_bf16"), "--last", "2,3", "--out", str(tmp_path / "sweep")]
    curves = "linear,1-sqrt,table:1,0.5,0,power:2"
    assert main([*command, "--curve", curves, "--json"]) == 0
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == sorted(
        f"last{n}-{curve}" for n in (2, 3) for curve in ("linear", "1-sqrt", "table-1-0.5-0", "power-2")
    )
    manifest = json.loads((tmp_path / "sweep/last2-1-sqrt" / MANIFEST).read_text())
    assert [source["step"] for source in manifest["sources"]] == [4, 6]
    assert manifest["recipe"]["curve"] == "1-sqrt"
    ends = ["merge", str(runs / "w2_s2_bf16"), "--last", "2", "--to", "4,6", "--format", "zero,safetensors"]
    assert main([*ends, "--out", str(tmp_path / "ends")]) == 0
    assert sorted(path.name for path in (tmp_path / "ends").iterdir()) == [
        "to4-safetensors", "to4-zero", "to6-safetensors", "to6-zero"
    ]  # fmt: skip


def test_a_recipe_lists_outputs_and_the_same_command_makes_what_is_missing(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = {
        "run": str(runs / "w2_s2_bf16"),
        "out": str(tmp_path / "out"),
        "curve": "linear",
        "outputs": [{"last": 3, "out": "mean"}, {"last": [2, 3], "curve": "1-sqrt", "out": "sqrt"}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(text))
    command = ["merge", "--recipe", str(tmp_path / "recipe.yaml")]
    assert main(command) == 0
    outs = [tmp_path / "out/mean", tmp_path / "out/sqrt/last2", tmp_path / "out/sqrt/last3"]
    first = [contents(out) for out in outs]
    capsys.readouterr()
    shutil.rmtree(outs[1])
    assert main(command) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("done")] == [
        f"done {outs[0]} (already made by the same merge)",
        f"done {outs[1]}",
        f"done {outs[2]} (already made by the same merge)",
    ]  # fmt: skip
    assert [contents(out) for out in outs] == first


def test_outputs_that_are_not_given_are_one_output(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("run: run\nout: out\nlast: 2\ncurve: linear\noutputs:\n")
    (recipe,) = load_recipes(tmp_path / "recipe.yaml")
    assert recipe.out == Path("out")


def test_wrong_sweeps_say_what_is_wrong(runs: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"run": runs / "w2_s2_bf16", "curve": "linear", "out": tmp_path / "out"}
    for values, words in (
        ({"last": []}, "`last`: the list is empty"),
        ({"last": [2, 2]}, "has a value twice, found .2, 2."),
        ({"outputs": []}, "a list of mappings"),
        ({"outputs": [{"last": 0}]}, r"not valid: outputs\[0\]: `last` must be at least 1, not 0"),
    ):
        with pytest.raises(RecipeError, match=words):
            make_recipes(**common | values)
    with pytest.raises(RecipeError, match="same folder"):
        plan_merge([make_recipe(**common, last=2), make_recipe(**common, last=3)])
    with pytest.raises(WindowError, match=r"2 complete checkpoints up to step 2 were asked for, but .* has 1;"):
        plan_merge(make_recipe(**common, last=2, to_step=2))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/last3").mkdir()
    with pytest.raises(OutputExists):
        merge_all(make_recipes(**common, last=[2, 3]))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["last3"]


def test_windows_of_unlike_models_are_refused(runs: Path, tmp_path: Path) -> None:
    other = next(path for path in runs.iterdir() if path.name == "hf")
    recipes = [
        make_recipe(run=runs / "w2_s2_bf16", last=1, curve="linear", out=tmp_path / "a"),
        make_recipe(run=other, last=1, curve="linear", out=tmp_path / "b", include=()),
    ]
    try:
        plan_merge(recipes)
    except LayoutMismatch:
        assert list(tmp_path.iterdir()) == []
