"""Several processes on one operation: barriers, decisions of rank 0, and errors that reach every rank.

The ranks exchange texts at a store, see `store`; tensors and checkpoints go through the shared file system. A merge and
a training job use the same protocol, `Ranks`.
"""

import base64
import json
import logging
import math
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from typing_extensions import override

from wsm_ds.distributed.parent import Parent
from wsm_ds.errors import PeerFailed, RecipeError, WsmError
from wsm_ds.filesystem import kept_objects

log = logging.getLogger(__name__)

POLL_S = 0.05
LONGEST_POLL_S = 1.0
BEAT_S = 5.0
SILENT_S = 120.0
"""A rank without a heartbeat for this long counts as failed."""
TOLD_EVERY_S = 10.0
PART_BYTES = 1 << 19
"""Bytes of an object that lie under one key of the store."""
FAREWELL_S = 15.0
"""Seconds that rank 0 waits at its end for the others: its process usually runs the store's server."""


class Ranks:
    """One process alone. Also the protocol that several processes follow (`StoreRanks`).

    Ranks: all call the same methods in the same order.
    """

    rank = 0
    world_size = 1

    def barrier(self, name: str) -> None:
        """Returns when all ranks have called it with this name.

        Args:
            name: used for one barrier only.

        Raises:
            PeerFailed: another rank failed, or no longer answers.
        """

    def check(self) -> None:
        """Raises PeerFailed if another rank failed, or no longer answers."""

    def agree(self, name: str, value: str) -> None:
        """Checks that all ranks have the value that rank 0 has.

        Args:
            name: what is compared, for the message; used once.
            value: of this rank.

        Raises:
            RecipeError: rank 0 has another value.
            PeerFailed: another rank failed, or no longer answers.
        """

    def decide(self, decision: Callable[[], Any]) -> Any:
        """Calls `decision` on rank 0 alone, and returns its result on every rank.

        Args:
            decision: returns plain data.

        Returns:
            The result after a conversion to JSON and back, also on rank 0.

        Raises:
            Exception: on rank 0, what `decision` raised.
            PeerFailed: on the other ranks, the same error; or rank 0 is gone, or has not decided in time.
        """
        return json.loads(json.dumps(decision()))

    def share(self, make: Callable[[], Any], modules: Sequence[ModuleType]) -> Any:
        """Calls `make` on rank 0 alone, and returns its result on every rank.

        Args:
            make: returns an object of data; it may take minutes.
            modules: where the classes of the object are defined; see `kept_objects.loads`.

        Raises:
            Exception: on rank 0, what `make` raised.
            PeerFailed: another rank failed, or no longer answers.
        """
        return make()

    def gather(self, value: Any) -> list[Any]:
        """Returns what each rank has given, by rank, on every rank.

        Args:
            value: of this rank, plain data.

        Returns:
            The values after a conversion to JSON and back, which keeps every bit of a float.

        Raises:
            PeerFailed: another rank failed, or no longer answers.
        """
        return [json.loads(json.dumps(value))]

    def tell(self, text: str) -> None:
        """Rank 0: says how far it is with what `share` makes. The other ranks write it to their logs.

        Args:
            text: a line.

        Raises:
            PeerFailed: another rank failed, or no longer answers.
        """

    @contextmanager
    def together(self) -> Iterator[None]:
        """While the context runs, an error of one rank ends all ranks, and so does a rank without a heartbeat."""
        yield


