"""What slot means cost on a CPU: ratios within one run, of a ZeRO-1 engine with one rank.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 python benchmarks/averaging.py --out benchmarks/averaging.json

- CPU seconds of a sample of the mean against those of torch's AdamW and of DeepSpeed's whole update;
- bytes and CPU seconds of a snapshot against those of a full checkpoint;
- the longest pause of another Python thread while snapshots are written;
- memory of the mean and of a snapshot that is being written.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
ENVIRONMENT = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29541"}
ENVIRONMENT |= {"CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": "1"}
TICK_S = 0.001


def cpu_s(call: Callable[[], Any]) -> float:
    """CPU seconds of a call, of all threads of this process."""
    before = time.process_time()
    call()
    return time.process_time() - before


def make_engine(width: int, layers: int) -> Any:
    """A ZeRO-1 engine in bf16 with torch's AdamW."""
    import deepspeed
    import deepspeed.ops
    import torch

    deepspeed.ops.__dict__["__compatible_ops__"] = {"deepspeed_shm_comm": False}
    deepspeed.init_distributed("gloo", verbose=False)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine


def train_once(engine: Any, width: int) -> dict[str, float]:
    """One update; the CPU seconds of DeepSpeed's step, and of AdamW in it."""
    import torch

    adam, taken = engine.optimizer.optimizer, {"adamw": 0.0}
    inner = type(adam).step

    def timed(*arguments: Any, **keywords: Any) -> Any:
        before = time.process_time()
        try:
            return inner(adam, *arguments, **keywords)
        finally:
            taken["adamw"] += time.process_time() - before

    loss = engine(torch.randn(1, width, dtype=torch.bfloat16)).float().square().mean()
    engine.backward(loss)
    adam.step = timed
    taken["step"] = cpu_s(engine.step)
    del adam.step
    return taken


class Pauses:
    """The longest pause of a thread that wants to run every millisecond."""

    def __init__(self) -> None:
        self.longest_s, self.is_over = 0.0, threading.Event()
        self.thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Pauses":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over.set()
        self.thread.join()

    def _run(self) -> None:
        before = time.monotonic()
        while not self.is_over.is_set():
            time.sleep(TICK_S)
            now = time.monotonic()
            self.longest_s, before = max(self.longest_s, now - before - TICK_S), now


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(width: int, layers: int, updates: int) -> dict[str, Any]:
    """All figures."""
    from wsm_ds.averaging import SlotMeans

    engine = make_engine(width, layers)
    numel = sum(parameter.numel() for parameter in engine.module.parameters())
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        slots = SlotMeans(engine, run, every=1 << 20)
        steps, samples = [], []
        for _ in range(updates):
            steps.append(train_once(engine, width))
            samples.append(cpu_s(slots.update))
        adamw, step = (statistics.median(taken[name] for taken in steps[2:]) for name in ("adamw", "step"))
        sample = statistics.mean(samples[2:])
        with Pauses() as idle:
            time.sleep(1.0)

        def write() -> None:
            slots.end_slot()
            slots.close()

        with Pauses() as writing:
            snapshot = cpu_s(write)
        full = cpu_s(lambda: engine.save_checkpoint(str(run), tag="full"))
        (written,) = (run / "snapshots").iterdir()
        return {
            "parameters": numel,
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "adamw_cpu_s": adamw,
            "update_cpu_s": step,
            "sample_cpu_s": sample,
            "sample_of_adamw": sample / adamw,
            "every_10th_sample_of_adamw": sample / adamw / 10,
            "sample_of_update": sample / step,
            "snapshot_bytes_a_parameter": folder_bytes(written) / numel,
            "full_bytes_a_parameter": folder_bytes(run / "full") / numel,
            "snapshot_cpu_s": snapshot,
            "full_cpu_s": full,
            "snapshot_of_full_cpu": snapshot / full,
            "snapshot_bytes": folder_bytes(written),
            "longest_pause_idle_s": idle.longest_s,
            "longest_pause_writing_s": writing.longest_s,
        }


def main() -> int:
    """Measures and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=24, help="of width² parameters each")
    parser.add_argument("--updates", type=int, default=18)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ |= ENVIRONMENT
    figures = measure(options.width, options.layers, options.updates)
    text = json.dumps(figures, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
