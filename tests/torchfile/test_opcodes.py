"""The pickle machine reads what the standard library reads, and means the same. Its bounds are kept."""

from __future__ import annotations

import collections
import io
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from wsm_ds.torchfile import opcodes
from wsm_ds.torchfile.opcode_values import CONSTANTS
from wsm_ds.torchfile.opcodes import InertMachine, TooLarge

GOLDEN = Path(__file__).parent.parent / "golden"
MUTATIONS = 4000
REFUSED = (
    *(b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00", b"I1\n", b"L1L\n", b"F1\n", b"S'a'\n", b"Va\n", b"P1\n"),
    *(b"p0\n", b"g0\n", b"o", b"ibuiltins\nlist\n", b"\x8b\x01\x00\x00\x00\x01", b"\x97", b"\x98"),
    *(b"\x96" + bytes(8), b"\x00", b"\xff"),
)
"""Opcodes that torch.save does not write: extension codes, texts of protocol 0, long integers, bytearrays, buffers."""


class Made:
    """The value of a name, a reference or a call, and what was done to it."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, callee: Any, args: Any, is_new: bool) -> None:
        self.parts: list[Any] = [callee, args, is_new]

    def append(self, item: Any) -> None:
        self.parts.append(("append", item))

    def extend(self, items: Any) -> None:
        self.parts.extend(("append", item) for item in items)

    def add(self, item: Any) -> None:
        self.parts.append(("add", item))

    def __setitem__(self, key: Any, value: Any) -> None:
        self.parts.append(("set", key, value))


class Values:
    """Gives both machines the same values."""

    def find_class(self, module: str, name: str) -> Any:
        return Made(module, name, False)

    def persistent_load(self, pid: Any) -> Any:
        return Made("persistent", pid, False)

    def make(self, callee: Any, args: Any, *, is_new: bool) -> Any:
        if type(args) is not tuple or not isinstance(callee, Made):
            raise pickle.UnpicklingError("not a call")
        return Made(callee, args, is_new)

    def set_state(self, target: Any, state: Any) -> None:
        if not isinstance(target, Made):
            raise pickle.UnpicklingError("no object")
        target.parts.append(("state", state))


class Ours(Values, InertMachine):
    pass


_Reference: Any = pickle._Unpickler


class Theirs(Values, _Reference):
    """The standard library's machine, with opcodes taken away, and the calls replaced."""

    dispatch: ClassVar[dict[int, Any]] = dict(_Reference.dispatch)

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")

    def reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.make(self.stack[-1], args, is_new=False)

    def newobj(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.make(self.stack[-1], args, is_new=True)

    def newobj_ex(self) -> None:
        if self.stack.pop():
            raise pickle.UnpicklingError("named arguments")
        self.newobj()

    def build(self) -> None:
        state = self.stack.pop()
        self.set_state(self.stack[-1], state)

    def refuse(self) -> None:
        raise pickle.UnpicklingError("not written by torch.save")

    dispatch.update(dict.fromkeys((opcode[0] for opcode in REFUSED), refuse))
    dispatch.update({pickle.REDUCE[0]: reduce, pickle.NEWOBJ[0]: newobj, pickle.BUILD[0]: build})
    dispatch[pickle.NEWOBJ_EX[0]] = newobj_ex


def shape_of(value: Any) -> list[Any]:
    """A tree as a flat list: types, values, and which objects are the same one. Equal lists mean equal trees."""
    found: list[Any] = []
    seen: dict[int, int] = {}
    open_values = [value]
    while open_values:
        one = open_values.pop()
        if isinstance(one, int | float | None.__class__):
            found.append((type(one), struct.pack("<d", one) if isinstance(one, float) else one))
        elif id(one) in seen:
            found.append(("again", seen[id(one)]))
        else:
            seen[id(one)] = len(seen)
            if isinstance(one, str | bytes):
                found.append((type(one), one))
                continue
            parts = one.parts if isinstance(one, Made) else list(one)
            if isinstance(one, dict):
                parts += one.values()
            if isinstance(one, set | frozenset):
                parts.sort(key=lambda part: (str(type(part)), repr(part)))
            found.append((type(one), len(parts)))
            open_values.extend(reversed(parts))
    return found


def outcome(machine: Callable[[bytes], Any], data: bytes) -> list[Any] | None:
    """The tree of a pickle; None if it is refused."""
    try:
        return shape_of(machine(data).load())
    except Exception:
        return None


def real_pickles() -> Iterator[bytes]:
    for path in sorted(GOLDEN.rglob("*.pt")):
        with zipfile.ZipFile(path) as archive:
            yield from (archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))


def random_value(chance: random.Random, depth: int = 0) -> Any:
    plain: list[Callable[[], Any]] = [
        lambda: chance.choice(
            [None, True, False, (), "", b"", 0.5, float("nan"), -0.0, "\udcff", "é" * 200, "x" * 300]
        ),
        lambda: chance.choice([1, -1]) * chance.getrandbits(chance.choice([1, 8, 9, 16, 17, 31, 32, 60, 100, 2000])),
        lambda: chance.randbytes(chance.choice([3, 300])),
        lambda: f"layers.{chance.randrange(5)}",
        lambda: chance.choice(["x" * 70_000, b"y" * 70_000]) if chance.random() < 0.05 else 1,  # stands outside a frame
    ]
    if depth == 4:
        return chance.choice(plain)()
    parts = [random_value(chance, depth + 1) for _ in range(chance.choice([0, 1, 1, 2, 3, 4, 5]))]
    parts += parts[:1]  # one object twice
    keys = [chance.choice([f"layers.{n}", n, -n, n / 2, (n, "x"), chance.getrandbits(60)]) for n in range(len(parts))]
    nested: list[Callable[[], Any]] = [
        lambda: parts,
        lambda: tuple(parts[:3]),
        lambda: tuple(parts),
        lambda: dict(zip(keys, parts, strict=True)),
        lambda: set(keys),
        lambda: frozenset(keys),
        lambda: collections.OrderedDict(zip(keys, parts, strict=True)),
        lambda: random.Random(1) if depth < 2 else 1.5,
    ]
    return chance.choice(nested)()


def plain_pickles(count: int) -> Iterator[bytes]:
    chance = random.Random(7)
    for number in range(count):
        yield pickle.dumps([random_value(chance) for _ in range(3)], protocol=2 + number % 4)


def mutated(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 4])):
        at = chance.randrange(len(changed) + 1)
        turn = chance.randrange(5)
        if turn == 0:
            changed = changed[:at] if chance.random() < 0.3 else changed[:at] + changed[at + chance.randrange(1, 9) :]
        elif turn == 1:
            changed[at:at] = bytes([chance.randrange(256) for _ in range(chance.randrange(1, 4))])
        elif turn == 2:
            changed[at:at] = changed[(start := chance.randrange(len(changed) + 1)) : start + chance.randrange(1, 30)]
        elif turn == 3:
            changed[at:at] = chance.choice([b"0", b"1", b"2", b"(", b"t", b"u", b"a", b"e", b"\x95" + bytes(8), b"."])
        elif changed:
            changed[min(at, len(changed) - 1)] ^= 1 << chance.randrange(8)
    return bytes(changed)


