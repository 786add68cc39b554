"""Optimizer states of every form: cut and summed if they hold one value per element, else copied or refused by name."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_runs import launch
from reference import average, load_all, merged_parameters, parameters, partitions, same_bits, same_tree, states

from wsm_ds.cli import main
from wsm_ds.errors import LayoutMismatch, UnsupportedLayout, WindowError
from wsm_ds.inspection import inspect_run
from wsm_ds.merging import export, merge, reshard
from wsm_ds.planning.constant_rate import rate_words
from wsm_ds.verification import verify

COEFFICIENTS = [0.25, 0.75]
PACKAGES = {"bnb8": "bitsandbytes", "bnb32": "bitsandbytes", "schedule_free": "schedulefree"}
NESTED = "__bnb_optimizer_quant_state__"
CUT = ["amsgrad_s2", "nadam_s2", "adafactor_s2", "adafactor_s3", "mine_s2", "bnb32_s2", "schedule_free_s2"]
"""Runs whose states hold one value per element, or one value that is equal everywhere."""
REFUSED = {
    "matrix_s2": r"preconditioner \(a fp32 tensor of shape \[4, 4\] for \d+ elements\)",
    "matrix_s3": r"preconditioner \(a fp32 tensor of shape \[4, 4\] for \d+ elements\)",
    "codes_s2": r"sign \(int8 codes, which mean nothing without their scales\)",
    "listed_s2": r"means \(a list of 1 with tensors or objects in it\)",
    "mine_one_group": r"my_mean \(256 values, as many as there are elements, or a table of this length: the name is",
    "table_one_group": r"table \(256 values, as many as there are elements, or a table of this length: the name is",
    "table_s2": r"table \(a fp32 tensor of shape \[256\] for \d+ elements\)",
    "bnb8_s2": r"state1 \(uint8 codes, which mean nothing without their scales\).*in all",
    "bnb8_s3": r"state1 \(uint8 codes, which mean nothing without their scales\).*in all",
}
"""Runs with states that cannot be cut, and what the message says of them."""
ALONE = ["per_tensor_s2"]
"""Runs with states of one value, which differs between ranks."""


def job_of(name: str, root: Path) -> dict[str, Any]:
    optimizer, form = name.rsplit("_one_", 1) if "_one_" in name else name.rsplit("_", 1)
    job = {"do": "train", "engine": "optimizer", "optimizer": optimizer, "dtype": "bf16", "steps": 4, "every": 2}
    return job | {
        "stage": 2 if form == "group" else int(form[1:]),
        "one_group": form == "group",
        "run": str(root / name),
    }


@pytest.fixture(scope="module")
def states_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`RUNS/{optimizer}_s{stage}` and `RUNS/{optimizer}_one_group`: two checkpoints each, of two ranks."""
    root = tmp_path_factory.mktemp("states")
    names = [name for name in [*CUT, *REFUSED, *ALONE] if is_installed(name)]
    stage0 = job_of("adafactor_s0", root) | {"dtype": "fp32", "one_group": True}
    layered = job_of("layered_s2", root) | {"scheduler": True, "warmup": 8}
    jobs = [*(job_of(name, root) for name in names), stage0, layered]
    launch(jobs, world_size=2, folder=tmp_path_factory.mktemp("train"), worker="optimizer_states_worker.py")
    return root


def is_installed(name: str) -> bool:
    package = PACKAGES.get(name.rsplit("_s", 1)[0])
    return package is None or find_spec(package) is not None


def run_of(states_runs: Path, name: str) -> Path:
    if not is_installed(name):
        pytest.skip(f"{name} needs a package of the extra `test`")
    return states_runs / name


def rank_states(checkpoint: Path) -> list[Any]:
    return [states(optim) for optim in load_all(checkpoint)[1].values()]


def unnested(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != NESTED} | state.get(NESTED, {})


@pytest.mark.parametrize("name", CUT)
def test_states_of_one_value_per_element_are_the_same_after_two_other_forms(
    states_runs: Path, tmp_path: Path, name: str
) -> None:
    run = run_of(states_runs, name)
    stage = 3 if name.endswith("s3") else 2
    other: dict[str, Any] = {"stage": 3, "sub_group_size": 300} if stage == 2 else {"stage": 2}
    reshard(run, out=tmp_path / "other", world_size=3, **other)
    reshard(tmp_path / "other", out=tmp_path / "back", like=run / "global_step4")
    before, after = (kinds_of(folder / "global_step4", stage) for folder in (run, tmp_path / "back"))
    assert list(before) == list(after)
    for kind, values in before.items():
        assert same_tree(values, after[kind]), kind
    assert any(isinstance(values, dict) for values in before.values())


