"""The whole path on a laptop: train with WSMLR, merge the window, let DeepSpeed load it, compare.

`python launch/quickstart.py --out DIR` starts itself again under torchrun for the two parts that are distributed.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

STEPS, EVERY, WINDOW, RANKS = 1600, 25, 8, 2
CONFIG = Path(__file__).parent.parent / "configs/zero2_bf16.json"
CURVES = ("linear", "1-sqrt")


def make_engine() -> Any:
    """A DeepSpeed engine on a small GPT. `import wsm_ds` is what makes "WSMLR" a name of the config."""
    import deepspeed
    import deepspeed.ops
    import torch
    from gpt import GPT

    import wsm_ds  # noqa: F401

    # Not used here, and compiling it would take the first start a minute (and hang later ones, if killed).
    deepspeed.ops.__dict__["__compatible_ops__"] = {}
    deepspeed.init_distributed("gloo" if os.environ.get("DS_ACCELERATOR") == "cpu" else None, verbose=False)
    torch.manual_seed(0)
    model = GPT()
    config = json.loads(CONFIG.read_text()) | {"train_micro_batch_size_per_gpu": 8}  # no accumulation on two ranks
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine


def texts() -> tuple["Tensor", "Tensor"]:
    """(training, validation) bytes of the Python standard library's sources as uint8; every 16th file is held out."""
    import torch

    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in folder.glob("*.py") if path.stat().st_size)
    parts = [path for index, path in enumerate(files) if index % 16], files[::16]
    learned, held_out = (bytearray(b"".join(path.read_bytes() for path in part)) for part in parts)
    return torch.frombuffer(learned, dtype=torch.uint8), torch.frombuffer(held_out, dtype=torch.uint8)


def batch(text: "Tensor", size: int, seed: int) -> "Tensor":
    """int64 [size, context + 1]: the same for the same seed."""
    import torch
    from gpt import GPTSize

    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(text) - GPTSize.context - 1, (size, 1), generator=generator)
    return text[starts + torch.arange(GPTSize.context + 1)].long()


def train(run: Path) -> None:
    """Trains STEPS updates at a rate that never decays, and saves every EVERY."""
    engine, (text, _) = make_engine(), texts()
    for step in range(1, STEPS + 1):
        size = engine.train_micro_batch_size_per_gpu()
        loss = engine(batch(text, size, seed=1_000_003 * step + engine.global_rank))
        engine.backward(loss)
        engine.step()
        if step % EVERY == 0:
            engine.save_checkpoint(str(run), tag=f"global_step{step}")
            if engine.global_rank == 0:
                print(f"step {step:4d}  loss {loss.item():.3f}  lr {engine.get_lr()[0]:g}", flush=True)


def evaluate(out: Path) -> None:
    """Loads every raw checkpoint and every merge with `engine.load_checkpoint`; writes their validation losses."""
    from gpt import mean_loss

    engine, (_, text) = make_engine(), texts()
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


def torchrun(part: str, out: Path) -> None:
    """This file again, on RANKS processes; its output in OUT/PART.log."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    log_path = out / f"{part}.log"
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [*command, __file__, "--part", part, "--out", str(out)], stdout=subprocess.PIPE, stderr=log, text=True
        )
        for line in process.stdout or ():
            log.write(line)
            if line.startswith("step "):
                print(line, end="", flush=True)
    if process.wait():
        sys.exit(f"{part} failed; see {log_path}")


def wsm_ds_command(*arguments: str) -> None:
    """One `wsm-ds` command, shown as a user would type it."""
    print(f"\n$ wsm-ds {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "wsm_ds", *arguments], check=True)


def show(losses: dict[str, float], last: str) -> None:
    """The table: every checkpoint of the window, and the merges."""
    print(f"\n{'':16}  validation loss")
    for name, loss in losses.items():
        note = f"  {loss - losses[last]:+.4f} against the last raw checkpoint" if "merge" in name else ""
        print(f"{name:16}  {loss:.4f}{note}")


def main() -> None:
    """Parses the command line and runs a part, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", choices=("train", "evaluate"))
    options = parser.parse_args()
    out: Path = options.out
    if options.part == "train":
        return train(out / "run")
    if options.part == "evaluate":
        return evaluate(out)
    if out.exists():
        sys.exit(f"{out} exists; remove it (rm -r {out}) or choose another --out")
    out.mkdir(parents=True)
    print(f"training a tiny GPT on {RANKS} ranks, ZeRO-2, bf16, {STEPS} updates", flush=True)
    torchrun("train", out)
    run = str(out / "run")
    wsm_ds_command("inspect", run)
    for curve in CURVES:
        wsm_ds_command("merge", run, "--last", str(WINDOW), "--curve", curve, "--out", str(out / f"merged-{curve}"))
    wsm_ds_command("verify", str(out / "merged-linear"))
    torchrun("evaluate", out)
    show(json.loads((out / "losses.json").read_text()), last=f"global_step{STEPS}")
    return None


if __name__ == "__main__":
    main()
