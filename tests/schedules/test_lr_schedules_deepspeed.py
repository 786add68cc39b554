"""The schedulers in real DeepSpeed engines: what the optimizer used, update by update."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from deepspeed_runs import launch

WSM: dict[str, Any] = {"type": "WSMLR", "params": {"warmup_max_lr": 1.0, "warmup_num_steps": 4}}
WARMUP = [0.25, 0.5, 0.75, 1.0, 1.0]
BF16_OPTIMIZER = {"config": {"data_types": {"grad_accum_dtype": "fp32"}}}
OFFLOAD = {"zero": {"offload_optimizer": {"device": "cpu"}}, "config": {"zero_force_ds_cpu_optimizer": False}}
ENGINES: dict[str, dict[str, Any]] = {
    "stage 0 fp32": {"stage": 0, "dtype": "fp32"},
    "stage 0 bf16": {"stage": 0, "dtype": "bf16"},
    "stage 1 bf16": {"stage": 1, "dtype": "bf16"},
    "stage 2 bf16": {"stage": 2, "dtype": "bf16"},
    "stage 2 fp32": {"stage": 2, "dtype": "fp32"},
    "stage 3 bf16": {"stage": 3, "dtype": "bf16"},
    "BF16_Optimizer": {"stage": 1, "dtype": "bf16", **BF16_OPTIMIZER},
    "stage 2 offloaded": {"stage": 2, "dtype": "bf16", **OFFLOAD},
    "stage 3 offloaded": {"stage": 3, "dtype": "bf16", **OFFLOAD},
}
ZERO = [name for name in ENGINES if not name.startswith("stage 0")]


def changed(**parameters: Any) -> dict[str, Any]:
    return {"type": "WSMLR", "params": WSM["params"] | parameters}


def cases_of_engines(root: Path) -> dict[str, dict[str, Any]]:
    """Starts and resumes in every engine."""
    jobs: dict[str, dict[str, Any]] = {}
    for name, engine in ENGINES.items():
        jobs[f"{name}: fresh"] = engine | {"updates": 5, "scheduler": WSM}
        jobs[f"{name}: save"] = engine | {"updates": 2, "scheduler": WSM, "save": str(root / name)}
        load = engine | {"updates": 3, "scheduler": WSM, "load": str(root / name)}
        jobs[f"{name}: resume"] = load
        if name in ZERO:
            jobs[f"{name}: no optimizer states"] = load | {"load_options": {"load_optimizer_states": False}}
            jobs[f"{name}: no scheduler states"] = load | {"load_options": {"load_lr_scheduler_states": False}}
            jobs[f"{name}: module only"] = load | {"load_options": {"load_module_only": True}}
        jobs[f"{name}: foreign"] = engine | {"updates": 1, "client": "foreign on the same model"}
        jobs[f"{name}: other peak refused"] = load | {"scheduler": changed(warmup_max_lr=2.0)}
        jobs[f"{name}: other peak applied"] = load | {"scheduler": changed(warmup_max_lr=2.0, on_change="apply")}
    return jobs


def cases_of_schedules(root: Path) -> dict[str, dict[str, Any]]:
    """Starts and resumes of one engine with every kind of scheduler."""
    zero2 = ENGINES["stage 2 bf16"]
    decay = {"decay_start_step": 2, "decay_num_steps": 2, "decay_curve": "linear", "warmup_num_steps": 2}
    stable = {"type": "WSMLR", "params": {"warmup_max_lr": 1.0, "warmup_num_steps": 2}}
    native: dict[str, Any] = {
        "type": "WarmupLR",
        "params": {"warmup_max_lr": 1.0, "warmup_num_steps": 4, "warmup_type": "linear"},
    }
    return {
        "accumulation": zero2 | {"updates": 5, "scheduler": WSM, "config": {"gradient_accumulation_steps": 3}},
        "overflow": {"stage": 2, "dtype": "fp16", "updates": 7, "scheduler": WSM, "overflow": [0, 3]}
        | {"config": {"fp16": {"enabled": True, "initial_scale_power": 4, "hysteresis": 1}}},
        "class": zero2 | {"updates": 2, "client": "class"},
        "factory": zero2 | {"updates": 5, "client": "factory"},
        "instance": zero2 | {"updates": 5, "client": "instance"},
        "variable batch sizes": zero2 | {"updates": 5, "scheduler": WSM, "batch_sizes": [1, 2]},
        "autocast": {"stage": 0, "dtype": "fp32", "updates": 3, "scheduler": WSM, "overflow": [0]}
        | {"config": {"torch_autocast": {"enabled": True, "dtype": "float16"}}},
        "foreign": zero2 | {"updates": 1, "client": "foreign"},
        "megatron's increment": zero2 | {"updates": 5, "scheduler": WSM, "lr_kwargs": {"increment": 64}},
        "stable": zero2 | {"updates": 2, "scheduler": stable, "save": str(root / "stable")},
        "branch": zero2
        | {"updates": 3, "load": str(root / "stable")}
        | {"scheduler": {"type": "WSDLR", "params": {"warmup_max_lr": 1.0} | decay}},
        "saved without": zero2 | {"updates": 2, "save": str(root / "without")},
        "loaded without": zero2 | {"updates": 2, "scheduler": WSM, "load": str(root / "without")},
        "loaded without, told": zero2
        | {"updates": 2, "scheduler": changed(last_batch_iteration=1), "load": str(root / "without")},
        "native": zero2 | {"updates": 2, "scheduler": native, "save": str(root / "native")},
        "from native": zero2 | {"updates": 3, "scheduler": WSM, "load": str(root / "native")},
        "native decay": zero2
        | {"updates": 2, "save": str(root / "native decay")}
        | {"scheduler": {"type": "WarmupDecayLR", "params": native["params"] | {"total_num_steps": 9}}},
        "from native decay": zero2 | {"updates": 3, "scheduler": WSM, "load": str(root / "native decay")},
        "torch": zero2 | {"updates": 2, "client": "torch", "save": str(root / "torch")},
        "from torch": zero2 | {"updates": 3, "scheduler": WSM, "load": str(root / "torch")},
    }


def cases_of_universal_checkpoints(root: Path) -> dict[str, dict[str, Any]]:
    """Resumes from universal checkpoints."""
    jobs: dict[str, dict[str, Any]] = {}
    for stage in (1, 2, 3):
        engine = {"stage": stage, "dtype": "bf16"}
        run = {"save": str(root / f"universal {stage}")}
        jobs[f"stage {stage}: to universal"] = engine | run | {"updates": 2, "scheduler": WSM, "universal": True}
        load = engine | {"updates": 3, "load": run["save"], "config": {"checkpoint": {"load_universal": True}}}
        jobs[f"stage {stage}: universal"] = load | {"scheduler": WSM}
        jobs[f"stage {stage}: universal, other peak"] = load | {
            "scheduler": changed(warmup_max_lr=2.0, on_change="apply")
        }
        jobs[f"stage {stage}: universal, warmup anew"] = load | {
            "scheduler": changed(warmup_max_lr=2.0),
            "load_options": {"load_lr_scheduler_states": False},
        }
        jobs[f"stage {stage}: other groups"] = engine | {
            "updates": 3,
            "scheduler": WSM,
            "group_cuts": [1, 3],
            "load": run["save"],
            "load_options": {"load_optimizer_states": False, "tag": "saved"},
        }
    return jobs


def cases(root: Path) -> dict[str, dict[str, Any]]:
    """Every job by name; those that load come after the one that saves."""
    jobs = cases_of_engines(root) | cases_of_schedules(root) | cases_of_universal_checkpoints(root)
    return {name: job | {"do": "schedule"} for name, job in jobs.items()}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Each case's report, from two ranks that agree; and a resume of three of them on one rank."""
    root = tmp_path_factory.mktemp("schedules")
    jobs = cases(root)
    first, second = launch(list(jobs.values()), world_size=2, folder=tmp_path_factory.mktemp("two"))
    assert first == second
    found = dict(zip(jobs, first, strict=True))
    alone = {f"{name}: on one rank": jobs[f"{name}: no optimizer states"] for name in ("stage 1 bf16", "stage 2 bf16")}
    alone |= {f"stage {stage}: universal, on one rank": jobs[f"stage {stage}: universal"] for stage in (1, 2, 3)}
    (reported,) = launch(list(alone.values()), world_size=1, folder=tmp_path_factory.mktemp("one"))
    return found | dict(zip(alone, reported, strict=True))


