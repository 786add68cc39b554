"""A store of texts that rank 0 serves and all ranks of a command use. It takes the place of torch's TCPStore.

To import torch costs each rank seconds, more than many merges take. A message is a JSON list behind its length in four
bytes, and each question has one answer. The first message says for which launch a process comes, so that a server of
another launch, or of another program, is recognised.
"""

import json
import socket
import struct
import threading
from contextlib import suppress
from typing import Any

LENGTH = struct.Struct("<I")
MOST_BYTES = 1 << 23
"""A longer message is refused: what listens at the other end is something else."""
GREETING = "wsm_ds store 1"
GREETING_S = 5.0
"""Seconds that a process has to say for which launch it comes."""


class NoStore(OSError):
    """What listens at an address is not the store of this launch."""


class StoreServer:
    """Serves the texts of one launch, in threads that end with the process.

    Args:
        port: where it listens, on all addresses of the host.
        launch: names the launch; processes of another one are turned away.

    Raises:
        OSError: the port is in use.
    """

    def __init__(self, port: int, launch: str) -> None:
        self.launch = launch
        self.values: dict[str, str] = {}
        self.lock = threading.Lock()
        if socket.has_dualstack_ipv6():
            self.socket = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512)
        else:
            self.socket = socket.create_server(("", port), backlog=512)
        threading.Thread(target=self._accept, daemon=True, name="store").start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except ConnectionAbortedError:  # this process has gone before it was served
                continue
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True, name="store-client").start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError, ValueError, TypeError, LookupError, RecursionError):
            connection.settimeout(GREETING_S)
            is_ours = _receive(connection) == [GREETING, self.launch]
            _send(connection, [GREETING, is_ours])
            connection.settimeout(None)
            while is_ours:
                _send(connection, self._answer(*_receive(connection)))

    def _answer(self, question: str, key: Any, *values: Any) -> list[Any]:
        with self.lock:
            if question == "set":
                self.values[key] = str(values[0])
                return [None]
            if question == "get":
                return [self.values.get(key)]
            if question == "check":
                return [all(name in self.values for name in key)]
            if question == "add":
                self.values[key] = str(int(self.values.get(key, "0")) + int(values[0]))
                return [int(self.values[key])]
            if question == "compare_set":
                # As torch's: the key is set if it has the expected value, or if it is missing and none is expected.
                if self.values.get(key, "") == values[0]:
                    self.values[key] = str(values[1])
                return [self.values.get(key, values[0])]
        raise ValueError(question)


class Store:
    """A connection to the store of a launch. Several threads may use it.

    Args:
        host: of the server.
        port: of the server.
        launch: names the launch.
        connect_s: seconds that the connection may take; the first answer may take GREETING_S.
        answer_s: seconds that it has to answer any other.

    Raises:
        NoStore: what listens there is not the store of this launch.
        OSError: nothing listens there.
    """

    def __init__(self, host: str, port: int, launch: str, connect_s: float, answer_s: float) -> None:
        self.lock = threading.Lock()
        self.socket = socket.create_connection((host, port), connect_s)
        try:
            self.socket.settimeout(GREETING_S)  # a server that plans, or has hundreds of ranks to greet, is slow
            _send(self.socket, [GREETING, launch])
            if _receive(self.socket) != [GREETING, True]:
                raise NoStore(f"the store at {host}:{port} is of another launch")
        except (OSError, ValueError, RecursionError) as error:
            self.socket.close()
            if isinstance(error, NoStore):
                raise
            raise NoStore(f"what answers at {host}:{port} is not the store of rank 0 ({error})") from error
        self.socket.settimeout(answer_s)

    def set(self, key: str, value: str) -> None:
        """Sets a key."""
        self._ask("set", key, value)

    def get(self, key: str) -> bytes:
        """Returns the value of a key, as UTF-8. Raises KeyError if there is none."""
        value = self._ask("get", key)
        if value is None:
            raise KeyError(key)
        return str(value).encode()

    def check(self, keys: list[str]) -> bool:
        """Whether all these keys are set."""
        return bool(self._ask("check", keys))

    def add(self, key: str, count: int) -> int:
        """Adds to a number, which begins at 0, and returns it."""
        return int(self._ask("add", key, count))

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Sets a key if it has the expected value, or is missing and "" is expected. Returns its value, as UTF-8."""
        return str(self._ask("compare_set", key, expected, desired)).encode()

    def _ask(self, *question: Any) -> Any:
        with self.lock:
            _send(self.socket, list(question))
            (answer,) = _receive(self.socket)
            return answer


class PrefixStore:
    """The part of a store that one operation uses: a prefix stands before its keys.

    Args:
        prefix: of the keys.
        store: a `Store`, or torch's TCPStore.
    """

    def __init__(self, prefix: str, store: Any) -> None:
        self.prefix, self.store = prefix, store

    def set(self, key: str, value: str) -> None:
        """Sets a key."""
        self.store.set(f"{self.prefix}/{key}", value)

    def get(self, key: str) -> bytes:
        """Returns the value of a key, as UTF-8."""
        value: bytes = self.store.get(f"{self.prefix}/{key}")
        return value

    def check(self, keys: list[str]) -> bool:
        """Whether all these keys are set."""
        return bool(self.store.check([f"{self.prefix}/{key}" for key in keys]))

    def add(self, key: str, count: int) -> int:
        """Adds to a number, which begins at 0, and returns it."""
        return int(self.store.add(f"{self.prefix}/{key}", count))

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Sets a key if it has the expected value, or is missing and "" is expected. Returns its value, as UTF-8."""
        value: bytes = self.store.compare_set(f"{self.prefix}/{key}", expected, desired)
        return value


def _send(connection: socket.socket, message: list[Any]) -> None:
    data = json.dumps(message).encode()
    connection.sendall(LENGTH.pack(len(data)) + data)


def _receive(connection: socket.socket) -> list[Any]:
    """One message. Raises OSError at the end of the connection, and ValueError if it is no message."""
    (nbytes,) = LENGTH.unpack(_receive_bytes(connection, LENGTH.size))
    if nbytes > MOST_BYTES:
        raise ValueError(f"a message of {nbytes} bytes")
    message = json.loads(_receive_bytes(connection, nbytes))
    if not isinstance(message, list):
        raise ValueError("a message that is no list")
    return message


def _receive_bytes(connection: socket.socket, nbytes: int) -> bytes:
    data = bytearray()
    while len(data) < nbytes:
        part = connection.recv(min(nbytes - len(data), 1 << 20))
        if not part:
            raise ConnectionResetError("the connection has ended")
        data += part
    return bytes(data)
