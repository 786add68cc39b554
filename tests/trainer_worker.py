"""Trains a tiny Llama with HF Trainer under DeepSpeed, or resumes it: torchrun tests/trainer_worker.py JOBS.json."""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed.ops
import torch
import torch.distributed as dist

deepspeed.ops.__dict__["__compatible_ops__"] = {}

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments  # noqa: E402

import wsm_ds  # noqa: E402, F401  registers WSMLR


def ds_config(stage: int) -> dict[str, Any]:
    warmup = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}
    adamw = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}
    return {
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": adamw},
        "scheduler": {"type": "WSMLR", "params": warmup},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": "auto"},
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }


class Recorder(TrainerCallback):
    """Notes what the engine holds when training begins, and every update's rate."""

    def __init__(self, trainer_box: list[Trainer]) -> None:
        self.box, self.masters, self.rates, self.steps = trainer_box, [], [], []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        engine = self.box[0].model_wrapped
        if not self.masters:
            stage3 = engine.zero_optimization_stage() == 3
            name = "fp32_partitioned_groups_flat" if stage3 else "single_partition_of_fp32_groups"
            self.masters = [tensor.detach().clone() for tensor in getattr(engine.optimizer, name)]
        self.rates.append(engine.get_lr()[0])
        self.steps.append(state.global_step)


def run(job: dict[str, Any]) -> dict[str, Any]:
    sizes = {"vocab_size": 13, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2}
    arguments = TrainingArguments(
        output_dir=job["run"], max_steps=job["max_steps"], save_steps=2, per_device_train_batch_size=2, bf16=True,
        learning_rate=1e-2, warmup_steps=2, weight_decay=0.1, deepspeed=ds_config(job["stage"]), report_to=[],
        use_cpu=True, logging_steps=1, disable_tqdm=True, seed=7,
    )  # fmt: skip
    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=job["tied"]))
    rows = torch.randint(0, 13, (64, 6), generator=torch.Generator().manual_seed(3))
    data = [{"input_ids": row, "labels": row} for row in rows]
    box: list[Trainer] = []
    recorder = Recorder(box)
    box.append(Trainer(model=model, args=arguments, train_dataset=data, callbacks=[recorder]))
    box[0].train(resume_from_checkpoint=job.get("resume"))
    torch.save(recorder.masters, f"{job['dump']}.rank{dist.get_rank()}")
    losses = [entry["loss"] for entry in box[0].state.log_history if "loss" in entry]
    return {"losses": losses, "rates": recorder.rates, "steps": recorder.steps}


def main() -> None:
    jobs_file = Path(sys.argv[1])
    reports = [run(job) for job in json.loads(jobs_file.read_text())]
    Path(f"{jobs_file}.rank{dist.get_rank()}").write_text(json.dumps(reports))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
