"""Shows all steps on a laptop: trains with WSMLR, merges, loads the merges, and chooses the best merge by measurement.

`python launch/quickstart.py --out DIR` starts itself again under torchrun for the two parts that run on several ranks:
the training and the evaluation.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

STEPS, EVERY, WINDOW, RANKS = 1600, 25, 8, 2
LEAST_STEPS = EVERY * (WINDOW + 2)
"""With fewer updates the window would begin in the warmup of the learning rate."""
CONFIGS = Path(__file__).parent.parent / "configs"
CURVES = ("linear", "1-sqrt")
TUNED_WINDOWS = (2, 4, 8, 16)
HELD_OUT, CONFIRM = "held_out.txt", "held_out_2.txt"
PROGRESS_EVERY_S = 5.0


def choose_config() -> Path:
    """Returns the config of the dtype that this machine multiplies fast, and prints the reason.

    Ends the program if a start of DeepSpeed would wait without end (see `wsm_ds.training.compilation`).
    """
    from wsm_ds.errors import StaleLock
    from wsm_ds.training.compilation import extensions_folder, require_no_stale_locks
    from wsm_ds.training.matmul_speed import measure_matmul

    try:
        require_no_stale_locks(extensions_folder(), stale_after_s=0)
    except StaleLock as error:
        sys.exit(f"StaleLock: {error}")
    speed = measure_matmul("bf16")
    config = CONFIGS / f"zero2_{'fp32' if speed.is_slow else 'bf16'}.json"
    print(f"{speed}: training with configs/{config.name}", flush=True)
    return config


def make_engine(config_path: Path) -> Any:
    """Makes a DeepSpeed engine of a small GPT. `import wsm_ds` makes "WSMLR" a scheduler of DeepSpeed's. Ranks: all."""
    import deepspeed
    import torch
    from gpt import GPT

    import wsm_ds  # noqa: F401
    from wsm_ds.training.compilation import prepare_compilation

    prepare_compilation()
    deepspeed.init_distributed("gloo" if os.environ.get("DS_ACCELERATOR") == "cpu" else None, verbose=False)
    torch.manual_seed(0)
    model = GPT()
    # 8 samples per rank on two ranks are the global batch: no accumulation, so each backward pass is an update.
    config = json.loads(config_path.read_text()) | {"train_micro_batch_size_per_gpu": 8}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine


def texts() -> tuple["Tensor", "Tensor"]:
    """Returns the training text and the validation text, uint8: the sources of Python's standard library.

    Every 16th file is kept for the validation.
    """
    import torch

    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in folder.glob("*.py") if path.stat().st_size)
    parts = [path for index, path in enumerate(files) if index % 16], files[::16]
    training, validation = (bytearray(b"".join(path.read_bytes() for path in part)) for part in parts)
    return torch.frombuffer(training, dtype=torch.uint8), torch.frombuffer(validation, dtype=torch.uint8)


def batch(text: "Tensor", size: int, seed: int) -> "Tensor":
    """Returns random windows of the text, int64, shape [size, context + 1]. The seed decides which."""
    import torch
    from gpt import GPTSize

    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(text) - GPTSize.context - 1, (size, 1), generator=generator)
    return text[starts + torch.arange(GPTSize.context + 1)].long()


def train(run: Path, config: Path, steps: int) -> None:
    """Trains `steps` updates at a learning rate that never decays, and saves every EVERY updates.

    Ranks: all; rank 0 prints the progress.
    """
    engine, (text, _) = make_engine(config), texts()
    began_s = time.monotonic()
    printed_s = began_s - PROGRESS_EVERY_S
    for step in range(1, steps + 1):
        size = engine.train_micro_batch_size_per_gpu()
        loss = engine(batch(text, size, seed=1_000_003 * step + engine.global_rank))
        engine.backward(loss)
        engine.step()
        if step % EVERY:
            continue
        engine.save_checkpoint(str(run), tag=f"global_step{step}")
        now_s = time.monotonic()
        if engine.global_rank == 0 and (now_s - printed_s >= PROGRESS_EVERY_S or step == steps):
            printed_s, rate = now_s, step / (now_s - began_s)
            left_s = round((steps - step) / rate)
            print(
                f"step {step:4d} of {steps}  loss {loss.item():.3f}  lr {engine.get_lr()[0]:g}  "
                f"{rate:.1f} steps/s  {left_s // 60} min {left_s % 60:2d} s left",
                flush=True,
            )


