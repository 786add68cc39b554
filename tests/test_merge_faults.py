"""Bad input gets a clear error. No file is lost, and no incomplete output appears."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lazy import torch

from wsm_ds import merging
from wsm_ds.engine import seals, tasks
from wsm_ds.engine.threads import Workers
from wsm_ds.errors import (
    BrokenCheckpoint,
    BudgetTooSmall,
    LayoutMismatch,
    NonFiniteValue,
    OutputExists,
    RecipeError,
    UnsafePickle,
    VerificationFailed,
    WindowError,
)
from wsm_ds.inspection import inspect_run
from wsm_ds.layouts.frameworks import MANIFEST
from wsm_ds.merge_planning import plan_merge
from wsm_ds.merging import merge, run_plan
from wsm_ds.planning.recipe import make_recipe
from wsm_ds.publishing.staging_folder import staged
from wsm_ds.verification import verify


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    """A copy of a ZeRO-2 bf16 run, to be damaged."""
    return Path(shutil.copytree(runs / "w2_s2_bf16", tmp_path / "a run's folder"))


def edit(path: Path, change: Any) -> None:
    """Loads a rank file, changes it with `change`, and saves it."""
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def optim(run: Path, step: int, rank: int = 1) -> Path:
    return run / f"global_step{step}/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def model(run: Path, step: int) -> Path:
    return run / f"global_step{step}/mp_rank_00_model_states.pt"


def refused(run: Path, error: type[Exception], match: str, **values: Any) -> None:
    """Checks that the merge fails with this error, leaves no output and no staging folder, and changes no source."""
    out = run.parent / "out"
    common: dict[str, Any] = {"run": run, "last": 3, "curve": "linear", "out": out}
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(error, match=match):
        merge(**common | values)
    assert not out.exists()
    assert [path.name for path in run.parent.iterdir()] == [run.name]
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_with_its_file_and_parameter(run: Path, value: float) -> None:
    def poison(content: Any) -> None:
        content["optimizer_state_dict"]["single_partition_of_fp32_groups"][0].data[100] = value

    edit(optim(run, 4), poison)
    refused(
        run, NonFiniteValue, r"global_step4/bf16_zero_pp_rank_1_mp_rank_00_optim_states\.pt holds .* in out\.weight"
    )


def test_a_missing_rank_file_is_named(run: Path) -> None:
    optim(run, 4).unlink()
    refused(run, BrokenCheckpoint, r"1 of 2 ranks.*: bf16_zero_pp_rank_1_mp_rank_00_optim_states\.pt")


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.99])
def test_a_truncated_rank_file_is_named(run: Path, fraction: float) -> None:
    path = optim(run, 2)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])
    refused(run, BrokenCheckpoint, r"global_step2/bf16_zero_pp_rank_1_mp_rank_00_optim_states\.pt is not a whole")


def test_a_newest_checkpoint_that_is_still_being_written_is_passed_over_and_named(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    optim(run, 6).unlink()
    plan = plan_merge(make_recipe(run=run, last=2, curve="linear", out=run.parent / "out"))
    assert [source.step for source in plan.outputs[0].sources] == [2, 4]
    assert "global_step6 is skipped" in caplog.text


def test_unlike_models_are_refused_with_the_difference(run: Path, runs: Path) -> None:
    def rename(content: Any) -> None:
        shapes = content["param_shapes"][1]
        shapes["bias2"] = shapes.pop("out.bias")
        content["module"]["bias2"] = content["module"].pop("out.bias")

    edit(model(run, 2), rename)
    refused(
        run, LayoutMismatch, r"out\.bias: absent against parameter \[9\], bias2|bias2: parameter \[9\] against absent"
    )


def test_a_frozen_tensor_that_differs_is_refused_by_name(run: Path) -> None:
    edit(model(run, 2), lambda content: content["module"]["frozen.weight"].add_(1))
    refused(run, LayoutMismatch, r"frozen\.weight differs between global_step2 and global_step6")


def test_a_window_inside_the_warmup_is_refused_unless_allowed(run: Path) -> None:
    def longer_warmup(content: Any) -> None:
        content["lr_scheduler"]["warmup_num_steps"] = 3

    for step in (2, 4, 6):
        edit(model(run, step), longer_warmup)
    refused(run, WindowError, r"global_step2 \(step 2\) lies inside the warmup of 3 steps.*--allow warmup")
    merge(run=run, last=2, curve="linear", out=run.parent / "later")
    merge(run=run, last=3, curve="linear", out=run.parent / "allowed", allow=("warmup",))


def test_a_change_of_learning_rate_is_refused_unless_allowed(run: Path) -> None:
    def halve(content: Any) -> None:
        for group in content["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]:
            group["lr"] = 0.005

    for rank in (0, 1):
        edit(optim(run, 6, rank), halve)
    refused(run, WindowError, r"\[0\.01, 0\.01\] at global_step2, \[0\.005, 0\.005\] at global_step6")
    merge(run=run, last=3, curve="linear", out=run.parent / "allowed", allow=("lr-change",))


def test_an_output_that_exists_is_never_touched(run: Path) -> None:
    out = run.parent / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(OutputExists, match="nothing is ever overwritten"):
        merge(run=run, last=3, curve="linear", out=out)
    assert [path.name for path in out.iterdir()] == ["precious"]


def test_two_merges_into_one_output_one_wins(run: Path) -> None:
    out = run.parent / "out"
    plan = plan_merge(make_recipe(run=run, last=3, curve="linear", out=out))
    with (
        staged(out, {"identity": "another"}),
        pytest.raises(OutputExists, match=f"another merge is writing .*process {os.getpid()}"),
    ):
        run_plan(plan)


def test_a_hostile_checkpoint_is_refused_and_inspect_says_so(run: Path) -> None:
    marker = run.parent / "it_ran"

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch '{marker}'",)

    edit(model(run, 4), lambda content: content.update(client=Evil()))
    found = inspect_run(run)
    assert [item.layout is not None for item in found] == [True, False, True]
    assert "posix.system" in (found[1].problem or "")
    assert not marker.exists()
    refused(run, UnsafePickle, r"global_step4/mp_rank_00_model_states\.pt names the global posix\.system")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("layer_00-model_00-model_states.pt", r"pipeline layers' files \(layer_00-model_00.*another save"),
        ("layer_0_expert_0_mp_rank_00_model_states.pt", r"experts that its model does not have \(layer_0_expert_0"),
        ("mp_rank_01_model_states.pt", "model files of 2 ranks, but was saved by 1"),
        ("zero_pp_rank_0_mp_rank_01_optim_states.pt", "optimizer files of 3 ranks, but was saved by 2"),
    ],
)
def test_a_file_of_another_save_is_named(run: Path, name: str, words: str) -> None:
    shutil.copy(run / "global_step4/mp_rank_00_model_states.pt", run / "global_step4" / name)
    refused(run, BrokenCheckpoint, words)


def test_wrong_recipes_say_what_is_wrong(run: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"run": run, "out": tmp_path / "o", "curve": "linear"}
    for values, words in (
        ({"last": 3, "tags": ("a",)}, "exactly one way: .* found `last`=3, `tags`="),
        ({"last": 3, "coefficients": (0.5, 0.3, 0.2)}, "either `curve` or `coefficients`"),
        ({"last": 0}, "`last` must be at least 1, not 0"),
        ({"last": 3, "dtype": "bf16"}, r"`dtype` \(bf16\) is for safetensors"),
        ({"last": 3, "memory_budget": "lots"}, "'lots' is not a size"),
        ({"last": 3, "colour": "red"}, "'colour' is not a key of a recipe"),
        ({"last": 3, "thread": 1}, "did you mean 'threads'"),
        ({"last": "two"}, "`last` must be a whole number, not 'two'"),
        ({"last": 3, "out": None}, "`out` is missing"),
    ):
        with pytest.raises(RecipeError, match=words):
            make_recipe(**common | values)
    refused(run, WindowError, "4 complete checkpoints were asked for, but .* has 3;", last=4)
    refused(run, WindowError, "no checkpoint from step 7 to 9", last=None, from_step=7, to_step=9)
    refused(run, WindowError, "2 were given for 3 checkpoints, steps 2, 4, 6", curve=None, coefficients=(0.5, 0.5))
    refused(
        run, WindowError, "step 4 is in the window more than once", last=None, tags=("global_step4", "global_step4")
    )
    refused(run, BudgetTooSmall, "--memory-budget: 1000 B are too little to plan", memory_budget=1000)
    refused(run, BudgetTooSmall, "the least is", memory_budget=20_000)


def test_a_source_that_changes_while_it_is_read_stops_the_merge(run: Path) -> None:
    out = run.parent / "out"
    plan = plan_merge(make_recipe(run=run, last=3, curve="linear", out=out))
    os.utime(optim(run, 4), (1, 1))
    with pytest.raises(BrokenCheckpoint, match="changed while it was read"):
        run_plan(plan)
    assert not out.exists()


def test_verify_notices_every_kind_of_damage(run: Path) -> None:
    out = run.parent / "out"
    merge(run=run, last=3, curve="1-sqrt", out=out)
    assert verify(out).recomputed_bytes > 0
    victim = out / "global_step6/mp_rank_00_model_states.pt"
    whole = victim.read_bytes()
    for place in (0, len(whole) // 2, len(whole) - 1):
        victim.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(VerificationFailed, match=r"mp_rank_00_model_states\.pt is not what was written"):
            verify(out)
    victim.write_bytes(whole)
    (out / "extra").write_text("")
    with pytest.raises(VerificationFailed, match="not of this merge extra"):
        verify(out)
    (out / "extra").unlink()
    shutil.rmtree(run / "global_step4")
    assert "checksums only" in verify(out).note
    (out / MANIFEST).unlink()
    with pytest.raises(VerificationFailed, match="not a merge's output"):
        verify(out)


def test_verify_notices_a_manifest_that_was_made_to_fit_wrong_bytes(run: Path) -> None:
    from wsm_ds.filesystem import checksum

    out = run.parent / "out"
    merge(run=run, last=3, curve="1-sqrt", out=out)
    victim = out / "global_step6/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    edit_at = optim_master_offset(victim)
    content = bytearray(victim.read_bytes())
    content[edit_at] ^= 1
    victim.write_bytes(content)
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["files"][f"global_step6/{victim.name}"]["xxh3_128_of_blocks"] = checksum.of_file(
        victim, manifest["block_bytes"]
    )
    (out / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(VerificationFailed, match=f"byte {edit_at} is not what the sources make"):
        verify(out)


def optim_master_offset(path: Path) -> int:
    from wsm_ds.torchfile import open_torch_file

    file = open_torch_file(path)
    return file.byte_offset(file.tree["optimizer_state_dict"]["single_partition_of_fp32_groups"][0])


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("block", "slice_numel"), [(64, 1), (1000, 7), (4096, 4096), (1 << 22, 50)])
def test_no_slice_size_and_no_number_of_threads_changes_a_bit(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, block: int, slice_numel: int
) -> None:
    recipe: dict[str, Any] = {"run": runs / "w2_s3_bf16", "last": 3, "curve": "1-sqrt", "optimizer_states": "merge"}
    for output in ({}, {"format": "safetensors", "dtype": "bf16", "optimizer_states": "carry"}):
        tag = f"{len(output)}"
        merge(**recipe | output | {"out": tmp_path / f"plain{tag}"})
        with monkeypatch.context() as patch:
            patch.setattr(seals, "BLOCK_BYTES", block)
            patch.setattr(tasks, "BLOCK_BYTES", block)
            patch.setattr(merging, "workers_for", lambda *_: Workers(threads, slice_numel))
            merge(**recipe | output | {"out": tmp_path / f"cut{tag}"})
        for path in (tmp_path / f"cut{tag}").rglob("*"):
            if path.is_file() and path.name != MANIFEST:
                relative = path.relative_to(tmp_path / f"cut{tag}")
                assert path.read_bytes() == (tmp_path / f"plain{tag}" / relative).read_bytes(), relative


def test_a_full_disk_is_an_error_and_leaves_nothing(runs: Path, tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys, pathlib; from wsm_ds.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
        "sys.exit(main(['merge', sys.argv[1], '--last', '3', '--out', sys.argv[2]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(runs / "w2_s2_bf16"), str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 3
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.deepspeed
def test_memory_stays_within_the_budget_for_checkpoints_ten_times_as_large(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from deepspeed_runs import launch

    budget = 10 << 20
    job = {"do": "train", "stage": 2, "dtype": "bf16", "steps": 2, "every": 1, "warmup": 1, "width": 1500}
    launch([job | {"run": str(tmp_path / "run")}], world_size=1, folder=tmp_path_factory.mktemp("train"))
    for values in (["--optimizer-states", "merge"], ["--format", "safetensors"]):
        out = tmp_path / values[-1]
        arguments = [str(tmp_path / "run"), "--last", "2", "--out", str(out), "--memory-budget", str(budget), *values]
        planned, merged = (peak_bytes(["merge", *arguments, *extra]) for extra in (["--dry-run"], []))
        checkpoint = sum(path.stat().st_size for path in (tmp_path / "run/global_step2").iterdir())
        assert checkpoint > 10 * budget
        assert merged - planned <= budget


def peak_bytes(arguments: list[str]) -> int:
    """Peak resident memory of one `wsm-ds` command in a process of its own."""
    code = (
        "import resource, sys; from wsm_ds.cli import main; import wsm_ds.engine.worker, wsm_ds.publishing.manifest; "
        "assert main(sys.argv[1:]) == 0; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) * 1024
