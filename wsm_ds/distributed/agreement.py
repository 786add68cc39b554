"""Rank 0 decides, every rank follows: texts at the store where the process group met, no tensors."""

import json
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from wsm_ds.errors import PeerFailed

POLL_S = 0.05
FAREWELL_S = 5.0
"""How long rank 0, which holds the store, waits until the others have read why it ends."""


class Agreement:
    """Decisions of rank 0, in an order that is the same on every rank.

    Args:
        store: torch's, of this job alone (`PrefixStore`).
        rank: of this process.
        world_size: of the job.
        timeout_s: how long a rank waits for a decision.
    """

    def __init__(self, store: Any, rank: int, world_size: int, timeout_s: float) -> None:
        self.store, self.rank, self.world_size, self.timeout_s = store, rank, world_size, timeout_s
        self.count = 0

    def decided(self, decide: Callable[[], Any]) -> Any:
        """What `decide()` returned on rank 0, as JSON keeps it.

        Ranks: all; `decide` runs on rank 0 alone.

        Raises:
            Exception: on rank 0, what `decide` raised.
            PeerFailed: on the others, the same, or that rank 0 gave no answer in time.
        """
        self.count += 1
        key = f"decision/{self.count}"
        if self.rank > 0:
            return self._followed(key)
        try:
            answer = decide()
        except Exception as error:
            self.store.set(key, json.dumps({"error": f"{type(error).__name__}: {error}"}))
            self._await_readers(key)
            raise
        text = json.dumps({"answer": answer})
        self.store.set(key, text)
        return json.loads(text)["answer"]

    def _followed(self, key: str) -> Any:
        try:
            self.store.wait([key], timedelta(seconds=self.timeout_s))
            told = json.loads(self.store.get(key))
        except Exception as error:
            raise PeerFailed(f"rank 0 is gone, or decides nothing for {self.timeout_s:g} s ({error}).", 1) from error
        if "error" in told:
            self.store.add(f"{key}/read", 1)
            raise PeerFailed(f"rank 0: {told['error']}", 1)
        return told["answer"]

    def _await_readers(self, key: str) -> None:
        deadline_s = time.monotonic() + FAREWELL_S
        while time.monotonic() < deadline_s and self.store.add(f"{key}/read", 0) < self.world_size - 1:
            time.sleep(POLL_S)
