"""Which folders are checkpoints, and in which order: whatever their names, the steps in their files decide."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lazy import torch
from saved_names import SERIES, Series, saved

from wsm_ds.cli import main
from wsm_ds.errors import BrokenCheckpoint, CheckpointNotFound, UnsafePickle, WindowError
from wsm_ds.inspection import inspect_run
from wsm_ds.layouts.order import UNBOUNDED, in_order
from wsm_ds.layouts.run import checkpoint_at, find_checkpoints, find_tag
from wsm_ds.layouts.saved_step import _counts_in, saved_step
from wsm_ds.merge_planning import plan_merge
from wsm_ds.merging import merge
from wsm_ds.planning.recipe import one_recipe
from wsm_ds.verification import verify

MODEL_FILE = "mp_rank_00_model_states.pt"


class Mine:
    """A class of the user's, in the client state."""


Copied = Callable[[str], Path]


@pytest.fixture(scope="session")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory)


@pytest.fixture
def copied(named: Path, tmp_path: Path) -> Copied:
    """A copy of a series that a test may break."""
    return lambda name: Path(shutil.copytree(named / name, tmp_path / name))


def plan(run: Path, **window: Any) -> list[str]:
    """The tags of a window, in the order of the plan."""
    (output,) = plan_merge(run=run, curve="linear", allow=("warmup",), out=run.parent / "out", **window).outputs
    return [source.tag for source in output.sources]


def last(run: Path, count: int, to: int | None = None) -> list[str]:
    return plan(run, last=count, to_step=to)


def between(run: Path, low: int, high: int) -> list[str]:
    return plan(run, from_step=low, to_step=high)


def cut(run: Path, tag: str) -> None:
    """Leaves the beginning of a model file, as a save in progress has it."""
    file = run / tag / MODEL_FILE
    file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize("series", SERIES.values(), ids=SERIES)
def test_the_counts_in_the_files_orders_whatever_the_names_are(named: Path, series: Series) -> None:
    run = named / series.run
    assert last(run, 2) == list(series.tags[2:])
    assert last(run, 2, to=3) == list(series.tags[1:3])
    assert between(run, 2, 3) == list(series.tags[1:3])
    assert plan(run, tags=series.tags[2::-1]) == list(series.tags[:3])
    (output,) = plan_merge(one_recipe(run, out=run.parent / "out", tag=None)).outputs
    assert [source.tag for source in output.sources] == [series.tags[3]]


@pytest.mark.parametrize("series", SERIES.values(), ids=SERIES)
def test_inspect_says_the_step_and_what_a_folder_was_taken_for(
    named: Path, series: Series, capsys: pytest.CaptureFixture[str]
) -> None:
    run = named / series.run
    assert main(["inspect", str(run), "--json"]) == 0
    found = [item for item in json.loads(capsys.readouterr().out) if not item["tag"].startswith("last.ckpt")]
    assert [(item["tag"], item["step"]) for item in found] == list(zip(series.tags, (1, 2, 3, 4), strict=True))
    assert {item["saved_by"] for item in found} == {series.framework}
    is_nested = "/" in series.tags[0]
    assert [item["save_folder"] for item in found] == [
        str((run / tag).parent if is_nested else run / tag) for tag in series.tags
    ]
    assert main(["inspect", str(run)]) == 0
    header, first, *_ = capsys.readouterr().out.splitlines()
    assert header.split()[-1] == "framework"
    assert first.endswith(f"yes  {series.framework}".rjust(5))


def test_the_folder_that_holds_the_checkpoints_is_a_run_too(named: Path) -> None:
    assert last(named / "accelerate/checkpoints", 2) == ["checkpoint_10/pytorch_model", "checkpoint_11/pytorch_model"]
    assert last(named / "accelerate/checkpoints/checkpoint_9", 1) == ["pytorch_model"]


def test_a_link_is_another_name_of_its_checkpoint(copied: Copied, capsys: pytest.CaptureFixture[str]) -> None:
    run = copied("plain")
    (run / "best").symlink_to("global_step2")
    (run / "latest").unlink()
    (run / "latest").symlink_to(run / "global_step4")
    (run / "gone").symlink_to("global_step9")
    assert between(run, 1, 4) == list(SERIES["plain"].tags)
    assert plan(run, tags=("latest", "best")) == [
        "global_step2", "global_step4"
    ]  # fmt: skip
    assert main(["inspect", str(run)]) == 0
    assert "best: a link to global_step2" in capsys.readouterr().out
    nested = copied("lightning")
    shutil.rmtree(nested / "last.ckpt")
    (nested / "last.ckpt").symlink_to("epoch=0-step=3.ckpt")
    assert last(nested, 3) == list(SERIES["lightning"].tags[1:])
    assert find_tag(nested, "last.ckpt").tag == "epoch=0-step=3.ckpt/checkpoint"


def test_a_link_to_a_checkpoint_elsewhere_is_a_checkpoint(copied: Copied, tmp_path: Path) -> None:
    run = copied("plain")
    (run / "global_step4").rename(tmp_path / "elsewhere")
    (run / "global_step4").symlink_to(tmp_path / "elsewhere")
    (run / "best").symlink_to(tmp_path / "elsewhere")
    assert last(run, 2) == ["global_step3", "global_step4"]
    assert [c.links for c in find_checkpoints(run)] == [(), (), (), ("best",)]


