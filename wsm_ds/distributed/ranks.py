"""Several processes on one merge: who they are, and when all have come so far. They meet at torch's TCPStore.

Nothing but short texts is exchanged; the bytes go through the shared file system. An error of one rank reaches all
others within a second, and a rank that no longer answers is named.
"""

import logging
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from wsm_ds.errors import PeerFailed, RecipeError, WsmError

log = logging.getLogger(__name__)

POLL_S = 0.05
BEAT_S = 5.0
SILENT_S = 120.0
"""A rank that has not been heard of for so long is given up."""
FAREWELL_S = 15.0
JOIN_S = 600.0


class Ranks:
    """One process alone: the whole merge is its own."""

    rank = 0
    world_size = 1

    def barrier(self, name: str) -> None:
        """Returns when all ranks have called it with this name.

        Raises:
            PeerFailed: another rank failed, or no longer answers.
        """

    def check(self) -> None:
        """Raises PeerFailed if another rank failed."""

    def agree(self, name: str, value: str) -> None:
        """Raises RecipeError if rank 0 has called it with another value."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """An error inside is told to the other ranks."""
        yield


class StoreRanks(Ranks):
    """One of several processes that a launcher has started."""

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self.left = threading.Event()
        self.last_beats: dict[int, tuple[int, float]] = {}
        self.checked_s = 0.0
        store.set(f"wsm/host/{rank}", socket.gethostname())
        threading.Thread(target=self._beat, daemon=True, name="beat").start()

    def barrier(self, name: str) -> None:
        key = f"wsm/barrier/{name}"
        count = self._ask(self.store.add, key, 1)
        while count < self.world_size:
            self.check()
            time.sleep(POLL_S)
            count = self._ask(self.store.add, key, 0)

    def check(self) -> None:
        if self._ask(self.store.check, ["wsm/error"]):
            code, _, message = self._ask(self.store.get, "wsm/error").decode().partition(" ")
            raise PeerFailed(message, int(code))
        now = time.monotonic()
        if now - self.checked_s < BEAT_S:
            return
        self.checked_s = now
        for rank in range(self.world_size) if self.rank == 0 else (0,):
            beat = self._ask(self.store.add, f"wsm/beat/{rank}", 0)
            if self.last_beats.get(rank, (-1, now))[0] != beat:
                self.last_beats[rank] = (beat, now)
            elif now - self.last_beats[rank][1] > SILENT_S:
                raise PeerFailed(f"rank {rank} ({self._host(rank)}) has not answered for {SILENT_S:g} s.", 3)

    def agree(self, name: str, value: str) -> None:
        key = f"wsm/agree/{name}"
        if self.rank == 0:
            self._ask(self.store.set, key, value)
        while not self._ask(self.store.check, [key]):
            self.check()
            time.sleep(POLL_S)
        if self._ask(self.store.get, key).decode() != value:
            raise RecipeError(f"the ranks have planned different merges ({name}); start the merge again.")

    @contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except PeerFailed:
            raise
        except BaseException as error:
            code = error.exit_code if isinstance(error, WsmError) else 3 if isinstance(error, Exception) else 130
            text = f"{code} rank {self.rank} ({socket.gethostname()}): {type(error).__name__}: {error}"
            try:
                self.store.compare_set("wsm/error", "", text)
            except Exception:  # the store is gone with rank 0, and so are the others
                log.debug("the other ranks could not be told", exc_info=True)
            raise
        finally:
            self._leave()

    def _leave(self) -> None:
        """Rank 0 holds the store, so it stays until the others have gone, or for a while."""
        try:
            self.store.add("wsm/left", 1)
            deadline = time.monotonic() + FAREWELL_S
            while self.rank == 0 and self.store.add("wsm/left", 0) < self.world_size and time.monotonic() < deadline:
                time.sleep(POLL_S)
        except Exception:
            log.debug("the store was gone first", exc_info=True)
        self.left.set()

    def _beat(self) -> None:
        while not self.left.is_set():
            try:
                self.store.add(f"wsm/beat/{self.rank}", 1)
            except Exception:
                return
            self.left.wait(BEAT_S)

    def _ask(self, question: Any, *arguments: Any) -> Any:
        try:
            return question(*arguments)
        except Exception as error:
            raise PeerFailed(f"rank 0 is gone ({type(error).__name__}: {error}).", 3) from error

    def _host(self, rank: int) -> str:
        key = f"wsm/host/{rank}"
        return self.store.get(key).decode() if self.store.check([key]) else "never started"


def launched_ranks(environment: Mapping[str, str] | None = None) -> Ranks:
    """The ranks that torchrun, deepspeed or srun have started, or one alone.

    Ranks: all of them call it, before anything else.

    Raises:
        RecipeError: the launcher's variables are incomplete, or the ranks do not find each other.
    """
    found = dict(os.environ if environment is None else environment)
    if "WORLD_SIZE" not in found and int(found.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        found |= slurm_variables(found)
    if int(found.get("WORLD_SIZE", "1")) < 2:
        return Ranks()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in found]
    if missing:
        raise RecipeError(
            f"WORLD_SIZE is {found['WORLD_SIZE']}, but {', '.join(missing)} is not set; unset it, or use a launcher."
        )
    os.environ.update({name: found[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")})
    return _meet()


def local_world_size() -> int:
    """Ranks that share this machine's cores."""
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", "SLURM_STEP_TASKS_PER_NODE"):
        digits = os.environ.get(name, "").split("(")[0].split(",")[0]
        if digits.isdigit():
            return max(1, int(digits))
    return 1


def _meet() -> Ranks:
    import datetime

    from torch.distributed import rendezvous

    try:
        store, rank, world_size = next(rendezvous("env://", timeout=datetime.timedelta(seconds=JOIN_S)))
    except Exception as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RecipeError(f"the ranks do not meet at {address}: {type(error).__name__}: {error}") from error
    return StoreRanks(store, rank, world_size)


def slurm_variables(found: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would set, for a step of one task a rank."""
    named = {"RANK": found["SLURM_PROCID"], "WORLD_SIZE": found["SLURM_STEP_NUM_TASKS"]}
    if "MASTER_ADDR" not in found:
        nodes = found.get("SLURM_STEP_NODELIST", "")
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
        hosts = done.stdout.split()
        if not hosts:
            raise RecipeError(f"scontrol does not say which hosts {nodes!r} are; set MASTER_ADDR and MASTER_PORT.")
        named["MASTER_ADDR"] = hosts[0]
    if "MASTER_PORT" not in found:
        job, step = int(found.get("SLURM_JOB_ID", "0")), int(found.get("SLURM_STEP_ID", "0"))
        named["MASTER_PORT"] = str(20000 + (job * 97 + step) % 20000)
    return named
