"""A merge into a model in memory: the bits of the way through files, and what does not fit."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loaded_models import GOLDEN, GoldenModel, loaded_from_files, same_model
from source_reads import record_source_reads

import wsm_ds
from wsm_ds import loading
from wsm_ds.engine import live_tensors, threads
from wsm_ds.errors import (
    BrokenCheckpoint,
    BudgetTooSmall,
    InsufficientCapacity,
    ModelMismatch,
    NonFiniteValue,
    RecipeError,
    WindowError,
)
from wsm_ds.loading import choose_windows
from wsm_ds.planning.window_recipe import WindowRecipe, make_window_recipe
from wsm_ds.watching.kept_layouts import fingerprint

RUNS = ("stage0_fp32", "zero1_bf16", "bf16_optimizer", "zero2_bf16", "zero3_bf16")
ZERO2 = GOLDEN / "zero2_bf16"
TWO: dict[str, Any] = {"last": 2, "coefficients": (0.25, 0.75)}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of a golden run of two checkpoints, for tests that change it."""
    return Path(shutil.copytree(ZERO2, tmp_path / "run"))


def recipe(run: Path = ZERO2, **values: Any) -> WindowRecipe:
    return make_window_recipe(run=run, **(TWO | values))


def one(tag: str, run: Path = ZERO2) -> WindowRecipe:
    return make_window_recipe(run=run, tags=(tag,))