def test_part_of_a_name_must_be_of_one_checkpoint(named: Path) -> None:
    run = named / "accelerate"
    for name in ("checkpoint_9", "checkpoints/checkpoint_9", "checkpoints/checkpoint_9/pytorch_model"):
        assert find_tag(run, name).tag == "checkpoints/checkpoint_9/pytorch_model"
    with pytest.raises(CheckpointNotFound, match="holds 4 checkpoints pytorch_model"):
        find_tag(run, "pytorch_model")
    with pytest.raises(CheckpointNotFound, match=r"no checkpoint 3 \(did you mean 'step_3_loss_0.41'\?\)"):
        find_tag(named / "losses", "3")


def test_of_two_equal_checkpoints_of_a_step_the_numbered_one_is_taken(
    copied: Copied, caplog: pytest.LogCaptureFixture
) -> None:
    run = copied("lightning")  # it holds last.ckpt, a second save of step 4
    assert last(run, 1) == ["epoch=0-step=4.ckpt/checkpoint"]
    shutil.copytree(run / "epoch=0-step=2.ckpt", run / "best.ckpt")
    assert between(run, 1, 4) == list(SERIES["lightning"].tags)
    (run / "epoch=0-step=4.ckpt/checkpoint" / MODEL_FILE).unlink()
    next((run / "best.ckpt/checkpoint").glob("*zero_pp_rank_1*")).unlink()
    assert last(run, 4) == [*SERIES["lightning"].tags[:3], "last.ckpt/checkpoint"]
    for tag in ("epoch=0-step=4.ckpt/checkpoint", "best.ckpt/checkpoint"):
        assert f"{tag} is skipped" in caplog.text


def test_two_different_checkpoints_of_a_step_are_refused(copied: Copied) -> None:
    run = copied("plain")
    shutil.copytree(run / "global_step4", run / "other_step4")
    optim = next((run / "other_step4").glob("*zero_pp_rank_1*"))
    optim.write_bytes(next((run / "global_step3").glob("*zero_pp_rank_1*")).read_bytes())
    for window in (partial(last, run, 1), partial(between, run, 3, 4)):
        with pytest.raises(WindowError, match="step 4 was saved more than once, as global_step4, other_step4"):
            window()
    assert last(run, 2, to=3) == ["global_step2", "global_step3"]  # a tie outside the window does not matter


