"""Tensors of every sort in checkpoints that DeepSpeed wrote: merged as what they are, carried, or refused by name."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_runs import launch
from reference import average, load_all, merged_parameters, same_bits
from safetensors.torch import load_file

from wsm_ds.errors import LayoutMismatch, UnsupportedLayout, WsmError
from wsm_ds.merging import export, merge, reshard
from wsm_ds.verification import verify

COEFFICIENTS = [0.75, 0.25]
FORMS = [(0, "fp32"), (0, "bf16"), (2, "bf16"), (3, "bf16")]
CHANGES: dict[str, dict[str, Any]] = {
    "unfrozen": {"frozen": ["embedding.weight"]},
    "frozen": {"freezes": ["hidden.weight"]},
    "added": {"adds": True},
    "left_out": {"left_out": ["hidden.bias"]},
}
OPAQUE = {
    "quantized": "a quantized tensor",
    "sparse": "a sparse tensor",
    "conjugate": "a view with torch's conjugate or negative bit",
    "complex128": "complex128",
}
UNTRAINED = ("fixed", "quantized", "narrow", "turned", "unused.empty", "unused.frozen")
TORCH = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`RUNS/{model}_s{stage}_{dtype}` with global_step1 and 2; `RUNS/{change}_s{stage}` with global_step2 and 4."""
    root = tmp_path_factory.mktemp("tensors")
    base = {"do": "train", "engine": "tensors", "dtype": "bf16", "steps": 2, "every": 1, "warmup": 1}
    jobs = [
        base | {"model": model, "stage": stage, "dtype": dtype, "run": str(root / f"{model}_s{stage}_{dtype}")}
        for model in ("strided", "extra", "kinds")
        for stage, dtype in FORMS
    ]
    jobs += [
        {"do": "change", "model": "plain", "stage": stage, "dtype": "bf16", "run": str(root / f"{name}_s{stage}")}
        | change
        for name, change in CHANGES.items()
        for stage in (0, 1, 2, 3)
        if stage < 3 or name != "added"  # it does not train on with a parameter that it has not partitioned
    ]
    jobs += [base | {"model": "opaque", "kind": kind, "stage": 3, "run": str(root / kind)} for kind in OPAQUE]
    jobs.append(base | {"engine": "pipeline", "stage": 0, "mp": 2, "batch": "same", "run": str(root / "pipeline")})
    launch(jobs, world_size=2, folder=tmp_path_factory.mktemp("train"), worker="tensors_worker.py")
    return root


def checkpoints(run: Path) -> list[Path]:
    return sorted(run.glob("global_step*"))


def merged(run: Path, out: Path, **values: Any) -> Path:
    merge(run=run, last=2, coefficients=COEFFICIENTS, out=out, **values)
    assert verify(out, full=True).note == ""
    return out