def change(run: Path, value: float) -> None:
    """Gives an element of the newest checkpoint's masters another value."""
    file = run / "global_step2/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    saved = torch.load(file, weights_only=False)
    saved["optimizer_state_dict"]["single_partition_of_fp32_groups"][0].data[3] = value
    torch.save(saved, file)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("dtype", [None, "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("model_dtype", ["float32", "bfloat16", "float16", "float64"])
def test_a_model_gets_the_bits_of_the_way_through_files(
    tmp_path: Path, name: str, dtype: Any, model_dtype: str
) -> None:
    to = getattr(torch, model_dtype)
    wanted = loaded_from_files(GoldenModel().to(to), tmp_path / "out", run=GOLDEN / name, dtype=dtype, **TWO)
    model = GoldenModel().to(to)
    loaded = wsm_ds.load_merge(model, run=GOLDEN / name, dtype=dtype, **TWO)
    assert same_model(model, wanted)
    assert model.head.weight is model.embedding.weight
    assert model.positions.tolist() == [0, 1, 2, 3]
    assert (loaded.kept, loaded.left_out) == ((), ())
    assert [(source.tag, source.coefficient) for source in loaded.output.sources] == [
        ("global_step1", 0.25), ("global_step2", 0.75),
    ]  # fmt: skip


def test_one_checkpoint_is_loaded_as_export_writes_it(tmp_path: Path) -> None:
    wanted = GoldenModel()
    wsm_ds.export(ZERO2, tag="global_step1", out=tmp_path / "out", dtype="fp32")
    from safetensors.torch import load_file

    wanted.load_state_dict(load_file(tmp_path / "out/model.safetensors"), strict=False)
    model = GoldenModel()
    loaded = wsm_ds.load_merge(model, ZERO2, tags=["global_step1"], dtype="fp32")
    assert same_model(model, wanted)
    assert (loaded.output.ess, loaded.output.lag_steps) == (1.0, 0.0)


@pytest.mark.parametrize("name", ["zero2_bf16", "zero3_bf16"])
@pytest.mark.parametrize("form", ["zero", "universal"])
def test_a_merge_that_was_written_is_loaded_with_its_own_bits(tmp_path: Path, name: str, form: Any) -> None:
    wsm_ds.merge(run=GOLDEN / name, out=tmp_path / "merged", format=form, **TWO)
    model, direct = GoldenModel(), GoldenModel()
    wsm_ds.load_merge(model, tmp_path / "merged", last=1, dtype="fp32")
    wsm_ds.load_merge(direct, GOLDEN / name, dtype="fp32", **TWO)
    assert same_model(model, direct)


def test_a_recipe_of_an_output_says_dtype_and_names(tmp_path: Path) -> None:
    merge = wsm_ds.make_recipe(run=ZERO2, out=tmp_path / "no", format="safetensors", dtype="fp32", **TWO)
    model, wanted = GoldenModel(), GoldenModel()
    wsm_ds.load_merge(model, merge)
    wsm_ds.load_merge(wanted, ZERO2, dtype="fp32", **TWO)
    assert same_model(model, wanted)
    assert not (tmp_path / "no").exists()


def test_tied_names_are_filled_under_every_name_of_a_model_that_does_not_tie_them() -> None:
    apart, tied = GoldenModel(tied=False), GoldenModel()
    wsm_ds.load_merge(apart, ZERO2, **TWO)
    wsm_ds.load_merge(tied, ZERO2, **TWO)
    assert apart.head.weight is not apart.embedding.weight
    assert same_model(apart, tied)


def test_tensors_that_the_training_kept_apart_cannot_fill_tied_ones() -> None:
    model = GoldenModel()
    model.out.bias = torch.nn.Parameter(model.running_mean)
    with pytest.raises(ModelMismatch, match=r"ties tensors that the training kept apart: out\.bias and running_mean"):
        wsm_ds.load_merge(model, ZERO2, **TWO)


def test_frozen_parameters_are_those_of_the_checkpoints_whatever_the_model_freezes() -> None:
    model = GoldenModel()
    with torch.no_grad():
        model.frozen.weight.zero_()
    model.requires_grad_(False)
    wsm_ds.load_merge(model, ZERO2, **TWO)
    stored = torch.load(ZERO2 / "global_step2/mp_rank_00_model_states.pt", weights_only=False)["module"]
    assert torch.equal(model.frozen.weight.bfloat16(), stored["frozen.weight"])
    assert int(model.num_batches) == int(stored["num_batches"])


def test_what_does_not_fit_is_named_all_at_once_before_anything_changes() -> None:
    model = GoldenModel()
    model.more = torch.nn.Linear(2, 2)
    model.hidden = torch.nn.Linear(3, 3)
    del model.scale
    model.num_batches = model.num_batches.double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelMismatch) as raised:
        wsm_ds.load_merge(model, ZERO2, **TWO)
    message = str(raised.value)
    for part in (
        "global_step2: the model has more.weight, more.bias, which the checkpoint lacks",
        "the checkpoint has scale, which the model lacks",
        "hidden.weight ([3, 3] in the model, [9, 4] in the checkpoint), hidden.bias ([3] in the model, [9] in the",
        "num_batches (fp64 in the model, int64 in the checkpoint)",
        "allow_missing",
        "allow_surplus",
        "rename",
    ):
        assert part in message
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_missing_and_surplus_names_are_let_be_on_request() -> None:
    model, wanted = GoldenModel(), GoldenModel()
    model.more = torch.nn.Linear(2, 2)
    del model.scale
    more = model.more.weight.clone()
    loaded = wsm_ds.load_merge(model, ZERO2, allow_missing=["more.*"], allow_surplus=["scale"], **TWO)
    wsm_ds.load_merge(wanted, ZERO2, **TWO)
    assert (loaded.kept, loaded.left_out) == (("more.weight", "more.bias"), ("scale",))
    assert torch.equal(model.more.weight, more)
    assert torch.equal(model.hidden.weight, wanted.hidden.weight)


def test_a_model_without_the_second_name_of_a_tied_tensor_lacks_nothing() -> None:
    model = GoldenModel()
    del model.head
    assert wsm_ds.load_merge(model, ZERO2, **TWO).left_out == ()


@pytest.mark.parametrize("wrap", ["_orig_mod", "module"])
def test_names_that_known_wrappers_add_to_the_model_are_matched(wrap: str) -> None:
    model, wanted = torch.nn.Module(), GoldenModel()
    model.add_module(wrap, GoldenModel())
    wsm_ds.load_merge(model, ZERO2, **TWO)
    wsm_ds.load_merge(wanted, ZERO2, **TWO)
    assert same_model(model.get_submodule(wrap), wanted)


def test_a_compiled_model_is_filled() -> None:
    model, wanted = GoldenModel(), GoldenModel()
    wsm_ds.load_merge(torch.compile(model), ZERO2, **TWO)
    wsm_ds.load_merge(wanted, ZERO2, **TWO)
    assert same_model(model, wanted)


def test_names_are_changed_as_in_an_export() -> None:
    model, wanted = torch.nn.Module(), GoldenModel()
    model.add_module("decoder", GoldenModel())
    wsm_ds.load_merge(model, ZERO2, rename={"^": "decoder."}, **TWO)
    wsm_ds.load_merge(wanted, ZERO2, **TWO)
    assert same_model(model.decoder, wanted)
    with pytest.raises(RecipeError, match="'enc' matches no tensor's name"):
        wsm_ds.load_merge(model, ZERO2, rename={"enc": "x"}, **TWO)
    with pytest.raises(RecipeError, match=r"`rename`: .* is not a regular expression"):
        wsm_ds.load_merge(model, ZERO2, rename={"(": "x"}, **TWO)


def test_the_prefix_by_which_names_differ_is_told() -> None:
    inner = torch.nn.Module()
    inner.add_module("decoder", GoldenModel())
    with pytest.raises(ModelMismatch, match=re.escape("With rename={'^': 'decoder.'} 9 of the 10 names would fit.")):
        wsm_ds.load_merge(inner, ZERO2, **TWO)
    outer = GoldenModel()
    with pytest.raises(ModelMismatch, match=re.escape(r"With rename={'^decoder\\.': ''} 9 of the")):
        wsm_ds.load_merge(outer, ZERO2, rename={"^": "decoder."}, **TWO)


def test_tensors_in_any_order_of_dimensions_are_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_tensors, "INDEXED_NUMEL", 5)
    model, wanted = GoldenModel(), GoldenModel()
    for name in ("hidden.weight", "embedding.weight"):
        tensor = wanted.get_parameter(name)
        turned = torch.empty(tensor.shape[::-1]).t()
        assert not turned.is_contiguous()
        model.get_parameter(name).data = turned
    wide = torch.full((9, 8), 7.0)
    model.out.weight.data = wide.t()[::2]  # every second column of a wider matrix
    wsm_ds.load_merge(model, ZERO2, **TWO)
    wsm_ds.load_merge(wanted, ZERO2, **TWO)
    assert same_model(model, wanted)
    assert wide[:, 1::2].eq(7.0).all()


