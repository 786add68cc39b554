"""Runs of older DeepSpeed, merged, and loaded by the version that wrote them. `docs/supported.md` shows the results.

Each version is installed from PyPI into a folder of its own; its ranks import it instead of the environment's. The
merges run here, beside the newest DeepSpeed. Only with `-m old_deepspeed`.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from old_deepspeed_runs import install, launch
from reference import average, load_all, merged_masters, merged_parameters, parameters, partitions, unpadded, whole
from safetensors.torch import load_file

from wsm_ds.errors import BrokenCheckpoint
from wsm_ds.merging import export, merge, reshard

VERSIONS = ("0.14.5", "0.15.4", "0.16.9", "0.17.6", "0.18.9", "0.19.8")
"""The newest patch of each."""
FORMS: dict[str, dict[str, Any]] = {
    "BF16_Optimizer": {"stage": 1, "config": {"data_types": {"grad_accum_dtype": "fp32"}}},
    "stage1": {"stage": 1, "config": {}},
    "stage2": {"stage": 2, "config": {}},
    "stage3": {"stage": 3, "config": {}},
}
OPTIMIZERS = ["BF16_Optimizer", "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"]
WITHOUT_OPTIMIZER = ("0.17.6", "BF16_Optimizer")
"""Here DeepSpeed makes an FP16_UnfusedOptimizer and saves none of it, because `BFLOAT16` and `DDP_BFLOAT16` are equal
(runtime/constants.py:127 and 141, runtime/engine.py:1464)."""
COEFFICIENTS = [0.25, 0.75]


@dataclass(frozen=True)
class Old:
    """A version with what it wrote: `RUNS/FORM/global_step2` and `global_step4`, from two ranks."""

    version: str
    deepspeed: Path
    runs: Path
    optimizers: list[str]

    @property
    def forms(self) -> list[str]:
        """Those whose optimizer was saved."""
        return [form for form in FORMS if (self.version, form) != WITHOUT_OPTIMIZER]

    def checkpoints(self, form: str) -> list[Path]:
        return [self.runs / form / "global_step2", self.runs / form / "global_step4"]

    def load(self, roots: dict[str, Path], world_size: int, folder: Path) -> dict[str, list[dict[str, Any]]]:
        """What each rank holds after a load of each form's root, with its report."""
        jobs = [{"do": "load", **FORMS[f], "root": str(root), "dump": f"{root}.held"} for f, root in roots.items()]
        reports = launch(jobs, deepspeed=self.deepspeed, world_size=world_size, folder=folder)
        return {
            form: [torch.load(f"{root}.held.rank{rank}") | reports[rank][number] for rank in range(world_size)]
            for number, (form, root) in enumerate(roots.items())
        }