def used(report: dict[str, Any]) -> list[float]:
    """The one rate of each update; the same for all groups."""
    assert "error" not in report, report
    assert all(len(rates) == 1 for rates in report["used"]), report["used"]
    return [rates[0] for rates in report["used"]]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_fresh_run_uses_the_formula_from_the_first_update(reports: dict[str, Any], engine: str) -> None:
    assert used(reports[f"{engine}: fresh"]) == WARMUP


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_uses_the_rates_of_an_uninterrupted_one(reports: dict[str, Any], engine: str) -> None:
    report = reports[f"{engine}: resume"]
    assert used(report) == WARMUP[2:]
    assert report["last_lr"] == [0.75, 0.75]  # right after the load, too


@pytest.mark.parametrize("engine", ZERO)
def test_every_kind_of_load_has_a_defined_first_rate(reports: dict[str, Any], engine: str) -> None:
    assert used(reports[f"{engine}: no optimizer states"]) == WARMUP[2:]
    assert used(reports[f"{engine}: no scheduler states"]) == WARMUP[:3]
    assert used(reports[f"{engine}: module only"]) == WARMUP[:3]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_changed_peak_is_refused_or_applied_at_once(reports: dict[str, Any], engine: str) -> None:
    message = reports[f"{engine}: other peak refused"]["error"]
    assert "warmup_max_lr: 1.0 in the checkpoint, 2.0 in the configuration" in message
    assert used(reports[f"{engine}: other peak applied"]) == [1.5, 2.0, 2.0]


