"""Measures how long a merge takes: wsm-ds, DeepSpeed's own script, and the limit of the machine.

    python benchmarks/merge.py --folder /tmp/bench

First it makes a run. DeepSpeed trains a model of 5·width² parameters (4·width² are trained, the others are frozen) on
2 CPU ranks for two updates, and writes a checkpoint after each. The other checkpoints are copies with other step
numbers. The run stays in --folder.

Then the contenders take turns, --rounds times. Each makes fp32 safetensors of the newest checkpoints:

    ours      wsm-ds merge --format safetensors --dtype fp32: the mean of the newest 4, or of the newest 16
    limit     reads the bytes that `ours` reads; writes and syncs the bytes that `ours` writes; with as many threads
              and no arithmetic in between
    peer      zero_to_fp32 on each of 4 checkpoints, then an average with torch; the result stays in the page cache
    synced    `peer`, and then a sync to the disk, as `ours` does
    sweep     wsm-ds merge of 10 windows (newest 7 to 16): 10 outputs of one pass
    writing   writes and syncs the bytes that `sweep` writes beyond one output, and does nothing else
    one       `ours` with 16 checkpoints, as one process of one thread
    two       `ours` with 16 checkpoints, as two processes of one thread

It prints the median of the wall time in seconds and the peak resident memory of each contender. Times are those of
whole commands, with the start of the interpreter. With --sizes it measures 4 checkpoints of several widths instead:
ours, --dry-run (`start`), limit and peer.
"""

import argparse
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import time
import zlib
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
WRITTEN = 2
"""Checkpoints that DeepSpeed writes; the others are copies."""

from wsm_ds.engine.tasks import Task, tasks_of  # noqa: E402
from wsm_ds.planning.plan import Plan  # noqa: E402
from wsm_ds.torchfile.raw_file import read_raw  # noqa: E402
from wsm_ds.torchfile.zip_entries import read_entries  # noqa: E402


def make_run(folder: Path, stage: int, width: int, checkpoints: int) -> Path:
    """Makes a run of two ranks, or reuses the one in `folder`.

    Args:
        folder: where the run is kept.
        stage: ZeRO stage.
        width: width of the model, which has 5·width² parameters.
        checkpoints: number of checkpoints; DeepSpeed writes WRITTEN of them, the others are copies.

    Returns:
        The run's folder.
    """
    from deepspeed_runs import launch

    from wsm_ds.inspection import inspect_run

    run = folder / f"stage{stage}-width{width}"
    if not run.exists():
        job = {"do": "train", "stage": stage, "dtype": "bf16", "steps": WRITTEN, "every": 1, "warmup": 1}
        job |= {"width": width, "run": str(run), "zero": {"sub_group_size": 10**9}}
        launch([job], world_size=2, folder=folder)
    for step in range(WRITTEN + 1, checkpoints + 1):
        copy = run / f"global_step{step}"
        if not copy.exists():
            shutil.copytree(run / f"global_step{1 + (step - 1) % WRITTEN}", copy)
            for path in copy.glob("*_model_states.pt"):
                set_step(path, step)
    steps = [checkpoint.layout.step for checkpoint in inspect_run(run) if checkpoint.layout]
    assert set(range(1, checkpoints + 1)) <= set(steps), f"{run} holds {steps}"
    return run


def set_step(path: Path, step: int) -> None:
    """Changes `global_steps` in a model file, without reading its tensors.

    Args:
        path: the model file.
        step: the new step, below 256.
    """
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        at = data.find(b"global_steps") + len(b"global_steps")
        # In the pickle, BINPUT (q, 1 byte) or LONG_BINPUT (r, 4 bytes) follows the key, then BININT1 (K) and the value.
        at += {b"q": 2, b"r": 5}[data[at : at + 1]]
        assert data[at : at + 1] == b"K", f"{path}: no byte at {at}"
        data[at + 1] = step
        pickled = next(entry.record for entry in read_entries(read_raw(path)) if entry.record.name == "data.pkl")
        crc = zlib.crc32(data[pickled.offset : pickled.offset + pickled.nbytes])
        for offset in pickled.crc_offsets:
            data[offset : offset + 4] = crc.to_bytes(4, "little")


def peer(run: Path, out: Path, tags: list[str]) -> None:
    """Averages checkpoints without wsm_ds: DeepSpeed's zero_to_fp32 on each of them, then a mean with torch.

    Args:
        run: the run's folder.
        out: where the fp32 weights and the mean are written.
        tags: the checkpoints' tags.
    """
    import torch
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict
    from safetensors.torch import save_file

    total: dict[str, torch.Tensor] = {}
    for tag in tags:
        folder = out / tag
        # Not as safetensors, which refuses tied weights.
        convert_zero_checkpoint_to_fp32_state_dict(str(run), str(folder), tag=tag)
        for file in folder.glob("*.bin"):
            for name, tensor in torch.load(file, mmap=True).items():
                # head.weight is tied to the embedding; one buffer counts in integers.
                if name != "head.weight" and tensor.is_floating_point():
                    total[name] = total[name].add_(tensor) if name in total else tensor.clone()
    save_file({name: tensor.div_(len(tags)) for name, tensor in total.items()}, out / "model.safetensors")