def test_real_checkpoints_and_plain_objects_are_read_as_the_standard_library_reads_them() -> None:
    pickles = [*real_pickles(), *plain_pickles(200)]
    assert len(pickles) > 210
    for data in pickles:
        theirs = outcome(Theirs, data)
        assert theirs is not None
        assert outcome(Ours, data) == theirs


def test_a_changed_pickle_is_refused_or_means_what_the_standard_library_says() -> None:
    chance = random.Random(11)
    small = [data for data in (*real_pickles(), *plain_pickles(120)) if len(data) < 8_000]
    accepted = stricter = 0
    for _ in range(MUTATIONS):
        data = mutated(chance.choice(small), chance)
        ours, theirs = outcome(Ours, data), outcome(Theirs, data)
        assert ours is None or ours == theirs, data
        accepted += ours is not None
        stricter += ours is None and theirs is not None
    assert accepted > MUTATIONS // 20
    assert stricter < accepted // 20  # keys of more than 61 bits, and memo indices


@pytest.mark.parametrize("opcode", REFUSED)
def test_an_opcode_that_torch_does_not_write_is_refused(opcode: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError, match=r"an opcode that torch\.save does not write"):
        Ours(b"\x80\x02N" + opcode + b".").load()


def frame(content: bytes, nbytes: int | None = None) -> bytes:
    return pickle.FRAME + struct.pack("<Q", len(content) if nbytes is None else nbytes) + content