def test_tensors_made_in_inference_mode_are_filled() -> None:
    with torch.inference_mode():
        model = GoldenModel()
    half, wanted = GoldenModel().bfloat16(), GoldenModel()
    wsm_ds.load_merge(model, ZERO2, **TWO)
    wsm_ds.load_merge(wanted, ZERO2, **TWO)
    assert same_model(model, wanted)
    wsm_ds.load_merge(half, ZERO2, **TWO)
    half.scale.sum().backward()
    assert half.scale.grad == 1.0


def meta(model: GoldenModel) -> None:
    model.out.to("meta")


def expanded(model: GoldenModel) -> None:
    model.hidden.bias.data = torch.zeros(1).expand(9)


def overlapping(model: GoldenModel) -> None:
    line = torch.zeros(12)
    model.hidden.bias.data, model.out.bias.data = line[:9], line[8:]


def partitioned(model: GoldenModel) -> None:
    model.scale.ds_id = 3


def sparse(model: GoldenModel) -> None:
    model.running_mean = torch.zeros(4).to_sparse()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (meta, r"on the meta device: out\.weight, out\.bias"),
        (expanded, r"elements that share memory: hidden\.bias"),
        (overlapping, r"hidden\.bias and out\.bias of the models share memory"),
        (partitioned, "partitioned by ZeRO stage 3: scale"),
        (sparse, "special kind, not plain tensors: running_mean"),
    ],
)
def test_models_that_cannot_be_filled_are_refused_by_name(spoil: Any, message: str) -> None:
    model = GoldenModel()
    spoil(model)
    with pytest.raises(ModelMismatch, match=message):
        wsm_ds.load_merge(model, ZERO2, **TWO)


