"""Is this node fit to take part? One line, before the ranks start on it.

    srun --ntasks-per-node=1 python -m wsm_ds.training.node_check RUN --accelerators 8 --free-bytes 2TB

Exit code 0, or 3 and the reason: the job script can leave the node out and let the job requeue.
"""

import argparse
import os
import shutil
import socket
import sys
import time
from pathlib import Path

from wsm_ds.errors import NodeUnfit, WsmError
from wsm_ds.sizes import format_size, parse_size
from wsm_ds.training.job import JobFolder

CLOCK_SKEW_S = 60.0
CONNECT_S = 10.0


def check_folder(run: Path) -> str:
    """RUN/job can be written, synced and read back, and its clock is ours.

    Raises:
        NodeUnfit: it cannot, or the clocks of the node and of the storage differ by more than a minute.
    """
    folder = JobFolder(run).folder
    path = folder / f".node_check.{socket.gethostname()}.{os.getpid()}"
    text = f"{time.time()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before_s = time.time()
        with path.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        after_s = time.time()
        written_s, found = path.stat().st_mtime, path.read_text()
        path.unlink()
    except OSError as error:
        raise NodeUnfit(f"{folder} cannot be written: {error}") from error
    if found != text:
        raise NodeUnfit(f"{folder} gives back other bytes than were written.")
    skew_s = max(written_s - after_s, before_s - written_s, 0.0)
    if skew_s > CLOCK_SKEW_S:
        raise NodeUnfit(f"the clock differs from that of the storage of {folder} by {skew_s:.0f} s; set it by NTP.")
    return "folder writable"


def check_free(run: Path, nbytes: int) -> str:
    """The storage of `run` has so many bytes free, for us.

    Raises:
        NodeUnfit: it has not.
    """
    free = shutil.disk_usage(run).free
    if free < nbytes:
        raise NodeUnfit(f"{run} has {format_size(free)} free, {format_size(nbytes)} are needed.")
    return f"{format_size(free)} free"


def check_rendezvous(address: str) -> str:
    """A packet gets to HOST:PORT and back. That nobody listens there yet is no fault; that the host is unknown is.

    Raises:
        NodeUnfit: it is no HOST:PORT, the name is unknown, or the host cannot be reached.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise NodeUnfit(f"--rendezvous {address}: HOST:PORT is needed.")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S):
            pass
    except ConnectionRefusedError:
        return f"{address} reached, nobody listens"
    except OSError as error:
        raise NodeUnfit(f"the rendezvous {address} cannot be reached: {error}") from error
    return f"{address} reached"


def check_accelerators(count: int) -> str:
    """So many accelerators are visible, and each adds two numbers rightly. On DS_ACCELERATOR=cpu there are none.

    Raises:
        NodeUnfit: there are fewer, or one fails.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return "accelerators not counted (DS_ACCELERATOR=cpu)"
    import torch
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    found = accelerator.device_count()
    if found < count:
        raise NodeUnfit(f"{found} accelerators ({accelerator.device_name()}) are visible, {count} are needed.")
    for index in range(count):
        name = accelerator.device_name(index)
        try:
            total = torch.ones(1024, device=name).sum().item()
        except RuntimeError as error:
            raise NodeUnfit(f"accelerator {name} fails: {error}") from error
        if total != 1024:
            raise NodeUnfit(f"accelerator {name} sums 1024 ones to {total}.")
    return f"{found} accelerators"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `run`, for `wsm-ds check-node` and for this module as a program."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of the training run; made if it is missing")
    parser.add_argument("--accelerators", type=int, metavar="N", help="number of accelerators that must be visible")
    parser.add_argument("--free-bytes", metavar="SIZE", help="free space that RUN's storage must have: 500GB, 2TiB")
    parser.add_argument(
        "--rendezvous",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="an address that the node must reach; may be given several times",
    )


def run(options: argparse.Namespace) -> int:
    """Checks this node and prints one line, "HOST: fit: FACTS" or "HOST: unfit: REASON".

    Args:
        options: the parsed arguments of `add_arguments`.

    Returns:
        The exit code: 0 if the node is fit, else 3.
    """
    host, facts = socket.gethostname(), []
    try:
        facts.append(check_folder(options.run))
        if options.free_bytes is not None:
            facts.append(check_free(options.run, parse_size(options.free_bytes)))
        facts += [check_rendezvous(address) for address in options.rendezvous]
        if options.accelerators is not None:
            facts.append(check_accelerators(options.accelerators))
    except WsmError as error:
        print(f"{host}: unfit: {error}", flush=True)
        return 3
    print(f"{host}: fit: {', '.join(facts)}", flush=True)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs `python -m wsm_ds.training.node_check`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m wsm_ds.training.node_check", description=__doc__.split("\n")[0])
    add_arguments(parser)
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