FRAMES = {
    "one": (b"\x80\x04" + frame(b"K\x05."), 5),
    "one after another": (b"\x80\x04" + frame(b"K\x05") + frame(b"K\x06\x86"[:2]) + frame(b"\x86."), (5, 6)),
    "a text between two": (b"\x80\x04" + frame(b"K\x05") + b"X\x02\x00\x00\x00hi" + frame(b"\x86."), (5, "hi")),
    "empty ones": (b"\x80\x04" + frame(b"") + frame(b"") + b"N.", None),
    "the next one announced by the last bytes of one": (b"\x80\x04" + frame(b"N" + frame(b"", 2)) + b"\x85.", (None,)),
    "STOP behind it": (b"\x80\x04" + frame(b"K\x05") + b".", 5),
    "the last one is shorter than it says": (b"\x80\x04" + frame(b"K\x05.", 1 << 62), 5),
}
BROKEN = {
    "nothing": b"",
    "no STOP": b"\x80\x02N",
    "no STOP in a frame": b"\x80\x04" + frame(b"N"),
    "STOP of nothing": b"\x80\x02.",
    "STOP above a mark": b"\x80\x02N(.",
    "a frame in a frame": b"\x80\x04" + frame(frame(b"K\x05") + b"."),
    "a number over a frame's end": b"\x80\x04" + frame(b"J\x05\x00") + b"\x00\x00.",
    "a text over a frame's end": b"\x80\x04" + frame(b"X\x03\x00\x00\x00a") + b"bc.",
    "a line over a frame's end": b"\x80\x04" + frame(b"cos\nna") + b"me\n.",
    "a frame of 2^63 bytes": b"\x80\x04" + frame(b"N.", 1 << 63),
    "half of a frame's length": b"\x80\x04\x95\x01\x00",
    "protocol 6": b"\x80\x06N.",
    "a protocol that is not there": b"\x80",
    "no memo": b"\x80\x02h\x05.",
    "no memo of a large index": b"\x80\x02j\x05\x00\x00\x00.",
    "a memo of nothing": b"\x80\x02q\x00N.",
    "a memo of nothing above a mark": b"\x80\x02N(q\x00t.",
    "a reference to nothing": b"\x80\x04\x94N.",
    "a text of -1 bytes": b"\x80\x02T\xff\xff\xff\xff.",
    "a text of Python 2 that is no UTF-8": b"\x80\x02U\x01\xff.",
    "a text that is no UTF-8": b"\x80\x02X\x01\x00\x00\x00\xff.",
    "half of a text": b"\x80\x02X\x05\x00\x00\x00ab",
    "a text that lacks the STOP": b"\x80\x02X\x02\x00\x00\x00a.",
    "half of a number": b"\x80\x02J\x05\x00",
    "a number that lacks the STOP": b"\x80\x02J\x05\x00\x00.",
    "half of a name": b"\x80\x02cos\nname",
    "a name that is no text": b"\x80\x04K\x01K\x02\x93.",
    "tuples of too few": b"\x80\x02N\x86.",
    "a tuple across a mark": b"\x80\x02NN(N\x87.",
    "a tuple without a mark": b"\x80\x02Nt.",
    "a list without a mark": b"\x80\x02]Ne.",
    "two pops over a mark": b"\x80\x02(00N.",
    "a copy of nothing": b"\x80\x022.",
    "an odd number of items": b"\x80\x02}(NNNu.",
    "an odd number of items of a dict": b"\x80\x02(NNNd.",
    "no items for nothing": b"\x80\x04(\x90N.",
    "no items for a list": b"\x80\x04](\x90.",
    "no entries for nothing": b"\x80\x02(uN.",
    "an item of a number": b"\x80\x02K\x01Na.",
    "named arguments": b"\x80\x04cos\nname\n)}X\x01\x00\x00\x00aNs\x92.",
    "a call without arguments": b"\x80\x02R.",
}


