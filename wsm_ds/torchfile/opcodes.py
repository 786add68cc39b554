"""The pickle machine, reduced to the opcodes that `torch.save` writes. The cost of each is bounded by its own bytes.

The standard library's C unpickler allocates as much memory as a memo index says, hashes tuples of any depth, and lets
BUILD set attributes of any object on its stack, even of our own functions. Here every opcode that does more than put
plain data together is checked. Opcodes that no torch file has (protocol 0's text, extension codes) are refused.
"""

import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

# The C unpickler's opcodes cannot be replaced. The `dispatch` table of this class has kept its form from Python 3.10
# to 3.14.
_Machine: Any = pickle._Unpickler
LARGEST_INT_KEY = (1 << 61) - 1
"""Integers up to this one hash to themselves. Of larger ones, any number can share one hash, which makes dicts slow."""
MOST_PARTS_OF_KEYS = 20_000
"""Items in all tuples that are keys together: a bound on the time that hashing and comparing them takes."""
MOST_OPCODES = 16_000_000
"""Of a whole pickle. A tensor of a model takes 42: that of 100 000 tensors has 4.2 million."""
MOST_OBJECTS = 4_000_000
"""Containers, calls and references that a pickle may make; each takes up to 240 bytes of memory, for a byte or two of
the file. A tensor of a model takes 23: that of 100 000 tensors has 2.3 million."""
WRITTEN = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.DUP),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
    *(pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8),
    *(pickle.BINSTRING, pickle.SHORT_BINSTRING, pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.EMPTY_LIST, pickle.LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.DICT),
    *(pickle.SETITEM, pickle.SETITEMS, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.BINPERSID),
    *(pickle.REDUCE, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.BUILD),
)
"""Opcodes of protocols 2 to 5, without extension codes, out-of-band buffers and integers of more than 255 bytes."""
MAKE_OBJECTS = frozenset(
    (
        *(pickle.MARK, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
        *(pickle.EMPTY_LIST, pickle.LIST, pickle.EMPTY_DICT, pickle.DICT, pickle.EMPTY_SET, pickle.FROZENSET),
        *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINPERSID),
        *(pickle.REDUCE, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.SETITEM),
    )
)
"""Opcodes that count against `MOST_OBJECTS`."""


class TooLarge(Exception):
    """A pickle needs more memory than that of any checkpoint; the message is the end of a sentence about it."""


class InertMachine(_Machine):  # type: ignore[misc]
    """Runs a pickle. Subclasses define the values of its names, calls and persistent ids.

    `load` raises pickle.UnpicklingError if the pickle asks for something that `torch.save` does not write, and any
    error of the standard library if it is malformed.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {}

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.parts_of_keys = 0

    def load(self) -> Any:
        """Runs the pickle and returns its object. The loop of the standard library, with a count of opcodes."""
        self._unframer = unframer = pickle._Unframer(self._file_read, self._file_readline)  # type: ignore[attr-defined]
        self.read, self.readinto, self.readline = unframer.read, unframer.readinto, unframer.readline
        self.metastack: list[Any] = []
        self.stack: list[Any] = []
        self.append, self.proto = self.stack.append, 0
        read, dispatch, objects = self.read, self.dispatch, 0
        try:
            for _ in range(MOST_OPCODES):
                code = read(1)
                if not code:
                    raise EOFError("it ends before its STOP")
                if code in MAKE_OBJECTS:
                    objects += 1
                    if objects > MOST_OBJECTS:
                        raise TooLarge(f"makes more than {MOST_OBJECTS:,} objects")
                dispatch[code[0]](self)
        except pickle._Stop as stop:  # type: ignore[attr-defined]
            return stop.value
        raise TooLarge(f"has more than {MOST_OPCODES:,} opcodes")

    def make(self, callee: Any, args: Any, *, is_new: bool) -> Any:
        """Returns the value of a call in the pickle.

        Args:
            callee: the object that the pickle calls.
            args: the arguments; anything, if the pickle is malformed.
            is_new: whether the `__new__` of `callee` is called (opcode NEWOBJ).
        """
        raise NotImplementedError

    def set_state(self, target: Any, state: Any) -> None:
        """Gives `target` its state (opcode BUILD)."""
        raise NotImplementedError

    def require_keys(self, keys: Iterable[Any]) -> None:
        """Raises UnpicklingError for keys that are costly to hash or to compare."""
        for key in keys:
            if type(key) is int and abs(key) > LARGEST_INT_KEY:
                raise pickle.UnpicklingError("it has a key of more than 61 bits")
            if isinstance(key, tuple | frozenset):
                self.parts_of_keys += 1 + len(key)
                if self.parts_of_keys > MOST_PARTS_OF_KEYS:
                    raise pickle.UnpicklingError(f"its keys have more than {MOST_PARTS_OF_KEYS} parts")
                self.require_keys(key)

    def _load_refused(self) -> None:
        raise pickle.UnpicklingError("it has an opcode that torch.save does not write")

    def _load_setitems(self) -> None:
        items, target = self.pop_mark(), self.stack[-1]
        self.require_keys(items[::2])
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key] = value

    def _load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.require_keys([key])
        self.stack[-1][key] = value

    def _load_dict(self) -> None:
        items = self.pop_mark()
        self.require_keys(items[::2])
        self.append(dict(zip(items[::2], items[1::2], strict=True)))

    def _load_additems(self) -> None:
        items, target = self.pop_mark(), self.stack[-1]
        self.require_keys(items)
        for item in items:
            target.add(item)

    def _load_frozenset(self) -> None:
        items = self.pop_mark()
        self.require_keys(items)
        self.append(frozenset(items))

    def _load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.make(self.stack[-1], args, is_new=False)

    def _load_newobj(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.make(self.stack[-1], args, is_new=True)

    def _load_newobj_ex(self) -> None:
        if self.stack.pop():
            raise pickle.UnpicklingError("it makes an object with named arguments")
        self._load_newobj()

    def _load_build(self) -> None:
        state = self.stack.pop()
        self.set_state(self.stack[-1], state)

    dispatch.update(dict.fromkeys(range(256), _load_refused))
    dispatch.update({code[0]: _Machine.dispatch[code[0]] for code in WRITTEN})
    dispatch[pickle.SETITEMS[0]] = _load_setitems
    dispatch[pickle.SETITEM[0]] = _load_setitem
    dispatch[pickle.DICT[0]] = _load_dict
    dispatch[pickle.ADDITEMS[0]] = _load_additems
    dispatch[pickle.FROZENSET[0]] = _load_frozenset
    dispatch[pickle.REDUCE[0]] = _load_reduce
    dispatch[pickle.NEWOBJ[0]] = _load_newobj
    dispatch[pickle.NEWOBJ_EX[0]] = _load_newobj_ex
    dispatch[pickle.BUILD[0]] = _load_build
