"""Checks whether this node is fit to train, and prints one line about it.

    srun --ntasks-per-node=1 wsm-ds check-node RUN --accelerators 8 --free-bytes 2TB

It runs on each node before the ranks start. `python -m wsm_ds.training.node_check` does the same. The exit code is 0,
or 3 if the node is unfit; the line then gives the reason. The job script can leave the node out and requeue the job.
"""

import argparse
import os
import shutil
import socket
import sys
import time
from pathlib import Path

from wsm_ds.errors import NodeUnfit, RecipeError, WsmError
from wsm_ds.filesystem.durable import write_text
from wsm_ds.sizes import format_size, parse_size
from wsm_ds.training.job import JobFolder

CLOCK_SKEW_S = 60.0
CONNECT_S = 10.0


def check_folder(run: Path) -> str:
    """Checks that RUN/job can be written, synced and read back, and that the clocks of node and storage agree.

    Args:
        run: the run's folder; it is made if it is missing.

    Returns:
        What was found, for the line of a fit node. So do the other checks.

    Raises:
        NodeUnfit: the folder cannot be used, or the clocks differ by more than CLOCK_SKEW_S.
    """
    folder = JobFolder(run).folder
    path = folder / f".node_check.{socket.gethostname()}.{os.getpid()}"
    text = f"{time.time()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before_s = time.time()
        write_text(path, text)
        after_s = time.time()
        written_s, read_back = path.stat().st_mtime, path.read_text()
        path.unlink()
    except OSError as error:
        raise NodeUnfit(f"{folder} cannot be written: {error}") from error
    if read_back != text:
        raise NodeUnfit(f"{folder}: the bytes that were read are not those that were written.")
    skew_s = max(written_s - after_s, before_s - written_s, 0.0)
    if skew_s > CLOCK_SKEW_S:
        raise NodeUnfit(f"the clock differs by {skew_s:.0f} s from that of the storage of {folder}; set it by NTP.")
    return "folder writable"


def check_free(run: Path, nbytes: int) -> str:
    """Checks that the storage of `run` has `nbytes` free for this user.

    Raises:
        NodeUnfit: it has fewer; the message names both sizes.
    """
    free = shutil.disk_usage(run).free
    if free < nbytes:
        raise NodeUnfit(f"{run} has {format_size(free)} free, {format_size(nbytes)} are needed.")
    return f"{format_size(free)} free"


def check_rendezvous(address: str) -> str:
    """Checks that packets reach a host and come back. It is no fault if no program listens at the port yet.

    Args:
        address: "HOST:PORT".

    Raises:
        RecipeError: the address is not HOST:PORT.
        NodeUnfit: the host's name is unknown, or the host cannot be reached.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise RecipeError(f"--rendezvous {address} is not HOST:PORT.")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S):
            pass
    except ConnectionRefusedError:
        # The refusal came from the host, so packets travel both ways.
        return f"{address} reached, nobody listens"
    except OSError as error:
        raise NodeUnfit(f"the rendezvous {address} cannot be reached: {error}") from error
    return f"{address} reached"


def check_accelerators(count: int) -> str:
    """Checks that at least `count` accelerators are visible, and that each of them adds numbers correctly.

    With DS_ACCELERATOR=cpu it checks nothing.

    Raises:
        NodeUnfit: fewer are visible, or one fails.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return "accelerators not counted (DS_ACCELERATOR=cpu)"
    import torch
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    visible = accelerator.device_count()
    if visible < count:
        raise NodeUnfit(f"{visible} accelerators ({accelerator.device_name()}) are visible, {count} are needed.")
    for index in range(count):
        name = accelerator.device_name(index)
        try:
            total = torch.ones(1024, device=name).sum().item()
        except RuntimeError as error:
            raise NodeUnfit(f"accelerator {name} fails: {error}") from error
        if total != 1024:
            raise NodeUnfit(f"accelerator {name} sums 1024 ones to {total}.")
    return f"{visible} accelerators"


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

    Raises:
        RecipeError: an argument is not valid; that says nothing about the node.
    """
    try:
        needed_bytes = None if options.free_bytes is None else parse_size(options.free_bytes)
    except RecipeError as error:
        raise RecipeError(f"--free-bytes: {error}") from None
    host, facts = socket.gethostname(), []
    try:
        facts.append(check_folder(options.run))
        if needed_bytes is not None:
            facts.append(check_free(options.run, needed_bytes))
        facts += [check_rendezvous(address) for address in options.rendezvous]
        if options.accelerators is not None:
            facts.append(check_accelerators(options.accelerators))
    except NodeUnfit as error:
        print(f"{host}: unfit: {error}", flush=True)
        return 3
    print(f"{host}: fit: {', '.join(facts)}", flush=True)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs `python -m wsm_ds.training.node_check`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m wsm_ds.training.node_check", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args(arguments))
    except WsmError as error:
        print(f"{socket.gethostname()}: {error}", file=sys.stderr, flush=True)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
