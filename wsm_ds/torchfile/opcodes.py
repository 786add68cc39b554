"""The pickle machine, cut down to what `torch.save` writes: a step costs no more than the bytes that ask for it.

The C unpickler of the standard library allocates whatever a memo index says, hashes tuples of any depth, and lets BUILD
set attributes of any object on its stack, our own functions among them. Here every opcode that does more than put plain
data together is checked; opcodes that no torch file has (protocol 0's text, extension codes) are refused.
"""

import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

_Machine: Any = pickle._Unpickler
LARGEST_INT_KEY = (1 << 61) - 1
"""Integers hash to themselves below this; beyond, as many as one likes have one hash."""
MOST_PARTS_OF_KEYS = 20_000
"""In all tuples that are keys: hashing and comparing them costs what it says here and no more."""
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
"""Opcodes of protocols 2 to 5, but for extension codes, out-of-band buffers and integers of more than 255 bytes."""


class InertMachine(_Machine):  # type: ignore[misc]
    """Runs a pickle. Subclasses say what its names, calls and persistent ids stand for.

    Raises:
        pickle.UnpicklingError: the pickle asks for something that `torch.save` does not write; and whatever else the
            standard library raises for one that is malformed.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {}

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.parts_of_keys = 0

    def make(self, callee: Any, args: Any, *, is_new: bool) -> Any:
        """What calling `callee` makes; if `is_new`, its `__new__` (NEWOBJ)."""
        raise NotImplementedError

    def put_into(self, target: Any, state: Any) -> None:
        """What BUILD does to `target`."""
        raise NotImplementedError

    def require_keys(self, keys: Iterable[Any]) -> None:
        """Raises UnpicklingError for keys whose hash or comparison is costly."""
        for key in keys:
            if type(key) is int and abs(key) > LARGEST_INT_KEY:
                raise pickle.UnpicklingError("it has a key of more than 61 bits")
            if isinstance(key, tuple | frozenset):
                self.parts_of_keys += 1 + len(key)
                if self.parts_of_keys > MOST_PARTS_OF_KEYS:
                    raise pickle.UnpicklingError(f"its keys have more than {MOST_PARTS_OF_KEYS} parts")
                self.require_keys(key)

    def load_refused(self) -> None:
        raise pickle.UnpicklingError("it has an opcode that torch.save does not write")

    def load_setitems(self) -> None:
        items, target = self.pop_mark(), self.stack[-1]
        self.require_keys(items[::2])
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key] = value

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.require_keys([key])
        self.stack[-1][key] = value

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.require_keys(items[::2])
        self.append(dict(zip(items[::2], items[1::2], strict=True)))

    def load_additems(self) -> None:
        items, target = self.pop_mark(), self.stack[-1]
        self.require_keys(items)
        for item in items:
            target.add(item)

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        self.require_keys(items)
        self.append(frozenset(items))

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.make(self.stack[-1], args, is_new=False)

    def load_newobj(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.make(self.stack[-1], args, is_new=True)

    def load_newobj_ex(self) -> None:
        if self.stack.pop():
            raise pickle.UnpicklingError("it makes an object with named arguments")
        self.load_newobj()

    def load_build(self) -> None:
        state = self.stack.pop()
        self.put_into(self.stack[-1], state)

    dispatch.update(dict.fromkeys(range(256), load_refused))
    dispatch.update({code[0]: _Machine.dispatch[code[0]] for code in WRITTEN})
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.ADDITEMS[0]] = load_additems
    dispatch[pickle.FROZENSET[0]] = load_frozenset
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.BUILD[0]] = load_build
