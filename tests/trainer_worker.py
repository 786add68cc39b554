"""Trains a tiny Llama through transformers' Trainer with DeepSpeed on CPU, as a user's script does.

Jobs and reports: `ds_worker.py`.
"""

import hashlib
from typing import Any

import numpy
import torch
import torch.distributed as dist
from ds_worker import master_partitions, module_weights, run_jobs  # prepares DeepSpeed for CPU
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from wsm_ds.averaging import trainer_callback

VOCABULARY = 13


def ds_config(job: dict[str, Any]) -> dict[str, Any]:
    """Everything that Trainer can fill in is "auto"."""
    warmup = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps")
    adam = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}
    config: dict[str, Any] = {
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": job["stage"], "reduce_bucket_size": "auto"},
        "optimizer": {"type": "AdamW", "params": adam},
        "scheduler": {"type": "WSMLR", "params": dict.fromkeys(warmup, "auto")},
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }
    if job["stage"] == 3:
        persistence = {"stage3_param_persistence_threshold": "auto", "stage3_prefetch_bucket_size": "auto"}
        config["zero_optimization"] |= persistence | {"stage3_gather_16bit_weights_on_model_save": True}
    if job.get("slot_every"):
        config["wsm_ds"] = {"slot_every": job["slot_every"]}
    if job.get("universal"):
        config["checkpoint"] = {"load_universal": True}
    return config


class Watch(TrainerCallback):
    """Writes down what the engine holds when training begins, and every update's rate, generator state and loss."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.trainer: Any = None
        self.report: dict[str, Any] = {"first_step": None, "rates": [], "generators": [], "losses": []}

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        engine = self.trainer.model_wrapped
        self.report["first_step"] = [state.global_step, engine.global_steps]
        if "dump" in self.job:
            held = {
                "masters": [t.detach().clone() for t in master_partitions(engine)],
                "module": module_weights(engine),
            }
            torch.save(held, f"{self.job['dump']}.rank{dist.get_rank()}")

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.report["rates"].append(self.trainer.model_wrapped.get_lr()[0])
        self.report["generators"].append(hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        if "loss" in logs:
            self.report["losses"].append(logs["loss"])


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word "tN" for token N."""
    tokenizer = Tokenizer(WordLevel({f"t{number}": number for number in range(VOCABULARY)}, unk_token="t0"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", eos_token="t0")


def do_trainer(job: dict[str, Any]) -> dict[str, Any]:
    """`Trainer.train`, from the beginning or from job["resume"]; saves into job["run"] after every second update.

    job["steps"] is the number of updates, job["every"] the updates from one save to the next, job["rate"] the learning
    rate, and job["data"] a file of rows of tokens.
    """
    arguments = TrainingArguments(
        output_dir=job["run"],
        deepspeed=ds_config(job),
        use_cpu=True,
        ddp_backend="gloo",
        bf16=True,
        learning_rate=job.get("rate", 1e-2),
        warmup_steps=8,
        max_steps=job.get("steps", 6),
        save_steps=job.get("every", 2),
        logging_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        disable_tqdm=True,
    )
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=job["tied"], attention_dropout=0.1)
    model = AutoModelForCausalLM.from_config(config)
    sequences = torch.randint(0, VOCABULARY, (64, 6), generator=torch.Generator().manual_seed(1))
    if "data" in job:
        sequences = torch.from_numpy(numpy.load(job["data"]).astype(numpy.int64))
    rows = [{"input_ids": sequence, "labels": sequence} for sequence in sequences]
    seen: list[list[int]] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].tolist()), with_kwargs=True)
    watch = Watch(job)
    watch.trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=default_data_collator,
        processing_class=make_tokenizer(),
        callbacks=[watch],
    )
    if job.get("slot_every"):
        watch.trainer.add_callback(trainer_callback(watch.trainer))
    watch.trainer.train(resume_from_checkpoint=job.get("resume"))
    watch.trainer.model_wrapped.destroy()
    return {**watch.report, "batches": seen, "global_step": watch.trainer.state.global_step}


if __name__ == "__main__":
    run_jobs({"trainer": do_trainer})
