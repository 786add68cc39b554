"""Writes a tree of `unpickle` as a pickle again, naming the same globals, without importing any of them.

It is used only where an output's metadata must differ from the newest checkpoint's (moments left out, another number of
ranks). The standard library's C pickler imports every class that it names, and its Python pickler can be extended only
through private methods that change between Python versions. So the few opcodes of protocol 2 that `torch.save` needs
are written here, in the same order as the standard library writes them (`Lib/pickle.py`, `_Pickler`).
"""

import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import chain, islice
from typing import Any

from wsm_ds.errors import UnsupportedLayout
from wsm_ds.torchfile.stand_ins import Global, Stub
from wsm_ds.torchfile.unpickle import Storage, Tensor, TorchSize, as_global

PROTOCOL = 2
"""What `torch.save` writes (`torch/serialization.py`, `DEFAULT_PROTOCOL`)."""
BATCH_ITEMS = 1000
"""Items between two MARKs: a reader holds no more of them on its stack."""
TUPLE_CODES = {1: pickle.TUPLE1, 2: pickle.TUPLE2, 3: pickle.TUPLE3}


def repickle(tree: Any) -> tuple[bytes, dict[str, Storage]]:
    """Writes `tree` as the `data.pkl` of a torch file.

    Args:
        tree: what `unpickle` returned, changed in any way: plain data, `Tensor`s, `Stub`s and `Global`s.

    Returns:
        A protocol-2 pickle, and the storages that it refers to under their new keys. Storages are numbered in the
        order in which the tree names them, as torch does. The caller writes their bytes as `data/KEY`.

    Raises:
        UnsupportedLayout: the tree is nested deeper than the interpreter's recursion limit.
    """
    writer = _PickleWriter()
    try:
        writer.save(tree)
    except RecursionError as error:
        raise UnsupportedLayout(
            "a checkpoint's client state is nested too deeply to be written again. Save it in a flatter form, or as "
            "tensors."
        ) from error
    data = pickle.PROTO + bytes([PROTOCOL]) + writer.data + pickle.STOP
    return data, {key: storage for storage, key in writer.keys.items()}


