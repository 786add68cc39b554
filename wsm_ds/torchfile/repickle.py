"""Writes an unpickled tree as a pickle again, naming the same globals, without importing any of them.

Used only where an output's metadata must differ from the newest checkpoint's (moments left out, another form). The
standard library's Python pickler does the work; only names, stand-ins and tensor addresses are ours.
"""

import io
import pickle
from collections.abc import Callable
from types import FunctionType
from typing import Any, ClassVar

from wsm_ds.errors import UnsupportedLayout
from wsm_ds.torchfile.unpickle import STRUCTURAL_GLOBALS, Global, InertMeta, Storage, Stub, Tensor, TorchSize

_Writer: Any = pickle._Pickler  # the C pickler insists on importing what it names


class _Repickler(_Writer):  # type: ignore[misc]
    dispatch: ClassVar[dict[type, Callable[..., None]]] = dict(_Writer.dispatch)

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.storages: dict[Storage, str] = {}

    def persistent_id(self, obj: Any) -> Any:
        """Storages are written by reference and numbered as they are met, as torch does."""
        if isinstance(obj, Storage):
            key = self.storages.setdefault(obj, str(len(self.storages)))
            return ("storage", obj.kind, key, obj.location, obj.numel)
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


def repickle(tree: Any) -> tuple[bytes, dict[str, Storage]]:
    """`tree` (from `unpickle`, changed at will) as a protocol-2 pickle for a torch file's `data.pkl`.

    Returns the pickle, and by the new keys the storages that it refers to; the caller places their bytes.

    Raises:
        UnsupportedLayout: it is nested deeper than the interpreter's recursion goes.
    """
    buffer = io.BytesIO()
    pickler = _Repickler(buffer)
    try:
        pickler.dump(tree)
    except RecursionError as error:
        raise UnsupportedLayout("a checkpoint's client state is nested too deeply to be written anew.") from error
    return buffer.getvalue(), {key: storage for storage, key in pickler.storages.items()}
