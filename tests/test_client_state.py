"""What a training program saves beside the model, as Megatron-DeepSpeed does, comes back from a merge unchanged."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from client_values import VALUES
from deepspeed_runs import launch
from lazy import torch
from reference import load_all, same_tree

from wsm_ds.merging import merge
from wsm_ds.verification import verify

STAGES = (1, 2, 3)
KEYS = ("args", "checkpoint_version", "iteration", "tokens", "rng_state", "losses", "seen")
UNIVERSAL = {"config": {"checkpoint": {"load_universal": True}}}
FORMS: dict[str, dict[str, Any]] = {
    "carry": {},
    "drop": {"optimizer_states": "drop"},
    "universal": {"format": "universal"},
    "3 ranks": {"world_size": 3},
    "3 ranks, stage 3": {"world_size": 3, "stage": 3},
    "3 ranks, stage 2, drop": {"world_size": 3, "stage": 2, "optimizer_states": "drop"},
}


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`RUNS/{stage}/global_step2` and 4 from two ranks, each with a client state."""
    root = tmp_path_factory.mktemp("megatron")
    base = {"do": "train", "dtype": "bf16", "steps": 4, "every": 2, "megatron": True}
    jobs = [base | {"stage": stage, "run": str(root / str(stage))} for stage in STAGES]
    launch(jobs, world_size=2, folder=tmp_path_factory.mktemp("train"))
    return root


def client_states(checkpoint: Path) -> dict[int, dict[str, Any]]:
    """By rank, or of rank 0 alone where there is one model file."""
    return {rank: {key: model[key] for key in KEYS} for rank, model in load_all(checkpoint)[0].items()}


def test_ranks_and_steps_differ_so_that_a_mistake_shows(megatron: Path) -> None:
    states = client_states(megatron / "3/global_step4")
    assert not same_tree(states[0], states[1])
    assert not same_tree(states[0], client_states(megatron / "3/global_step2")[0])


@pytest.mark.parametrize("world_size", [2, 3])
def test_deepspeed_returns_the_newest_client_state_from_every_form(
    megatron: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, world_size: int
) -> None:
    jobs, wanted = [], []
    for stage in STAGES:
        for number, values in enumerate(FORMS.values()):
            if values.get("world_size", 2) != world_size:
                continue
            out = tmp_path / f"{stage}-{number}"
            merge(run=megatron / str(stage), last=2, curve="linear", out=out, **values)
            assert verify(out, full=True).note == ""
            form = {"stage": values.get("stage", stage), **(UNIVERSAL if "format" in values else {})}
            jobs.append({"do": "load", "dtype": "bf16", "root": str(out), "dump": str(out / "dump"), **form})
            wanted.append(client_states(megatron / str(stage) / "global_step4"))
    reports = launch(jobs, world_size=world_size, folder=tmp_path_factory.mktemp("load"))
    for rank, reported in enumerate(reports):
        for job, report, states in zip(jobs, reported, wanted, strict=True):
            assert report["global_steps"] == 4
            held = torch.load(f"{job['dump']}.rank{rank}", weights_only=False)["client_state"]
            keeps_ranks = job["stage"] == 3 and "config" not in job
            for key, value in states[rank if keeps_ranks and rank in states else 0].items():
                assert same_tree(held[key], value), (job["root"], rank, key)


def test_files_that_are_written_anew_name_the_same_globals(megatron: Path, tmp_path: Path) -> None:
    """Nothing of ours, and nothing less, is in the pickle: a program without wsm_ds reads it."""
    out = tmp_path / "out"
    merge(run=megatron / "2", last=1, curve="linear", out=out, world_size=4)
    name = "mp_rank_00_model_states.pt"
    names = [
        set(torch.serialization.get_unsafe_globals_in_checkpoint(root / "global_step4" / name))
        for root in (megatron / "2", out)
    ]
    assert names[0] == names[1]
    assert "argparse.Namespace" in names[0]


def state_of(value: Any) -> Any:
    """A random generator's state, for a comparison; a sparse tensor as a dense one; any other value itself."""
    if torch.is_tensor(value):
        return tuple(value.shape) if value.is_meta else value.to_dense()
    for name in ("getstate", "get_state"):
        if hasattr(value, name):
            return getattr(value, name)()
    return value.bit_generator.state if hasattr(value, "bit_generator") else value


@pytest.mark.parametrize("form", ["carry", "drop", "universal", "3 ranks"])
def test_plain_values_of_every_library_come_back_from_every_form(runs: Path, tmp_path: Path, form: str) -> None:
    values = {name: make() for name, make in VALUES.items()}
    run = tmp_path / "run"
    shutil.copytree(runs / "w2_s2_bf16/global_step4", run / "global_step4")
    model = run / "global_step4/mp_rank_00_model_states.pt"
    torch.save(torch.load(model, weights_only=False) | {"kept": values}, model)
    merge(run=run, last=1, curve="linear", out=tmp_path / "out", allow=("warmup",), **FORMS[form])
    (merged,) = (tmp_path / "out").glob("*/mp_rank_00_model_states.pt")
    kept = torch.load(merged, weights_only=False)["kept"]
    assert list(kept) == list(values)
    for name, value in values.items():
        pairs = zip(kept[name], value, strict=True) if isinstance(value, list) else [(kept[name], value)]
        for held, wanted in pairs:
            held, wanted = state_of(held), state_of(wanted)
            assert type(held) is type(wanted), name
            assert same_tree(held, wanted) or repr(held) == repr(wanted), name
