"""What rank 0 decides, all ranks follow; and an error of rank 0 reaches all."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from lazy import torch

from wsm_ds.distributed import ranks
from wsm_ds.distributed.ranks import Ranks, StoreRanks
from wsm_ds.errors import PeerFailed, Superseded


@pytest.fixture(scope="module")
def server() -> torch.distributed.TCPStore:
    return torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def on_ranks(
    server: torch.distributed.TCPStore, name: str, world_size: int, work: Callable[[Ranks], Any], **options: Any
) -> list[Any]:
    """What `work` returns or raises on every rank: a thread each, with a connection of its own."""

    def one(rank: int) -> Any:
        store = torch.distributed.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=30))
        try:
            return work(StoreRanks(torch.distributed.PrefixStore(name, store), rank, world_size, **options))
        except Exception as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(one, range(world_size)))


def test_one_process_decides_for_itself_and_gets_what_json_keeps() -> None:
    assert Ranks().decide(lambda: {"path": ("a", 1)}) == {"path": ["a", 1]}


def test_rank_0_alone_decides_and_all_ranks_get_its_decisions_in_order(server: torch.distributed.TCPStore) -> None:
    deciding: list[int] = []

    def work(member: Ranks) -> list[Any]:
        def square(number: int) -> list[int]:
            deciding.append(member.rank)
            return [number, number**2]

        return [member.decide(partial(square, number)) for number in range(3)]

    assert on_ranks(server, "order", 3, work) == [[[0, 0], [1, 1], [2, 4]]] * 3
    assert deciding == [0, 0, 0]


def test_every_rank_gets_what_each_has_given(
    server: torch.distributed.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Ranks().gather({"nats": [0.1]}) == [{"nats": [0.1]}]
    monkeypatch.setattr(ranks, "PART_BYTES", 100)  # so that a value takes several keys

    def work(member: Ranks) -> list[Any]:
        numbers = [(member.rank + 1) / number for number in range(1, 200)]
        return [member.gather(numbers), member.gather(member.rank)]

    numbers = [[(rank + 1) / number for number in range(1, 200)] for rank in range(3)]
    assert on_ranks(server, "gather", 3, work) == [[numbers, [0, 1, 2]]] * 3


def test_an_error_of_rank_0_reaches_all_with_its_exit_code_and_nobody_waits(server: torch.distributed.TCPStore) -> None:
    def decision() -> None:
        raise Superseded("attempt 1 was superseded")

    began_s = time.monotonic()
    first, *others = on_ranks(server, "error", 3, lambda member: member.decide(decision))
    assert type(first) is Superseded
    for error in others:
        assert type(error) is PeerFailed
        assert str(error) == f"rank 0 ({os.uname().nodename}): Superseded: attempt 1 was superseded"
        assert error.exit_code == Superseded.exit_code
    assert time.monotonic() - began_s < ranks.FAREWELL_S / 2


def test_a_decision_that_does_not_come_in_time_is_an_error_on_the_others(server: torch.distributed.TCPStore) -> None:
    done = threading.Event()

    def work(member: Ranks) -> Any:
        if member.rank == 0:
            done.wait(30)
            return None
        try:
            return member.decide(lambda: 1)
        finally:
            done.set()

    _, error = on_ranks(server, "late", 2, work, timeout_s=0.3)
    assert type(error) is PeerFailed
    assert str(error).endswith("has decided nothing for 0.3 s.")


def test_ranks_that_only_decide_send_no_beats(server: torch.distributed.TCPStore) -> None:
    on_ranks(server, "quiet", 2, lambda member: member.decide(lambda: 1))
    assert not torch.distributed.PrefixStore("quiet", server).check(["wsm/beat/0"])


def test_ranks_do_not_import_torch() -> None:
    import subprocess

    code = "import sys, wsm_ds.distributed.launcher as it; it.launched_ranks({}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
