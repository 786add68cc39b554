"""What is not read is refused by its name, before anything is written; what is missing is named."""

import shutil
from pathlib import Path

import pytest
import torch
from deepspeed_runs import launch

from wsm_ds.errors import BrokenCheckpoint, UnsupportedLayout, WsmError
from wsm_ds.inspect import inspect_run
from wsm_ds.merging import merge


def refused(run: Path, error: type[WsmError], words: str) -> None:
    out = run.parent / "refused"
    with pytest.raises(error, match=words):
        merge(run=run, last=1, curve="linear", out=out)
    assert not out.exists()


@pytest.fixture(scope="module")
def legacy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with `"checkpoint_serialization": false`, which torch writes in its old format without a zip."""
    run = tmp_path_factory.mktemp("legacy") / "run"
    job = {"do": "train", "stage": 2, "dtype": "bf16", "steps": 2, "every": 2, "run": str(run)}
    config = {"checkpoint": {"checkpoint_serialization": False}}
    launch([job | {"config": config}], world_size=1, folder=tmp_path_factory.mktemp("train"))
    return run


def test_the_legacy_format_is_refused_with_the_setting_that_made_it(legacy: Path) -> None:
    refused(legacy, UnsupportedLayout, "checkpoint_serialization")
    (found,) = inspect_run(legacy)
    assert found.layout is None
    assert "legacy format" in str(found.problem)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("expp_rank_0_mp_rank_00_optim_states.pt", r"experts without ZeRO \(stage 0\)"),  # `engine.py:4383`
        ("offloaded_tensors", "NVMe"),  # a folder, `engine.py:4936-4952`
        ("mp_rank_00_model_states.pt-0.2", "fast writer"),  # `model_checkpointing/writer_factory.py:39-46`
    ],
)
def test_files_of_other_forms_are_refused_by_name(runs: Path, tmp_path: Path, name: str, words: str) -> None:
    """The names are those of DeepSpeed's source, beside a real checkpoint; the forms themselves need other hardware."""
    shutil.copytree(runs / "w2_s2_bf16/global_step6", tmp_path / "run/global_step6")
    (tmp_path / "run/global_step6" / name).touch()
    refused(tmp_path / "run", UnsupportedLayout, words)


def test_masters_that_were_offloaded_to_nvme_are_noticed_where_they_are_missing(runs: Path, tmp_path: Path) -> None:
    """Stage 3 then saves empty tensors in their place (`stage3.py`, `fp32_partitioned_groups_flat`)."""
    shutil.copytree(runs / "w2_s3_bf16/global_step6", tmp_path / "run/global_step6")
    path = next((tmp_path / "run/global_step6").glob("*rank_1*optim_states.pt"))
    state = torch.load(path, weights_only=False)
    state["optimizer_state_dict"]["fp32_flat_groups"][0] = torch.empty(0)
    torch.save(state, path)
    refused(tmp_path / "run", UnsupportedLayout, "offloaded to NVMe")


def test_node_local_storage_names_the_ranks_that_lie_elsewhere(runs: Path, tmp_path: Path) -> None:
    """A node's own folder has only its ranks' files: nothing is merged from half of a checkpoint."""
    for stage, missing in ((2, "optimizer files are missing: zero_pp_rank_1"), (3, "optimizer files are missing")):
        run = tmp_path / f"node{stage}"
        shutil.copytree(runs / f"w2_s{stage}_bf16/global_step6", run / "global_step6")
        for path in (run / "global_step6").glob("*zero_pp_rank_1_*"):
            path.unlink()
        with pytest.raises(BrokenCheckpoint, match=missing):
            merge(run=run, tags=("global_step6",), curve="linear", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
