"""Runs whose batch grows and whose ranks change, trained by DeepSpeed on CPU. Usage and reports: `ds_worker.py`."""

import argparse
from typing import Any

import numpy as np
import torch
from ds_worker import build_engine, run_jobs


def client_state(samples: int, length: int) -> dict[str, Any]:
    """The counts that Megatron-DeepSpeed saves (`megatron/checkpointing.py`), as numpy scalars and as plain numbers."""
    args = argparse.Namespace(
        consumed_train_samples=np.int64(samples), consumed_train_tokens=np.int64(samples * length), seq_length=length
    )
    return {"args": args, "checkpoint_version": 3.0, "iteration": 1, "tokens": samples * length}


def do_ramp(job: dict[str, Any]) -> dict[str, Any]:
    """Trains with the global batch job["batches"][i] in update i, and saves every second one, after job["load"]."""
    engine = build_engine(job)
    if "load" in job:
        engine.load_checkpoint(job["load"])
    first = engine.global_steps + 1
    for step, size in enumerate(job["batches"], start=first):
        engine.set_train_batch_size(size)
        for _ in range(engine.gradient_accumulation_steps()):
            tokens = torch.randint(0, 13, (2, 6), generator=torch.Generator().manual_seed(step))
            loss = torch.nn.functional.cross_entropy(engine(tokens).float().flatten(0, 1), tokens.flatten())
            engine.backward(loss)
            engine.step()
        if step % 2 == 0:
            state = client_state(10 * engine.global_samples, 6) if job.get("megatron") else {}
            engine.save_checkpoint(job["run"], tag=f"global_step{step}", client_state=state)
    samples = engine.global_samples
    engine.destroy()
    return {"samples": samples}


if __name__ == "__main__":
    run_jobs({"ramp": do_ramp})
