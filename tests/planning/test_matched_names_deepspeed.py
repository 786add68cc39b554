"""A run whose model is wrapped midway is merged: the same numbers as without the wrapper, under the newest's names."""

import json
from pathlib import Path
from typing import Any

import pytest
import reference
from deepspeed_runs import launch
from lazy import load_file, torch

from wsm_ds.errors import LayoutMismatch, RecipeError
from wsm_ds.layouts.frameworks import MANIFEST
from wsm_ds.merge_planning import plan_merge
from wsm_ds.merging import export, merge, merge_all, reshard, run_plan
from wsm_ds.planning.recipe import load_recipe, make_recipe
from wsm_ds.verification import verify

KINDS = {0: "compile", 1: "module", 2: "peft", 3: "fsdp and checkpoint"}
PLAIN, OWN = "plain", "own"
PREFIXES = {"compile": "_orig_mod.", "module": "module.", "peft": "base_model.model.",
            "fsdp and checkpoint": "_fsdp_wrapped_module."}  # fmt: skip


@pytest.fixture(scope="module")
def wrapping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ROOT/s{stage}/{kind}` of `names_worker.py`, for the kind of each stage and for plain."""
    root = tmp_path_factory.mktemp("wrapping")
    jobs = [
        {"do": "wrap", "root": str(root / f"s{stage}"), "stage": stage, "dtype": "bf16",
         "kinds": [PLAIN, kind, *([OWN] if stage == 2 else [])]}
        for stage, kind in KINDS.items()
    ]  # fmt: skip
    launch(jobs, world_size=2, folder=tmp_path_factory.mktemp("train"), worker="names_worker.py")
    return root


def with_wrapper(name: str, kind: str) -> str:
    """The name that a tensor of TinyModel has in the state dict of a wrapped model."""
    if kind == "peft":
        name = name.replace("out.", "out.base_layer.")
    return PREFIXES[kind] + name


def tensors_of(out: Path) -> dict[str, Any]:
    return {name: tensor for path in sorted(out.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def test_a_model_with_checkpoint_wrappers_is_resharded_and_converted_under_its_own_names(
    wrapping: Path, tmp_path: Path
) -> None:
    run, hidden = wrapping / "s3" / KINDS[3], "_checkpoint_wrapped_module"
    newest, _ = reference.load_all(run / "global_step4")
    assert f"_fsdp_wrapped_module.hidden.{hidden}.weight" in newest[0]["param_shapes"][0]
    expected = tensors_of(export(run, out=tmp_path / "exported", dtype="fp32").out)
    assert "_fsdp_wrapped_module.hidden.weight" in expected
    reshard(run, like=wrapping / "s2" / PLAIN / "global_step4", out=tmp_path / "stage2")
    written, _ = reference.load_all(tmp_path / "stage2" / "global_step4")
    assert list(written[0]["module"]) == list(newest[0]["module"])
    assert [*written[0]["param_shapes"][0]] == [name for group in newest[0]["param_shapes"] for name in group]
    merge(run, last=1, format="universal", out=tmp_path / "universal")
    for out in (tmp_path / "stage2", tmp_path / "universal"):
        again = tensors_of(export(out, out=Path(f"{out}-exported"), dtype="fp32").out)
        assert set(again) == set(expected)
        assert all(reference.same_bits(again[name], tensor) for name, tensor in expected.items())
    parameters = tmp_path / "universal" / "global_step4_universal" / "zero"
    assert (parameters / f"_fsdp_wrapped_module.hidden.{hidden}.bias").is_dir()


@pytest.mark.parametrize("stage", KINDS)
def test_a_model_that_is_wrapped_midway_merges_to_the_same_numbers(
    wrapping: Path, stage: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kind = KINDS[stage]
    plain, run = wrapping / f"s{stage}" / PLAIN, wrapping / f"s{stage}" / kind
    for form in ("safetensors", "zero"):
        merge(plain, last=2, format=form, out=tmp_path / f"plain-{form}")
        caplog.clear()
        manifest = merge(run, last=2, format=form, out=tmp_path / form).manifest
        lines = [record.message for record in caplog.records if "the names of global_step4" in record.message]
        assert len(lines) == 1
        assert f"global_step2 (scale as {with_wrapper('scale', kind)}" in lines[0]
        (matched,) = manifest["matched_names"]
        assert (matched["tag"], matched["renamed"]) == ("global_step2", 10 if stage else matched["renamed"])
        assert verify(tmp_path / form, full=True).recomputed_bytes > 0
    merged, expected = tensors_of(tmp_path / "safetensors"), tensors_of(tmp_path / "plain-safetensors")
    assert set(merged) == {with_wrapper(name, kind) for name in expected}
    older = tensors_of(merge(plain, tags=["global_step4"], format="safetensors", out=tmp_path / "newest").out)
    for name, tensor in expected.items():
        assert reference.same_bits(merged[with_wrapper(name, kind)], tensor)
    assert any(not torch.equal(older[name], expected[name]) for name in expected)
    checkpoints = [run / f"global_step{step}" for step in (2, 4)]
    if stage:
        whole = reference.whole(tmp_path / "zero" / "global_step4", stage, kinds=())["master"]
        literal = reference.merged_parameters(checkpoints, [0.5, 0.5], stage)
        assert list(whole) == list(literal)
        assert all(reference.same_bits(whole[name], literal[name]) for name in literal)
    newest, _ = reference.load_all(run / "global_step4")
    written, _ = reference.load_all(tmp_path / "zero" / "global_step4")
    assert list(written[0]["module"]) == list(newest[0]["module"])
    assert reference.same_tree(written[0].get("param_shapes"), newest[0].get("param_shapes"))


def test_deepspeed_loads_what_was_merged_and_resharded_into_wrapped_models(
    wrapping: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outs = {stage: tmp_path / f"s{stage}" for stage in (1, 2, 3)}
    for stage, out in outs.items():
        merge(wrapping / f"s{stage}" / KINDS[stage], last=2, out=out)
    reshard(outs[3], stage=2, out=tmp_path / "s3 as s2")
    jobs: list[dict[str, Any]] = [
        {"do": "load", "stage": stage, "dtype": "bf16", "kind": KINDS[stage], "run": str(out)}
        for stage, out in outs.items()
    ]
    jobs.append({"do": "load", "stage": 2, "dtype": "bf16", "kind": KINDS[3], "run": str(tmp_path / "s3 as s2")})
    reports, _ = launch(jobs, world_size=2, folder=tmp_path_factory.mktemp("load"), worker="names_worker.py")
    for job, loaded in zip(jobs, reports, strict=True):
        exported = tensors_of(export(job["run"], dtype="fp32", out=Path(f"{job['run']} exported")).out)
        assert len(loaded) == 6
        for name, master in loaded.items():
            assert exported[name.replace("_checkpoint_wrapped_module.", "")].flatten().tolist() == master


def test_names_with_an_own_wrapper_are_matched_by_a_rule(wrapping: Path, tmp_path: Path) -> None:
    plain, run = wrapping / "s2" / PLAIN, wrapping / "s2" / OWN
    options: dict[str, Any] = {"last": 2, "format": "safetensors", "dtype": "fp32"}
    with pytest.raises(
        LayoutMismatch,
        match=r"against absent, .*--rename-sources TAG:PATTERN=NEW",
    ):
        merge(run, out=tmp_path / "out", **options)
    rules = {"global_step2": {"^": "trunk."}}
    merged = merge(run, out=tmp_path / "out", rename_sources=rules, **options)
    assert verify(tmp_path / "out", full=True).recomputed_bytes > 0
    expected = tensors_of(merge(plain, out=tmp_path / "plain", **options).out)
    assert {name: tensor.tolist() for name, tensor in tensors_of(merged.out).items()} == {
        f"trunk.{name}": tensor.tolist() for name, tensor in expected.items()
    }
    assert not merge(run, out=tmp_path / "out", rename_sources=rules, **options).is_new
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"run": str(run), "out": str(tmp_path / "out"), "rename_sources": rules, **options}))
    assert load_recipe(recipe).rename_sources == rules
    assert not merge(load_recipe(recipe)).is_new


def test_the_command_line_takes_rules_for_tags_and_patterns_of_tags(
    wrapping: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from wsm_ds.cli import main

    run = str(wrapping / "s2" / OWN)
    for number, rule in enumerate(("global_step2:^=trunk.", "*:^(?!trunk)=trunk.")):
        out = tmp_path / f"out{number}"
        assert main(["merge", run, "--last", "2", "--out", str(out), "--rename-sources", rule]) == 0
        assert main(["verify", str(out), "--full"]) == 0
    capsys.readouterr()
    for rule, words in (("x", "must be TAG:PATTERN=NEW, not 'x'"), (":a=b", "must be TAG:PATTERN=NEW"),
                        ("t:ab", "with a pattern before the last '='")):  # fmt: skip
        assert main(["merge", run, "--last", "2", "--out", "NEW", "--rename-sources", rule]) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(RecipeError, match=r"`rename_sources`: .*is not a regular expression"):
        make_recipe(run=run, out="NEW", last=2, rename_sources={"t": {"(": "x"}})


def test_two_names_that_become_one_are_an_error(wrapping: Path, tmp_path: Path) -> None:
    rules = {"global_step2": {r"^(hidden|out)\.": "trunk.both."}}
    with pytest.raises(LayoutMismatch, match=r"hidden\.weight and out\.weight would both be trunk\.both\.weight"):
        merge(wrapping / "s2" / OWN, last=2, rename_sources=rules, out=tmp_path / "out")


def test_a_killed_merge_of_renamed_sources_goes_on(
    wrapping: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wsm_ds.engine.staged_files import StagedFiles

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    recipe = make_recipe(run=wrapping / "s2" / KINDS[2], last=2, out=tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(StagedFiles, "sync", killed)
        with pytest.raises(KeyboardInterrupt):
            run_plan(plan_merge(recipe))
    assert merge(recipe).is_new
    assert verify(tmp_path / "out", full=True).recomputed_bytes > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["matched_names"][0]["tag"] == "global_step2"


def test_windows_of_one_call_that_end_before_and_after_the_change_are_refused(wrapping: Path, tmp_path: Path) -> None:
    run = wrapping / "s1" / KINDS[1]
    recipes = [
        make_recipe(run=run, tags=tags, format="safetensors", out=tmp_path / str(len(tags)))
        for tags in (["global_step2"], ["global_step2", "global_step4"])
    ]
    with pytest.raises(LayoutMismatch, match="make the outputs of the windows in separate calls"):
        merge_all(recipes)
    for recipe in recipes:
        assert merge(recipe).is_new
    assert "embedding.weight" in tensors_of(tmp_path / "1")
    assert "module.embedding.weight" in tensors_of(tmp_path / "2")