def plan_of(run: Path, out: Path, count: int) -> Plan:
    """Returns the plan of `ours`.

    Args:
        run: the run's folder.
        out: the output's folder.
        count: number of checkpoints.
    """
    from wsm_ds.merge_planning import plan_merge
    from wsm_ds.planning.recipe import make_recipe

    return plan_merge(make_recipe(run=run, last=count, curve="linear", out=out, format="safetensors", dtype="fp32"))


def limit(run: Path, out: Path, count: int) -> None:
    """Reads and writes the bytes that `ours` reads and writes, with as many threads, and syncs them.

    Args:
        run: the run's folder.
        out: the output's folder, which must not exist.
        count: number of checkpoints.
    """
    from concurrent.futures import ThreadPoolExecutor

    plan = plan_of(run, out, count)
    out.mkdir()
    descriptors = [os.open(out / output.name, os.O_RDWR | os.O_CREAT) for output in plan.files]
    for descriptor, output in zip(descriptors, plan.files, strict=True):
        os.ftruncate(descriptor, output.nbytes)

    def move(task: Task) -> None:
        buffer = memoryview(bytearray(1 << 18))
        stream = plan.streams[task.stream]
        for source in stream.sources:
            for element, numel, file, offset in source.within(task.begin, task.end):
                with plan.inputs[file].path.open("rb", buffering=0) as opened:
                    opened.seek(offset)
                    remaining = numel * source.dtype(element).itemsize
                    while remaining:
                        remaining -= opened.readinto(buffer[: min(remaining, len(buffer))]) or 0
        places = stream.targets[0].places
        for element, numel, file, offset in places.within(task.begin, task.end):
            nbytes = numel * places.dtype(element).itemsize
            for at in range(0, nbytes, len(buffer)):
                os.pwrite(descriptors[file], buffer[: min(len(buffer), nbytes - at)], offset + at)

    with ThreadPoolExecutor(plan.threads) as pool:
        list(pool.map(move, tasks_of(plan)))
    for descriptor in descriptors:
        os.fsync(descriptor)


def writing(run: Path, out: Path, outputs: int) -> None:
    """Writes and syncs the bytes of several outputs, and does nothing else.

    Args:
        run: the run's folder.
        out: the folder of the written files, which must not exist.
        outputs: number of outputs.
    """
    out.mkdir()
    plan = plan_of(run, out / "none", 1)
    buffer = memoryview(bytearray(1 << 22))
    for number in range(outputs):
        with (out / f"{number}").open("wb", buffering=0) as file:
            for at in range(0, plan.bytes_to_write, len(buffer)):
                file.write(buffer[: min(len(buffer), plan.bytes_to_write - at)])
            os.fsync(file.fileno())


def measure(commands: list[list[str]], environments: list[dict[str, str]]) -> tuple[float, int]:
    """Runs commands at the same time.

    Args:
        commands: the processes to start.
        environments: variables to add to each process's environment.

    Returns:
        Wall seconds, and the peak resident bytes of the largest process.
    """
    begun = time.monotonic()
    processes = [
        subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for command, variables in zip(commands, environments, strict=True)
    ]
    peak = 0
    for process, command in zip(processes, commands, strict=True):
        _, status, usage = os.wait4(process.pid, 0)
        peak = max(peak, usage.ru_maxrss * 1024)
        if status:
            raise SystemExit(f"{' '.join(command)} failed")
    return time.monotonic() - begun, peak


def turns(rounds: int, out: Path, contenders: dict[str, list[list[str]]]) -> dict[str, tuple[float, int]]:
    """Runs the contenders in turn.

    Args:
        rounds: turns of each contender. One more is made first, and not counted.
        out: the output's folder, which is removed before each turn.
        contenders: the commands of each contender, by its name; several run at the same time.

    Returns:
        The median of the wall seconds and the highest peak of resident bytes of each contender, by its name.
    """
    measured: dict[str, list[tuple[float, int]]] = {name: [] for name in contenders}
    for round_number in range(rounds + 1):
        for name, commands in contenders.items():
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            figures = measure(commands, environments(len(commands)))
            if round_number:
                measured[name].append(figures)
    shutil.rmtree(out, ignore_errors=True)
    return {
        name: (statistics.median(seconds for seconds, _ in values), max(peak for _, peak in values))
        for name, values in measured.items()
    }