def test_several_models_are_filled_by_one_read_of_the_union(monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = [one("global_step1"), one("global_step2"), recipe(), recipe(coefficients=None, curve="1-sqrt")]
    apart = [GoldenModel() for _ in recipes]
    for model, single in zip(apart, recipes, strict=True):
        wsm_ds.load_merge(model, single)
    together = [GoldenModel().bfloat16() if number == 2 else GoldenModel() for number in range(len(recipes))]
    reads = record_source_reads(monkeypatch)
    loaded = wsm_ds.load_merges(together, recipes)
    for model, wanted in zip(together, apart, strict=True):
        assert same_model(model, wanted.to(model.scale.dtype))
    positions = sorted(reads)
    overlaps = [(a, b) for a, b in pairwise(positions) if a[0] == b[0] and b[1] < a[2]]
    assert overlaps == []
    whole = wsm_ds.load_merge(GoldenModel(), recipe())
    assert {merge.read_bytes for merge in loaded} == {whole.read_bytes}


def test_models_and_recipes_are_counted_and_models_share_nothing() -> None:
    model = GoldenModel()
    with pytest.raises(RecipeError, match="found 2 for 1"):
        wsm_ds.load_merges([model], [recipe(), recipe()])
    with pytest.raises(RecipeError, match="found 0 for 0"):
        wsm_ds.load_merges([], [])
    with pytest.raises(RecipeError, match="at least one recipe"):
        wsm_ds.load_each(model, [])
    with pytest.raises(RecipeError, match="many"):
        wsm_ds.load_each(model, [recipe()], room="many")
    with pytest.raises(ModelMismatch, match=r"of the models share memory"):
        wsm_ds.load_merges([model, model], [one("global_step1"), one("global_step2")])


@pytest.mark.parametrize(("room", "passes"), [(0, 5), ("700", 5), ("4KiB", 2), ("1GiB", 1)])
def test_each_merge_in_turn_is_in_the_model_and_few_passes_read(
    monkeypatch: pytest.MonkeyPatch, room: Any, passes: int
) -> None:
    recipes = [one("global_step1"), recipe(), one("global_step2"), recipe(coefficients=(0.5, 0.5)), recipe()]
    wanted = [GoldenModel() for _ in recipes]
    wsm_ds.load_merges(wanted, recipes)
    begun: list[Any] = []

    def counting(plan: Any, *rest: Any) -> Any:
        begun.append(plan)
        return threads.run_into(plan, *rest)

    monkeypatch.setattr(loading, "run_into", counting)
    monkeypatch.setattr(loading, "copy_bytes", lambda tensors: 2048)
    model, seen = GoldenModel(), 0
    for alone, loaded in zip(wanted, wsm_ds.load_each(model, recipes, room=room), strict=True):
        assert isinstance(loaded, wsm_ds.LoadedMerge)
        assert same_model(model, alone)
        assert model.head.weight is model.embedding.weight
        seen += 1
    assert (seen, len(begun)) == (len(recipes), passes)


def test_a_diverged_checkpoint_costs_its_own_merges_alone(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(run, float("nan"))
    good, bad = one("global_step1", run), one("global_step2", run)
    recipes = [recipe(run), good, bad, good, good]
    model, wanted = GoldenModel(), GoldenModel()
    wsm_ds.load_merge(wanted, one("global_step1", run))
    results = []
    for loaded in wsm_ds.load_each(model, recipes):
        results.append(type(loaded))
        if isinstance(loaded, wsm_ds.LoadedMerge):
            assert same_model(model, wanted)
        else:
            assert re.search(r"global_step2/\S+ holds nan in embedding\.weight", str(loaded))
    made = wsm_ds.LoadedMerge
    assert results == [NonFiniteValue, made, NonFiniteValue, made, made]
    assert "halves of them are tried" in caplog.text


def test_a_value_that_the_models_dtype_cannot_hold_is_an_error(run: Path) -> None:
    change(run, 1e6)
    newest = make_window_recipe(run=run, tags=("global_step2",), allow=("foreign-files",))
    with pytest.raises(NonFiniteValue, match=r"embedding\.weight overflows float16"):
        wsm_ds.load_merge(GoldenModel().half(), newest)
    wsm_ds.load_merge(GoldenModel(), newest)


def test_sources_are_only_read_and_one_that_changes_is_found(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(run)
    wsm_ds.load_merge(GoldenModel(), recipe(run))
    assert fingerprint(run) == before
    file = run / "global_step1/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    write = live_tensors.LiveTensors.write

    def writing(self: Any, *rest: Any) -> None:
        file.touch()
        write(self, *rest)

    monkeypatch.setattr(live_tensors.LiveTensors, "write", writing)
    with pytest.raises(BrokenCheckpoint, match="changed while it was read"):
        wsm_ds.load_merge(GoldenModel(), recipe(run))


def test_windows_budgets_and_options_are_checked_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads = record_source_reads(monkeypatch)
    model = GoldenModel()
    wrong: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (WindowError, "3 complete checkpoints", (ZERO2,), {"last": 3}),
        (BudgetTooSmall, "memory budget", (ZERO2,), TWO | {"memory_budget": "1MiB"}),
        (InsufficientCapacity, "memory", (ZERO2,), TWO | {"memory_budget": "900TiB"}),
        (RecipeError, "`dtype` is one of bf16, fp16, fp32; found 'int8'", (ZERO2,), TWO | {"dtype": "int8"}),
        (RecipeError, "`allow_missing` is a list", (ZERO2,), TWO | {"allow_missing": "more"}),
        (RecipeError, "'lst' is not a key", (ZERO2,), {"lst": 2}),
        (RecipeError, "the run is given twice", (ZERO2,), TWO | {"run": ZERO2}),
        (RecipeError, "a recipe and `last` are given", (recipe(),), {"last": 2}),
    ]
    for error, match, arguments, options in wrong:
        with pytest.raises(error, match=match):
            wsm_ds.load_merge(model, *arguments, **options)
    with pytest.raises(WindowError, match="3 complete checkpoints"):
        wsm_ds.load_each(model, [recipe(), recipe(last=3, coefficients=None)])
    with pytest.raises(InsufficientCapacity, match="memory"):
        wsm_ds.load_each(model, [recipe(memory_budget="900TiB"), recipe()])
    assert reads == []


def test_equal_identities_are_equal_sums(run: Path) -> None:
    linear, given = choose_windows([make_window_recipe(run=run, last=2), recipe(run, coefficients=(0.5, 0.5))])
    (other,) = choose_windows([recipe(run)])
    assert linear.identity() == given.identity()
    assert len({linear.identity(), other.identity(), linear.identity("fp32")}) == 3
    assert wsm_ds.load_merge(GoldenModel(), recipe(run)).identity == other.identity()
    (run / "global_step1/mp_rank_00_model_states.pt").touch()
    (touched,) = choose_windows([recipe(run)])
    assert touched.identity() != other.identity()


def test_what_is_chosen_stays_although_the_run_goes_on(run: Path) -> None:
    newest = run / "global_step2"
    newest.rename(run.parent / "global_step2")
    chosen = choose_windows([make_window_recipe(run=run, last=1)])
    (run.parent / "global_step2").rename(newest)
    model, wanted = GoldenModel(), GoldenModel()
    (loaded,) = wsm_ds.load_each(model, chosen)
    assert isinstance(loaded, wsm_ds.LoadedMerge)
    assert [source.tag for source in loaded.output.sources] == ["global_step1"]
    wsm_ds.load_merge(wanted, one("global_step1", run))
    assert same_model(model, wanted)


def test_any_number_of_threads_and_size_of_slices_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = GoldenModel()
    wsm_ds.load_merge(wanted, recipe())
    for numel in (1, 7, 64):
        monkeypatch.setattr(threads, "MAX_SLICE_NUMEL", numel)
        for count in (1, 3):
            model = GoldenModel()
            wsm_ds.load_merge(model, recipe(threads=count))
            assert same_model(model, wanted), (numel, count)


def test_progress_counts_all_bytes_once() -> None:
    counted: list[int] = []
    loaded = wsm_ds.load_merge(GoldenModel(), recipe(), on_bytes=counted.append)
    assert sum(counted) >= loaded.read_bytes
    assert np.all(np.array(counted) > 0)


LARGE = """
import sys
from pathlib import Path

import torch
import wsm_ds


def memory(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


run, numel, options = sys.argv[1], int(sys.argv[2]), {"last": 3, "threads": 2, "memory_budget": "8MiB"}
model = torch.nn.Module()
model.weight = torch.nn.Parameter(torch.zeros(numel))
wsm_ds.load_merge(model, run, **options)  # imports everything
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
wsm_ds.load_merge(model, run, **options)
print(memory("VmHWM") - before, float(model.weight[-1]))
"""


def test_memory_is_that_of_the_model_and_the_budget(tmp_path: Path) -> None:
    numel = 1 << 24
    for step in (1, 2, 3):
        shutil.copytree(GOLDEN / "stage0_fp32/global_step2", folder := tmp_path / f"run/global_step{step}")
        saved = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)
        saved |= {"global_steps": step, "module": {"weight": torch.full((numel,), float(step))}}
        group = saved["optimizer"]["param_groups"][0] | {"params": [0]}
        saved |= {"buffer_names": [], "optimizer": {"state": {}, "param_groups": [group]}}
        torch.save(saved, folder / "mp_rank_00_model_states.pt")
    command = [sys.executable, "-c", LARGE, str(tmp_path / "run"), str(numel)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    grown, mean = map(float, done.stdout.split())
    assert mean == 2.0
    assert grown <= 12 << 20, "the model has 64 MiB, the checkpoints 192 MiB, the budget is 8 MiB"
