"""Stand-ins for what a pickle names and calls: data that remembers the names and the arguments."""

import pickle
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Global:
    """The name of a class or a function in a pickle. It is not imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Stub:
    """The object that a call of a `Global` would have made.

    Attributes:
        callee: the class or function that was called.
        args: its arguments.
        state: the state of the object (opcode BUILD: for `__setstate__`, or its `__dict__`).
        items: the items that were appended to it.
        entries: the keys and values that were set in it.
        is_new: whether the class's `__new__` was called (opcode NEWOBJ), not the class (REDUCE).
    """

    callee: Global
    args: tuple[Any, ...]
    state: Any = None
    items: list[Any] = field(default_factory=list)
    entries: list[tuple[Any, Any]] = field(default_factory=list)
    is_new: bool = False

    def append(self, item: Any) -> None:
        """Records the item of an APPEND."""
        self.items.append(item)

    def extend(self, items: Any) -> None:
        """Records the items of an APPENDS."""
        self.items.extend(items)

    def add(self, item: Any) -> None:
        """Records an item of an ADDITEMS."""
        self.items.append(item)

    def __setitem__(self, key: Any, value: Any) -> None:
        require_no_method([key], ())
        self.entries.append((key, value))


class InertMeta(type):
    """Tells REDUCE (a call of the class) from NEWOBJ (a call of its `__new__`)."""

    global_: Global

    def __call__(cls, *args: Any) -> Any:
        """Records a call of the class."""
        return Stub(cls.global_, args)


class _Inert(metaclass=InertMeta):
    """Base of the stand-in classes: pickle's NEWOBJ wants a class, REDUCE a callable, and this is both."""

    global_: Global

    def __new__(cls, *args: Any) -> Any:
        return Stub(cls.global_, args, is_new=True)


def inert_class(module: str, name: str) -> InertMeta:
    """Returns the stand-in of a class or a function."""
    return InertMeta(name, (_Inert,), {"global_": Global(module, name)})


def require_no_method(keys: Iterable[Any], methods: Iterable[str]) -> None:
    """Raises UnpicklingError for an attribute that takes the place of a method when the pickle is loaded."""
    if not {"__setstate__", "__reduce__", "__reduce_ex__", "__class__", *methods}.isdisjoint(_texts(keys)):
        raise pickle.UnpicklingError("it gives an object a method")


def _texts(keys: Iterable[Any]) -> Iterable[str]:
    return (key for key in keys if type(key) is str)
