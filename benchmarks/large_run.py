"""Merges a run of many ranks to the end, on few open files and little memory; kills it once; verifies the outputs.

    python -m benchmarks.large_run --folder /tmp/large --ranks 1024 --checkpoints 16

Every rank file of the run is one of its own, with its own values (ZeRO-3). The merge makes a native output and
safetensors in one pass. It runs under a limit of open files (--open-files, as `ulimit -n` sets it) and with
--memory-budget. The same merge is then made once more, killed while it writes, and started again. The program fails if
the two differ in a byte, if a process needs more memory than the budget and its own modules, or if `verify` finds
anything.

The last line is JSON: what each command used.
"""

import argparse
import filecmp
import json
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.counted import Started, Usage, counted
from benchmarks.plan_material import Run, tags

MANIFEST = "wsm_merge.json"
MODULES = "import wsm_ds.cli, wsm_ds.merging, wsm_ds.verification, wsm_ds.engine.worker, wsm_ds.publishing.manifest"
SLOW_MS = 1.0
"""How long each call on the oldest checkpoint waits in the killed merge, so that it writes long enough to be killed."""
PATIENCE_S = 3600


def merge_command(run: Path, out: Path, options: argparse.Namespace) -> list[str]:
    """Returns the command of the merge.

    Args:
        run: the run's folder.
        out: the folder of both outputs.
        options: the options of this script.
    """
    words = ["merge", run, "--last", options.checkpoints, "--format", "zero,safetensors",
             "--threads", options.threads, "--memory-budget", f"{options.memory_mib}MiB", "--out", out]  # fmt: skip
    return [sys.executable, "-m", "wsm_ds", *map(str, words)]


def kill_while_it_writes(command: list[str], run: Path, out: Path, options: argparse.Namespace) -> None:
    """Starts a merge, and kills it when it has finished a block.

    Args:
        command: the merge.
        run: the run's folder.
        out: the folder of its outputs.
        options: the options of this script.

    Raises:
        RuntimeError: it ended before.
    """
    slow = f"{run / tags(1)[0]}/*"
    with Started(command, slow, folder=options.folder, delay_ms=SLOW_MS, open_files=options.open_files) as started:
        deadline = time.monotonic() + PATIENCE_S
        while not any(path.stat().st_size for path in out.parent.rglob("journal.*")):
            if started.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(command)} was not seen to finish a block")
            time.sleep(0.01)
        started.process.send_signal(signal.SIGKILL)


def differences(one: Path, other: Path) -> list[str]:
    """Returns the files of two folders that differ; manifests hold times, and do not count.

    Args:
        one: a folder.
        other: another.
    """
    names = [{str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} for out in (one, other)]
    alike = {name for name in names[0] & names[1] if filecmp.cmp(one / name, other / name, shallow=False)}
    return sorted(name for name in (names[0] | names[1]) - alike if Path(name).name != MANIFEST)


def measure(run: Path, options: argparse.Namespace) -> dict[str, Usage]:
    """Runs all commands; returns what each used.

    Args:
        run: the run's folder.
        options: the options of this script.

    Raises:
        RuntimeError: a command failed, or the killed merge ended in other bytes.
    """
    files, folder, limit = f"{run}/*", options.folder, options.open_files
    whole, again = folder / "whole/out", folder / "again/out"
    for out in (whole, again):
        out.parent.mkdir()
    used = {"modules": counted([sys.executable, "-c", MODULES], files, folder=folder)}
    used["merge"] = counted(merge_command(run, whole, options), files, folder=folder, open_files=limit)
    command = merge_command(run, again, options)
    kill_while_it_writes(command, run, again, options)
    used["resumed"] = counted(command, files, folder=folder, open_files=limit)
    if different := differences(whole, again):
        raise RuntimeError(f"{len(different)} files of the killed merge differ, {different[0]} first")
    for path in sorted(whole.rglob(MANIFEST)):
        verify = [sys.executable, "-m", "wsm_ds", "verify", str(path.parent)]
        used[f"verify {path.parent.name}"] = counted(verify, files, folder=folder, open_files=limit)
    return used


def main() -> None:
    """Makes the run, merges, kills, resumes and verifies."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--folder", type=Path, required=True, help="of the run and of the outputs")
    parser.add_argument("--forms", type=Path, help="where runs of two ranks are kept (default: FOLDER/forms)")
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=80, help="80 layers have 723 tensors (default)")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--checkpoints", type=int, default=16)
    parser.add_argument("--open-files", type=int, default=1024, help="limit of open files (default 1024)")
    parser.add_argument("--memory-mib", type=int, default=512, help="memory budget of the merge (default 512)")
    parser.add_argument("--threads", type=int, default=16, help="of the merge (default 16)")
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in ("whole", "again"):
        shutil.rmtree(options.folder / name, ignore_errors=True)
    run = Run("zero3", options.ranks, options.checkpoints, options.layers, options.hidden).make(
        options.folder, (options.forms or options.folder / "forms").resolve(), all_real=True
    )
    used = measure(run, options)
    allowed = used["modules"].peak_bytes + options.memory_mib * 2**20
    for name, usage in used.items():
        peak, most = usage.peak_bytes / 2**20, allowed / 2**20
        print(f"{name:20} CPU {usage.cpu_s:7.1f} s  wall {usage.wall_s:7.1f} s  peak {peak:5.0f} of {most:.0f} MiB  "
              f"opens {usage.opens:7.0f}  at once {usage.open_at_once:5.0f}")  # fmt: skip
    print(json.dumps({name: asdict(usage) for name, usage in used.items()}))
    above = [name for name, usage in used.items() if usage.peak_bytes > allowed]
    if above:
        raise SystemExit(f"more memory than the budget: {', '.join(above)}")


if __name__ == "__main__":
    main()
