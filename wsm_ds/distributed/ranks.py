"""Several processes on one task: barriers, decisions of rank 0, and errors that reach every rank.

The ranks exchange short texts at torch's TCPStore; tensors and checkpoints go through the shared file system. A merge
and a training job use the same protocol, `Ranks`.
"""

import json
import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from typing_extensions import override

from wsm_ds.errors import PeerFailed, RecipeError, WsmError

log = logging.getLogger(__name__)

POLL_S = 0.05
LONGEST_POLL_S = 1.0
BEAT_S = 5.0
SILENT_S = 120.0
"""A rank that has not beaten for so long is given up."""
FAREWELL_S = 15.0
"""How long rank 0, which usually holds the store, waits for the others before it leaves."""


class Ranks:
    """One process alone. Also the protocol that several processes follow (`StoreRanks`).

    Ranks: all call the same methods in the same order.
    """

    rank = 0
    world_size = 1

    def barrier(self, name: str) -> None:
        """Returns when all ranks have called it with this name. A name is used once.

        Raises:
            PeerFailed: another rank failed, or no longer answers.
        """

    def check(self) -> None:
        """Raises PeerFailed if another rank failed, or no longer answers."""

    def agree(self, name: str, value: str) -> None:
        """Checks that all ranks have the value that rank 0 has. A name is used once.

        Raises:
            RecipeError: rank 0 has another value.
            PeerFailed: another rank failed, or no longer answers.
        """

    def decide(self, decision: Callable[[], Any]) -> Any:
        """Calls `decision` on rank 0 alone, and returns on every rank what it returned, as JSON keeps it.

        Raises:
            Exception: on rank 0, what `decision` raised.
            PeerFailed: on the other ranks, the same error; or rank 0 is gone, or decides nothing in time.
        """
        return json.loads(json.dumps(decision()))

    @contextmanager
    def together(self) -> Iterator[None]:
        """While the context runs, an error of one rank ends all ranks, and a rank that is silent is noticed."""
        yield


class StoreRanks(Ranks):
    """One of several processes that meet at a store. An object serves one task, such as one merge.

    Args:
        store: torch's TCPStore, or a PrefixStore of it that is for this task alone.
        rank: of this process.
        world_size: number of processes.
        timeout_s: how long `decide` waits for rank 0.
    """

    def __init__(self, store: Any, rank: int, world_size: int, *, timeout_s: float = math.inf) -> None:
        self.store, self.rank, self.world_size, self.timeout_s = store, rank, world_size, timeout_s
        self.decisions = 0
        self.is_beating, self.has_left = False, threading.Event()
        self.last_beats: dict[int, tuple[int, float]] = {}
        self.checked_s = 0.0
        store.set(f"wsm/host/{rank}", socket.gethostname())

    @override
    def barrier(self, name: str) -> None:
        key = f"wsm/barrier/{name}"
        self._ask(self.store.add, key, 1)
        self._poll(lambda: self._ask(self.store.add, key, 0) >= self.world_size)

    @override
    def check(self) -> None:
        if self._ask(self.store.check, ["wsm/error"]):
            code, _, message = self._ask(self.store.get, "wsm/error").decode().partition(" ")
            raise PeerFailed(message, int(code))
        now = time.monotonic()
        if not self.is_beating or now - self.checked_s < BEAT_S:
            return
        self.checked_s = now
        for rank in range(self.world_size) if self.rank == 0 else (0,):
            beat = self._ask(self.store.add, f"wsm/beat/{rank}", 0)
            if self.last_beats.get(rank, (-1, now))[0] != beat:
                self.last_beats[rank] = (beat, now)
            elif now - self.last_beats[rank][1] > SILENT_S:
                raise PeerFailed(f"rank {rank} ({self._host(rank)}) has not answered for {SILENT_S:g} s.", 3)

    @override
    def agree(self, name: str, value: str) -> None:
        key = f"wsm/agree/{name}"
        if self.rank == 0:
            self._ask(self.store.set, key, value)
        if self._wait_for(key) != value:
            raise RecipeError(f"the ranks have planned different merges ({name}); start the merge again.")

    @override
    def decide(self, decision: Callable[[], Any]) -> Any:
        self.decisions += 1
        key = f"wsm/decision/{self.decisions}"
        try:
            if self.rank == 0:
                with self._telling():
                    self._ask(self.store.set, key, json.dumps(decision()))
            return json.loads(self._wait_for(key, self.timeout_s))
        except BaseException:
            self._leave()
            raise

    @override
    @contextmanager
    def together(self) -> Iterator[None]:
        # Only here: a training job runs for weeks, and has its own heartbeats.
        self.is_beating = True
        threading.Thread(target=self._beat, daemon=True, name="beat").start()
        try:
            with self._telling():
                yield
        finally:
            self._leave()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Tells the other ranks of an error inside. The first error of all ranks counts."""
        try:
            yield
        except PeerFailed:
            raise
        except BaseException as error:
            code = error.exit_code if isinstance(error, WsmError) else 3 if isinstance(error, Exception) else 130
            text = f"{code} rank {self.rank} ({socket.gethostname()}): {type(error).__name__}: {error}"
            try:
                # A path in the message may not be text; the store takes UTF-8 alone.
                self.store.compare_set("wsm/error", "", text.encode(errors="backslashreplace").decode())
            except Exception:  # the store is gone with rank 0, and so are the others
                log.debug("the other ranks could not be told", exc_info=True)
            raise

    def _leave(self) -> None:
        """Says that this rank needs the store no more; rank 0 waits a while until all ranks have said so."""
        if self.has_left.is_set():
            return
        self.has_left.set()
        try:
            self.store.add("wsm/left", 1)
            deadline_s = time.monotonic() + FAREWELL_S
            while self.rank == 0 and self.store.add("wsm/left", 0) < self.world_size and time.monotonic() < deadline_s:
                time.sleep(POLL_S)
        except Exception:
            log.debug("the store was gone first", exc_info=True)

    def _beat(self) -> None:
        while not self.has_left.is_set():
            try:
                self.store.add(f"wsm/beat/{self.rank}", 1)
            except Exception:
                return
            self.has_left.wait(BEAT_S)

    def _wait_for(self, key: str, timeout_s: float = math.inf) -> str:
        """The text that rank 0 sets at `key`."""
        self._poll(lambda: self._ask(self.store.check, [key]), timeout_s)
        text: str = self._ask(self.store.get, key).decode()
        return text

    def _poll(self, is_over: Callable[[], bool], timeout_s: float = math.inf) -> None:
        """Returns when `is_over()`. Raises PeerFailed if a rank failed, is silent, or the time is up."""
        # Polled, not `store.wait`: a wait locks this process's connection, which NCCL's watchdog needs, too.
        began_s = time.monotonic()
        while not is_over():
            self.check()
            waited_s = time.monotonic() - began_s
            if waited_s > timeout_s:
                raise PeerFailed(f"rank 0 ({self._host(0)}) decides nothing for {timeout_s:g} s.", 3)
            time.sleep(min(max(POLL_S, waited_s / 10), LONGEST_POLL_S))

    def _ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return question(*arguments)
        except Exception as error:
            raise PeerFailed(f"rank 0 is gone ({type(error).__name__}: {error}).", 3) from error

    def _host(self, rank: int) -> str:
        key = f"wsm/host/{rank}"
        if not self._ask(self.store.check, [key]):
            return "never started"
        host: str = self._ask(self.store.get, key).decode()
        return host