class StoreRanks(Ranks):
    """One of several processes that meet at a store. An object serves one operation, such as one merge.

    Args:
        store: a `store.PrefixStore`, or torch's, that this operation alone uses.
        rank: of this process.
        world_size: number of processes.
        timeout_s: seconds that `decide` waits for rank 0.
        parent: the launcher, with whose end this rank fails; None if the launcher is not known.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        *,
        timeout_s: float = math.inf,
        parent: Parent | None = None,
    ) -> None:
        self.store, self.rank, self.world_size, self.timeout_s = store, rank, world_size, timeout_s
        self.parent = parent
        self.decisions = self.shared = self.gathered = 0
        self.logged_s = time.monotonic()
        self.is_beating, self.has_left = False, threading.Event()
        self.last_beats: dict[int, tuple[int, float]] = {}
        self.checked_s = 0.0
        store.set(f"wsm/host/{rank}", socket.gethostname())

    @override
    def barrier(self, name: str) -> None:
        # A key for each rank, not a count: a process that should not be there must not stand for a rank that is late.
        arrived = self._keys(f"barrier/{name}")
        is_over = f"wsm/barrier/{name}/all"
        self._ask(self.store.set, arrived[self.rank], "")
        if self.rank == 0:
            self._poll(lambda: self._ask(self.store.check, arrived))
            self._ask(self.store.set, is_over, "")
        self._poll(lambda: self._ask(self.store.check, [is_over]))

    @override
    def check(self) -> None:
        if self.parent is not None:
            self.parent.check()
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
                # By change, on this rank's clock: clocks of hosts differ.
                self.last_beats[rank] = (beat, now)
            elif now - self.last_beats[rank][1] > SILENT_S:
                raise PeerFailed(f"rank {rank} ({self._host(rank)}) has not answered for {SILENT_S:g} s.", 3)

    @override
    def agree(self, name: str, value: str) -> None:
        key = f"wsm/agree/{name}"
        if self.rank == 0:
            self._ask(self.store.set, key, value)
        if self._wait_for(key) != value:
            raise RecipeError(f"the ranks were asked for different merges ({name}); start the merge again.")

    @override
    def decide(self, decision: Callable[[], Any]) -> Any:
        self.decisions += 1
        key = f"wsm/decision/{self.decisions}"
        try:
            if self.rank == 0:
                with self._errors_reach_all():
                    self._ask(self.store.set, key, json.dumps(decision()))
            return json.loads(self._wait_for(key, self.timeout_s))
        except BaseException:
            self._leave()
            raise

    @override
    def share(self, make: Callable[[], Any], modules: Sequence[ModuleType]) -> Any:
        self.shared += 1
        key = f"wsm/shared/{self.shared}"
        if self.rank == 0:
            made = make()
            self._put(key, kept_objects.dumps(made))
            return made
        return kept_objects.loads(self._take(key, on_wait=self._log_what_rank_0_tells), modules)

    @override
    def gather(self, value: Any) -> list[Any]:
        self.gathered += 1
        keys = self._keys(f"gathered/{self.gathered}")
        self._put(keys[self.rank], json.dumps(value).encode())
        return [json.loads(self._take(key)) for key in keys]

    def _put(self, key: str, content: bytes) -> None:
        """Lays bytes of any length under a key, in parts that the store takes."""
        data = zlib.compress(content, 1)
        parts = [data[begin : begin + PART_BYTES] for begin in range(0, len(data), PART_BYTES)]
        for number, part in enumerate(parts):
            self._ask(self.store.set, f"{key}/{number}", base64.b64encode(part).decode())
        self._ask(self.store.set, key, str(len(parts)))

    def _take(self, key: str, on_wait: Callable[[], None] = lambda: None) -> bytes:
        """Waits for what another rank lays under a key, and returns it."""
        count = int(self._wait_for(key, on_wait=on_wait))
        parts = [base64.b64decode(self._ask(self.store.get, f"{key}/{number}")) for number in range(count)]
        return zlib.decompress(b"".join(parts))

    @override
    def tell(self, text: str) -> None:
        self.check()
        if self.rank == 0:
            self._ask(self.store.set, "wsm/told", text)

    def _log_what_rank_0_tells(self) -> None:
        now = time.monotonic()
        if now - self.logged_s >= TOLD_EVERY_S:
            self.logged_s = now
            told = "wsm/told"
            text = self._ask(self.store.get, told).decode() if self._ask(self.store.check, [told]) else "it has begun"
            log.info("rank %d waits while rank 0 (%s) plans: %s", self.rank, self._host(0), text)

    @override
    @contextmanager
    def together(self) -> Iterator[None]:
        # Not in `__init__`: a training job never enters this context, because it has heartbeats of its own.
        self.is_beating = True
        threading.Thread(target=self._beat, daemon=True, name="beat").start()
        try:
            with self._errors_reach_all():
                yield
        finally:
            self._leave()

    @contextmanager
    def _errors_reach_all(self) -> Iterator[None]:
        """Sends an error in the context to the other ranks. The first error of all ranks counts."""
        try:
            yield
        except PeerFailed:
            raise
        except BaseException as error:
            code = error.exit_code if isinstance(error, WsmError) else 3 if isinstance(error, Exception) else 130
            text = f"{code} rank {self.rank} ({socket.gethostname()}): {type(error).__name__}: {error}"
            try:
                # It sets the key only if no rank has set it before (`Store.compare_set` with an empty old value).
                # A path in the message may not be text, and the store takes only UTF-8.
                self.store.compare_set("wsm/error", "", text.encode(errors="backslashreplace").decode())
            except Exception:  # the store ended with rank 0, and with it the other ranks
                log.debug("the error could not be sent to the other ranks", exc_info=True)
            raise

    def _leave(self) -> None:
        """Announces that this rank needs the store no more. Rank 0 waits at most FAREWELL_S for all announcements."""
        if self.has_left.is_set():
            return
        self.has_left.set()
        try:
            left = self._keys("left")
            self.store.set(left[self.rank], "")
            deadline_s = time.monotonic() + FAREWELL_S
            while self.rank == 0 and not self.store.check(left) and time.monotonic() < deadline_s:
                time.sleep(POLL_S)
        except Exception:
            log.debug("the store ended before this rank", exc_info=True)

    def _beat(self) -> None:
        while not self.has_left.is_set():
            try:
                self.store.add(f"wsm/beat/{self.rank}", 1)
            except Exception:
                return
            self.has_left.wait(BEAT_S)

    def _wait_for(self, key: str, timeout_s: float = math.inf, on_wait: Callable[[], None] = lambda: None) -> str:
        """The text that another rank sets at `key`. Calls `on_wait` again and again meanwhile."""

        def is_set() -> bool:
            on_wait()
            return bool(self._ask(self.store.check, [key]))

        self._poll(is_set, timeout_s)
        text: str = self._ask(self.store.get, key).decode()
        return text

    def _poll(self, is_over: Callable[[], bool], timeout_s: float = math.inf) -> None:
        """Returns when `is_over()` is true. Raises PeerFailed if a rank failed or is silent, or after `timeout_s`."""
        # Polled, not `store.wait`: a wait locks this process's connection, which NCCL's watchdog needs, too.
        began_s = time.monotonic()
        while not is_over():
            self.check()
            waited_s = time.monotonic() - began_s
            if waited_s > timeout_s:
                raise PeerFailed(f"rank 0 ({self._host(0)}) has decided nothing for {timeout_s:g} s.", 3)
            time.sleep(min(max(POLL_S, waited_s / 10), LONGEST_POLL_S))

    def _ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return question(*arguments)
        except Exception as error:
            raise PeerFailed(f"rank 0 is gone ({type(error).__name__}: {error}).", 3) from error

    def _keys(self, name: str) -> list[str]:
        return [f"wsm/{name}/{rank}" for rank in range(self.world_size)]

    def _host(self, rank: int) -> str:
        key = f"wsm/host/{rank}"
        if not self._ask(self.store.check, [key]):
            return "never started"
        host: str = self._ask(self.store.get, key).decode()
        return host
