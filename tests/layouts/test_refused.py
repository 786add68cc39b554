"""Checkpoints that DeepSpeed writes and that are not read: refused by name, before anything appears."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deepspeed_runs import launch
from lazy import load_file, torch

from wsm_ds.errors import BrokenCheckpoint, UnsupportedLayout, WsmError
from wsm_ds.inspection import inspect_run
from wsm_ds.merging import export, merge
from wsm_ds.verification import verify

LEGACY = {"config": {"checkpoint": {"checkpoint_serialization": False}}}
PYTHON_WRITER = {"config": {"checkpoint": {"writer": {"type": "PYTHON"}}}}
NODE_LOCAL = {"config": {"checkpoint": {"use_node_local_storage": True}}, "node_local": True}
STAGES = (2, 3)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`RUNS/{plain,legacy,writer}{stage}` and, a folder a node of one rank each, `RUNS/local{stage}/node{rank}`."""
    root = tmp_path_factory.mktemp("refused")
    kinds: dict[str, dict[str, Any]] = {"plain": {}, "legacy": LEGACY, "writer": PYTHON_WRITER, "local": NODE_LOCAL}
    jobs = [
        {"do": "train", "stage": stage, "dtype": "bf16", "steps": 2, "every": 2, "run": str(root / f"{kind}{stage}")}
        | values
        for stage in STAGES
        for kind, values in kinds.items()
        if stage == 3 or kind != "writer"  # without an mpu DeepSpeed cannot set a writer up in stages 1 and 2
    ]
    launch(jobs, world_size=2, folder=tmp_path_factory.mktemp("train"))
    return root


def refused(run: Path, error: type[WsmError], words: str) -> None:
    """A merge and an export stop with `words`, `inspect` says them, and nothing is left behind."""
    before = sorted(run.parent.iterdir())
    for values in ({}, {"format": "safetensors"}, {"world_size": 4}):
        with pytest.raises(error, match=words):
            merge(run=run, tags=("global_step2",), coefficients=(1.0,), out=run.parent / "out", **values)
    with pytest.raises(error, match=words):
        export(run, tag="global_step2", out=run.parent / "out")
    assert sorted(run.parent.iterdir()) == before
    (found,) = inspect_run(run)
    assert found.layout is None


@pytest.mark.parametrize("stage", STAGES)
def test_torchs_legacy_format_is_refused_with_the_setting_that_causes_it(written: Path, stage: int) -> None:
    run = written / f"legacy{stage}"
    assert not any(path.read_bytes().startswith(b"PK") for path in run.rglob("*.pt"))
    words = r"global_step2/.*mp_rank_00_model_states\.pt is in torch's legacy format.*checkpoint_serialization"
    refused(run, UnsupportedLayout, words)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("rank", [0, 1])
def test_the_folder_of_one_node_names_the_ranks_whose_files_lie_elsewhere(written: Path, stage: int, rank: int) -> None:
    """`use_node_local_storage`: each node has its own ranks' files, and in stages 1 and 2 a model file."""
    run = written / f"local{stage}/node{rank}"
    assert len(list((run / "global_step2").glob("*_model_states.pt"))) == 1
    assert [path.name.split("_")[4] for path in (run / "global_step2").glob("*_optim_states.pt")] == [str(rank)]
    missing = f"(bf16_)?zero_pp_rank_{1 - rank}_mp_rank_00_optim_states.pt"
    refused(run, BrokenCheckpoint, f"1 of 2 ranks' optimizer files are missing: {missing}")


@pytest.mark.parametrize("stage", STAGES)
def test_the_folders_of_all_nodes_put_together_are_the_checkpoint(written: Path, tmp_path: Path, stage: int) -> None:
    """Tied names are recognized in node 1's model file, too, in which DeepSpeed leaves `shared_params` empty."""
    for rank in (0, 1):
        shutil.copytree(written / f"local{stage}/node{rank}", tmp_path / "run", dirs_exist_ok=True)
    for run, out in ((tmp_path / "run", tmp_path / "one"), (written / f"plain{stage}", tmp_path / "two")):
        export(run, out=out, dtype="fp32")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert list(one) == list(two)
    assert "head.weight" not in one
    assert all(torch.equal(one[name], two[name]) for name in one if name != "running_mean")  # a rank's own


@pytest.fixture
def plain(written: Path, tmp_path: Path) -> Callable[[int], Path]:
    """A copy of the plain run of a stage, to be put into a form that needs hardware to write."""

    def copy(stage: int) -> Path:
        return shutil.copytree(written / f"plain{stage}", tmp_path / f"plain{stage}")

    return copy


def test_nvme_offload_is_refused_by_its_folder_and_by_its_empty_masters(plain: Callable[[int], Path]) -> None:
    """The form of `runtime/engine.py:4937` and `runtime/zero/stage3.py:1118`: writing it needs libaio.

    Masters and states are raw files `offloaded_tensors/rankNN/ID.tensor.swp`, `fp32_flat_groups` are empty.
    """
    run = plain(3)
    for rank in (0, 1):
        path = run / f"global_step2/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        content = torch.load(path, weights_only=False)
        state = content["optimizer_state_dict"]
        folder = run / f"global_step2/offloaded_tensors/rank{rank:02d}"
        folder.mkdir(parents=True)
        for number, flat in enumerate(state["fp32_flat_groups"]):
            flat.detach().numpy().tofile(folder / f"{number}.tensor.swp")
            state["fp32_flat_groups"][number] = torch.empty(0)
        state["optimizer_state_dict"]["state"] = {}
        torch.save(content, path)
    refused(run, UnsupportedLayout, "holds NVMe-offloaded optimizer states .offloaded_tensors")
    shutil.rmtree(run / "global_step2/offloaded_tensors")
    refused(
        run, UnsupportedLayout, r"optim_states\.pt: master of the sub-group of .* is empty: it was offloaded to NVMe"
    )


def test_pieces_of_the_fast_writer_are_refused(plain: Callable[[int], Path]) -> None:
    """The form of `runtime/model_checkpointing/writer_factory.py:39-46`: writing it needs libaio."""
    run = plain(2)
    for path in list((run / "global_step2").glob("*_states.pt")):
        data = path.read_bytes()
        for writer in (0, 1):
            half = data[writer * len(data) // 2 : (writer + 1) * len(data) // 2]
            path.with_name(f"{path.name}-{writer}.2").write_bytes(half)
        path.unlink()
    refused(run, UnsupportedLayout, r"pieces written by DeepSpeed's fast writer \(.*\.pt-0\.2")


def test_files_of_the_python_writer_are_read_like_any_other(written: Path, tmp_path: Path) -> None:
    for kind in ("writer", "plain"):
        export(written / f"{kind}3", out=tmp_path / kind, dtype="fp32")
    model = "model.safetensors"
    assert (tmp_path / "writer" / model).read_bytes() == (tmp_path / "plain" / model).read_bytes()
    assert verify(tmp_path / "writer", full=True).note == ""


def test_stage_0_experts_are_refused_by_their_files_name(plain: Callable[[int], Path]) -> None:
    """The name of `runtime/engine.py:4383`, beside a real checkpoint."""
    run = plain(2)
    (run / "global_step2/expp_rank_0_mp_rank_00_optim_states.pt").touch()
    refused(run, UnsupportedLayout, r"experts without ZeRO \(stage 0\)")