class _PickleWriter:
    """Appends the opcodes of one object after another to `data`; an object met again becomes a reference."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.keys: dict[Storage, str] = {}
        self.memo: dict[int, int] = {}
        self.memoized: list[Any] = []  # keeps the objects alive: the memo's keys are their addresses

    def save(self, value: Any) -> None:
        """Writes any value of a tree."""
        if isinstance(value, Storage):
            self._save_storage(value)
        elif id(value) in self.memo:
            self._write_numbered(pickle.BINGET, pickle.LONG_BINGET, self.memo[id(value)])
        elif type(value) in _SAVERS:
            _SAVERS[type(value)](self, value)
        elif (name := as_global(value)) is not None:  # a class or a function, as an argument of a call
            self._save_global(name)
            self._memoize(value)
        else:
            raise TypeError(f"a {type(value).__name__} has no place in the tree of a torch file.")

    def _memoize(self, value: Any) -> None:
        number = len(self.memoized)
        self.memo[id(value)] = number
        self.memoized.append(value)
        self._write_numbered(pickle.BINPUT, pickle.LONG_BINPUT, number)

    def _write_numbered(self, short: bytes, long: bytes, number: int) -> None:
        self.data += short + bytes([number]) if number < 256 else long + struct.pack("<I", number)

    def _save_storage(self, storage: Storage) -> None:
        key = self.keys.setdefault(storage, str(len(self.keys)))
        self._save_tuple(("storage", storage.storage_class, key, storage.location, storage.numel))
        self.data += pickle.BINPERSID

    def _save_none(self, _: None) -> None:
        self.data += pickle.NONE

    def _save_bool(self, value: bool) -> None:
        self.data += pickle.NEWTRUE if value else pickle.NEWFALSE

    def _save_int(self, value: int) -> None:
        if 0 <= value < 1 << 8:
            self.data += pickle.BININT1 + bytes([value])
        elif 0 <= value < 1 << 16:
            self.data += pickle.BININT2 + struct.pack("<H", value)
        elif -(1 << 31) <= value < 1 << 31:
            self.data += pickle.BININT + struct.pack("<i", value)
        else:
            # At most 255 bytes: the reader refuses longer ones. A negative power of two needs no further sign bit.
            encoded = value.to_bytes((value + (value < 0)).bit_length() // 8 + 1, "little", signed=True)
            self.data += pickle.LONG1 + bytes([len(encoded)]) + encoded

    def _save_float(self, value: float) -> None:
        self.data += pickle.BINFLOAT + struct.pack(">d", value)

    def _save_str(self, value: str) -> None:
        encoded = value.encode("utf-8", "surrogatepass")
        self.data += pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded
        self._memoize(value)

    def _save_bytes(self, value: bytes) -> None:
        # Protocol 2 has no opcode for bytes; the standard library writes this call, too.
        self._save_builtin_call(Global("_codecs", "encode"), value, (value.decode("latin-1"), "latin1"))

    def _save_set(self, value: set[Any] | frozenset[Any]) -> None:
        self._save_builtin_call(Global("__builtin__", type(value).__name__), value, (list(value),))

    def _save_builtin_call(self, function: Global, value: Any, arguments: tuple[Any, ...]) -> None:
        self._save_global(function)
        self._save_tuple(arguments)
        self.data += pickle.REDUCE
        self._memoize(value)

    def _save_tuple(self, values: tuple[Any, ...]) -> None:
        if not values:
            self.data += pickle.EMPTY_TUPLE
            return
        code = TUPLE_CODES.get(len(values))
        if code is None:
            self.data += pickle.MARK
        for value in values:
            self.save(value)
        if id(values) in self.memo:  # it holds itself, through a list: what is on the stack is its second copy
            self.data += pickle.POP_MARK if code is None else pickle.POP * len(values)
            self.save(values)
            return
        self.data += code or pickle.TUPLE
        self._memoize(values)

    def _save_list(self, values: list[Any]) -> None:
        self.data += pickle.EMPTY_LIST
        self._memoize(values)
        self._save_items(values)

    def _save_dict(self, values: dict[Any, Any]) -> None:
        self.data += pickle.EMPTY_DICT
        self._memoize(values)
        self._save_entries(values.items())

    def _save_ordered_dict(self, values: OrderedDict[Any, Any]) -> None:
        self.save(OrderedDict)
        self.data += pickle.EMPTY_TUPLE + pickle.REDUCE
        self._memoize(values)
        self._save_entries(values.items())
        self._save_state(vars(values) or None)  # a module's state dict has `_metadata` there

    def _save_items(self, items: list[Any]) -> None:
        self._save_batches(zip(items, strict=True), pickle.APPEND, pickle.APPENDS)

    def _save_entries(self, entries: Iterable[tuple[Any, Any]]) -> None:
        self._save_batches(entries, pickle.SETITEM, pickle.SETITEMS)

    def _save_batches(self, rows: Iterable[tuple[Any, ...]], code_of_one: bytes, code_of_many: bytes) -> None:
        remaining = iter(rows)
        while batch := list(islice(remaining, BATCH_ITEMS)):
            if len(batch) > 1:
                self.data += pickle.MARK
            for value in chain.from_iterable(batch):
                self.save(value)
            self.data += code_of_many if len(batch) > 1 else code_of_one

    def _save_state(self, state: Any) -> None:
        if state is not None:
            self.save(state)
            self.data += pickle.BUILD

    def _save_global(self, name: Global) -> None:
        owner, _, attribute = name.name.rpartition(".")
        if owner:  # protocol 2 has no opcode for what is inside a class; the standard library writes this call, too
            self._save_global(Global("__builtin__", "getattr"))
            self._save_tuple((Global(name.module, owner), attribute))
            self.data += pickle.REDUCE
            return
        self.data += pickle.GLOBAL + f"{name.module}\n{name.name}\n".encode()

    def _save_size(self, size: TorchSize) -> None:
        self._save_global(Global("torch", "Size"))
        self._save_tuple((tuple(size),))
        self.data += pickle.REDUCE
        self._memoize(size)

    def _save_tensor(self, tensor: Tensor) -> None:
        self._save_call(tensor.call)
        self._memoize(tensor)

    def _save_stub(self, stub: Stub) -> None:
        self._save_call(stub)
        self._memoize(stub)
        self._save_items(stub.items)
        self._save_entries(stub.entries)
        self._save_state(stub.state)

    def _save_call(self, stub: Stub) -> None:
        self._save_global(stub.callee)
        self.save(stub.args)
        self.data += pickle.NEWOBJ if stub.is_new else pickle.REDUCE


_SAVERS: dict[type, Callable[[_PickleWriter, Any], None]] = {
    type(None): _PickleWriter._save_none,
    bool: _PickleWriter._save_bool,
    int: _PickleWriter._save_int,
    float: _PickleWriter._save_float,
    str: _PickleWriter._save_str,
    bytes: _PickleWriter._save_bytes,
    tuple: _PickleWriter._save_tuple,
    list: _PickleWriter._save_list,
    dict: _PickleWriter._save_dict,
    set: _PickleWriter._save_set,
    frozenset: _PickleWriter._save_set,
    OrderedDict: _PickleWriter._save_ordered_dict,
    Global: _PickleWriter._save_global,
    TorchSize: _PickleWriter._save_size,
    Tensor: _PickleWriter._save_tensor,
    Stub: _PickleWriter._save_stub,
}
