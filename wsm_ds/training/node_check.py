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
from wsm_ds.filesystem.durable import write_text
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
        write_text(path, text)
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


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m wsm_ds.training.node_check", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--accelerators", type=int, metavar="N", help="how many have to be visible")
    parser.add_argument("--free-bytes", metavar="SIZE", help="free on RUN's storage: 500GB, 2TiB")
    parser.add_argument("--rendezvous", action="append", default=[], metavar="HOST:PORT", help="to be reached")
    options = parser.parse_args(arguments)
    host, found = socket.gethostname(), []
    try:
        found.append(check_folder(options.run))
        if options.free_bytes is not None:
            found.append(check_free(options.run, parse_size(options.free_bytes)))
        found += [check_rendezvous(address) for address in options.rendezvous]
        if options.accelerators is not None:
            found.append(check_accelerators(options.accelerators))
    except WsmError as error:
        print(f"{host}: unfit: {error}", flush=True)
        return 3
    print(f"{host}: fit: {', '.join(found)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
