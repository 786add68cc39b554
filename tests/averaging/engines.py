"""The engines that averages are tested with."""

from typing import Any

Job = dict[str, Any]
ACCUMULATING = {"gradient_accumulation_steps": 2}
OVERFLOWING = {"fp16": {"enabled": True, "initial_scale_power": 20}}
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
TORCH_ADAM = {"zero_force_ds_cpu_optimizer": False}

TWO_RANKS: dict[str, Job] = {
    "ZeRO-1 bf16": {"stage": 1, "dtype": "bf16", "engine": "noisy"},
    "ZeRO-1 fp16 with overflows": {"stage": 1, "dtype": "fp16", "engine": "noisy", "config": OVERFLOWING},
    "ZeRO-2 bf16, accumulating": {"stage": 2, "dtype": "bf16", "engine": "noisy", "config": ACCUMULATING},
    "ZeRO-2 fp32": {"stage": 2, "dtype": "fp32", "engine": "noisy"},
    "ZeRO-2 round robin": {"stage": 2, "dtype": "bf16", "zero": {"round_robin_gradients": True}},
    "ZeRO-2 offloaded": {"stage": 2, "dtype": "bf16", "zero": OFFLOADED, "config": TORCH_ADAM},
    "BF16_Optimizer": {
        "stage": 1,
        "dtype": "bf16",
        "engine": "noisy",
        "config": {"data_types": {"grad_accum_dtype": "fp32"}},
    },
    "ZeRO-3 bf16": {"stage": 3, "dtype": "bf16", "engine": "noisy"},
    "ZeRO-3 fp32": {"stage": 3, "dtype": "fp32", "engine": "noisy"},
    "ZeRO-3 fp16 with overflows": {"stage": 3, "dtype": "fp16", "engine": "noisy", "config": OVERFLOWING},
    "ZeRO-3 persistent": {"stage": 3, "dtype": "bf16", "zero": {"stage3_param_persistence_threshold": 100}},
    "ZeRO-3 hpZ": {"stage": 3, "dtype": "bf16", "zero": {"zero_hpz_partition_size": 2}},
    "ZeRO-3 offloaded": {"stage": 3, "dtype": "bf16", "zero": OFFLOADED, "config": TORCH_ADAM},
    "stage 0 bf16": {"stage": 0, "dtype": "bf16", "engine": "noisy"},
    "stage 0 fp16 with overflows": {"stage": 0, "dtype": "fp16", "engine": "noisy", "overflow_at": [3, 7]},
    "stage 0 fp32": {"stage": 0, "dtype": "fp32", "engine": "noisy"},
    "native MoE": {"stage": 2, "dtype": "bf16", "ep": 2},
    "tensor parallel": {"stage": 1, "dtype": "bf16", "engine": "tensor parallel", "mp": 2},
    "pipeline": {"stage": 1, "dtype": "bf16", "engine": "pipeline", "mp": 2},
}