@pytest.mark.parametrize("engine", ["stage 1 bf16", "stage 2 bf16"])
def test_another_world_size_goes_on_with_the_same_rate(reports: dict[str, Any], engine: str) -> None:
    assert used(reports[f"{engine}: on one rank"]) == WARMUP[2:]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_universal_checkpoint_does_not_bring_its_rates_along(reports: dict[str, Any], stage: int) -> None:
    # DeepSpeed writes them straight into the groups, after the scheduler's state (runtime/base_optimizer.py)
    assert used(reports[f"stage {stage}: universal"]) == WARMUP[2:]
    assert used(reports[f"stage {stage}: universal, on one rank"]) == WARMUP[2:]
    assert used(reports[f"stage {stage}: universal, other peak"]) == [1.5, 2.0, 2.0]
    assert used(reports[f"stage {stage}: universal, warmup anew"]) == [0.5, 1.0, 1.5]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_other_parameter_groups_go_on_with_the_same_rate(reports: dict[str, Any], stage: int) -> None:
    assert used(reports[f"stage {stage}: other groups"]) == WARMUP[2:]


def test_gradient_accumulation_counts_updates(reports: dict[str, Any]) -> None:
    assert used(reports["accumulation"]) == WARMUP


def test_skipped_updates_do_not_count(reports: dict[str, Any]) -> None:
    report = reports["overflow"]
    assert report["skipped"] == 2
    assert report["used"] == [[], [0.25], [0.5], [], [0.75], [1.0], [1.0]]


def test_class_factory_and_instance_are_taken(reports: dict[str, Any]) -> None:
    assert used(reports["class"]) == pytest.approx([1e-6, 2e-6])  # the default warmup of 1000 to the optimizer's 1e-3
    assert used(reports["factory"]) == WARMUP
    assert used(reports["instance"]) == WARMUP


def test_an_instance_on_a_foreign_optimizer_is_refused_at_the_first_update(reports: dict[str, Any]) -> None:
    assert reports["foreign"]["error"].startswith("ScheduleError: WSMLR was stepped, but the optimizer it is bound to")


@pytest.mark.parametrize("engine", ENGINES)
def test_an_instance_on_another_optimizer_of_the_same_model_is_refused_too(
    reports: dict[str, Any], engine: str
) -> None:
    error = reports[f"{engine}: foreign"]["error"]
    assert error.startswith("ScheduleError: WSMLR was stepped, but the optimizer it is bound to made no update")


def test_a_skipped_update_that_deepspeed_does_not_know_of_is_no_foreign_optimizer(reports: dict[str, Any]) -> None:
    assert reports["autocast"]["used"] == [[], [0.5], [0.75]]  # DeepSpeed counts it


def test_variable_batch_sizes_scale_the_formula(reports: dict[str, Any]) -> None:
    assert used(reports["variable batch sizes"]) == [0.25, 1.0, 0.75, 2.0, 1.0]