def evaluate(out: Path, config: Path) -> None:
    """Loads each checkpoint of the window and each merge, and writes their validation losses. Ranks: all."""
    from gpt import mean_loss

    engine, (_, text) = make_engine(config), texts()
    batches = [batch(text, 16, seed) for seed in range(16)]
    losses = {}
    window = sorted((out / "run").glob("global_step*"), key=lambda path: int(path.name[11:]))[-WINDOW:]
    for name, root, tag in [(path.name, out / "run", path.name) for path in window] + [
        (f"merge, {curve}", out / f"merged-{curve}", None) for curve in CURVES
    ]:
        engine.load_checkpoint(str(root), tag=tag)
        losses[name] = mean_loss(engine, batches)
    if engine.global_rank == 0:
        (out / "losses.json").write_text(json.dumps(losses, indent=2))


def torchrun(part: str, out: Path, config: Path, steps: int) -> None:
    """Runs a part of this program on RANKS processes, with its output in OUT/PART.log; ends the program if it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    log_path = out / f"{part}.log"
    arguments = [__file__, "--part", part, "--out", str(out), "--config", str(config), "--steps", str(steps)]
    with log_path.open("w") as log:
        process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=log, text=True)
        for line in process.stdout or ():
            log.write(line)
            if line.startswith("step "):
                print(line, end="", flush=True)
    if process.wait():
        sys.exit(f"{part} failed; see {log_path}")


def wsm_ds_command(*arguments: str) -> None:
    """Runs a `wsm-ds` command, and prints it as a user would type it."""
    print(f"\n$ wsm-ds {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "wsm_ds", *arguments], check=True)


def tune(out: Path) -> None:
    """Measures merges of several windows on held-out text, and makes the recommended one."""
    from gpt import GPTSize

    _, text = texts()
    half = len(text) // 2
    for name, part in ((HELD_OUT, text[:half]), (CONFIRM, text[half:])):
        (out / name).write_bytes(part.numpy().tobytes())
    checkpoints = len(list((out / "run").glob("global_step*")))
    windows = [str(window) for window in TUNED_WINDOWS if window < checkpoints]
    wsm_ds_command(
        *("tune", str(out / "run"), "--windows", ",".join(windows), "--curve", ",".join(CURVES)),
        *("--data", str(out / HELD_OUT), "--confirm", str(out / CONFIRM), "--tokenizer", "bytes"),
        *("--model", f"{Path(__file__).with_name('gpt.py')}:GPT", "--sequence-length", str(GPTSize.context)),
        *("--run-sequence-length", str(GPTSize.context), "--out", str(out / "tune")),
    )
    recipe = ("--recipe", str(out / "tune/best.yaml"))
    wsm_ds_command("merge", str(out / "run"), *recipe, "--out", str(out / "best"))


def show(losses: dict[str, float], last: str) -> None:
    """Prints the losses of the window's checkpoints and of the merges.

    Args:
        losses: by name.
        last: the name of the checkpoint that the merges are compared with.
    """
    print(f"\n{'':16}  validation loss")
    for name, loss in losses.items():
        note = f"  {loss - losses[last]:+.4f} against the last raw checkpoint" if "merge" in name else ""
        print(f"{name:16}  {loss:.4f}{note}")


def main() -> None:
    """Parses the command line, and runs one part or everything."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", type=Path, help="DeepSpeed's; default: the dtype that this machine multiplies fast")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"updates: a multiple of {EVERY} (default: {STEPS})")
    parser.add_argument("--part", choices=("train", "evaluate"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    out: Path = options.out
    if options.part == "train":
        return train(out / "run", options.config, options.steps)
    if options.part == "evaluate":
        return evaluate(out, options.config)
    if options.steps % EVERY or options.steps < LEAST_STEPS:
        parser.error(f"--steps {options.steps} is not a multiple of {EVERY} that is at least {LEAST_STEPS}")
    logging.basicConfig(format="%(message)s")
    if out.exists():
        sys.exit(f"{out} exists; remove it (rm -r {out}) or choose another --out")
    config = options.config or choose_config()
    out.mkdir(parents=True)
    print(f"training a tiny GPT on {RANKS} ranks, ZeRO-2, {options.steps} updates", flush=True)
    torchrun("train", out, config, options.steps)
    run = str(out / "run")
    wsm_ds_command("inspect", run)
    for curve in CURVES:
        wsm_ds_command("merge", run, "--last", str(WINDOW), "--curve", curve, "--out", str(out / f"merged-{curve}"))
    wsm_ds_command("verify", str(out / "merged-linear"))
    torchrun("evaluate", out, config, options.steps)
    show(json.loads((out / "losses.json").read_text()), last=f"global_step{options.steps}")
    tune(out)
    return None


if __name__ == "__main__":
    main()