@pytest.mark.parametrize("name", FRAMES)
def test_frames_are_read_as_the_standard_library_reads_them(name: str) -> None:
    data, value = FRAMES[name]
    assert Theirs(data).load() == value
    assert Ours(data).load() == value


@pytest.mark.parametrize("name", BROKEN)
def test_a_malformed_pickle_is_refused(name: str) -> None:
    assert outcome(Theirs, BROKEN[name]) is None
    with pytest.raises(Exception, match=r".") as raised:
        Ours(BROKEN[name]).load()
    assert isinstance(
        raised.value, pickle.UnpicklingError | EOFError | LookupError | ValueError | struct.error | AttributeError
    )


def test_a_frame_does_not_make_reading_slow_or_large() -> None:
    count = 200_000
    data = b"\x80\x04N" + frame(b"") * count + b"X" + struct.pack("<I", 10 << 20) + bytes(10 << 20) + b"0."
    assert Ours(data).load() is None


@pytest.mark.parametrize("opcode", [b"(", b"\x94", b"]", b"q\x00", b"\x8f", b"r\x00\x00\x00\x00"])
def test_objects_are_counted_exactly(monkeypatch: pytest.MonkeyPatch, opcode: bytes) -> None:
    monkeypatch.setattr(opcodes, "MOST_OBJECTS", 10)
    assert Ours(b"N" + opcode * 10 + b"N.").load() is None
    with pytest.raises(TooLarge, match="makes more than 10 objects"):
        Ours(b"N" + opcode * 11 + b"N.").load()


def test_opcodes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opcodes, "MOST_OPCODES", 3 * opcodes.STEP)
    assert Ours(b"N" * (3 * opcodes.STEP - 1) + b".").load() is None
    with pytest.raises(TooLarge, match="opcodes"):
        Ours(b"N" * (3 * opcodes.STEP) + b".").load()


@pytest.mark.parametrize("key", [(1 << 61).to_bytes(8, "little"), (-(1 << 61)).to_bytes(8, "little", signed=True)])
@pytest.mark.parametrize("where", [b"}%sNs.", b"}(%sNu.", b"(%sNd.", b"\x8f(%s\x90.", b"(%s\x91.", b"}%s\x85Ns."])
def test_a_key_that_shares_its_hash_is_refused(key: bytes, where: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError, match="61 bits"):
        Ours(b"\x80\x04" + where % (b"\x8a\x08" + key)).load()


def test_a_memo_index_may_be_as_large_as_the_number_of_objects() -> None:
    largest = struct.pack("<I", opcodes.LARGEST_MEMO_INDEX)
    assert Ours(b"\x80\x02K\x07r" + largest + b"j" + largest + b"\x86.").load() == (7, 7)
    with pytest.raises(pickle.UnpicklingError, match="memo index of 4,000,001"):
        Ours(b"\x80\x02Nr" + struct.pack("<I", opcodes.LARGEST_MEMO_INDEX + 1) + b".").load()


def test_every_opcode_of_the_standard_library_is_either_read_or_refused_on_purpose() -> None:
    read = set(_Reference.dispatch) - {opcode[0] for opcode in REFUSED}
    loop = {getattr(opcodes, f"_{name}") for name in ("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "BININT1")}
    loop |= {opcodes._BINUNICODE, opcodes._MARK, opcodes._TUPLE, opcodes._TUPLE1, *CONSTANTS}
    table = {code for code, run in InertMachine._table.items() if run is not InertMachine._refuse} - {opcodes.END[0]}
    assert loop | table == read
    assert loop.isdisjoint(table)