def mean(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The merge of floating or complex tensors."""
    if tensors[0].is_complex():
        return torch.view_as_complex(mean([torch.view_as_real(tensor) for tensor in tensors]))
    if tensors[0].dtype == torch.float64:
        return tensors[0] * COEFFICIENTS[0] + tensors[1] * COEFFICIENTS[1]
    return average(tensors, COEFFICIENTS)


def expected_buffers(run: Path, rank: int) -> dict[str, torch.Tensor]:
    """A rank's merged buffers: sums of floating and complex ones, the newest of others."""
    older, newest = (load_all(path)[0][rank] for path in checkpoints(run))
    expected = {}
    for name in newest["buffer_names"]:
        pair = [older["module"][name], newest["module"][name]]
        is_summed = pair[1].is_complex() or (pair[1].is_floating_point() and pair[1].itemsize > 1)
        expected[name] = mean(pair) if is_summed else pair[1]
    return expected


def masters(run: Path, stage: int) -> dict[str, torch.Tensor]:
    """The merged masters."""
    if stage:
        return merged_parameters(checkpoints(run), COEFFICIENTS, stage)
    files = [load_all(path)[0][0] for path in checkpoints(run)]
    names = [name for name in files[0]["module"] if name not in (*files[0]["buffer_names"], *UNTRAINED)]
    if "fp32_groups" not in files[0]["optimizer"]:
        return {name: average([file["module"][name] for file in files], COEFFICIENTS) for name in names}
    columns = zip(*(file["optimizer"]["fp32_groups"][0] for file in files), strict=True)
    return {
        name: average([m.detach() for m in column], COEFFICIENTS) for name, column in zip(names, columns, strict=True)
    }


def refused(run: Path, error: type[WsmError], words: str, **values: Any) -> None:
    """Every format refuses, with `words`, and leaves nothing behind."""
    before = sorted(run.parent.iterdir())
    window: dict[str, Any] = {"last": 1, "coefficients": [1.0]} | values
    forms: list[dict[str, Any]] = [{}, {"format": "safetensors"}, {"format": "universal"}, {"world_size": 3}]
    for more in forms:
        with pytest.raises(error, match=words):
            merge(run=run, out=run.parent / "out", **window, **more)
    with pytest.raises(error, match=words):
        export(run, out=run.parent / "out")
    assert sorted(run.parent.iterdir()) == before


@pytest.mark.parametrize(("stage", "dtype"), FORMS)
def test_buffers_of_every_stride_are_merged_and_keep_their_strides(
    written: Path, tmp_path: Path, stage: int, dtype: str
) -> None:
    run = written / f"strided_s{stage}_{dtype}"
    out = merged(run, tmp_path / "out")
    newest, _ = load_all(checkpoints(run)[-1])
    assert not newest[0]["module"]["transposed"].is_contiguous()
    assert newest[0]["module"]["one_value"].untyped_storage().nbytes() == newest[0]["module"]["one_value"].itemsize
    for rank, model in load_all(out / "global_step2")[0].items():
        for name, tensor in expected_buffers(run, rank).items():
            stored, original = model["module"][name], newest[rank]["module"][name]
            assert torch.equal(stored, tensor), (rank, name)
            assert (stored.stride(), stored.storage_offset()) == (original.stride(), original.storage_offset()), name
        gaps = model["module"]["every_second"].as_strided((6,), (2,), 1)
        assert torch.equal(gaps, newest[rank]["module"]["every_second"].as_strided((6,), (2,), 1))


@pytest.mark.parametrize(("stage", "dtype"), FORMS)
def test_weights_of_every_stride_are_merged(written: Path, tmp_path: Path, stage: int, dtype: str) -> None:
    """ZeRO flattens in row-major order. At stage 0 the module may be channels_last while its masters are not."""
    run = written / f"strided_s{stage}_{dtype}"
    # In fp32 the files do not say which of Adam's states belongs to which weight if some weights are frozen.
    out = merged(run, tmp_path / "out", optimizer_states="carry" if (stage, dtype) == (0, "fp32") else "merge")
    model = load_all(out / "global_step2")[0][0]
    expected = masters(run, stage)
    assert {"kernel", "across"} < set(expected)
    if stage == 0:
        assert model["module"]["kernel"].is_contiguous(memory_format=torch.channels_last)
    if stage < 3:
        for name, tensor in expected.items():
            assert torch.equal(model["module"][name], tensor.to(TORCH[dtype])), name
        assert model["module"]["fixed"].stride() == (1, 3)
        assert torch.equal(model["module"]["fixed"], torch.arange(6).reshape(3, 2).to(TORCH[dtype]))
    if (stage, dtype) == (0, "bf16"):
        states = [load_all(path)[0][0]["optimizer"] for path in (*checkpoints(run), out / "global_step2")]
        moments = [state["optimizer_state_dict"]["state"] for state in states]
        for number, state in moments[2].items():
            pair = [moment[number]["exp_avg"] for moment in moments[:2]]
            assert torch.equal(state["exp_avg"], average(pair, COEFFICIENTS)), number


@pytest.mark.parametrize(("stage", "dtype"), FORMS)
def test_safetensors_hold_strided_tensors_in_row_major_order(
    written: Path, tmp_path: Path, stage: int, dtype: str
) -> None:
    run = written / f"strided_s{stage}_{dtype}"
    tensors = load_file(merged(run, tmp_path / "out", format="safetensors", dtype="fp32") / "model.safetensors")
    expected = expected_buffers(run, 0) | masters(run, stage)
    expected["fixed"] = torch.arange(6.0).reshape(3, 2)
    assert set(tensors) == set(expected)
    for name, tensor in expected.items():
        assert tensors[name].is_contiguous()
        assert same_bits(tensors[name], tensor), name


def test_a_window_may_mix_strides_unless_an_element_would_have_two_values(written: Path, tmp_path: Path) -> None:
    """What one checkpoint holds transposed, another may hold in row-major order; but what it holds once, not twice."""
    run, path = tmp_path / "run", "global_step1/mp_rank_00_model_states.pt"
    for name in ("transposed", "expanded"):
        for file in (written / "strided_s2_bf16").rglob("*_states.pt"):
            target = run / name / file.relative_to(written / "strided_s2_bf16")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
        content = torch.load(run / name / path, weights_only=False)
        content["module"][name] = content["module"][name].contiguous()
        torch.save(content, run / name / path)
    out = merged(run / "transposed", tmp_path / "out")
    stored = load_all(out / "global_step2")[0][0]["module"]["transposed"]
    assert stored.stride() == (1, 4)
    assert torch.equal(stored, expected_buffers(written / "strided_s2_bf16", 0)["transposed"])
    with pytest.raises(LayoutMismatch, match=r"holds expanded in the same bytes as others"):
        merged(run / "expanded", tmp_path / "refused")


def test_strided_tensors_survive_another_number_of_ranks_and_another_stage(written: Path, tmp_path: Path) -> None:
    for stage, target in ((2, 3), (3, 2), (2, 2)):
        run = written / f"strided_s{stage}_bf16"
        reshard(run, out=tmp_path / f"{stage}{target}", stage=target, world_size=3)
        again = tmp_path / f"{stage}{target}st"
        export(tmp_path / f"{stage}{target}", out=again)
        export(run, out=tmp_path / f"{again.name}-direct")
        assert (again / "model.safetensors").read_bytes() == (
            tmp_path / f"{again.name}-direct/model.safetensors"
        ).read_bytes()


@pytest.mark.parametrize(("stage", "dtype"), FORMS)
def test_extra_states_are_those_of_the_newest(
    written: Path, tmp_path: Path, stage: int, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = written / f"extra_s{stage}_{dtype}"
    newest, _ = load_all(checkpoints(run)[-1])
    outputs = [merged(run, tmp_path / "out"), merged(run, tmp_path / "dropped", optimizer_states="drop")]
    if stage:
        outputs += [merged(run, tmp_path / "other", stage=stage - 1), merged(run, tmp_path / "more", world_size=3)]
    for out in outputs:
        for rank, model in load_all(out / "global_step2")[0].items():
            original = newest[rank if rank in newest else 0]["module"]
            module = model["module"]
            assert list(module) == list(original)
            assert torch.equal(module["extra.tensor._extra_state"], torch.full((4,), 2.0))
            assert torch.equal(module["extra.size._extra_state"], torch.arange(2.0))
            assert module["extra.bytes._extra_state"].getvalue() == bytes([2] * 3)
            assert module["extra.none._extra_state"] is None
            held = module["extra.dict._extra_state"]
            assert torch.equal(held.pop("scale"), torch.full((2,), 2.0))
            assert held == {"passes": 2, "recipe": None}
            assert torch.equal(module["quantizer.absmax"], torch.arange(3.0))
    with caplog.at_level(logging.WARNING):
        tensors = load_file(merged(run, tmp_path / "st", format="safetensors") / "model.safetensors")
    assert not [name for name in tensors if "extra" in name]
    assert {"embedding.weight", "head.bias"} < set(tensors)
    assert torch.equal(tensors["quantizer.absmax"], torch.arange(3.0))
    assert "left out of safetensors" in caplog.text
    assert "extra.tensor._extra_state" in caplog.text


@pytest.mark.parametrize(("stage", "dtype"), FORMS)
def test_buffers_of_every_dtype_are_summed_or_those_of_the_newest(
    written: Path, tmp_path: Path, stage: int, dtype: str
) -> None:
    run = written / f"kinds_s{stage}_{dtype}"
    out = merged(run, tmp_path / "out")
    for rank, model in load_all(out / "global_step2")[0].items():
        expected = expected_buffers(run, rank)
        assert len(expected) == 10
        for name, tensor in expected.items():
            assert same_bits(model["module"][name], tensor), (rank, name)
    sources = [load_all(path)[0][0]["module"]["phases"] for path in checkpoints(run)]
    assert not torch.equal(sources[0], sources[1])
    assert not torch.equal(expected["phases"], sources[1])


@pytest.mark.parametrize(("stage", "dtype"), FORMS)
def test_only_floating_point_parameters_are_cast(written: Path, tmp_path: Path, stage: int, dtype: str) -> None:
    run = written / f"kinds_s{stage}_{dtype}"
    tensors = load_file(merged(run, tmp_path / "out", format="safetensors", dtype="fp16") / "model.safetensors")
    expected = expected_buffers(run, 0)
    for name, tensor in expected.items():
        assert same_bits(tensors[name], tensor), name
    assert tensors["hidden.weight"].dtype == tensors["unused.empty"].dtype == torch.float16
    assert (tensors["unused.empty"].shape, tensors["unused.frozen"].shape) == ((0, 4), (3, 0))
    if stage < 3:
        assert same_bits(tensors["quantized"], torch.arange(-4, 4, dtype=torch.int8))
        assert same_bits(tensors["narrow"], torch.ones(6).to(torch.float8_e5m2))
        assert same_bits(tensors["turned"], torch.tensor([1 + 2j, 3 - 4j]))


def test_odd_dtypes_survive_another_number_of_ranks(written: Path, tmp_path: Path) -> None:
    for source, stage in ((2, 2), (3, 2), (3, 3)):
        run = written / f"kinds_s{source}_bf16"
        reshard(run, out=tmp_path / f"{source}{stage}", world_size=3, stage=stage)
        export(tmp_path / f"{source}{stage}", out=tmp_path / f"{source}{stage}st")
        tensors, direct = tmp_path / f"{source}{stage}st", tmp_path / f"{source}{stage}direct"
        export(run, out=direct)
        assert (tensors / "model.safetensors").read_bytes() == (direct / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", OPAQUE)
def test_what_is_more_than_stored_elements_is_kept_and_is_refused_where_it_cannot_be_stored(
    written: Path, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = written / kind
    with caplog.at_level(logging.WARNING):
        outputs = [merged(run, tmp_path / "out"), merged(run, tmp_path / "two", stage=2, world_size=1)]
    assert (f"not compared or merged: table ({OPAQUE[kind]})" in caplog.text) == (kind != "complex128")
    expected = load_all(run / "global_step2")[0][0]["module"]["table"]
    for out in outputs:
        for model in load_all(out / "global_step2")[0].values():
            table = model["module"]["table"]
            assert (table.dtype, table.layout, table.is_conj()) == (expected.dtype, expected.layout, expected.is_conj())
            pair = [(x.dequantize() if kind == "quantized" else x.to_dense()) for x in (table, expected)]
            assert torch.equal(*pair)
    with pytest.raises(UnsupportedLayout, match=rf"table \({OPAQUE[kind]}\), which safetensors cannot store"):
        export(run, out=tmp_path / "refused")


def test_a_pipeline_without_zero_is_refused_by_its_name(written: Path) -> None:
    refused(written / "pipeline", UnsupportedLayout, "is of a PipelineModule at ZeRO stage 0.*Train with ZeRO stage 1")


UNSAVED = r"{} has no weights in any file: it was frozen when the optimizer was made and trainable when this was saved"


def test_stage_3_weights_that_deepspeed_did_not_save_are_refused_by_name(written: Path) -> None:
    path = written / "unfrozen_s3/global_step4/zero_pp_rank_0_mp_rank_00_model_states.pt"
    file = torch.load(path, weights_only=False)
    assert file["module"]["embedding.weight"].numel() == 0
    assert "embedding.weight" not in (*file["frozen_param_shapes"], *file["param_shapes"][0])
    refused(written / "unfrozen_s3", UnsupportedLayout, UNSAVED.format(r"embedding\.weight"))
    refused(written / "unfrozen_s3", UnsupportedLayout, UNSAVED.format(r"embedding\.weight"), last=2)
    refused(written / "left_out_s3", UnsupportedLayout, UNSAVED.format(r"hidden\.bias"))


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(("change", "name"), [("unfrozen", "embedding.weight"), ("left_out", "hidden.bias")])
def test_other_stages_save_what_the_optimizer_does_not_train_in_the_module(
    written: Path, tmp_path: Path, change: str, name: str, stage: int
) -> None:
    run = written / f"{change}_s{stage}"
    weight = load_all(run / "global_step4")[0][0]["module"][name]
    assert torch.equal(weight, load_all(run / "global_step2")[0][0]["module"][name])
    model = load_all(merged(run, tmp_path / "out") / "global_step4")[0][0]
    assert torch.equal(model["module"][name], weight)
    tensors = load_file(merged(run, tmp_path / "st", format="safetensors") / "model.safetensors")
    assert torch.equal(tensors[name], weight)
    if stage:
        reshard(run, out=tmp_path / "more", world_size=3)
        assert torch.equal(load_all(tmp_path / "more/global_step4")[0][0]["module"][name], weight)
    if stage == 2:
        with pytest.raises(UnsupportedLayout, match=rf"holds {name}, for which ZeRO stage 3 has no place"):
            reshard(run, out=tmp_path / "three", stage=3)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_parameter_that_is_frozen_later_is_merged_like_any_trained_one(
    written: Path, tmp_path: Path, stage: int
) -> None:
    """DeepSpeed loads it from `frozen_param_fragments`, so these are cast from the merged master, too."""
    run = written / f"frozen_s{stage}"
    expected = merged_parameters(checkpoints(run), COEFFICIENTS, stage)["hidden.weight"]
    tensors = load_file(merged(run, tmp_path / "st", format="safetensors", dtype="fp32") / "model.safetensors")
    assert torch.equal(tensors["hidden.weight"], expected)
    models = load_all(merged(run, tmp_path / "out") / "global_step4")[0]
    assert ("hidden.weight" in (models[0]["frozen_param_shapes"] or {})) == (stage > 1)
    if stage == 3:
        pieces = [models[rank]["frozen_param_fragments"]["hidden.weight"] for rank in sorted(models)]
        assert torch.equal(torch.cat(pieces), expected.flatten().bfloat16())
    if stage == 2:
        assert torch.equal(models[0]["frozen_param_fragments"]["hidden.weight"], expected.bfloat16())
        # On a GPU DeepSpeed copies frozen weights to the CPU, so the file holds them twice.
        apart = tmp_path / "apart"
        shutil.copytree(run, apart)
        path = apart / "global_step4/mp_rank_00_model_states.pt"
        file = torch.load(path, weights_only=False)
        file["frozen_param_fragments"]["hidden.weight"] = file["module"]["hidden.weight"].clone()
        torch.save(file, path)
        model = load_all(merged(apart, tmp_path / "twice") / "global_step4")[0][0]
        for entry in ("module", "frozen_param_fragments"):
            assert torch.equal(model[entry]["hidden.weight"], expected.bfloat16())
    if stage < 3:
        assert torch.equal(models[0]["module"]["hidden.weight"], expected.bfloat16())


@pytest.mark.parametrize("stage", [1, 2])
def test_a_parameter_that_is_added_later_is_in_no_older_checkpoint(written: Path, tmp_path: Path, stage: int) -> None:
    run = written / f"added_s{stage}"
    with pytest.raises(LayoutMismatch, match=r"more\.added: absent against frozen \[5\]"):
        merge(run=run, last=2, coefficients=COEFFICIENTS, out=tmp_path / "refused")
    export(run, out=tmp_path / "st")
    assert torch.equal(load_file(tmp_path / "st/model.safetensors")["more.added"], torch.arange(5.0).bfloat16())
    reshard(run, out=tmp_path / "more", world_size=3)
    for model in load_all(tmp_path / "more/global_step4")[0].values():
        assert torch.equal(model["module"]["more.added"], torch.arange(5.0).bfloat16())


def test_deepspeed_loads_merges_of_odd_tensors(
    written: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    jobs: list[dict[str, Any]] = [
        {"do": "load", "engine": "tensors", "model": model, "stage": stage, "dtype": dtype, "steps": 1,
         "root": str(merged(written / f"{model}_s{stage}_{dtype}", tmp_path / f"{model}{stage}{dtype}")),
         "dump": str(tmp_path / f"{model}{stage}{dtype}.dump")}
        for model in ("strided", "kinds")
        for stage, dtype in FORMS
    ]  # fmt: skip
    launch(jobs, world_size=2, folder=tmp_path_factory.mktemp("load"), worker="tensors_worker.py")
    for job in jobs:
        run = written / f"{job['model']}_s{job['stage']}_{job['dtype']}"
        for rank in (0, 1):
            loaded = torch.load(f"{job['dump']}.rank{rank}")
            for name, tensor in expected_buffers(run, rank if job["stage"] == 3 else 0).items():
                assert same_bits(loaded["buffers"][name].contiguous(), tensor.contiguous()), (job["dump"], name)
            for name, tensor in masters(run, job["stage"]).items():
                assert torch.equal(loaded["module"][name], tensor.to(TORCH[job["dtype"]])), (job["dump"], name)