@pytest.mark.parametrize("name", ["losses", "diffusers", "accelerate", "lightning", "trainer"])
def test_a_newest_checkpoint_that_tells_no_step_is_skipped_if_all_names_agree(
    copied: Copied, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    run, names = copied(name), SERIES[name].tags
    shutil.rmtree(run / "last.ckpt", ignore_errors=True)
    cut(run, names[3])
    assert last(run, 2) == list(names[1:3])
    assert f"{names[3]} is skipped" in caplog.text
    assert between(run, 1, 3) == list(names[:3])
    cut(run, names[1])
    with pytest.raises(BrokenCheckpoint, match=r"mp_rank_00_model_states\.pt is not a whole torch file"):
        last(run, 2)
    with pytest.raises(BrokenCheckpoint, match="not a whole torch file"):
        between(run, 1, 3)
    assert last(run, 1) == [names[2]]


def test_a_checkpoint_that_nothing_dates_is_never_placed_by_its_name(copied: Copied) -> None:
    run = copied("words")
    cut(run, "a")  # of step 3
    for window in (partial(last, run, 1), partial(between, run, 1, 4)):
        with pytest.raises(BrokenCheckpoint, match="So the step of a is not known, and it may belong to the window"):
            window()
    assert plan(run, tags=("b", "c")) == ["b", "c"]
    dated = {d.checkpoint.tag: (d.earliest, d.latest) for d in in_order(find_checkpoints(run))}
    assert dated == {"d": (1, 1), "b": (2, 2), "a": (-1, UNBOUNDED), "c": (4, 4)}


def test_names_that_contradict_the_steps_place_nothing(copied: Copied) -> None:
    run = copied("accelerate") / "checkpoints"
    (run / "checkpoint_9").rename(run / "checkpoint_30")  # of step 2
    assert last(run, 1) == ["checkpoint_11/pytorch_model"]
    cut(run, "checkpoint_11/pytorch_model")
    with pytest.raises(BrokenCheckpoint, match="step of checkpoint_11/pytorch_model is not known"):
        last(run, 1)


def test_a_step_that_another_rank_s_file_tells_is_known(named: Path, tmp_path: Path, runs: Path) -> None:
    run = Path(shutil.copytree(runs / "w2_s3_bf16", tmp_path / "run"))
    file = run / "global_step4" / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    file.write_bytes(file.read_bytes()[:1000])
    assert saved_step(run / "global_step4") == 4


def test_to_order_reads_one_model_file_of_each_checkpoint_once(copied: Copied) -> None:
    run = copied("words")
    for file in run.glob("*/*optim_states.pt"):
        file.write_bytes(b"")  # would fail if it was read
    before = _counts_in.cache_info()
    for _ in range(3):
        assert [d.checkpoint.tag for d in in_order(find_checkpoints(run))] == ["d", "b", "a", "c"]
    after = _counts_in.cache_info()
    assert (after.misses - before.misses, after.hits - before.hits) == (4, 8)
    shutil.rmtree(run / "a")
    shutil.copytree(run / "d", run / "a")  # the tag is used again
    assert saved_step(run / "a") == 1


def test_an_old_checkpoint_with_an_unknown_class_does_not_hinder_the_window(copied: Copied) -> None:
    run = copied("plain")
    file = run / "global_step1" / MODEL_FILE
    torch.save(torch.load(file, weights_only=False) | {"mine": Mine()}, file)
    assert last(run, 2) == ["global_step3", "global_step4"]
    with pytest.raises(UnsafePickle, match="Mine"):
        last(run, 4)


def test_two_models_or_two_runs_in_one_folder_are_refused_and_tags_choose(copied: Copied, tmp_path: Path) -> None:
    run = copied("two")
    with pytest.raises(WindowError, match="checkpoint_1 holds several checkpoints: pytorch_model, pytorch_model_1"):
        last(run, 2)
    chosen = ("checkpoint_1/pytorch_model_1", "checkpoint_2/pytorch_model_1")
    assert plan(run, tags=chosen) == list(chosen)
    with pytest.raises(CheckpointNotFound, match=f"Give one of the runs in it: {run}"):
        find_checkpoints(tmp_path)
    with pytest.raises(CheckpointNotFound, match=f"give {run}/checkpoint_1, and its name pytorch_model as tag"):
        find_checkpoints(run / "checkpoint_1/pytorch_model")
    mixed = copied("plain")
    shutil.copytree(mixed / "global_step1", mixed / "checkpoints/global_step1")
    with pytest.raises(WindowError, match=f"more than one run: they lie in {mixed}, {mixed}/checkpoints"):
        last(mixed, 2)
    assert len(inspect_run(mixed)) == 5


def test_the_outputs_of_merges_in_a_run_are_no_checkpoints_of_it(copied: Copied) -> None:
    run = copied("folders")
    merge(run=run, last=2, curve="linear", out=run / "step_9")
    assert last(run, 4) == list(SERIES["folders"].tags)
    assert len(find_checkpoints(run / "step_9")) == 1


def test_one_checkpoint_is_named_by_its_folder_or_by_that_of_its_save(named: Path) -> None:
    save = named / "lightning/epoch=0-step=2.ckpt"
    assert checkpoint_at(save).path == checkpoint_at(save / "checkpoint").path == save / "checkpoint"
    for path in (named / "two/checkpoint_1", named / "plain", named):
        with pytest.raises(CheckpointNotFound, match=r"Give RUN/TAG"):
            checkpoint_at(path)


def test_composer_and_gpt_neox_are_told_by_their_own_files(copied: Copied) -> None:
    run = copied("plain")
    (run / "global_step1/configs").mkdir()  # `save_ds_checkpoint`, megatron/checkpointing.py of GPT-NeoX
    for step in (2, 3):
        save = run / f"ep0-ba{step}"  # composer/utils/checkpoint.py; its tar files, unpacked
        save.mkdir()
        (run / f"global_step{step}").rename(save / "deepspeed")
        (save / "composer_states.pt").touch()
    found = [(c.tag, c.saved_by, c.save_folder) for c in find_checkpoints(run)]
    assert found == [
        ("ep0-ba2/deepspeed", "Composer", run / "ep0-ba2"),
        ("ep0-ba3/deepspeed", "Composer", run / "ep0-ba3"),
        ("global_step1", "GPT-NeoX", run / "global_step1"),
        ("global_step4", "DeepSpeed", run / "global_step4"),
    ]


def test_a_fault_of_all_checkpoints_is_told_once(copied: Copied, capsys: pytest.CaptureFixture[str]) -> None:
    run = copied("plain")
    for file in run.glob("*/*zero_pp_rank_1*"):
        file.unlink()
    assert main(["merge", str(run), "--last", "2", "--out", str(run / "o")]) == 3
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("ranks' optimizer files are missing") == 1
    assert "global_step4, the newest checkpoint, cannot be read" in shown.err
    assert "None of the other 3 checkpoints can be read, either." in shown.err


def test_a_run_that_was_moved_is_merged_and_its_merges_are_verified(copied: Copied, tmp_path: Path) -> None:
    run = copied("lightning")
    merge(run=run, last=2, curve="linear", format="safetensors", out=tmp_path / "before")
    moved = run.rename(tmp_path / "moved")
    assert "the sources cannot be read any more" in verify(tmp_path / "before").note
    merge(run=moved, last=2, curve="linear", format="safetensors", out=tmp_path / "after")
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("before", "after")]
    assert same[0] == same[1]
    (tmp_path / "lightning").symlink_to(moved)
    assert verify(tmp_path / "before", full=True).note == ""