def test_keywords_of_megatron_do_not_freeze_the_schedule(reports: dict[str, Any]) -> None:
    assert used(reports["megatron's increment"]) == WARMUP


def test_a_decay_branches_from_a_stable_checkpoint(reports: dict[str, Any]) -> None:
    assert used(reports["branch"]) == [0.5, 0.0, 0.0]


def test_a_checkpoint_without_a_scheduler_is_loaded(reports: dict[str, Any]) -> None:
    assert used(reports["loaded without"]) == WARMUP[:2]
    assert used(reports["loaded without, told"]) == WARMUP[2:4]


def test_a_run_that_used_deepspeeds_warmup_goes_on_where_it_was(reports: dict[str, Any]) -> None:
    assert used(reports["native"]) == [0.0, 0.0]  # DeepSpeed's own: two updates at the minimum
    assert used(reports["from native"]) == WARMUP[2:]
    assert used(reports["from native decay"]) == WARMUP[2:]


def test_a_run_that_used_a_torch_scheduler_goes_on_where_it_was(reports: dict[str, Any]) -> None:
    assert used(reports["torch"]) == pytest.approx([0.25e-3, 0.5e-3])
    assert used(reports["from torch"]) == WARMUP[2:]


def test_auto_values_are_filled_by_name() -> None:
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    auto = dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto")
    config = HfTrainerDeepSpeedConfig({"scheduler": {"type": "WSMLR", "params": auto}})
    arguments = TrainingArguments(output_dir="unused", learning_rate=3e-3, warmup_steps=4, use_cpu=True)
    config.trainer_config_process(arguments)
    config.trainer_config_finalize(arguments, None, 100)
    filled = config.config["scheduler"]["params"]
    assert filled["warmup_max_lr"] == 3e-3

    import torch

    from wsm_ds import WSMLR

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = WSMLR(optimizer, **filled)
    assert scheduler.get_last_lr() == [3e-3 / 4]


ACCELERATE = """
import json, os, torch
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
os.environ.update(DS_ACCELERATOR="cpu", ACCELERATE_USE_DEEPSPEED="true")
import deepspeed.ops
deepspeed.ops.__dict__["__compatible_ops__"] = {"deepspeed_shm_comm": False}
import wsm_ds
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import DummyScheduler
params = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True,
          "bf16": {"enabled": True}, "scheduler": {"type": "WSMLR", "params": params}}
accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = DummyScheduler(optimizer, warmup_num_steps=4)
model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
used = []
for _ in range(6):
    used.append(model.optimizer.optimizer.param_groups[0]["lr"])
    accelerator.backward(model(torch.ones(1, 4, dtype=torch.bfloat16)).float().sum())
    optimizer.step(); scheduler.step(); optimizer.zero_grad()
print(json.dumps([type(model.lr_scheduler).__name__, used]))
"""


def test_auto_values_of_accelerate_and_its_loop_give_the_formula() -> None:
    done = subprocess.run([sys.executable, "-c", ACCELERATE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    name, rates = json.loads(done.stdout.splitlines()[-1])
    assert name == "WSMLR"
    assert rates == pytest.approx([0.75e-3, 1.5e-3, 2.25e-3, 3e-3, 3e-3, 3e-3], rel=1e-12)


IMPORTS = """
import json, sys
for name in {order!r}:
    __import__(name)
light = sorted({{"torch", "deepspeed", "numpy"}} & set(sys.modules)) if {order!r} == ["wsm_ds"] else None
from deepspeed.runtime import lr_schedules
import wsm_ds
print(json.dumps([light, lr_schedules.WSMLR is wsm_ds.WSMLR, lr_schedules.VALID_LR_SCHEDULES.count("WSMLR"),
                  lr_schedules.VALID_LR_SCHEDULES.count("WSDLR")]))
"""


@pytest.mark.parametrize("order", [["wsm_ds"], ["wsm_ds", "deepspeed"], ["deepspeed", "wsm_ds"]])
def test_importing_wsm_ds_registers_in_either_order_and_alone_imports_nothing_heavy(order: list[str]) -> None:
    code = IMPORTS.format(order=order)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    light, *registered = json.loads(done.stdout.splitlines()[-1])
    assert light in ([], None)
    assert registered == [True, 1, 1]
