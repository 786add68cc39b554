"""Writes an unpickled tree as a pickle again, naming the same globals, without importing any of them.

Used only where an output's metadata must differ from the newest checkpoint's (moments left out). The
standard library's Python pickler does the work; only names, stand-ins and tensor addresses are ours.
"""

import io
import pickle
from collections.abc import Callable
from types import FunctionType
from typing import Any, ClassVar

from wsm_ds.torchfile.unpickle import STRUCTURAL_GLOBALS, Global, InertMeta, Storage, Stub, Tensor, TorchSize

_Writer: Any = pickle._Pickler  # the C pickler insists on importing what it names


class _Repickler(_Writer):  # type: ignore[misc]
    dispatch: ClassVar[dict[type, Callable[..., None]]] = dict(_Writer.dispatch)

    def persistent_id(self, obj: Any) -> Any:
        """Storages are written by reference, as torch does."""
        if isinstance(obj, Storage):
            return ("storage", obj.kind, obj.key, obj.location, obj.numel)
        return None

    def save_global_name(self, value: Global) -> None:
        self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())

    def save_inert_class(self, cls: Any) -> None:
        self.save_global_name(cls.global_)
        self.memoize(cls)

    def save_function(self, function: Any) -> None:
        self.save_global_name(STRUCTURAL_GLOBALS[function])
        self.memoize(function)

    def save_size(self, size: TorchSize) -> None:
        self.save_global_name(Global("torch", "Size"))
        self.save((tuple(size),))
        self.write(pickle.REDUCE)
        self.memoize(size)

    def save_tensor(self, tensor: Tensor) -> None:
        self._save_call(tensor.made_by)
        self.memoize(tensor)

    def save_stub(self, stub: Stub) -> None:
        self._save_call(stub)
        self.memoize(stub)
        if stub.items:
            self._batch_appends(stub.items)
        if stub.entries:
            self._batch_setitems(iter(stub.entries))
        if stub.state is not None:
            self.save(stub.state)
            self.write(pickle.BUILD)

    def _save_call(self, stub: Stub) -> None:
        self.save_global_name(stub.made_by)
        self.save(stub.args)
        self.write(pickle.NEWOBJ if stub.is_new else pickle.REDUCE)

    dispatch[Global] = save_global_name
    dispatch[InertMeta] = save_inert_class
    dispatch[FunctionType] = save_function
    dispatch[TorchSize] = save_size
    dispatch[Tensor] = save_tensor
    dispatch[Stub] = save_stub


def repickle(tree: Any) -> bytes:
    """`tree` (from `unpickle`, changed at will) as a protocol-2 pickle for a torch file's `data.pkl`."""
    buffer = io.BytesIO()
    _Repickler(buffer, protocol=2).dump(tree)
    return buffer.getvalue()


def storages(tree: Any) -> list[Storage]:
    """The storages that `tree` refers to, each once, in the order in which a pickler meets them."""
    found: dict[str, Storage] = {}

    class _Collector(_Repickler):
        def persistent_id(self, obj: Any) -> Any:
            """Notes the storage on the way."""
            if isinstance(obj, Storage):
                found.setdefault(obj.key, obj)
            return super().persistent_id(obj)

    _Collector(io.BytesIO(), protocol=2).dump(tree)
    return list(found.values())
