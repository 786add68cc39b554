"""Checks of a ds_config. Each check is a function of the configuration and the version; it returns its findings.

A value "auto" is filled in by HF's Trainer or by Accelerate when the run starts. It is not known here.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from packaging.version import Version

from wsm_ds.doctor.deepspeed_facts import (
    CHECKS_BF16_OVERFLOW,
    CLIPS_BY_DEFAULT,
    LOSES_BF16_OPTIMIZER,
    REMOVED_KEYS,
    REMOVED_OPTIMIZERS,
    timeout_minutes,
)
from wsm_ds.doctor.findings import Finding

Config = Mapping[str, Any]

CONSTANT = ("WSMLR", "WarmupLR")
DECAYING = {
    "WSDLR": "the rate falls at the end of the run (it is the baseline that WSM replaces)",
    "WarmupDecayLR": "the rate falls from the end of the warmup to 0 at total_num_steps",
    "WarmupCosineLR": "the rate falls from the end of the warmup along a cosine",
    "OneCycle": "the rate rises and falls in cycles",
    "LRRangeTest": "the rate rises without end",
}
SCHEDULES_SOURCE = "deepspeed/runtime/lr_schedules.py"


def check_config(config: Config, version: Version) -> list[Finding]:
    """Checks a ds_config.

    Args:
        config: the content of the JSON file.
        version: of the DeepSpeed that runs it.
    """
    checks = (
        _scheduler,
        _clipping,
        _overflow,
        _timeout,
        _removed,
        _writer,
        _unsaved,
        _unreadable,
        _storage,
        _universal,
    )
    return [finding for check in checks for finding in check(config, version)]


def block(config: Config, key: str) -> Config:
    """Returns a block of a configuration; an empty one if it is missing or no block."""
    value = config.get(key)
    return value if isinstance(value, Mapping) else {}


def _scheduler(config: Config, version: Version) -> Iterator[Finding]:
    scheduler = block(config, "scheduler")
    name, params = scheduler.get("type"), scheduler.get("params")
    if name is None:
        yield Finding(
            name="no-scheduler",
            level="note",
            found="the ds_config names no scheduler",
            effect="the rate is what the training code makes it; DeepSpeed neither steps nor saves a scheduler of its "
            "own",
            cure='name one: "scheduler": {"type": "WSMLR", "params": {"warmup_max_lr": …, "warmup_num_steps": …}}',
            source="deepspeed/runtime/engine.py, _configure_lr_scheduler",
        )
    elif isinstance(name, str) and name in DECAYING:
        yield Finding(
            name="scheduler-decays",
            level="error",
            found=f"scheduler.type is {name}: {DECAYING[name]}",
            effect="a merge emulates a decay from a constant rate; a window inside this decay is refused",
            cure='use "type": "WSMLR" with the same warmup_max_lr and warmup_num_steps',
            source="wsm_ds/schedules/lr_schedules.py" if name == "WSDLR" else f"{SCHEDULES_SOURCE}, class {name}",
        )
    elif name not in CONSTANT:
        yield Finding(
            name="scheduler-fails",
            level="error",
            found=f"scheduler.type is {name!r}",
            effect="it is no scheduler of DeepSpeed's. torch's own fail when a ds_config names them under ZeRO, in "
            "bf16 or in fp16: they get DeepSpeed's wrapper, not a torch optimizer (TypeError)",
            cure='use "type": "WSMLR", or pass the scheduler object to deepspeed.initialize',
            source="deepspeed/runtime/engine.py, _scheduler_from_config",
        )
    elif not isinstance(params, Mapping):
        yield Finding(
            name="scheduler-params",
            level="error",
            found=f"scheduler.type is {name}, and scheduler.params is missing",
            effect="deepspeed.initialize ends with a TypeError: it passes params with **, whatever they are",
            cure='give "params": {"warmup_max_lr": …, "warmup_num_steps": …}',
            source="deepspeed/runtime/engine.py, _scheduler_from_config",
        )
    if name == "WarmupLR":
        yield from _warmup_lr(params if isinstance(params, Mapping) else {})


def _warmup_lr(params: Config) -> Iterator[Finding]:
    kind = "" if "warmup_type" in params else "; warmup_type is missing, so the warmup is logarithmic"
    yield Finding(
        name="warmup-lr",
        level="warning",
        found=f"scheduler.type is WarmupLR{kind}",
        effect="the first two updates have the rate warmup_min_lr; after a resume without optimizer states the first "
        "update has the rate 0; after a resume with another warmup_max_lr the first update has the old rate",
        cure='use "type": "WSMLR": the same parameters, a linear warmup, and the right rate after every kind of resume',
        source=f"{SCHEDULES_SOURCE}, class WarmupLR; tests/schedules/test_lr_schedules_deepspeed.py runs both",
    )


def _clipping(config: Config, version: Version) -> Iterator[Finding]:
    if "gradient_clipping" in config:
        return
    clips = version >= CLIPS_BY_DEFAULT
    yield Finding(
        name="clipping-by-default",
        level="warning",
        found="the ds_config does not set gradient_clipping",
        effect=f"since DeepSpeed {CLIPS_BY_DEFAULT} gradients are then clipped to a norm of 1.0"
        + ("" if clips else f"; {version} does not clip, so an update of DeepSpeed changes the training"),
        cure='set it: "gradient_clipping": 1.0, or 0.0 for none',
        source="deepspeed/runtime/constants.py, GRADIENT_CLIPPING_DEFAULT",
    )


def _overflow(config: Config, version: Version) -> Iterator[Finding]:
    bf16 = block(config, "bf16") or block(config, "bfloat16")
    if bf16.get("enabled") is not True or "check_grad_overflow" in bf16:
        return
    if version >= CHECKS_BF16_OVERFLOW:
        yield Finding(
            name="bf16-overflow-check",
            level="note",
            found="bf16.check_grad_overflow is not set",
            effect=f"since DeepSpeed {CHECKS_BF16_OVERFLOW} an update with a gradient that is infinite or not a "
            "number is skipped; the scheduler does not move then, so it counts fewer steps than global_steps",
            cure='set it: "bf16": {"enabled": true, "check_grad_overflow": true}, or false as before',
            source="deepspeed/runtime/precision_config.py, DeepSpeedBF16Config",
        )


def _timeout(config: Config, version: Version) -> Iterator[Finding]:
    minutes = timeout_minutes(version)
    yield Finding(
        name="process-group-timeout",
        level="note",
        found=f"DeepSpeed {version} waits {minutes} minutes in a collective, unless DEEPSPEED_TIMEOUT (minutes) is set",
        effect="ranks that have saved their files wait for the slowest rank; a save that takes longer ends the job",
        cure="if a save can take longer, set DEEPSPEED_TIMEOUT, or pass timeout= to deepspeed.init_distributed",
        source="deepspeed/constants.py, default_pg_timeout",
    )


def _removed(config: Config, version: Version) -> Iterator[Finding]:
    zero = block(config, "zero_optimization")
    for key, since in REMOVED_KEYS.items():
        if key.removeprefix("zero_optimization.") in (zero if "." in key else config):
            yield _gone(key, f"the ds_config has {key}", since, version, "deepspeed.initialize ends with an error")
    name = block(config, "optimizer").get("type")
    since_ = REMOVED_OPTIMIZERS.get(str(name).lower())
    if since_ is not None:
        effect = "deepspeed.initialize ends with an error: it is not a supported DeepSpeed optimizer"
        yield _gone("optimizer.type", f"optimizer.type is {name}", since_, version, effect)


def _gone(key: str, found: str, since: Version, version: Version, effect: str) -> Finding:
    is_gone = version >= since
    return Finding(
        name="removed-feature",
        level="error" if is_gone else "warning",
        found=found,
        effect=f"DeepSpeed {since} has removed it: {effect}"
        + ("" if is_gone else f". {version} still has it; an update breaks the run"),
        cure=f"remove {key}, or choose another feature",
        source="deepspeed/runtime/config.py, _REMOVED_TOP_LEVEL_CONFIG_KEYS, _REMOVED_ZERO_CONFIG_KEYS, "
        "DEEPSPEED_OPTIMIZERS",
    )


def _writer(config: Config, version: Version) -> Iterator[Finding]:
    checkpoint = block(config, "checkpoint")
    if isinstance(checkpoint.get("writer"), Mapping):
        is_decoupled = checkpoint["writer"].get("decoupled") is True
        engine, module = ("Decoupled", "decoupled") if is_decoupled else ("Fast", "fast")
        yield Finding(
            name="writer-cannot-load",
            level="error",
            found=f"checkpoint.writer is set, so DeepSpeed saves with {engine}CheckpointEngine",
            effect="it loads with torch.load's default weights_only=True, which refuses DeepSpeed's optimizer files: "
            "the run cannot be resumed (DeepSpeed issue 8500). In stages 0 to 2 it may write files in pieces that "
            "nothing reads",
            cure="remove checkpoint.writer",
            source=f"deepspeed/runtime/checkpoint_engine/{module}_checkpoint_engine.py, load",
        )
    if block(config, "datastates_ckpt"):
        yield Finding(
            name="writer-datastates",
            level="warning",
            found="the ds_config has datastates_ckpt",
            effect="an external package writes the checkpoints; wsm_ds does not read its files",
            cure="remove datastates_ckpt, or convert what it wrote before merging",
            source="deepspeed/runtime/checkpoint_engine/utils.py, create_checkpoint_engine",
        )


def _unsaved(config: Config, version: Version) -> Iterator[Finding]:
    first, end = LOSES_BF16_OPTIMIZER
    bf16, zero = block(config, "bf16") or block(config, "bfloat16"), block(config, "zero_optimization")
    accumulates_in_fp32 = block(config, "data_types").get("grad_accum_dtype") == "fp32"
    is_bf16_stage1 = bf16.get("enabled") is True and zero.get("stage") == 1
    offloads = block(zero, "offload_optimizer").get("device") == "cpu"
    if first <= version < end and is_bf16_stage1 and accumulates_in_fp32 and not offloads:
        yield Finding(
            name="optimizer-not-saved",
            level="error",
            found="bf16 at stage 1 with data_types.grad_accum_dtype fp32",
            effect=f"DeepSpeed {version} makes the optimizer of stage 0 and saves none of it: no masters, no moments; "
            "its own load_checkpoint ends with an AttributeError, and wsm_ds refuses the checkpoint",
            cure=f"use stage 2, DeepSpeed {end} or newer, or one before {first}",
            source="deepspeed/runtime/constants.py, DDP_BFLOAT16; tests/test_old_deepspeed.py runs it",
        )


def _unreadable(config: Config, version: Version) -> Iterator[Finding]:
    """Settings with which DeepSpeed writes files that wsm_ds refuses."""
    if block(config, "checkpoint").get("checkpoint_serialization") is False:
        yield Finding(
            name="legacy-files",
            level="error",
            found="checkpoint.checkpoint_serialization is false",
            effect="torch then writes its old file format, whose tensors cannot be read one by one; wsm_ds refuses it",
            cure="remove checkpoint.checkpoint_serialization",
            source="deepspeed/runtime/checkpoint_engine/torch_checkpoint_engine.py, save",
        )
    offload = block(block(config, "zero_optimization"), "offload_optimizer")
    if offload.get("device") == "nvme":
        yield Finding(
            name="nvme-offload",
            level="error",
            found="zero_optimization.offload_optimizer.device is nvme",
            effect="the masters are then in swap files beside the checkpoint, which wsm_ds refuses",
            cure='offload to "cpu", or not at all',
            source="deepspeed/runtime/engine.py, offloaded_tensors",
        )


def _storage(config: Config, version: Version) -> Iterator[Finding]:
    if block(config, "checkpoint").get("use_node_local_storage") is True:
        yield Finding(
            name="node-local-storage",
            level="warning",
            found="checkpoint.use_node_local_storage is true",
            effect="each node keeps only the files of its own ranks; a merge needs the files of all ranks in one "
            "folder",
            cure="save to shared storage, or copy all nodes' files into one folder before merging",
            source="deepspeed/runtime/engine.py, use_node_local_storage",
        )


def _universal(config: Config, version: Version) -> Iterator[Finding]:
    if block(config, "checkpoint").get("load_universal") is True:
        yield Finding(
            name="loads-universal",
            level="warning",
            found="checkpoint.load_universal is true",
            effect="every load expects a universal checkpoint; buffers and frozen parameters stay as initialised",
            cure="remove it as soon as the run has resumed from its universal checkpoint",
            source="deepspeed/runtime/engine.py, load_universal_checkpoint",
        )
    if block(config, "zero_optimization").get("round_robin_gradients") is True:
        yield Finding(
            name="round-robin",
            level="note",
            found="zero_optimization.round_robin_gradients is true",
            effect="DeepSpeed's universal conversion and loading give wrong weights with it, without an error; "
            "merging and resharding by wsm_ds are right",
            cure="change the number of ranks with `wsm-ds reshard`, not with ds_to_universal",
            source="deepspeed/runtime/zero/stage_1_and_2.py; tests/outputs/resharding runs it",
        )
