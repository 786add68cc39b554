"""Golden checkpoints that DeepSpeed wrote (`golden/write_golden.py`), read and merged without torch or DeepSpeed."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from wsm_ds.dtypes import ALL
from wsm_ds.layouts import Layout, find_checkpoints, read_layout
from wsm_ds.merging import export, merge
from wsm_ds.verification import verify

GOLDEN = Path(__file__).parent.parent / "golden"
TAGS = ("global_step1", "global_step2")
COEFFICIENTS = (0.25, 0.75)
RUNS = {"stage0_fp32": 0, "zero1_bf16": 1, "bf16_optimizer": 1, "zero2_bf16": 2, "zero3_bf16": 3}
"""ZeRO stage of each run."""
TRAINED = {
    "embedding.weight": (13, 4),
    "hidden.weight": (9, 4),
    "out.weight": (4, 9),
    "scale": (1,),
    "hidden.bias": (9,),
    "out.bias": (4,),
}
"""Shapes of the trained parameters: matrices, which decay, and then the others."""
FROZEN, BUFFERS = "frozen.weight", {"running_mean": (4,), "num_batches": ()}
SCALES = {
    "stage0_fp32": (0.9900000095367432, 0.9800979495048523),
    "zero1_bf16": (0.9900000095367432, 0.980093777179718),
    "bf16_optimizer": (0.9900000095367432, 0.980093777179718),
    "zero2_bf16": (0.9900000095367432, 0.980093777179718),
    "zero3_bf16": (0.9900000095367432, 0.9800971746444702),
}
"""The parameter of one element in each checkpoint. AdamW's first update is the learning rate, 0.01."""

Array = NDArray[Any]
runs = pytest.mark.parametrize("run", RUNS)


def layouts(run: str) -> list[Layout]:
    return [read_layout(checkpoint) for checkpoint in find_checkpoints(GOLDEN / run)]


def elements(layout: Layout, kind: str) -> dict[str, Array]:
    """Whole tensors of a kind as they are stored; bf16 as uint16."""
    tensors: dict[str, Array] = {}
    for row in layout.fragments[kind]:
        name, dtype = layout.names[row["tensor"]], ALL[row["dtype"]]
        info = layout.tensors[name]
        flat = tensors.setdefault(name, np.zeros(info.numel, dtype.storage))
        path = layout.path / layout.files[row["file"]]
        flat[row["start"] : row["start"] + row["numel"]] = np.fromfile(
            path, dtype.storage, row["numel"], offset=row["offset"]
        )
    return {name: flat.reshape(layout.tensors[name].shape) for name, flat in tensors.items()}


def masters(run: str, tag: str) -> dict[str, Array]:
    """The masters that `torch.load` found, of the parameters that the run trains or cannot tell from trained ones."""
    names = [*TRAINED, *([FROZEN] if RUNS[run] == 0 else [])]
    with np.load(GOLDEN / "masters.npz") as arrays:
        return {name: arrays[f"{run}/{tag}/{name}"] for name in names}


def mean_of_masters(run: str) -> dict[str, Array]:
    """Σ c_j θ_j in float64, rounded once."""
    older, newer = (masters(run, tag) for tag in TAGS)
    c_older, c_newer = COEFFICIENTS
    return {
        name: (older[name].astype(np.float64) * c_older + newer[name].astype(np.float64) * c_newer).astype(np.float32)
        for name in newer
    }


