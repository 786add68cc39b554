"""Opcodes that put one value on the stack, and need nothing but their own bytes for it."""

import pickle
import struct
from collections.abc import Callable
from typing import Any, Protocol

uint16 = struct.Struct("<H").unpack_from
uint32 = struct.Struct("<I").unpack_from
uint64 = struct.Struct("<Q").unpack_from
_int32 = struct.Struct("<i").unpack_from
_float64 = struct.Struct(">d").unpack_from


class Machine(Protocol):
    """What these opcodes use of a pickle machine.

    Attributes:
        data: the bytes that are read now: those of the pickle, or of a frame of it.
        stack: the values above the last MARK.
    """

    data: bytes
    stack: list[Any]


Opcode = Callable[[Any, int], int]
"""Runs an opcode: takes the machine and the position of the argument, and returns the position behind the argument."""
Unpack = Callable[[bytes, int], tuple[Any, ...]]


def _uint8(data: bytes, position: int) -> tuple[int]:
    return (data[position],)


def _empty(container: Callable[[], Any]) -> Opcode:
    def run(machine: Machine, position: int) -> int:
        machine.stack.append(container())
        return position

    return run


def _number(unpack: Unpack, nbytes: int) -> Opcode:
    def run(machine: Machine, position: int) -> int:
        machine.stack.append(unpack(machine.data, position)[0])
        return position + nbytes

    return run


def _sized(unpack: Unpack, nbytes: int, decode: Callable[[bytes], Any]) -> Opcode:
    """A value behind its length, which has `nbytes`."""

    def run(machine: Machine, position: int) -> int:
        (length,) = unpack(machine.data, position)
        if length < 0:
            raise pickle.UnpicklingError(f"it has a text of {length:,} bytes")
        start = position + nbytes
        machine.stack.append(decode(machine.data[start : start + length]))
        return start + int(length)

    return run


def _integer(encoded: bytes) -> int:
    return int.from_bytes(encoded, "little", signed=True)


def _text(encoded: bytes) -> str:
    return encoded.decode("utf-8", "surrogatepass")


CONSTANTS = {pickle.EMPTY_TUPLE[0]: (), pickle.NEWFALSE[0]: False, pickle.NEWTRUE[0]: True, pickle.NONE[0]: None}
"""The values of opcodes that stand for one."""
VALUES: dict[int, Opcode] = {
    pickle.EMPTY_LIST[0]: _empty(list),
    pickle.EMPTY_DICT[0]: _empty(dict),
    pickle.EMPTY_SET[0]: _empty(set),
    pickle.BININT[0]: _number(_int32, 4),
    pickle.BININT2[0]: _number(uint16, 2),
    pickle.BINFLOAT[0]: _number(_float64, 8),
    pickle.LONG1[0]: _sized(_uint8, 1, _integer),
    pickle.SHORT_BINUNICODE[0]: _sized(_uint8, 1, _text),
    pickle.BINUNICODE8[0]: _sized(uint64, 8, _text),
    pickle.SHORT_BINSTRING[0]: _sized(_uint8, 1, bytes.decode),
    pickle.BINSTRING[0]: _sized(_int32, 4, bytes.decode),
    pickle.SHORT_BINBYTES[0]: _sized(_uint8, 1, bytes),
    pickle.BINBYTES[0]: _sized(uint32, 4, bytes),
    pickle.BINBYTES8[0]: _sized(uint64, 8, bytes),
}
"""BININT1 and BINUNICODE are in the loop of `opcodes`."""
