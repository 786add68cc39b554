"""HF Trainer with DeepSpeed and WSMLR: transformers loads a merge of its run, and Trainer resumes from it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_runs import launch
from reference import merged_masters, merged_parameters
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from wsm_ds.cli import main
from wsm_ds.errors import RecipeError
from wsm_ds.inspect import inspect_run
from wsm_ds.merging import merge, reshard
from wsm_ds.verification import verify

CASES = [(stage, tied) for stage in (2, 3) for tied in (True, False)]
COEFFICIENTS = [0.5, 0.3, 0.2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ROOT/{stage}{tied}/checkpoint-{2,4,6}/global_step{2,4,6}`, and Trainer's report beside it."""
    root = tmp_path_factory.mktemp("trainer")
    jobs = [job(root / f"{stage}{tied}", stage, tied, max_steps=6) for stage, tied in CASES]
    reports = launch(jobs, world_size=2, folder=tmp_path_factory.mktemp("train"), worker="trainer_worker.py")
    for done, report in zip(jobs, reports[0], strict=True):
        Path(done["run"], "report.json").write_text(json.dumps(report))
    return root


def job(run: Path, stage: int, tied: bool, **values: Any) -> dict[str, Any]:
    return {"run": str(run), "stage": stage, "tied": tied, "dump": f"{run}.masters", **values}


def sources(run: Path) -> list[Path]:
    return [run / f"checkpoint-{step}/global_step{step}" for step in (2, 4, 6)]


@pytest.mark.parametrize(("stage", "tied"), CASES)
def test_transformers_loads_the_merge_of_a_trainer_run(trained: Path, tmp_path: Path, stage: int, tied: bool) -> None:
    """config.json lies beside the newest checkpoint and comes along by itself."""
    run, out = trained / f"{stage}{tied}", tmp_path / "out"
    assert [i.layout is not None for i in inspect_run(run)] == [True] * 3
    common = {"format": "safetensors", "dtype": "fp32", "max_shard_size": "8KiB"}
    merge(run=run, last=3, coefficients=COEFFICIENTS, out=out, **common)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    wanted = merged_parameters(sources(run), COEFFICIENTS, stage)
    reference = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    assert reference.load_state_dict(wanted, strict=False).unexpected_keys == []
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(model(tokens).logits, reference(tokens).logits)
    for name, value in wanted.items():
        assert torch.equal(model.state_dict()[name], value), name
    names = {path.name for path in out.iterdir() if not path.name.endswith(".safetensors")}
    assert names == {"config.json", "generation_config.json", "model.safetensors.index.json", "wsm_merge.json"}
    assert verify(out, full=True).note == ""


def test_trainer_resumes_from_the_merged_folder(
    trained: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    jobs = []
    for stage, tied in CASES:
        run, out = trained / f"{stage}{tied}", tmp_path / f"{stage}{tied}-merged"
        merge(run=run, last=3, coefficients=COEFFICIENTS, out=out)
        carried = {path.name for path in out.iterdir() if path.is_file()} - {"latest", "wsm_merge.json"}
        newest = run / "checkpoint-6"
        held = {path.name for path in newest.iterdir() if path.is_file()}
        assert carried == held - {"latest", "model.safetensors"}
        assert {"trainer_state.json", "rng_state_0.pth", "rng_state_1.pth", "training_args.bin"} <= carried
        assert all((out / name).read_bytes() == (newest / name).read_bytes() for name in carried)
        assert verify(out, full=True).note == ""
        jobs.append(job(tmp_path / f"{stage}{tied}", stage, tied, max_steps=9, resume=str(out)))
    reports = launch(jobs, world_size=2, folder=tmp_path_factory.mktemp("resume"), worker="trainer_worker.py")
    for rank, reported in enumerate(reports):
        for done, report, (stage, tied) in zip(jobs, reported, CASES, strict=True):
            assert report["steps"] == [6, 7, 8]
            assert report["rates"] == [0.01] * 3
            assert all(math.isfinite(loss) for loss in report["losses"])
            wanted = merged_masters(sources(trained / f"{stage}{tied}"), COEFFICIENTS)[rank]
            for got, partition in zip(torch.load(f"{done['dump']}.rank{rank}"), wanted, strict=True):
                assert torch.equal(got[: partition.numel()], partition)


def test_a_trainer_run_used_the_rates_of_the_schedule(trained: Path) -> None:
    for stage, tied in CASES:
        report = json.loads((trained / f"{stage}{tied}/report.json").read_text())
        assert report["rates"] == [0.005, 0.01, 0.01, 0.01, 0.01, 0.01]


def test_a_resharded_trainer_folder_keeps_trainers_files(trained: Path, tmp_path: Path) -> None:
    reshard(trained / "2True", "checkpoint-4", tmp_path / "out", world_size=3)
    assert json.loads((tmp_path / "out/trainer_state.json").read_text())["global_step"] == 4
    assert len(list((tmp_path / "out/global_step4").glob("*_optim_states.pt"))) == 3


def test_names_are_changed_by_rules_and_never_made_equal(trained: Path, tmp_path: Path) -> None:
    run = trained / "2False"
    rules = ["--rename", r"^model\.=", "--rename", r"layers\.(\d+)=block\1", "--include", str(run / "report.json")]
    assert main(["export", str(run), "--out", str(tmp_path / "out"), *rules]) == 0
    names = set(load_file(tmp_path / "out/model.safetensors"))
    assert {"embed_tokens.weight", "block0.mlp.up_proj.weight", "block1.input_layernorm.weight", "norm.weight"} <= names
    assert (tmp_path / "out/report.json").is_file()
    common = {"run": run, "last": 1, "curve": "linear", "format": "safetensors", "out": tmp_path / "no"}
    with pytest.raises(RecipeError, match=r"the name 'x', which .* has already"):
        merge(**common, rename={".*proj.*": "x"})
    with pytest.raises(RecipeError, match="not a regular expression"):
        merge(**common, rename={"(": "x"})
    with pytest.raises(RecipeError, match="rename is for safetensors"):
        merge(**common | {"format": "zero"}, rename={"a": "b"})
    with pytest.raises(RecipeError, match=r"nothing\.json is not a file"):
        merge(**common, include=(run / "nothing.json",))
    assert not (tmp_path / "no").exists()
