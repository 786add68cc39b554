"""What changed in which version of DeepSpeed, where a run or its merges feel it.

The versions come from the source distributions of 0.14.5, 0.15.4, 0.16.9, 0.17.6, 0.18.9 and 0.19.0 to 0.19.8 on PyPI:
the change is in the named version and not in the one before it. `tests/doctor/test_deepspeed_facts.py` compares the
facts with the DeepSpeed that is installed.
"""

from packaging.version import Version

NEWEST_READ = Version("0.19.8")
"""The newest version whose source was read. A later one is judged as this one."""

CLIPS_BY_DEFAULT = Version("0.19.3")
"""`GRADIENT_CLIPPING_DEFAULT` (`runtime/constants.py`) is 1.0 since this version; it was 0, no clipping, before."""
CHECKS_BF16_OVERFLOW = Version("0.19.3")
"""`check_grad_overflow` of `bf16` (`runtime/precision_config.py`) is on since this version; it was off before."""
SHORT_TIMEOUT = Version("0.19.6")
"""`default_pg_timeout` (`constants.py`) is 10 minutes since this version; it was 30 before."""
KEEPS_FROZEN_GATHERED = Version("0.19.3")
"""Since this version, ZeRO-3 keeps a frozen parameter gathered while a checkpointed block is computed again
(`runtime/zero/partitioned_param_coordinator.py`, `ds_recompute_parameters`)."""
LOSES_BF16_OPTIMIZER = (Version("0.17.6"), Version("0.18.5"))
"""Since the first version and before the second, `BFLOAT16` and `DDP_BFLOAT16` are equal (`runtime/constants.py`; read
in 0.17.0 to 0.17.6 and 0.18.0 to 0.18.9). A bf16 run at stage 1 that accumulates its gradients in fp32 gets an
optimizer for stage 0 then (`runtime/engine.py`, `_configure_optimizer`), and no checkpoint holds it."""

REMOVED_KEYS: dict[str, Version] = {
    key: Version(version)
    for version, keys in {
        "0.19.7": (
            "nebula",
            "compression_training",
            "quantize_training",
            "sparse_attention",
            "zero_optimization.mics_shard_size",
            "zero_optimization.mics_hierarchical_params_gather",
        ),
        "0.19.8": (
            "amp",
            "sparse_gradients",
            "eigenvalue",
            "elasticity",
            "graph_harvesting",
            "curriculum_learning",
            "progressive_layer_drop",
            "zero_optimization.zeropp_loco_param",
        ),
    }.items()
    for key in keys
}
"""Keys of a ds_config that DeepSpeed refuses since a version (`runtime/config.py`, `_REMOVED_TOP_LEVEL_CONFIG_KEYS`
and `_REMOVED_ZERO_CONFIG_KEYS`)."""
REMOVED_OPTIMIZERS = {name: Version("0.19.7") for name in ("onebitadam", "zerooneadam", "onebitlamb")}
"""1-bit optimizers, in lower case, with the version that no longer has them (`runtime/config.py`)."""


def timeout_minutes(version: Version) -> int:
    """Returns DeepSpeed's own timeout of a process group, in minutes, without `DEEPSPEED_TIMEOUT`.

    Args:
        version: of DeepSpeed.
    """
    return 10 if version >= SHORT_TIMEOUT else 30
