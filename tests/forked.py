"""Python processes that have torch and DeepSpeed from their first moment on.

To import them takes seconds of CPU time, so a server of multiprocessing's does it once, and each process is forked
from it: one of its own, with a pid, signals and an exit code, started in a tenth of a second.
"""

import multiprocessing
import os
import runpy
import socket
import sys
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from wsm_ds.errors import StaleLock
from wsm_ds.training.compilation import extensions_folder, require_no_stale_locks

TESTS = Path(__file__).parent
ROOT = TESTS.parent
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "launch", TESTS))),
}
PRELOADED = ["deepspeed", "torch._dynamo", "pretrain"]


def fork(script: Path, arguments: list[str], environment: dict[str, str], *, folder: Path, log: Path) -> BaseProcess:
    """Starts what `python SCRIPT ARGUMENTS` does in a folder, with its output at the end of `log`."""
    process = server().Process(target=run, args=(script, arguments, environment, folder, log))
    process.start()
    return process


@cache
def server() -> ForkServerContext:
    """One a session. It ends the session where a start of DeepSpeed would wait for ever."""
    try:
        require_no_stale_locks(extensions_folder(), stale_after_s=0)
    except StaleLock as error:
        pytest.exit(f"StaleLock: {error}", returncode=3)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


def run(script: Path, arguments: list[str], environment: dict[str, str], folder: Path, log: Path) -> None:
    """In the process."""
    os.environ.update(environment)
    os.chdir(folder)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def free_port() -> str:
    """A port at which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def as_torchrun(rank: int, world_size: int) -> dict[str, str]:
    """What torchrun and deepspeed call a rank of one machine."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
