"""How long a merge takes, side by side in one run: ours, DeepSpeed's own way, and the limit of the disk.

    python benchmarks/merge.py --width 3000 --checkpoints 4 --rounds 3 --folder /tmp/bench

DeepSpeed trains a model of about 6·width² parameters for a few updates and writes the checkpoints (kept in --folder for
another time). Then each of three processes makes the mean of them as fp32 safetensors, in turn, --rounds times:

    ours    wsm-ds merge --format safetensors --dtype fp32
    peer    zero_to_fp32 on every checkpoint, then an average with torch
    limit   reads the bytes that ours reads and writes the bytes that ours writes, and does nothing else

Shown are medians of wall seconds, their ratio, and the peak resident memory of each process.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))


def make_run(folder: Path, stage: int, width: int, checkpoints: int) -> Path:
    """A run of `checkpoints` checkpoints by two ranks, written by DeepSpeed."""
    from deepspeed_runs import launch

    run = folder / f"stage{stage}-width{width}-n{checkpoints}"
    if not run.exists():
        job = {"do": "train", "stage": stage, "dtype": "bf16", "steps": checkpoints, "every": 1, "warmup": 1}
        job |= {"width": width, "run": str(run), "zero": {"sub_group_size": 10**9}}
        launch([job], world_size=2, folder=folder)
    return run


def peer(run: Path, out: Path, tags: list[str]) -> None:
    """What one does without wsm_ds."""
    import torch
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict
    from safetensors.torch import save_file

    total: dict[str, torch.Tensor] = {}
    for tag in tags:
        folder = out / tag
        convert_zero_checkpoint_to_fp32_state_dict(
            str(run), str(folder), tag=tag
        )  # its safetensors refuses tied weights
        for file in folder.glob("*.bin"):
            for name, tensor in torch.load(file, mmap=True).items():
                if name != "head.weight" and tensor.is_floating_point():  # tied; a counter
                    total[name] = total[name].add_(tensor) if name in total else tensor.clone()
    save_file({name: tensor.div_(len(tags)) for name, tensor in total.items()}, out / "model.safetensors")


def limit(run: Path, out: Path, count: int) -> None:
    """The same bytes read and written (and synced), by the same number of threads, with nothing in between."""
    from concurrent.futures import ThreadPoolExecutor

    from wsm_ds.merging import plan_merge
    from wsm_ds.plan import Sum
    from wsm_ds.recipe import make_recipe

    recipe = make_recipe(run=run, last=count, curve="linear", out=out, format="safetensors", dtype="fp32")
    plan = plan_merge(recipe)
    out.mkdir()

    def move(job: tuple[int, Sum]) -> None:
        descriptor, run = job
        buffer = memoryview(bytearray(4 << 20))
        for source in run.sources:
            with plan.inputs[source.file].path.open("rb", buffering=0) as file:
                file.seek(source.offset)
                remaining = run.numel * source.dtype.itemsize
                while remaining:
                    remaining -= file.readinto(buffer[: min(remaining, len(buffer))]) or 0
        for at in range(0, run.nbytes, len(buffer)):
            os.pwrite(descriptor, buffer[: min(len(buffer), run.nbytes - at)], run.offset + at)

    for output in plan.outputs:
        descriptor = os.open(out / output.name, os.O_RDWR | os.O_CREAT)
        with ThreadPoolExecutor(plan.threads) as pool:
            list(pool.map(move, [(descriptor, piece) for piece in output.pieces if isinstance(piece, Sum)]))
        os.fsync(descriptor)
        os.close(descriptor)


def measure(command: list[str]) -> tuple[float, int]:
    """(wall seconds, peak resident bytes) of a command."""
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed")
    return time.monotonic() - begun, usage.ru_maxrss * 1024


def main() -> None:
    """Measures one stage after the other and prints a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--width", type=int, default=3000)
    parser.add_argument("--checkpoints", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--only", choices=("peer", "limit"), help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.folder / "out"
    if options.only:
        tags = sorted((path.name for path in options.run.glob("global_step*")), key=lambda tag: int(tag[11:]))
        return peer(options.run, out, tags) if options.only == "peer" else limit(options.run, out, len(tags))
    options.folder.mkdir(parents=True, exist_ok=True)
    for stage in options.stages:
        run = make_run(options.folder, stage, options.width, options.checkpoints)
        ours = [
            sys.executable,
            "-m",
            "wsm_ds",
            "merge",
            str(run),
            "--last",
            str(options.checkpoints),
            "--out",
            str(out),
        ]
        again = [sys.executable, __file__, "--folder", str(options.folder), "--run", str(run), "--only"]
        commands = {
            "ours": [*ours, "--format", "safetensors", "--dtype", "fp32"],
            "limit": [*again, "limit"],
            "peer": [*again, "peer"],
        }
        found: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
        for _ in range(options.rounds):
            for name, command in commands.items():
                shutil.rmtree(out, ignore_errors=True)
                found[name].append(measure(command))
        shutil.rmtree(out, ignore_errors=True)
        report(stage, options.checkpoints, found)
    return None


def report(stage: int, checkpoints: int, found: dict[str, list[tuple[float, int]]]) -> None:
    """Medians and ratios of one stage."""
    seconds = {name: statistics.median(value for value, _ in values) for name, values in found.items()}
    peaks = {name: max(peak for _, peak in values) for name, values in found.items()}
    print(f"ZeRO-{stage}, {checkpoints} checkpoints")
    for name in found:
        ratio = seconds[name] / seconds["ours"]
        print(f"  {name:6} {seconds[name]:8.2f} s   {ratio:6.2f} × ours   peak {peaks[name] / 2**20:7.0f} MiB")
    print(json.dumps({"stage": stage, "seconds": seconds, "peak_bytes": peaks}), flush=True)


if __name__ == "__main__":
    main()
