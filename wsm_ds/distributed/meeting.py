"""How the ranks of one operation find each other: at a store, by a roll call.

A store can have visitors that do not belong to the operation: ranks of an earlier start whose launcher was killed,
ranks of the training run from whose shell a command was started, or the ranks of the command before this one. So rank
0 makes a *nonce* and calls; each rank answers with words about its process. When all have answered, rank 0 closes the
call and names one process per rank, the members. Any other process is refused. Everything else that the members
exchange lies in the store under the nonce, where no earlier operation has left anything.
"""

import datetime
import json
import logging
import os
import socket
import time
import uuid
from typing import Any

from wsm_ds.distributed.parent import Parent
from wsm_ds.errors import PeerFailed, RecipeError, WsmError, few

log = logging.getLogger(__name__)

JOIN_S = 120.0
"""Seconds that the ranks wait for each other at the start."""
NOTICE_S, NOTICE_AGAIN_S = 2.5, 30.0
"""Seconds after which a rank says for the first time for whom it waits, and how often it says so again."""
SKEW_S = 1.0
"""Seconds of waiting about which a rank says nothing: ranks import torch at different speeds."""
TAKEN_S = 40.0
"""Seconds that a rank waits for another call, when rank 0 has begun with another process in its place."""
CONNECT_S = 1.5
POLL_S = 0.05
OPERATION_S = 120.0
"""Most seconds that the store may take for one answer."""
CALL = "wsm_ds/call"


class Patience:
    """How long this process waits for the other ranks, and what it says meanwhile.

    Args:
        who: this process, such as "rank 1 of 8".
        about: why it waits for others, and how it would run alone.
        parent: the launcher, whose end ends the wait; None if the launcher is not known.
    """

    def __init__(self, who: str, about: str, parent: Parent | None) -> None:
        self.who, self.about, self.parent = who, about, parent
        self.began_s = time.monotonic()
        self.next_notice_s = NOTICE_S
        self.looked_s: float | None = None

    def wait(self, lacking: str) -> None:
        """Waits a moment.

        Args:
            lacking: for whom or what.

        Raises:
            PeerFailed: the wait has been too long, or the launcher has ended.
        """
        if self.parent is not None:
            self.parent.check()
        waited_s = time.monotonic() - self.began_s
        if waited_s > JOIN_S:
            raise PeerFailed(f"{self.who} has waited {JOIN_S:g} s for {lacking}. {self.about}", 3)
        self.looked_s = waited_s if self.looked_s is None else self.looked_s
        if waited_s >= max(self.next_notice_s, self.looked_s + SKEW_S):
            self.next_notice_s = waited_s + NOTICE_AGAIN_S
            log.warning("%s waits for %s, at most %g s. %s", self.who, lacking, JOIN_S, self.about)
        time.sleep(POLL_S)


def connected_store(host: str, port: int, is_server: bool, patience: Patience) -> Any:
    """A connection to the store where the ranks meet.

    Args:
        host: of the store.
        port: of the store.
        is_server: whether this process runs the store's server.
        patience: how long to wait for a server that does not listen yet.

    Returns:
        A torch.distributed.TCPStore.

    Raises:
        RecipeError: the port is in use.
        PeerFailed: nothing listens there, or something else than a store.
    """
    # A plain connection first: torch's own attempts cannot be interrupted, and log each failure.
    while not is_server and (failure := _failure_to_connect(host, port)):
        patience.wait(f"rank 0, because nothing answers at {host}:{port} ({failure})")
    from torch.distributed import TCPStore

    try:
        store = TCPStore(
            host, port, is_master=is_server, wait_for_workers=False, timeout=datetime.timedelta(seconds=OPERATION_S)
        )
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if is_server:
            raise RecipeError(
                f"rank 0 cannot listen at {host}:{port} (MASTER_ADDR, MASTER_PORT): {reason} A training run, or an "
                f"earlier start of this command, may use the port. {patience.about}"
            ) from error
        raise PeerFailed(f"what answers at {host}:{port} is not the store of rank 0: {reason}", 3) from error
    return store


def _failure_to_connect(host: str, port: int) -> str:
    try:
        socket.create_connection((host, port), CONNECT_S).close()
    except OSError as error:
        return str(error)
    return ""


