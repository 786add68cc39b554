"""Rank 0 decides, every rank follows: texts at the store where the process group met, no tensors."""

import json
import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from wsm_ds.errors import PeerFailed

log = logging.getLogger(__name__)


class Agreement:
    """Decisions of rank 0, in an order that is the same on every rank.

    Args:
        store: torch's, of this job alone (`PrefixStore`).
        rank: of this process.
        timeout_s: how long a rank waits for a decision.
    """

    def __init__(self, store: Any, rank: int, timeout_s: float) -> None:
        self.store, self.rank, self.timeout_s = store, rank, timeout_s
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
        if self.rank == 0:
            try:
                answer = decide()
            except Exception as error:
                self.store.set(key, json.dumps({"error": f"{type(error).__name__}: {error}"}))
                raise
            self.store.set(key, json.dumps({"answer": answer}))
            return json.loads(json.dumps(answer))
        try:
            self.store.wait([key], timedelta(seconds=self.timeout_s))
            told = json.loads(self.store.get(key))
        except Exception as error:
            raise PeerFailed(f"rank 0 has not decided within {self.timeout_s:g} s ({error}).", 1) from error
        if "error" in told:
            raise PeerFailed(f"rank 0: {told['error']}", 1)
        return told["answer"]