def as_bf16(values: Array) -> Array:
    """float32 rounded to nearest even, as the upper 16 bits."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def merged(run: str, out: Path, **values: Any) -> None:
    merge(run=GOLDEN / run, tags=TAGS, coefficients=COEFFICIENTS, out=out, **values)


@runs
def test_steps_ranks_and_rates_are_those_of_the_run(run: str) -> None:
    first, second = layouts(run)
    assert (first.tag, second.tag) == TAGS
    assert (first.step, second.step) == (1, 2)
    for layout in (first, second):
        assert (layout.stage, layout.world_size, layout.model_parallel_size) == (RUNS[run], 2, 1)
        assert layout.dtype.name == ("fp32" if run == "stage0_fp32" else "bf16")
        assert layout.learning_rates == (0.01, 0.01)
        assert layout.warmup_num_steps == 0
        assert not layout.is_universal


@runs
def test_names_shapes_and_roles_are_those_of_the_model(run: str) -> None:
    for layout in layouts(run):
        described = {name: (info.shape, info.role) for name, info in layout.tensors.items()}
        frozen = "parameter" if RUNS[run] == 0 else "frozen"  # stage 0 does not say what is trained
        assert described == (
            {name: (shape, "parameter") for name, shape in TRAINED.items()}
            | {FROZEN: ((4, 4), frozen)}
            | {name: (shape, "buffer") for name, shape in BUFFERS.items()}
        )
        assert layout.aliases == {"head.weight": "embedding.weight"}
        assert layout.numel == 154
        if RUNS[run]:
            assert list(layout.names)[: len(TRAINED)] == list(TRAINED)  # the order of partitions


@runs
def test_every_master_is_where_the_layout_says(run: str) -> None:
    for layout, scale in zip(layouts(run), SCALES[run], strict=True):
        stored = elements(layout, "master")
        assert stored["scale"].tolist() == [np.float32(scale)]
        expected = masters(run, layout.tag)
        assert set(stored) == set(expected)
        for name, values in expected.items():
            np.testing.assert_array_equal(stored[name], values, err_msg=name)


@pytest.mark.parametrize("run", [run for run, stage in RUNS.items() if 0 < stage < 3])
def test_the_modules_weights_are_the_rounded_masters(run: str) -> None:
    for layout in layouts(run):
        stored = elements(layout, "module")
        assert set(stored) == set(TRAINED)
        for name, values in masters(run, layout.tag).items():
            np.testing.assert_array_equal(stored[name], as_bf16(values), err_msg=name)


@pytest.mark.parametrize("run", [run for run, stage in RUNS.items() if stage])
def test_moments_lie_beside_the_masters(run: str) -> None:
    (layout, _) = layouts(run)
    assert layout.state_names == ("exp_avg", "exp_avg_sq")
    first, second = (elements(layout, kind) for kind in layout.state_names)
    for name, values in first.items():  # after one update: 0.1 g and 0.001 g²
        np.testing.assert_allclose(second[name], 0.1 * values.astype(np.float64) ** 2, rtol=1e-5, atol=1e-12)


@runs
def test_a_merge_is_the_mean_of_the_masters(run: str, tmp_path: Path) -> None:
    merged(run, tmp_path / "out")
    (layout,) = [read_layout(checkpoint) for checkpoint in find_checkpoints(tmp_path / "out")]
    assert (layout.step, layout.stage, layout.world_size) == (2, RUNS[run], 2)
    expected = mean_of_masters(run)
    stored = elements(layout, "master")
    for name, values in expected.items():
        np.testing.assert_array_equal(stored[name], values, err_msg=name)
    if 0 < RUNS[run] < 3:
        for name, values in elements(layout, "module").items():
            np.testing.assert_array_equal(values, as_bf16(expected[name]), err_msg=name)
    proof = verify(tmp_path / "out", full=True)
    assert proof.note == ""
    assert proof.recomputed_bytes > 0


@pytest.mark.parametrize("run", [run for run, stage in RUNS.items() if stage])
@pytest.mark.parametrize(("stage", "world_size"), [(2, 3), (3, 1), (1, 1)])
def test_a_merge_for_other_ranks_holds_the_same_elements(run: str, tmp_path: Path, stage: int, world_size: int) -> None:
    merged(run, tmp_path / "out", stage=stage, world_size=world_size)
    (layout,) = [read_layout(checkpoint) for checkpoint in find_checkpoints(tmp_path / "out")]
    assert (layout.stage, layout.world_size) == (stage, world_size)
    stored = elements(layout, "master")
    for name, values in mean_of_masters(run).items():
        np.testing.assert_array_equal(stored[name], values, err_msg=name)
    assert verify(tmp_path / "out", full=True).note == ""


@runs
def test_an_export_to_safetensors_holds_the_masters_of_one_checkpoint(run: str, tmp_path: Path) -> None:
    export(GOLDEN / run, tag="global_step2", out=tmp_path / "out", dtype="fp32")
    data = (tmp_path / "out/model.safetensors").read_bytes()
    (header_bytes,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + header_bytes])
    expected = masters(run, "global_step2")
    assert set(header) - {"__metadata__", FROZEN, *BUFFERS} == set(TRAINED)
    for name, values in expected.items():
        begin, end = (8 + header_bytes + offset for offset in header[name]["data_offsets"])
        assert header[name]["dtype"] == "F32"
        assert header[name]["shape"] == list(values.shape)
        assert data[begin:end] == values.tobytes()
    assert verify(tmp_path / "out", full=True).note == ""