@pytest.fixture(scope="module", params=VERSIONS)
def old(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Old:
    folder = tmp_path_factory.mktemp(request.param)
    install(request.param, folder / "deepspeed")
    jobs = [{"do": "train", **values, "run": str(folder / "runs" / form)} for form, values in FORMS.items()]
    reports, _ = launch(jobs, deepspeed=folder / "deepspeed", world_size=2, folder=folder / "train")
    assert {report["version"] for report in reports} == {request.param}
    return Old(request.param, folder / "deepspeed", folder / "runs", [report["optimizer"] for report in reports])


@pytest.fixture(scope="module")
def merged(old: Old, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A merge of the two checkpoints, for each form."""
    outs = {form: tmp_path_factory.mktemp("merged") / form for form in old.forms}
    for form, out in outs.items():
        merge(run=old.runs / form, last=2, coefficients=tuple(COEFFICIENTS), out=out)
    return outs


def test_the_files_are_of_that_version_and_hold_what_the_forms_name(old: Old) -> None:
    saved = load_all(old.runs / "stage2/global_step4")[0][0]
    assert saved["ds_version"] == old.version
    assert saved["param_shapes"][0].keys() == {"embedding.weight", "hidden.weight", "head.weight"}
    assert len(saved["param_shapes"]) == 2
    unsaved = old.version == WITHOUT_OPTIMIZER[0]
    assert old.optimizers == (["FP16_UnfusedOptimizer", *OPTIMIZERS[1:]] if unsaved else OPTIMIZERS)


def test_the_merge_equals_the_reference_bit_for_bit(old: Old, merged: dict[str, Path]) -> None:
    for form, out in merged.items():
        stage = FORMS[form]["stage"]
        models, optims = load_all(out / "global_step4")
        wanted = merged_masters(old.checkpoints(form), COEFFICIENTS)
        for rank, optim in optims.items():
            columns = zip(
                unpadded(models, partitions(optim), rank, stage),
                unpadded(models, wanted[rank], rank, stage),
                strict=True,
            )
            assert all(torch.equal(got, expected) for got, expected in columns), (form, rank)


def test_that_version_loads_the_merge_and_trains_on(old: Old, merged: dict[str, Path], tmp_path: Path) -> None:
    losses = {}
    for form, ranks in old.load(merged, 2, tmp_path / "load").items():
        stage, checkpoints = FORMS[form]["stage"], old.checkpoints(form)
        assert [rank["global_steps"] for rank in ranks] == [4, 4]
        expected = merged_parameters(checkpoints, COEFFICIENTS, stage)
        assert_holds(ranks, merged[form] / "global_step4", stage, expected, checkpoints[-1])
        sources = [load_all(checkpoint)[0] for checkpoint in checkpoints]
        for number, rank in enumerate(ranks):  # in stage 3 each rank saves its own buffers
            saved = [source[number if stage == 3 else 0]["module"]["running_mean"] for source in sources]
            assert torch.equal(rank["buffers"]["running_mean"], average(saved, COEFFICIENTS)), form
        losses[form] = ranks[0]["losses"]
    for form in losses:
        assert losses[form] == pytest.approx(losses["stage2"], rel=0.05), losses


def test_that_version_loads_one_rank_s_form_of_two_ranks_checkpoint(old: Old, tmp_path: Path) -> None:
    roots = {form: tmp_path / form for form in old.forms}
    for form, root in roots.items():
        reshard(old.runs / form, out=root, world_size=1)
    for form, ranks in old.load(roots, 1, tmp_path / "load").items():
        stage, newest = FORMS[form]["stage"], old.checkpoints(form)[-1]
        assert ranks[0]["global_steps"] == 4
        assert_holds(ranks, roots[form] / "global_step4", stage, merged_parameters([newest], [1.0], stage), newest)
        assert all(map(math.isfinite, ranks[0]["losses"])), (form, ranks[0]["losses"])


def assert_holds(
    ranks: list[dict[str, Any]], loaded: Path, stage: int, expected: dict[str, torch.Tensor], newest: Path
) -> None:
    """Every rank's masters and weights are the expected parameters; the moments are the newest checkpoint's."""
    models, _ = load_all(loaded)
    held = parameters(models, {number: rank["masters"] for number, rank in enumerate(ranks)}, stage)
    assert held.keys() == expected.keys()
    for name, wanted in expected.items():
        assert torch.equal(held[name], wanted), name
        assert all(torch.equal(rank["module"][name], wanted.bfloat16()) for rank in ranks), name
    carried = whole(newest, stage)
    for kind in ("exp_avg", "exp_avg_sq"):
        flats = {number: [state[kind] for state in rank["moments"]] for number, rank in enumerate(ranks)}
        for name, moment in parameters(models, flats, stage).items():
            assert torch.equal(moment, carried[kind][name]), (kind, name)


def test_export_writes_the_masters_as_safetensors(old: Old, tmp_path: Path) -> None:
    for form in old.forms:
        export(old.runs / form, out=tmp_path / form, dtype="fp32")
        tensors = load_file(tmp_path / form / "model.safetensors")
        assert tensors.pop("running_mean").shape == (9,)
        wanted = merged_parameters(old.checkpoints(form)[-1:], [1.0], FORMS[form]["stage"])
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[name], wanted[name]) for name in wanted), form


@pytest.mark.parametrize("old", [WITHOUT_OPTIMIZER[0]], indirect=True, scope="module")
def test_a_checkpoint_without_its_optimizer_is_refused(old: Old, tmp_path: Path) -> None:
    form = WITHOUT_OPTIMIZER[1]
    with pytest.raises(BrokenCheckpoint, match=r"has no optimizer files: .* DeepSpeed saved none: 0\.17\.6"):
        merge(run=old.runs / form, last=2, coefficients=tuple(COEFFICIENTS), out=tmp_path / "out")
    with pytest.raises(AssertionError, match="'FP16_UnfusedOptimizer' object has no attribute 'dp_process_group'"):
        old.load({form: old.runs / form}, 2, tmp_path / "load")  # DeepSpeed cannot load it, either
