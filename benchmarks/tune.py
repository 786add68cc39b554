"""Measures what it costs to screen many merges by their loss: in memory, and by way of files.

    python -m benchmarks.tune --folder /tmp/bench

First it makes a run. DeepSpeed trains a Llama of 197 M parameters in bf16 for two updates, and writes a checkpoint
after each. The other checkpoints are copies with other step numbers. The run stays in --folder.

Then the contenders take turns, --rounds times. Each measures the loss of 20 merges on the same few tokens:

    memory    load_each: one pass over the union of the windows, then each merge in turn in one model
    files     for each merge: wsm_ds.merge into bf16 safetensors, from_pretrained, the loss

Beside them are measured:

    one       load_merge of the longest window into the model: one pass that reads the union, for one merge
    read      reads the bytes of the union, with as many threads, and does nothing else

With --cold the run's files are dropped from the page cache before each turn, and before each merge of `files`: so it is
with a run that is larger than the memory. Times are those inside the process, without the start of the interpreter and
without building the first model. `merge` is what `memory` takes without the losses.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import wsm_ds
from benchmarks.merge import set_step

WRITTEN = 2
"""Checkpoints that DeepSpeed writes; the others are copies."""
CURVES = ("linear", "1-sqrt", "cosine", "ema:0.1")
TOKENS = (1, 16)
"""Sequences, and tokens of each: so few that reading and writing dominate."""


def config() -> LlamaConfig:
    """Returns a Llama of 197 M parameters."""
    return LlamaConfig(
        vocab_size=16384, hidden_size=1024, intermediate_size=2816, num_hidden_layers=14, num_attention_heads=16,
        tie_word_embeddings=True,
    )  # fmt: skip


def train(run: Path) -> None:
    """Trains for WRITTEN updates with DeepSpeed, on the CPU and one rank, and saves after each."""
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "scheduler": {"type": "WSMLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 1}},
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(config())
    # SGD keeps no states, and a merge does not read them: the files are smaller.
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-3), config=settings
    )
    for step in range(1, WRITTEN + 1):
        tokens = torch.randint(0, 16384, (1, 16))
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
        engine.save_checkpoint(str(run), tag=f"global_step{step}")
    config().save_pretrained(run)


def make_run(folder: Path, checkpoints: int) -> Path:
    """Makes a run, or reuses the one in `folder`.

    Args:
        folder: where the run is kept.
        checkpoints: of the run.
    """
    run = folder / "run"
    if not run.exists():
        alone = {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29917"}
        command = [sys.executable, "-m", "benchmarks.tune", "--folder", str(folder), "--only", "train"]
        subprocess.run(
            command, env=os.environ | alone | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, check=True
        )
    for step in range(WRITTEN + 1, checkpoints + 1):
        copy = run / f"global_step{step}"
        if not copy.exists():
            shutil.copytree(run / f"global_step{1 + (step - 1) % WRITTEN}", copy)
            for path in copy.glob("*_model_states.pt"):
                set_step(path, step)
    newest = max(int(path.name.removeprefix("global_step")) for path in run.glob("global_step*"))
    (run / "latest").write_text(f"global_step{newest}")
    os.sync()
    return run


def candidates(run: Path, checkpoints: int) -> list[wsm_ds.WindowRecipe]:
    """Returns 20 recipes: 5 windows and 4 curves."""
    windows = [max(2, checkpoints * part // 16) for part in (3, 6, 9, 12, 16)]
    return [wsm_ds.make_window_recipe(run=run, last=last, curve=curve) for last in windows for curve in CURVES]


def loss(model: Any) -> float:
    """Returns the model's loss on always the same tokens, in nats per token."""
    tokens = torch.randint(0, 16384, TOKENS, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return float(model(input_ids=tokens, labels=tokens).loss)


def screen_in_memory(recipes: list[wsm_ds.WindowRecipe], room: str) -> dict[str, Any]:
    """The contender `memory`."""
    model, before_mib = build(), memory_mib("VmRSS")
    begun, cpu_begun_s, in_losses, losses = time.perf_counter(), cpu_s(), 0.0, []
    for loaded in wsm_ds.load_each(model, recipes, room=room):
        assert isinstance(loaded, wsm_ds.LoadedMerge), loaded
        began, cpu_began_s = time.perf_counter(), cpu_s()
        losses.append(loss(model))
        in_losses += time.perf_counter() - began
        cpu_begun_s += cpu_s() - cpu_began_s
    seconds = time.perf_counter() - begun
    figures = {"s": seconds, "merge_s": seconds - in_losses, "merge_cpu_s": cpu_s() - cpu_begun_s}
    return figures | {"losses": losses, "before_MiB": before_mib}


def screen_by_files(recipes: list[wsm_ds.WindowRecipe], out: Path, *, cold: bool) -> dict[str, Any]:
    """The contender `files`. The folder of each merge is removed before the next, which is not timed."""
    losses, seconds = [], 0.0
    for recipe in recipes:
        if cold:
            evict(recipe.run)
        began = time.perf_counter()
        folder = out / "merged"
        included = [recipe.run / "config.json"]
        wsm_ds.merge(
            run=recipe.run, last=recipe.last, curve=recipe.curve, out=folder, format="safetensors", include=included
        )
        losses.append(loss(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()))
        seconds += time.perf_counter() - began
        shutil.rmtree(folder)
    return {"s": seconds, "losses": losses}


def load_one(recipes: list[wsm_ds.WindowRecipe]) -> dict[str, Any]:
    """The beside `one`."""
    model, before_mib = build(), memory_mib("VmRSS")
    began, cpu_began_s = time.perf_counter(), cpu_s()
    wsm_ds.load_merge(model, max(recipes, key=lambda recipe: recipe.last or 0))
    return {"s": time.perf_counter() - began, "cpu_s": cpu_s() - cpu_began_s, "before_MiB": before_mib}


def read_union(recipes: list[wsm_ds.WindowRecipe]) -> dict[str, Any]:
    """The beside `read`."""
    longest = max(recipes, key=lambda recipe: recipe.last or 0)
    newest = sorted(longest.run.glob("global_step*"), key=lambda path: int(path.name[11:]))[-(longest.last or 0) :]
    files = [path for folder in newest for path in folder.glob("*optim_states.pt")]

    def read(path: Path) -> int:
        buffer, count = memoryview(bytearray(1 << 22)), 0
        with path.open("rb", buffering=0) as file:
            while nbytes := file.readinto(buffer):
                count += nbytes
        return count

    began = time.perf_counter()
    with ThreadPoolExecutor(longest.threads) as pool:
        nbytes = sum(pool.map(read, files))
    return {"s": time.perf_counter() - began, "GB": nbytes / 1e9}


def build() -> Any:
    """Returns the model in bf16, with other weights than any merge. The peak of memory is counted from here on."""
    torch.manual_seed(1)
    # Not `.to(torch.bfloat16)`, which would round the frequencies of the positions, too.
    model = AutoModelForCausalLM.from_config(config(), dtype=torch.bfloat16).eval()
    Path("/proc/self/clear_refs").write_text("5")
    return model


def cpu_s() -> float:
    """Returns the processor seconds of this process so far, user and system, of all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def memory_mib(field: str) -> float:
    """Returns a figure of this process: "VmRSS" (resident now) or "VmHWM" (its peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def evict(run: Path) -> None:
    """Drops a run's files from the page cache."""
    os.sync()
    for path in run.glob("*/*.pt"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measured(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Runs a contender in a process of its own, and returns its figures."""
    if options.cold:
        evict(options.folder / "run")
    command = [sys.executable, "-m", "benchmarks.tune", "--folder", str(options.folder), "--only", name]
    command += ["--room", options.room, "--checkpoints", str(options.checkpoints), *(["--cold"] * options.cold)]
    found = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    figures: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Measures the contenders in turn; prints a table and lines of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpoints", type=int, default=16)
    parser.add_argument("--room", default="9GiB", help="memory for merges that wait")
    parser.add_argument("--cold", action="store_true", help="drop the run from the page cache before each turn")
    parser.add_argument("--only", choices=("train", "memory", "files", "one", "read"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only == "train":
        return train(options.folder / "run")
    if options.only:
        recipes = candidates(options.folder / "run", options.checkpoints)
        contenders = {"memory": lambda: screen_in_memory(recipes, options.room),
                      "files": lambda: screen_by_files(recipes, options.folder / "out", cold=options.cold),
                      "one": lambda: load_one(recipes), "read": lambda: read_union(recipes)}  # fmt: skip
        figures = contenders[options.only]()
        return print(json.dumps(figures | {"process_cpu_s": cpu_s(), "peak_MiB": memory_mib("VmHWM")}))
    options.folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(options.folder / "out", ignore_errors=True)
    make_run(options.folder, options.checkpoints)
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in ("read", "one", "memory", "files")}
    for _ in range(options.rounds):
        for name, values in turns.items():
            values.append(measured(options, name))
            print(json.dumps({"contender": name, "cold": options.cold} | values[-1]), flush=True)
    report(turns)
    return None


def report(turns: dict[str, list[dict[str, Any]]]) -> None:
    """Prints the medians, and checks that both ways found the same losses."""
    losses = {json.dumps(turn["losses"]) for name in ("memory", "files") for turn in turns[name]}
    medians = {name: statistics.median(turn["s"] for turn in values) for name, values in turns.items()}
    merge_s = statistics.median(turn["merge_s"] for turn in turns["memory"])
    for name, seconds in medians.items():
        peak, before = (max(turn.get(key, 0.0) for turn in turns[name]) for key in ("peak_MiB", "before_MiB"))
        beside = f", {before:.0f} before it" if before else ""
        ratio = seconds / medians["memory"]
        print(f"  {name:8} {seconds:8.2f} s  {ratio:6.2f} × memory   peak {peak:7.0f} MiB{beside}")
    shares = [f"{merge_s / medians[name]:6.2f} × {name}" for name in ("one", "read")]
    print(f"  {'merge':8} {merge_s:8.2f} s  {'  '.join(shares)}")
    print(f"  the losses of both ways are {'equal' if len(losses) == 1 else 'NOT equal'}")


if __name__ == "__main__":
    main()