def kinds_of(checkpoint: Path, stage: int) -> dict[str, Any]:
    """Every optimizer state by name: of each parameter, without padding; or as every rank and flat tensor has it."""
    models, optims = load_all(checkpoint)
    flats = {rank: [unnested(state) for state in states(optim).values()] for rank, optim in optims.items()}
    found: dict[str, Any] = {}
    for kind in flats[0][0]:
        values = {rank: [state[kind] for state in of_rank] for rank, of_rank in flats.items()}
        if is_long(values[0][0]):
            found[kind] = parameters(models, values, stage)
        elif kind != "RMS":  # Adafactor computes it anew before it uses it
            found[kind] = list(values.values())
    return found


def is_long(value: Any) -> bool:
    return torch.is_tensor(value) and value.ndim == 1


@pytest.mark.parametrize("name", REFUSED)
def test_states_that_cannot_be_cut_are_refused_by_name(states_runs: Path, tmp_path: Path, name: str) -> None:
    run = run_of(states_runs, name)
    advice = r".*\(--optimizer-states drop"
    with pytest.raises(UnsupportedLayout, match="cannot be cut for other ranks: .*" + REFUSED[name] + advice):
        reshard(run, out=tmp_path / "out", world_size=4)
    with pytest.raises(UnsupportedLayout, match=REFUSED[name] + advice):
        merge(run=run, last=2, coefficients=COEFFICIENTS, out=tmp_path / "out", format="universal")
    assert not (tmp_path / "out").exists()
    assert main(["reshard", str(run), "--world-size", "4", "--optimizer-states", "drop", "--out", f"{tmp_path}/w"]) == 0
    assert all(not any(groups.values()) for groups in rank_states(tmp_path / "w/global_step4"))
    assert verify(tmp_path / "w", full=True).note == ""


@pytest.mark.parametrize("name", [*REFUSED, "mine_s2"])
def test_states_that_are_no_known_moments_are_carried_byte_by_byte_and_not_merged(
    states_runs: Path, tmp_path: Path, name: str
) -> None:
    run = run_of(states_runs, name)
    reason = REFUSED.get(name, r"my_mean \(not known to be a mean of gradients")
    with pytest.raises(UnsupportedLayout, match="cannot be merged: .*" + reason):
        merge(run=run, last=2, coefficients=COEFFICIENTS, out=tmp_path / "out", optimizer_states="merge")
    merge(run=run, last=2, coefficients=COEFFICIENTS, out=tmp_path / "out")
    assert same_tree(rank_states(tmp_path / "out/global_step4"), rank_states(run / "global_step4"))
    stage = 3 if name.endswith("s3") else 2
    wanted = merged_parameters([run / "global_step2", run / "global_step4"], COEFFICIENTS, stage)
    models, optims = load_all(tmp_path / "out/global_step4")
    merged = parameters(models, {rank: partitions(optim) for rank, optim in optims.items()}, stage)
    assert all(same_bits(merged[parameter], tensor) for parameter, tensor in wanted.items())


def test_one_value_that_differs_between_ranks_is_refused_with_both(states_runs: Path, tmp_path: Path) -> None:
    run = states_runs / "per_tensor_s2"
    words = (
        r"optimizer states of parameter group 0 differ between rank 0 and bf16_zero_pp_rank_1\S+: norm_of_mine: fp32 "
    )
    with pytest.raises(UnsupportedLayout, match=words):
        reshard(run, out=tmp_path / "out", world_size=1)
    reshard(run, out=tmp_path / "out", world_size=1, optimizer_states="drop")