def environments(world_size: int) -> list[dict[str, str]]:
    """Returns the variables that a launcher sets for each process.

    Args:
        world_size: number of processes.
    """
    if world_size == 1:
        return [{}]
    from forked import free_port

    port = free_port()
    return [
        {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for rank in range(world_size)
    ]


def ours(run: Path, out: Path, last: str, *more: str) -> list[str]:
    """Returns the command of `ours`.

    Args:
        run: the run's folder.
        out: the output's folder.
        last: value of --last.
        *more: further arguments.
    """
    return [sys.executable, "-m", "wsm_ds", "merge", str(run), "--last", last, "--out", str(out),
            "--format", "safetensors", "--dtype", "fp32", *more]  # fmt: skip


def main() -> None:
    """Measures one stage after the other; prints tables and lines of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--width", type=int, default=7100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--sizes", type=int, nargs="+", metavar="WIDTH", help="time per byte of these widths")
    parser.add_argument("--without", nargs="+", default=[], help="contenders to leave out")
    parser.add_argument("--only", choices=("peer", "synced", "limit", "writing"), help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.folder / "out"
    if options.only in ("peer", "synced"):
        tags = sorted((path.name for path in options.run.glob("global_step*")), key=lambda tag: int(tag[11:]))
        peer(options.run, out, tags[-options.count :])
        return os.sync() if options.only == "synced" else None
    if options.only:
        return {"limit": limit, "writing": writing}[options.only](options.run, out, options.count)
    options.folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)  # an earlier benchmark that was killed has left it
    for stage in options.stages:
        if options.sizes:
            measure_sizes(stage, options, out)
        else:
            measure_stage(stage, options, out)
    return None


def again(options: argparse.Namespace, run: Path, only: str, count: int) -> list[str]:
    """Returns the command that runs one contender of this script.

    Args:
        options: the options of this script.
        run: the run's folder.
        only: the contender's name.
        count: number of checkpoints, or of outputs for `writing`.
    """
    return [sys.executable, __file__, "--folder", str(options.folder), "--run", str(run), "--only", only,
            "--count", str(count)]  # fmt: skip


def measure_stage(stage: int, options: argparse.Namespace, out: Path) -> None:
    """Measures all contenders on one run of 16 checkpoints.

    Args:
        stage: ZeRO stage.
        options: the options of this script.
        out: the output's folder.
    """
    run = make_run(options.folder, stage, options.width, 16)
    sweep = ",".join(map(str, range(7, 17)))
    alone = ours(run, out, "16", "--threads", "1")
    # Contenders that would push each other's files out of the page cache are in different groups.
    groups = {
        "4 checkpoints": {
            "ours": [ours(run, out, "4")],
            "limit": [again(options, run, "limit", 4)],
            "peer": [again(options, run, "peer", 4)],
            "synced": [again(options, run, "synced", 4)],
        },
        "16 checkpoints": {
            "ours": [ours(run, out, "16")],
            "limit": [again(options, run, "limit", 16)],
            "one": [alone],
            "two": [alone, alone],
        },
        "10 outputs of 16 checkpoints": {
            "ours": [ours(run, out, "16")],
            "sweep": [ours(run, out, sweep)],
            "writing": [again(options, run, "writing", 9)],
        },
    }
    print(f"ZeRO-{stage}, {4 * options.width**2 / 1e6:.0f} M trained parameters")
    for title, contenders in groups.items():
        measured = turns(options.rounds, out, {n: c for n, c in contenders.items() if n not in options.without})
        print(title)
        for name, (seconds, peak) in measured.items():
            ratio = seconds / measured["ours"][0]
            print(f"  {name:8} {seconds:8.2f} s  {ratio:6.2f} × ours   peak {peak / 2**20:7.0f} MiB")
        print(json.dumps({"stage": stage, "width": options.width, "group": title, "found": measured}), flush=True)


def measure_sizes(stage: int, options: argparse.Namespace, out: Path) -> None:
    """Measures the time per byte for models of several sizes, with 4 checkpoints each.

    Args:
        stage: ZeRO stage.
        options: the options of this script.
        out: the output's folder.
    """
    for width in options.sizes:
        run = make_run(options.folder, stage, width, 4)
        plan = plan_of(run, out, 4)
        gigabytes = (plan.bytes_to_read + plan.bytes_to_write) / 1e9
        contenders = {
            "ours": [ours(run, out, "4")],
            "start": [ours(run, out, "4", "--dry-run")],
            "limit": [again(options, run, "limit", 4)],
            "peer": [again(options, run, "peer", 4)],
        }
        measured = turns(options.rounds, out, {n: c for n, c in contenders.items() if n not in options.without})
        seconds = {name: value for name, (value, _) in measured.items()}
        work_s = seconds["ours"] - seconds["start"]
        others = ", ".join(f"{name} {s / seconds['ours']:.2f} × ours" for name, s in seconds.items() if name != "ours")
        print(
            f"ZeRO-{stage}, {4 * width**2 / 1e6:5.0f} M: {seconds['ours']:6.2f} s ({others}); "
            f"{work_s / gigabytes:.3f} s/GB without the start"
        )
        print(json.dumps({"stage": stage, "width": width, "GB": gigabytes, "found": measured}), flush=True)


if __name__ == "__main__":
    main()
