"""How the ranks of one operation find each other: at a store, by a roll call.

A store can have visitors that do not belong to the operation: ranks of an earlier start whose launcher was killed,
ranks of the training run from whose shell a command was started, or the ranks of the command before this one. So rank
0 makes a *nonce* and calls; each rank answers with words about its process. When all have answered, rank 0 closes the
call and names one process per rank, the members. Any other process is refused. Everything else that the members
exchange lies in the store under the nonce, where no earlier operation has left anything.
"""

import json
import logging
import os
import socket
import time
import uuid
from typing import Any

from wsm_ds.distributed.parent import Parent
from wsm_ds.distributed.store import NoStore, PrefixStore, Store, StoreServer
from wsm_ds.errors import PeerFailed, RecipeError, WsmError, few

log = logging.getLogger(__name__)

JOIN_S = 120.0
"""Seconds that the ranks wait for each other at the start."""
NOTICE_S, NOTICE_AGAIN_S = 2.5, 30.0
"""Seconds after which a rank says for the first time for whom it waits, and how often it says so again."""
SKEW_S = 1.0
"""Seconds of waiting about which a rank says nothing: processes start at different speeds."""
TAKEN_S = 40.0
"""Seconds that a rank waits for another call, when rank 0 has begun with another process in its place."""
CONNECT_S = 1.5
PORTS = 16
HIGHEST_PORT = (1 << 16) - 1
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


def connected_store(
    host: str, port: int, launch: str, patience: Patience, *, serves: bool, is_port_taken: bool
) -> Store:
    """A connection to the store where the ranks meet.

    A launcher with a store of its own (torchrun) has taken the port where ranks usually meet. Then rank 0, which runs
    on the same host (`RendezvousStoreInfo.build`, `torch/distributed/elastic/rendezvous/api.py`), takes one of the next
    PORTS ports, and the others look for it there.

    Args:
        host: of rank 0.
        port: the launcher's.
        launch: names the launch, so that another store is not taken for that of rank 0.
        patience: how long to wait for a server that does not listen yet.
        serves: whether this process is rank 0, which runs the server.
        is_port_taken: whether the launcher has a server of its own at `port`.

    Raises:
        RecipeError: the port is in use.
        PeerFailed: nothing listens there, or something else than the store of rank 0.
    """
    first = port if not is_port_taken else port + 1 if port + PORTS <= HIGHEST_PORT else port - PORTS
    ports = range(first, first + PORTS if is_port_taken else first + 1)
    if serves:
        # Rank 0 of a start whose launcher was killed may still serve the same launch. The others must not join it.
        while is_port_taken and any(_is_served(number, launch) for number in ports):
            patience.wait(f"the end of another rank 0 of this launch at {host}:{ports.start} or behind")
        port = _serve(host, ports, launch, patience)
        return Store("localhost", port, launch, CONNECT_S, OPERATION_S)
    while True:
        failure = ""
        for number in ports:
            try:
                return Store(host, number, launch, CONNECT_S, OPERATION_S)
            except NoStore as error:
                if not is_port_taken:
                    raise PeerFailed(str(error), 3) from error
            except OSError as error:
                failure = failure or f"nothing answers at {host}:{number} ({error})"
        patience.wait(f"rank 0, because {failure or f'no store of this launch is at {host}:{ports.start} and behind'}")


def _is_served(port: int, launch: str) -> bool:
    try:
        Store("localhost", port, launch, CONNECT_S, OPERATION_S).socket.close()
    except OSError:
        return False
    return True


def _serve(host: str, ports: range, launch: str, patience: Patience) -> int:
    """Starts the server at the first free port, and returns the port."""
    reason: OSError | None = None
    for number in ports:
        try:
            StoreServer(number, launch)
            return number
        except OSError as error:
            reason = error
    raise RecipeError(
        f"rank 0 cannot listen at {host}:{ports.start} (MASTER_ADDR, MASTER_PORT): {reason}. A training run, or an "
        f"earlier start of this command, may use the port. {patience.about}"
    ) from reason


def roll_call(store: Any, rank: int, world_size: int, patience: Patience) -> PrefixStore:
    """Finds one process for each rank, and a part of the store that these processes alone use.

    Ranks: all.

    Args:
        store: where the ranks meet.
        rank: of this process.
        world_size: number of ranks.
        patience: how long to wait for the others.

    Returns:
        A part of `store`.

    Raises:
        PeerFailed: ranks are missing, or another process takes part as this rank. The message names them.
    """
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
