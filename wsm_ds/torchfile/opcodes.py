"""The pickle machine, reduced to the opcodes that `torch.save` writes. The cost of each is bounded by its own bytes.

The standard library's C unpickler allocates as much memory as a memo index says, hashes tuples of any depth, and lets
BUILD set attributes of any object on its stack, even of our own functions. Here every opcode that does more than put
plain data together is checked. Opcodes that no torch file has (protocol 0's text, extension codes) are refused.

It is written for speed: a stage-3 model file has 50 opcodes a tensor, and a run has as many such files as ranks. The
most frequent opcodes of checkpoints are in one loop, about in the order of their frequency. All others are in a table.
"""

import pickle
import sys
from collections.abc import Iterable
from typing import Any, ClassVar

from wsm_ds.torchfile.opcode_values import CONSTANTS, VALUES, Opcode, uint32, uint64

LARGEST_INT_KEY = (1 << 61) - 1
"""Integers up to this one hash to themselves. Of larger ones, any number can share one hash, which makes dicts slow."""
MOST_PARTS_OF_KEYS = 20_000
"""Items in all tuples that are keys together: a bound on the time that hashing and comparing them takes."""
MOST_OPCODES = 16_000_000
"""Of a whole pickle. A tensor of a model takes 42: that of 100 000 tensors has 4.2 million."""
MOST_OBJECTS = 4_000_000
"""Containers, calls and references that a pickle may make; each takes up to 240 bytes of memory, for a byte or two of
the file. A tensor of a model takes 23: that of 100 000 tensors has 2.3 million."""
LARGEST_MEMO_INDEX = MOST_OBJECTS
"""torch's reader, the C unpickler, allocates twice as many pointers as the largest index. Picklers count up from 0."""
STEP = 4_000
"""Opcodes between two looks at the number of objects."""
LATEST_PROTOCOL = 5
END = b"\0"
"""Stands behind the last byte that may be read. It is no opcode."""
MAKE_OBJECTS = frozenset(
    code[0]
    for code in (
        *(pickle.MARK, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
        *(pickle.EMPTY_LIST, pickle.LIST, pickle.EMPTY_DICT, pickle.DICT, pickle.EMPTY_SET, pickle.FROZENSET),
        *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINPERSID),
        *(pickle.REDUCE, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.SETITEM),
    )
)
"""Opcodes that count against `MOST_OBJECTS`."""
_BINPUT, _LONG_BINPUT = pickle.BINPUT[0], pickle.LONG_BINPUT[0]
_BINGET, _LONG_BINGET = pickle.BINGET[0], pickle.LONG_BINGET[0]
_BININT1, _BINUNICODE = pickle.BININT1[0], pickle.BINUNICODE[0]
_MARK, _TUPLE, _TUPLE1 = pickle.MARK[0], pickle.TUPLE[0], pickle.TUPLE1[0]


class TooLarge(Exception):
    """A pickle needs more memory than that of any checkpoint; the message is the end of a sentence about it."""


class _Stopped(Exception):
    """The machine has reached STOP."""


