"""Stage 0 masters that no longer differ once rounded: told apart by the optimizer's order, or refused."""

from pathlib import Path

import pytest
import torch
from deepspeed_runs import launch
from reference import average, load_all
from safetensors.torch import load_file

from wsm_ds.errors import UnsupportedLayout
from wsm_ds.merging import merge

PLAIN = ["first.weight", "first.bias", "second.weight", "second.bias", "head.bias"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("alike")
    base = {"do": "train", "stage": 0, "dtype": "bf16", "alike": True, "lr": 1e-5, "steps": 4, "every": 2}
    jobs = [base | {"run": str(root / name), "reversed": name == "reversed"} for name in ("in order", "reversed")]
    launch(jobs, world_size=1, folder=tmp_path_factory.mktemp("train"))
    return root


def plain_masters(checkpoint: Path) -> list[torch.Tensor]:
    return load_all(checkpoint)[0][0]["optimizer"]["fp32_groups"][1]


def test_the_norms_are_alike_in_the_module_but_not_in_the_masters(written: Path) -> None:
    module = load_all(written / "in order/global_step4")[0][0]["module"]
    first, _, second, *_ = plain_masters(written / "in order/global_step4")
    assert torch.equal(module["first.weight"], module["second.weight"])
    assert not torch.equal(first, second)


def test_groups_in_the_modules_order_tell_which_master_is_whose(written: Path, tmp_path: Path) -> None:
    run = written / "in order"
    merge(run=run, last=2, coefficients=[0.7, 0.3], out=tmp_path / "out", format="safetensors", dtype="fp32")
    tensors = load_file(tmp_path / "out/model.safetensors")
    columns = zip(*(plain_masters(run / f"global_step{step}") for step in (2, 4)), strict=True)
    for name, column in zip(PLAIN, columns, strict=True):
        assert torch.equal(tensors[name], average([master.detach() for master in column], [0.7, 0.3])), name


def test_another_order_is_refused_rather_than_guessed(written: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedLayout, match=r"may be any of first\.weight, second\.weight"):
        merge(run=written / "reversed", last=2, curve="linear", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