def test_hyperparameters_that_differ_between_ranks_are_refused_or_named(
    states_runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Prodigy and D-Adaptation keep sums over a rank's own partition in the parameter groups."""
    run = Path(shutil.copytree(states_runs / "amsgrad_s2", tmp_path / "run"))
    path = run / "global_step4/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = torch.load(path, weights_only=False)
    content["optimizer_state_dict"]["base_optimizer_state"]["param_groups"][1]["d_numerator"] = torch.tensor([2.5])
    torch.save(content, path)
    words = "hyper-parameters of parameter group 1 differ .*d_numerator: absent against fp32 2.5"
    with pytest.raises(UnsupportedLayout, match=words):
        reshard(run, out=tmp_path / "out", world_size=1)
    reshard(run, out=tmp_path / "out", world_size=1, optimizer_states="drop")
    assert "d_numerator: absent against fp32 2.5. Those of rank 0 are written for every rank" in caplog.text


def test_a_universal_checkpoint_is_refused_where_deepspeed_would_not_restore_a_state(
    states_runs: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedLayout, match="would not restore the optimizer states mu_product"):
        merge(run=states_runs / "nadam_s2", last=2, curve="linear", out=tmp_path / "out", format="universal")
    merge(run=states_runs / "adafactor_s2", last=2, curve="linear", out=tmp_path / "out", format="universal")


@pytest.mark.parametrize("name", ["amsgrad_s2", "adafactor_s2", "bnb32_s2"])
def test_known_moments_are_merged_and_stay_non_negative(states_runs: Path, tmp_path: Path, name: str) -> None:
    run = run_of(states_runs, name)
    merge(run=run, last=2, coefficients=COEFFICIENTS, out=tmp_path / "out", optimizer_states="merge")
    sources = [rank_states(run / f"global_step{step}") for step in (2, 4)]
    for older, newer, merged in zip(*sources, rank_states(tmp_path / "out/global_step4"), strict=True):
        for group in merged:
            for kind, value in unnested(merged[group]).items():
                if is_long(value):
                    pair = [unnested(state[group])[kind] for state in (older, newer)]
                    assert same_bits(value, average(pair, COEFFICIENTS)), kind
                    assert kind in ("exp_avg", "state1") or (value >= 0).all()
                else:
                    assert same_tree(value, unnested(newer[group])[kind]), kind


def test_factored_states_of_stage_0_are_not_merged_in_part(states_runs: Path, tmp_path: Path) -> None:
    run = states_runs / "adafactor_s0"
    factored = r"cannot be merged: exp_avg_sq_row \(a fp32 tensor of shape \[13\] for a parameter of shape \[13, 32\]\)"
    with pytest.raises(UnsupportedLayout, match=factored):
        merge(run=run, last=2, curve="linear", out=tmp_path / "out", optimizer_states="merge")


def test_a_rate_that_is_not_in_the_files_is_a_warning_and_no_fault(
    states_runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    run = states_runs / "adafactor_s2"
    merge(run=run, last=2, curve="linear", out=tmp_path / "out")
    assert "computes its own learning rates ([None, None])" in caplog.text
    caplog.clear()
    export(run, out=tmp_path / "model")
    assert "learning rates" not in caplog.text
    assert main(["inspect", str(run), "--json"]) == 0
    assert [found["learning_rates"] for found in json.loads(capsys.readouterr().out)] == [[None, None]] * 2
    assert main(["inspect", str(run)]) == 0


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        (1e-2, r"changes inside the window: \[None, None\] at global_step2, \[0\.01, 0\.01\] at global_step4"),
        (float("nan"), r"global_step4 was saved with the learning rates \[nan, nan\], one of which is not finite"),
        (float("inf"), r"\[inf, inf\], one of which is not finite"),
    ],
)
def test_a_rate_that_comes_or_is_not_finite_is_refused(
    states_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rate: float, words: str
) -> None:
    run = Path(shutil.copytree(states_runs / "adafactor_s2", tmp_path / "run"))
    for path in (run / "global_step4").glob("*optim_states.pt"):
        content = torch.load(path, weights_only=False)
        for group in content["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]:
            group["lr"] = rate
        torch.save(content, path)
    with pytest.raises(WindowError, match=words):
        merge(run=run, last=2, curve="linear", out=tmp_path / "out")
    merge(run=run, last=2, curve="linear", out=tmp_path / "out", allow=("lr-change",))
    assert main(["inspect", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[1]["learning_rates"] == [rate if rate == 1e-2 else str(rate)] * 2


def test_a_rate_that_is_a_bit_off_is_the_same_rate(states_runs: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(states_runs / "amsgrad_s2", tmp_path / "run"))
    for path in (run / "global_step4").glob("*optim_states.pt"):
        content = torch.load(path, weights_only=False)
        for group in content["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]:
            assert group["lr"] == 0.01
            group["lr"] = 0.009999999999999998  # as torch's LinearLR ends
        torch.save(content, path)
    merge(run=run, last=2, curve="linear", out=tmp_path / "out")


def test_groups_of_different_rates_keep_them_under_one_warmup_max_lr_and_resume_so(
    states_runs: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    load = load_of("layered", states_runs / "layered_s2", stage=2, scheduler=True, warmup=8, steps=1)
    load["dump"] = str(tmp_path / "dump")
    folder = tmp_path_factory.mktemp("load")
    reports = launch([load], world_size=2, folder=folder, worker="optimizer_states_worker.py")
    for (report,) in reports:
        assert report["lr"] == [1e-2 * 6 / 8, 1e-3 * 6 / 8]  # of the sixth update
    layout = inspect_run(states_runs / "layered_s2")[-1].layout
    assert layout is not None
    assert rate_words(layout.learning_rates) == "[0.00625, 0.000625]"  # of the fifth update


def test_weights_among_the_states_are_merged_with_the_weights_or_left_out(
    states_runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(states_runs, "schedule_free_s2")
    window: dict[str, Any] = {"run": run, "last": 2, "coefficients": COEFFICIENTS}
    with pytest.raises(UnsupportedLayout, match=r"optimizer states z are weights.*--optimizer-states merge"):
        merge(**window, out=tmp_path / "carried")
    merge(**window, out=tmp_path / "merged", optimizer_states="merge")
    sources = [rank_states(run / f"global_step{step}") for step in (2, 4)]
    for older, newer, merged in zip(*sources, rank_states(tmp_path / "merged/global_step4"), strict=True):
        for group in merged:
            assert same_bits(merged[group]["z"], average([older[group]["z"], newer[group]["z"]], COEFFICIENTS))
    merge(**window, out=tmp_path / "dropped", optimizer_states="drop")
    for optim in load_all(tmp_path / "dropped/global_step4")[1].values():
        for group in optim["base_optimizer_state"]["param_groups"]:
            assert (group["k"], group["weight_sum"], group["lr_max"]) == (0, 0.0, -1.0)
    assert "training mode" not in caplog.text
    export(run, out=tmp_path / "model")
    assert "was saved in the training mode of a schedule-free optimizer" in caplog.text


def test_the_two_modes_of_a_schedule_free_optimizer_are_not_merged_with_each_other(
    states_runs: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(run_of(states_runs, "schedule_free_s2"), tmp_path / "run"))
    for path in (run / "global_step2").glob("*optim_states.pt"):
        content = torch.load(path, weights_only=False)
        for group in content["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]:
            group["train_mode"] = False
        torch.save(content, path)
    with pytest.raises(LayoutMismatch, match=r"global_step2 was saved in evaluation mode, .*global_step4 in training"):
        merge(run=run, last=2, curve="linear", out=tmp_path / "out", format="safetensors")


def load_of(name: str, root: Path, **values: Any) -> dict[str, Any]:
    """A job that loads root/global_step4, which was made of the run `name`."""
    common = {"do": "load", "engine": "optimizer", "optimizer": name.removesuffix("_s2"), "dtype": "bf16", "steps": 2}
    return common | {"root": str(root), "dump": str(root / "dump")} | values


def test_deepspeed_loads_the_results_and_trains_on(
    states_runs: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    jobs: list[dict[str, Any]] = []
    for name in filter(is_installed, ("adafactor_s2", "bnb32_s2", "bnb8_s2", "schedule_free_s2", "nadam_s2")):
        form: dict[str, Any] = {"stage": 3, "sub_group_size": 300}
        reshard(
            states_runs / name, out=tmp_path / name, optimizer_states="drop" if name == "bnb8_s2" else "carry", **form
        )
        jobs.append(load_of(name, tmp_path / name, stage=3, zero={"sub_group_size": 300}))
    if is_installed("bnb32_s2"):
        merge(run=states_runs / "bnb32_s2", last=1, curve="linear", out=tmp_path / "universal", format="universal")
        config: dict[str, Any] = {"tag": "global_step4_universal", "config": {"checkpoint": {"load_universal": True}}}
        jobs.append(load_of("bnb32_s2", tmp_path / "universal", stage=1, **config))
    worker = "optimizer_states_worker.py"
    reports = launch(jobs, world_size=2, folder=tmp_path_factory.mktemp("load"), worker=worker)
    for rank, of_rank in enumerate(reports):
        for job, report in zip(jobs, of_rank, strict=True):
            assert report["global_steps"] == 4
            assert all(torch.isfinite(torch.tensor(report["losses"])))
            # A universal checkpoint of stage 2 is cut for stage 1 in the same way.
            source = states_runs / "bnb32_s2" if "tag" in job else Path(job["root"])
            held = torch.load(f"{job['dump']}.rank{rank}", weights_only=False)["moments"]
            for saved, loaded in zip(rank_states(source / "global_step4")[rank].values(), held, strict=False):
                wanted = {kind: value for kind, value in unnested(saved).items() if torch.is_tensor(value)}
                assert wanted
                assert same_tree(wanted, {kind: loaded[kind] for kind in wanted}), job