class InertMachine:
    """Runs a pickle. Subclasses define the values of its names, calls and persistent ids.

    `load` raises pickle.UnpicklingError if the pickle asks for something that `torch.save` does not write, and any
    error of Python if it is malformed.

    An argument that reaches over the end of the data is not noticed at once. But then the position is behind `END`,
    where no opcode can be read, and a position never goes back.

    Attributes:
        data: the bytes that are read now, and `END`: those of the pickle, or of a frame of it.
        stack: the values above the last MARK.
        parts_of_keys: items of the tuples that are keys, so far.
    """

    def __init__(self, data: bytes) -> None:
        self.data = self._whole = data + END
        self.stack: list[Any] = []
        self.parts_of_keys = 0
        self._frame_end: int | None = None  # in `_whole`, while `data` is a frame
        self._position = self._objects = 0
        self._outer_stacks: list[list[Any]] = []  # one for each MARK
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """Runs the pickle and returns its object."""
        has_stopped = False
        for _ in range(MOST_OPCODES // STEP):
            try:
                self._run()
            except _Stopped:
                has_stopped = True
            if self._objects > MOST_OBJECTS:
                raise TooLarge(f"makes more than {MOST_OBJECTS:,} objects")
            if has_stopped:
                return self.stack.pop()
        raise TooLarge(f"has more than {MOST_OPCODES:,} opcodes")

    def _run(self) -> None:
        """Runs `STEP` opcodes. What is in local variables is written back for the opcodes of the table."""
        data, position, stack, outer_stacks = self.data, self._position, self.stack, self._outer_stacks
        memo, objects, table = self._memo, self._objects, self._table
        for _ in range(STEP):
            code = data[position]
            position += 1
            if code == _LONG_BINPUT:
                objects += 1
                index = uint32(data, position)[0]
                memo[index if index <= LARGEST_MEMO_INDEX else _refused_index(index)] = stack[-1]
                position += 4
            elif code == _BININT1:
                stack.append(data[position])
                position += 1
            elif code == _BINPUT:
                objects += 1
                memo[data[position]] = stack[-1]
                position += 1
            elif code == _BINGET:
                stack.append(memo[data[position]])
                position += 1
            elif code == _BINUNICODE:
                start = position + 4
                position = start + uint32(data, position)[0]
                stack.append(data[start:position].decode("utf-8", "surrogatepass"))
            elif code == _TUPLE1:
                objects += 1
                stack[-1] = (stack[-1],)
            elif code in CONSTANTS:
                stack.append(CONSTANTS[code])
            elif code == _LONG_BINGET:
                stack.append(memo[uint32(data, position)[0]])
                position += 4
            elif code == _MARK:
                objects += 1
                outer_stacks.append(stack)
                stack = []
            elif code == _TUPLE:
                objects += 1
                items, stack = tuple(stack), outer_stacks.pop()
                stack.append(items)
            else:
                self.stack, self._objects = stack, objects + (code in MAKE_OBJECTS)
                position = table[code](self, position)
                stack, data, objects = self.stack, self.data, self._objects
        self._position, self.stack, self._objects = position, stack, objects

    def pop_mark(self) -> list[Any]:
        """Returns what lies on the stack above the last MARK."""
        items, self.stack = self.stack, self._outer_stacks.pop()
        return items

    def find_class(self, module: str, name: str) -> Any:
        """Returns the value of a name in the pickle."""
        raise NotImplementedError

    def persistent_load(self, pid: Any) -> Any:
        """Returns the value of a persistent id: anything, if the pickle is malformed."""
        raise NotImplementedError

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
            if type(key) is str:
                continue
            if type(key) is int and abs(key) > LARGEST_INT_KEY:
                raise pickle.UnpicklingError("it has a key of more than 61 bits")
            if isinstance(key, (tuple, frozenset)):
                self.parts_of_keys += 1 + len(key)
                if self.parts_of_keys > MOST_PARTS_OF_KEYS:
                    raise pickle.UnpicklingError(f"its keys have more than {MOST_PARTS_OF_KEYS} parts")
                self.require_keys(key)

    # The opcodes of the table: each takes the position of its argument, and returns the position behind it.

    def _refuse(self, _: int) -> int:
        raise pickle.UnpicklingError("it has an opcode that torch.save does not write")

    def _stop(self, _: int) -> int:
        raise _Stopped

    def _end(self, position: int) -> int:
        """At `END`, goes on behind the frame that ends there."""
        if position != len(self.data):
            return self._refuse(position)
        if self._frame_end is None:
            raise EOFError("it ends before its STOP")
        self.data, position, self._frame_end = self._whole, self._frame_end, None
        return position

    def _frame(self, position: int) -> int:
        """Reads only the frame until it ends. The last one may be shorter than it says: nothing is allocated for it."""
        nbytes, start = uint64(self.data, position)[0], position + 8
        if nbytes > sys.maxsize:
            raise pickle.UnpicklingError(f"it has a frame of {nbytes:,} bytes")
        if self._frame_end is not None:
            if start != len(self.data) - len(END):
                raise pickle.UnpicklingError("it has a frame in a frame")
            start = self._frame_end
        self._frame_end = max(start, min(start + nbytes, len(self._whole) - len(END)))
        self.data = self._whole[start : self._frame_end] + END
        return 0

    def _proto(self, position: int) -> int:
        if self.data[position] > LATEST_PROTOCOL:
            raise pickle.UnpicklingError(f"it has protocol {self.data[position]}, which no pickler writes")
        return position + 1

    def _pop(self, position: int) -> int:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()
        return position

    def _pop_to_mark(self, position: int) -> int:
        self.pop_mark()
        return position

    def _dup(self, position: int) -> int:
        self.stack.append(self.stack[-1])
        return position

    def _tuple2(self, position: int) -> int:
        last = self.stack.pop()
        self.stack[-1] = (self.stack[-1], last)
        return position

    def _tuple3(self, position: int) -> int:
        last, middle = self.stack.pop(), self.stack.pop()
        self.stack[-1] = (self.stack[-1], middle, last)
        return position

    def _list(self, position: int) -> int:
        items = self.pop_mark()
        self.stack.append(items)
        return position

    def _append(self, position: int) -> int:
        item = self.stack.pop()
        self.stack[-1].append(item)
        return position

    def _appends(self, position: int) -> int:
        items = self.pop_mark()
        self.stack[-1].extend(items)
        return position

    def _dict(self, position: int) -> int:
        items = self.pop_mark()
        self.require_keys(items[::2])
        self.stack.append(dict(zip(items[::2], items[1::2], strict=True)))
        return position

    def _setitem(self, position: int) -> int:
        value, key = self.stack.pop(), self.stack.pop()
        self.require_keys([key])
        self.stack[-1][key] = value
        return position

    def _setitems(self, position: int) -> int:
        items = self.pop_mark()
        target = self.stack[-1]
        self.require_keys(items[::2])
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key] = value
        return position

    def _additems(self, position: int) -> int:
        items = self.pop_mark()
        add = self.stack[-1].add
        self.require_keys(items)
        for item in items:
            add(item)
        return position

    def _frozenset(self, position: int) -> int:
        items = self.pop_mark()
        self.require_keys(items)
        self.stack.append(frozenset(items))
        return position

    def _memoize(self, position: int) -> int:
        self._memo[len(self._memo)] = self.stack[-1]
        return position

    def _global(self, position: int) -> int:
        module_end = self.data.index(b"\n", position)
        name_end = self.data.index(b"\n", module_end + 1)
        module, name = self.data[position:module_end].decode(), self.data[module_end + 1 : name_end].decode()
        self.stack.append(self.find_class(module, name))
        return name_end + 1

    def _stack_global(self, position: int) -> int:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise pickle.UnpicklingError("it names a global by something that is no text")
        self.stack.append(self.find_class(module, name))
        return position

    def _binpersid(self, position: int) -> int:
        self.stack[-1] = self.persistent_load(self.stack[-1])
        return position

    def _reduce(self, position: int) -> int:
        args = self.stack.pop()
        self.stack[-1] = self.make(self.stack[-1], args, is_new=False)
        return position

    def _newobj(self, position: int) -> int:
        args = self.stack.pop()
        self.stack[-1] = self.make(self.stack[-1], args, is_new=True)
        return position

    def _newobj_ex(self, position: int) -> int:
        if self.stack.pop():
            raise pickle.UnpicklingError("it makes an object with named arguments")
        return self._newobj(position)

    def _build(self, position: int) -> int:
        state = self.stack.pop()
        self.set_state(self.stack[-1], state)
        return position

    _table: ClassVar[dict[int, Opcode]] = {
        **dict.fromkeys(range(256), _refuse),
        **VALUES,
        END[0]: _end,
        pickle.STOP[0]: _stop,
        pickle.FRAME[0]: _frame,
        pickle.PROTO[0]: _proto,
        pickle.POP[0]: _pop,
        pickle.POP_MARK[0]: _pop_to_mark,
        pickle.DUP[0]: _dup,
        pickle.TUPLE2[0]: _tuple2,
        pickle.TUPLE3[0]: _tuple3,
        pickle.LIST[0]: _list,
        pickle.APPEND[0]: _append,
        pickle.APPENDS[0]: _appends,
        pickle.DICT[0]: _dict,
        pickle.SETITEM[0]: _setitem,
        pickle.SETITEMS[0]: _setitems,
        pickle.ADDITEMS[0]: _additems,
        pickle.FROZENSET[0]: _frozenset,
        pickle.MEMOIZE[0]: _memoize,
        pickle.GLOBAL[0]: _global,
        pickle.STACK_GLOBAL[0]: _stack_global,
        pickle.BINPERSID[0]: _binpersid,
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _newobj,
        pickle.NEWOBJ_EX[0]: _newobj_ex,
        pickle.BUILD[0]: _build,
    }


def _refused_index(index: int) -> int:
    raise pickle.UnpicklingError(f"it has a memo index of {index:,}, which torch's reader has no memory for")
