"""What transformers makes of an output."""

from pathlib import Path

import pytest
import torch
from deepspeed_runs import launch
from reference import merged_parameters
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from wsm_ds.cli import main
from wsm_ds.errors import RecipeError
from wsm_ds.merging import merge
from wsm_ds.verification import verify

CASES = [(stage, tied) for stage in (2, 3) for tied in (True, False)]


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small Llamas trained with DeepSpeed: RUN/global_step2 and 4, and RUN/config.json."""
    root = tmp_path_factory.mktemp("llamas")
    base = {"do": "train", "model": "llama", "dtype": "bf16", "steps": 4, "every": 2}
    jobs = [base | {"stage": s, "tied": t, "run": str(root / f"{s}{t}")} for s, t in CASES]
    launch(jobs, world_size=2, folder=tmp_path_factory.mktemp("train"))
    return root


@pytest.mark.parametrize(("stage", "tied"), CASES)
def test_transformers_loads_a_merge_and_gives_the_reference_logits(
    llamas: Path, tmp_path: Path, stage: int, tied: bool
) -> None:
    run, out = llamas / f"{stage}{tied}", tmp_path / "out"
    options = ["--last", "2", "--format", "safetensors", "--dtype", "fp32", "--max-shard-size", "8KiB"]
    assert main(["merge", str(run), *options, "--include", str(run / "config.json"), "--out", str(out)]) == 0
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    wanted = merged_parameters([run / "global_step2", run / "global_step4"], [0.5, 0.5], stage)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in wanted) != tied
    for name, value in wanted.items():
        assert torch.equal(model.state_dict()[name], value), name
    reference = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    assert reference.load_state_dict(wanted, strict=False).unexpected_keys == []
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(model(tokens).logits, reference(tokens).logits)
    assert verify(out, full=True).note == ""


def test_names_are_changed_by_rules_and_never_made_equal(llamas: Path, tmp_path: Path) -> None:
    run = llamas / "2False"
    rules = ["--rename", r"^model\.=", "--rename", r"layers\.(\d+)=block\1"]
    assert main(["export", str(run), "--out", str(tmp_path / "out"), *rules]) == 0
    names = set(load_file(tmp_path / "out/model.safetensors"))
    assert {"embed_tokens.weight", "block0.mlp.up_proj.weight", "block1.input_layernorm.weight", "norm.weight"} <= names
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
