"""The store of a launch: it keeps texts for its own ranks and turns others away."""

import socket
import threading
from collections.abc import Callable

import pytest

from wsm_ds.distributed import meeting
from wsm_ds.distributed.meeting import PORTS, Patience, connected_store
from wsm_ds.distributed.store import MOST_BYTES, NoStore, PrefixStore, Store, StoreServer
from wsm_ds.errors import PeerFailed, RecipeError


def free_port() -> int:
    with socket.create_server(("", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


def connected(port: int, launch: str = "launch") -> Store:
    return Store("localhost", port, launch, 5.0, 5.0)


def test_what_one_process_sets_another_one_gets() -> None:
    port = free_port()
    StoreServer(port, "launch")
    one, other = connected(port), connected(port)
    one.set("key", "ä text\n")
    assert other.get("key") == "ä text\n".encode()
    assert not other.check(["key", "none"])
    other.set("none", "")
    assert one.check(["key", "none"])
    with pytest.raises(KeyError, match="missing"):
        one.get("missing")
    large = "x" * (1 << 21)
    one.set("large", large)
    assert other.get("large").decode() == large


def test_numbers_are_counted_by_all_threads_of_all_processes() -> None:
    port = free_port()
    StoreServer(port, "launch")
    stores = [connected(port) for _ in range(4)]

    def count(store: Store) -> None:
        for _ in range(50):
            store.add("count", 1)

    threads = [threading.Thread(target=count, args=(store,)) for store in stores * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert stores[0].add("count", 0) == 400


def test_a_key_is_set_in_one_step_only_from_the_expected_value() -> None:
    port = free_port()
    StoreServer(port, "launch")
    store = PrefixStore("part", connected(port))
    assert store.compare_set("key", "", "first") == b"first"
    assert store.compare_set("key", "", "second") == b"first"
    assert store.compare_set("key", "first", "second") == b"second"
    assert store.compare_set("other", "expected", "desired") == b"expected"
    assert not store.check(["other"])
    assert connected(port).get("part/key") == b"second"


def test_a_process_of_another_launch_is_turned_away() -> None:
    port = free_port()
    StoreServer(port, "launch")
    with pytest.raises(NoStore, match="of another launch"):
        connected(port, "other")


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", (MOST_BYTES + 1).to_bytes(4, "little")])
def test_another_server_is_recognised(answer: bytes) -> None:
    with socket.create_server(("", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(100)
                connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(NoStore, match="is not the store of rank 0"):
            connected(listening.getsockname()[1])


def test_a_server_survives_what_other_programs_send() -> None:
    port = free_port()
    StoreServer(port, "launch")
    nested = (100_000).to_bytes(4, "little") + b"[" * 100_000
    for data in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 40, (4).to_bytes(4, "little") + b"null", b"", nested):
        with socket.create_connection(("localhost", port)) as connection:
            connection.sendall(data)
    store = connected(port)
    store.set("key", "value")
    assert store.get("key") == b"value"


def meet(port: int, launch: str, *, serves: bool, is_port_taken: bool) -> Callable[[], Store]:
    patience = Patience("rank", "about", None)
    return lambda: connected_store("localhost", port, launch, patience, serves=serves, is_port_taken=is_port_taken)


def test_beside_a_launchers_own_server_rank_0_takes_the_next_free_port() -> None:
    """The ports behind that of the launcher: one is another program's, one is another launch's."""
    with socket.create_server(("", 0)) as launcher:
        port = launcher.getsockname()[1]
        taken = []
        try:
            taken.append(socket.create_server(("", port + 1)))
            StoreServer(port + 2, "other launch")
        except OSError:
            pytest.skip("the next ports are in use on this machine")
        found: list[Store] = []
        waiting = threading.Thread(
            target=lambda: found.append(meet(port, "launch", serves=False, is_port_taken=True)()), daemon=True
        )
        waiting.start()
        rank_0 = meet(port, "launch", serves=True, is_port_taken=True)()
        waiting.join(60)
        rank_0.set("key", "value")
        assert found[0].get("key") == b"value"
        assert port + 2 < rank_0.socket.getpeername()[1] <= port + PORTS
        taken[0].close()


def test_rank_0_waits_for_the_end_of_another_rank_0_of_its_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "JOIN_S", 0.5)
    with socket.create_server(("", 0)) as launcher:
        port = launcher.getsockname()[1]
        try:
            StoreServer(port + 1, "launch")
        except OSError:
            pytest.skip("the next port is in use on this machine")
        with pytest.raises(PeerFailed, match="the end of another rank 0 of this launch"):
            meet(port, "launch", serves=True, is_port_taken=True)()


def test_a_port_that_another_program_has_is_an_error_on_every_rank() -> None:
    with socket.create_server(("", 0)) as listening:
        port = listening.getsockname()[1]

        def serve() -> None:
            while True:
                connection, _ = listening.accept()
                connection.close()

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(RecipeError, match="cannot listen at"):
            meet(port, "launch", serves=True, is_port_taken=False)()
        with pytest.raises(PeerFailed, match="is not the store of rank 0"):
            meet(port, "launch", serves=False, is_port_taken=False)()