def roll_call(store: Any, rank: int, world_size: int, patience: Patience) -> Any:
    """Finds one process for each rank, and a part of the store that these processes alone use.

    Ranks: all.

    Args:
        store: where the ranks meet.
        rank: of this process.
        world_size: number of ranks.
        patience: how long to wait for the others.

    Returns:
        A torch.distributed.PrefixStore of `store`.

    Raises:
        PeerFailed: ranks are missing, or another process takes part as this rank. The message names them.
    """
    from torch.distributed import PrefixStore

    me = f"process {os.getpid()} on {socket.gethostname()}"
    own = [me, uuid.uuid4().hex]  # unique: a process of an earlier start may have had the same number
    try:
        if rank == 0:
            nonce = _call(store, world_size, own, patience)
        else:
            nonce = _answer(store, rank, world_size, own, patience)
    except WsmError:
        raise
    except Exception as error:
        raise PeerFailed(f"the store where the ranks meet is gone ({type(error).__name__}: {error}).", 3) from error
    return PrefixStore(f"wsm_ds/{nonce}", store)


def _call(store: Any, world_size: int, own: list[str], patience: Patience) -> str:
    """Rank 0: calls, and names the members when all ranks have answered. Returns the nonce."""
    nonce = uuid.uuid4().hex
    call = json.dumps({"nonce": nonce, "world_size": world_size, "by": own, "is_open": True})
    store.set(CALL, call)
    missing = list(range(1, world_size))
    while missing := [rank for rank in missing if not store.check([_answer_key(nonce, rank)])]:
        if store.get(CALL).decode() != call:
            raise _displaced(own, json.loads(store.get(CALL))["by"], 0)
        patience.wait(f"{'rank' if len(missing) == 1 else 'ranks'} {few(missing)}")
    answers = [json.loads(store.get(_answer_key(nonce, rank))) for rank in range(1, world_size)]
    closed = json.dumps(json.loads(call) | {"is_open": False})
    # In one step: of two processes that both are rank 0, one at most closes its call.
    if store.compare_set(CALL, call, closed).decode() != closed:
        raise _displaced(own, json.loads(store.get(CALL))["by"], 0)
    store.set(_members_key(nonce), json.dumps([own, *answers]))
    return nonce


def _answer(store: Any, rank: int, world_size: int, own: list[str], patience: Patience) -> str:
    """A rank but rank 0: answers each call, until one has ended with a list of members. Returns its nonce."""
    answered: list[str] = []
    begun_s: dict[str, float] = {}
    while True:
        call = json.loads(store.get(CALL)) if store.check([CALL]) else None
        if call and call["is_open"] and call["world_size"] == world_size and call["nonce"] not in answered:
            store.set(_answer_key(call["nonce"], rank), json.dumps(own))
            answered.append(call["nonce"])
        for nonce in answered:
            if store.check([_members_key(nonce)]):
                member = json.loads(store.get(_members_key(nonce)))[rank]
                if member != own:
                    raise _displaced(own, member, rank)
                return nonce
        # A closed call may be that of the command before this one. Then the next call comes soon.
        is_taken = call is not None and not call["is_open"] and call["nonce"] not in answered
        taken_s = time.monotonic() - begun_s.setdefault(call["nonce"], time.monotonic()) if call and is_taken else 0.0
        if call and taken_s > TAKEN_S:
            raise PeerFailed(
                f"rank 0 ({call['by'][0]}) has begun with another process in place of {own[0]} as rank {rank}. One of "
                "the two belongs to another start of the command: end it, and start the command again.", 3,
            )  # fmt: skip
        patience.wait(_lacking(call, rank, world_size, answered))


def _lacking(call: dict[str, Any] | None, rank: int, world_size: int, answered: list[str]) -> str:
    """What a rank waits for that is not rank 0."""
    if call is None:
        return "rank 0, which has not called yet"
    if call["nonce"] in answered:
        return f"the other ranks that rank 0 ({call['by'][0]}) has called"
    if call["is_open"]:
        return f"a rank 0 of {world_size}: the one there ({call['by'][0]}) was started for {call['world_size']} ranks"
    return f"another call: rank 0 ({call['by'][0]}) has begun with another process as rank {rank}"


def _displaced(own: list[str], other: list[str], rank: int) -> PeerFailed:
    return PeerFailed(
        f"{own[0]} and {other[0]} both take part as rank {rank}, and the latter, which came later, counts. One of them "
        "belongs to another start of the command: end it, and start the command again.", 3,
    )  # fmt: skip


def _answer_key(nonce: str, rank: int) -> str:
    return f"wsm_ds/{nonce}/answer/{rank}"


def _members_key(nonce: str) -> str:
    return f"wsm_ds/{nonce}/members"
