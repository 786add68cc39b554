"""Reads the pickle of a torch file into plain data and inert stand-ins. No class that it names is imported.

A pickle is a program: it may name any callable and call it. Here every name becomes a `Global` (data), every call of
one becomes a `Stub` (data), and every tensor becomes a `Tensor` address. Names that are not in `known_globals` are
refused: whoever loads an output with torch runs the pickle that was copied into it.
"""

import collections
import math
import pickle
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from wsm_ds.dtypes import BY_TORCH_NAME, DType
from wsm_ds.errors import BrokenCheckpoint, UnsafePickle, UnsupportedLayout, WsmError, few
from wsm_ds.torchfile.archive import Archive, Record
from wsm_ds.torchfile.known_globals import CALLED, CHECKED, ENUMS, GETATTR, KNOWN, MADE, TENSOR_FUNCTIONS
from wsm_ds.torchfile.opcodes import InertMachine, TooLarge
from wsm_ds.torchfile.stand_ins import Global, InertMeta, Stub, inert_class, require_no_method
from wsm_ds.torchfile.strides import run_count

STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
    "QInt8Storage": "int8",
    "QUInt8Storage": "uint8",
    "QInt32Storage": "int32",
}


@dataclass(frozen=True)
class Storage:
    """The bytes of one or more tensors: a record of a torch file.

    Attributes:
        key: the record is called `data/{key}`.
        dtype: of its elements.
        storage_class: torch's class of the storage.
        location: device that it was saved from ("cpu", "cuda:0").
        numel: how many elements it has.
        file: path of the torch file. Empty for a placeholder, in a tree that is to be written: its elements are not
            known yet.
        copy: other than 0 for a second record with the same bytes, in a tree that is to be written.
    """

    key: str
    dtype: DType
    storage_class: Global
    location: str
    numel: int
    file: str = ""
    copy: int = 0

    @property
    def nbytes(self) -> int:
        """Size of the record."""
        return self.numel * self.dtype.itemsize


@dataclass(eq=False)
class Tensor:
    """A tensor's address: a strided view of a storage. It holds no data.

    Attributes:
        storage: the storage that holds the elements.
        offset: of the first element in the storage, in elements.
        shape: sizes.
        stride: in elements.
        call: the call that made the tensor, for `repickle`.
        dtype_override: the dtype, if it is not the storage's.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    call: Stub
    dtype_override: DType | None = None

    @property
    def dtype(self) -> DType:
        """Dtype of the elements."""
        return self.dtype_override or self.storage.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in row-major order without gaps."""
        return 0 in self.shape or run_count(self.shape, self.stride) == 1


class TorchSize(tuple):  # type: ignore[type-arg]
    """`torch.Size`: a tuple that is written back under its own name."""

    def __new__(cls, sizes: Any = ()) -> "TorchSize":
        """Checks that `sizes` may be a tensor's shape; the pickle may pass anything."""
        return super().__new__(cls, _sizes(sizes))


def _sizes(values: Any) -> tuple[int, ...]:
    """A tensor's shape or stride."""
    if not isinstance(values, (tuple, list)) or len(values) > MOST_DIMENSIONS:
        raise pickle.UnpicklingError("a shape or a stride is not a short row of numbers")
    for value in values:
        if type(value) is not int or not 0 <= value <= MOST_ELEMENTS:
            raise pickle.UnpicklingError("a shape or a stride is not made of whole numbers that may be sizes")
    return tuple(values)


MOST_DIMENSIONS = 64
MOST_ELEMENTS = 1 << 58
"""Most elements of one tensor: their bytes can be counted in 64 bits."""
MOST_GLOBALS = 10_000
_NEVER_PASSED = frozenset((*CHECKED, *GETATTR))
SHOWN_GLOBALS = 40
"""Names that an error lists, at most."""


class _InertUnpickler(InertMachine):
    """Attributes: `unknown` has the names that are neither known nor allowed, in the order of the pickle."""

    def __init__(self, data: bytes, archive: Archive, allowed: frozenset[str]) -> None:
        super().__init__(data)
        self.archive, self.path, self.allowed = archive, str(archive.path), allowed
        self.record_bytes = dict(zip(archive.directory.names, archive.directory.nbytes.tolist(), strict=True))
        self.classes: dict[str, InertMeta] = {}
        self.unknown: dict[str, None] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Returns our own function for a structural name and an inert class for any other; imports nothing."""
        full = f"{module}.{name}"
        if full in _STRUCTURAL:
            return _STRUCTURAL[full]
        if not all(part.isidentifier() for part in full.split(".")):  # `repickle` writes it as a line of text
            raise pickle.UnpicklingError("it names a global that is not a Python name")
        # `KNOWN` has ZoneInfo._unpickle, which protocol 2 reaches by `getattr`. As one name, protocol 4 could make a
        # path from any module to any other: torch, "os.system".
        if full not in self.allowed and (full not in KNOWN or "." in name):
            self.unknown[full] = None
        return self._inert(module, name)

    def _inert(self, module: str, name: str) -> "InertMeta":
        full = f"{module}.{name}"
        if full not in self.classes and len(self.classes) >= MOST_GLOBALS:
            raise pickle.UnpicklingError(f"it names more than {MOST_GLOBALS} globals")
        return self.classes.setdefault(full, inert_class(module, name))

    def _attribute(self, args: tuple[Any, ...], call: Stub) -> Any:
        """What `getattr(class, name)` means: a class in a class, a method, or (`call` itself) a member of an enum."""
        if len(args) != 2 or not isinstance(args[0], InertMeta) or type(args[1]) is not str:
            raise pickle.UnpicklingError("it takes an attribute of something that is no class")
        owner, name = args[0].global_, args[1]
        full = f"{owner}.{name}"
        if (full in CALLED or full in self.allowed) and name.isidentifier():
            return self._inert(owner.module, f"{owner.name}.{name}")
        is_enum = str(owner) in ENUMS or str(owner) in self.allowed
        if not is_enum or name.startswith("_") or not name.isidentifier():
            self.unknown[full] = None
        return call

    def persistent_load(self, pid: Any) -> Storage:
        """Returns the storage that a reference ('storage', type, key, location, numel) means."""
        if not isinstance(pid, tuple) or len(pid) != 5:
            raise pickle.UnpicklingError("a persistent id is not a storage")
        tag, storage_class, key, location, numel = pid
        name = storage_class.global_.name if isinstance(storage_class, InertMeta) else ""
        if not (type(tag) is type(key) is type(location) is str and tag == "storage" and name in STORAGES):
            raise pickle.UnpicklingError("a persistent id is not a storage that torch writes")
        if type(numel) is not int or not 0 <= numel <= MOST_ELEMENTS:
            raise pickle.UnpicklingError(f"storage {key} does not say how many elements it has")
        dtype = BY_TORCH_NAME[STORAGES[name]]
        storage = Storage(key, dtype, storage_class.global_, location, numel, self.path)
        if self.record_bytes.get(f"data/{key}") != storage.nbytes:
            record_of(self.archive, storage)  # says what is wrong
        return storage

    def make(self, callee: Any, args: Any, *, is_new: bool) -> Any:
        """Returns a `Stub` for an inert class; call our own function of a structural name."""
        if not isinstance(args, tuple):
            raise pickle.UnpicklingError("a call has no tuple of arguments")
        for arg in args:
            if type(arg) is InertMeta and str(arg.global_) in _NEVER_PASSED:
                raise pickle.UnpicklingError("it passes a function to another one")
        if isinstance(callee, InertMeta):
            return self._made(callee.global_, args, is_new=is_new)
        if isinstance(callee, Stub) and str(callee.callee) in GETATTR and len(callee.args) == 2:
            name = f"{as_global(callee.args[0])}.{callee.args[1]}"
            if name not in self.allowed:  # not a member of an enum, but a class in a class, or a method
                self.unknown[name] = None
            return Stub(callee.callee, args)
        if as_global(callee) is None or (is_new and not isinstance(callee, type)):
            raise pickle.UnpicklingError("it calls an object that is not a global")
        # `torch.save` makes an empty one and fills it by SETITEMS. Arguments could hold keys that nobody has checked.
        if callee is collections.OrderedDict and args:
            raise pickle.UnpicklingError("an OrderedDict is not filled in the way that torch does")
        return callee(*args)

    def _made(self, name: Global, args: tuple[Any, ...], *, is_new: bool) -> Any:
        full, made = str(name), Stub(name, args, is_new=is_new)
        if full in GETATTR and full not in self.unknown:
            return self._attribute(args, made)
        if full in self.allowed or full in self.unknown:
            return made
        is_plain = full in CALLED or (is_new and full in MADE)
        if not (CHECKED[full](args) if full in CHECKED else is_plain):
            raise pickle.UnpicklingError(f"it calls {full} in a way in which no checkpoint does")
        return made

    def set_state(self, target: Any, state: Any) -> None:
        """Records an object's state as data. A state dict's `OrderedDict` gets its attributes (`_metadata`)."""
        # A second state would go to the `__setstate__` that the first one can have put into the object.
        if isinstance(target, Stub) and target.state is None:
            for part in state if isinstance(state, tuple) else (state,):
                if isinstance(part, dict):
                    require_no_method(part, ())
            target.state = state
        elif isinstance(target, collections.OrderedDict) and isinstance(state, dict) and not vars(target):
            require_no_method(state, dir(collections.OrderedDict))
            vars(target).update(state)
        else:
            raise pickle.UnpicklingError("it sets the state of an object that has none")


def _rebuild_tensor_v2(storage: Storage, offset: int, shape: Any, stride: Any, *rest: Any) -> Any:
    # Behind requires_grad and the hooks: whether the values are the conjugates or the negatives of what is stored
    # (`torch/_utils.py`, `get_tensor_metadata`).
    if any(rest[2:]):
        return _as_stub("_rebuild_tensor_v2", storage, offset, shape, stride, *rest)
    return _rebuilt(_REBUILD_TENSOR_V2, storage, offset, shape, stride, rest, None)


def _rebuild_tensor_v3(storage: Storage, offset: int, shape: Any, stride: Any, *rest: Any) -> Any:
    # torch uses version 3 for dtypes without a storage class of their own, with the dtype as a further argument
    # (`torch/_tensor.py`, `_reduce_ex_internal`; `torch/storage.py`, `_new_dtypes`).
    dtype_name = as_global(rest[2]) if len(rest) > 2 else None
    if any(rest[3:]) or (dtype_name is not None and dtype_name.name not in BY_TORCH_NAME):
        return _as_stub("_rebuild_tensor_v3", storage, offset, shape, stride, *rest)
    dtype = BY_TORCH_NAME[dtype_name.name] if dtype_name else None
    return _rebuilt(_REBUILD_TENSOR_V3, storage, offset, shape, stride, rest, dtype)


def _as_stub(name: str, *args: Any) -> Stub:
    """A tensor whose values are not simply the stored elements: the call that makes it, as data."""
    return Stub(Global("torch._utils", name), args)


def _rebuilt(
    name: Global, storage: Any, offset: Any, shape: Any, stride: Any, rest: tuple[Any, ...], dtype: DType | None
) -> Tensor:
    shape, stride = _sizes(shape), _sizes(stride)
    if not isinstance(storage, Storage) or len(shape) != len(stride):
        raise pickle.UnpicklingError("a tensor has no storage, or a stride of another length than its shape")
    if type(offset) is not int or not 0 <= offset <= MOST_ELEMENTS or math.prod(shape) > MOST_ELEMENTS:
        raise pickle.UnpicklingError("a tensor's offset or number of elements is beyond any file")
    call = Stub(name, (storage, offset, shape, stride, *rest))
    return Tensor(storage, offset, shape, stride, call, dtype)


def _rebuild_parameter(data: Any, *rest: Any) -> Any:
    if not isinstance(data, Tensor):
        return _as_stub("_rebuild_parameter", data, *rest)
    return _rewrapped("torch._utils", "_rebuild_parameter", data, (data, *rest))


def _rebuild_from_type_v2(function: Any, tensor_class: Any, args: Any, state: Any) -> Any:
    """A tensor with Python attributes (stage 3's `ds_id`): a `Tensor` whose attributes are kept for `repickle`."""
    if not isinstance(args, tuple) or as_global(tensor_class) is None:
        raise pickle.UnpicklingError("a tensor with attributes has no class")
    if function not in (_rebuild_tensor_v2, _rebuild_tensor_v3, _rebuild_parameter):
        name = as_global(function)
        if name is None or str(name) not in TENSOR_FUNCTIONS:
            raise pickle.UnpicklingError("a tensor with attributes is made by a function that makes no tensor")
        return Stub(Global("torch._tensor", "_rebuild_from_type_v2"), (function, tensor_class, args, state))
    inner = function(*args)
    if not isinstance(inner, Tensor):
        return Stub(Global("torch._tensor", "_rebuild_from_type_v2"), (function, tensor_class, args, state))
    return _rewrapped("torch._tensor", "_rebuild_from_type_v2", inner, (function, tensor_class, args, state))


def _rewrapped(module: str, name: str, inner: Tensor, args: tuple[Any, ...]) -> Tensor:
    call = Stub(Global(module, name), args)
    return Tensor(inner.storage, inner.offset, inner.shape, inner.stride, call, inner.dtype_override)


_STRUCTURAL: dict[str, Any] = {
    "collections.OrderedDict": collections.OrderedDict,
    "torch.Size": TorchSize,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type_v2,
}
"""Names with a meaning for the layout. Their stand-ins are harmless functions of this module."""
STRUCTURAL_GLOBALS: dict[Any, Global] = {value: Global(*name.rsplit(".", 1)) for name, value in _STRUCTURAL.items()}
_REBUILD_TENSOR_V2, _REBUILD_TENSOR_V3 = STRUCTURAL_GLOBALS[_rebuild_tensor_v2], STRUCTURAL_GLOBALS[_rebuild_tensor_v3]


def as_global(value: Any) -> Global | None:
    """Returns the global that a value of an unpickled tree stands for; None if it is something else."""
    if isinstance(value, InertMeta):
        return value.global_
    return STRUCTURAL_GLOBALS.get(value) if isinstance(value, (type, FunctionType)) else None


def record_of(archive: Archive, storage: Storage) -> Record:
    """Returns the record that holds a storage.

    Raises:
        BrokenCheckpoint: there is no record, or it is shorter or longer than the storage. torch loads neither
            (`torch/serialization.py`, `load_tensor`).
    """
    record = archive.records.get(f"data/{storage.key}")
    if record is None:
        raise BrokenCheckpoint(
            f"{archive.path}: storage {storage.key} is missing: there is no record data/{storage.key}."
        )
    if storage.nbytes != record.nbytes:
        raise BrokenCheckpoint(
            f"{archive.path}: storage {storage.key} has {record.nbytes} bytes, expected {storage.nbytes} for "
            f"{storage.numel} elements."
        )
    return record


def unpickle(archive: Archive, data: bytes, allowed_globals: frozenset[str] = frozenset()) -> Any:
    """Reads `data.pkl` into an object tree, with `Tensor` addresses for tensors and `Stub`s for foreign objects.

    Args:
        archive: the torch file that `data` is of.
        data: the pickle.
        allowed_globals: names of the user's own classes that the pickle may mention; they are not imported.

    Raises:
        UnsafePickle: it names a global that is not among the known ones; the message names it.
        BrokenCheckpoint: it is not a pickle that torch writes; the message says what is wrong.
    """
    where = str(archive.path)
    machine, tree = _InertUnpickler(data, archive, allowed_globals), None
    fault: WsmError | None = None
    try:
        tree = machine.load()
    except BrokenCheckpoint as error:
        fault = error
    except TooLarge as error:
        fault = UnsupportedLayout(f"{where}: data.pkl {error}: save client state of that size as tensors.")
    except UnsupportedLayout as error:
        fault = UnsupportedLayout(f"{where}: {error}")
    except Exception as error:  # any fault of a malformed pickle is the file's, not ours
        text = f"{type(error).__name__}: {error}"
        fault = BrokenCheckpoint(f"{where}: data.pkl cannot be read ({text[:200]}).")
        fault.__cause__ = error
    if machine.unknown:
        raise UnsafePickle(_unknown_names(where, list(machine.unknown)))
    if fault is not None:
        raise fault
    return tree


def _unknown_names(where: str, names: list[str]) -> str:
    flags = " ".join(f"--allow-global {name}" for name in names[:SHOWN_GLOBALS])
    what, are = ("the global", "is") if len(names) == 1 else ("the globals", "are")
    return (
        f"{where} names {what} {few(names, SHOWN_GLOBALS)}, which {are} not among those that training checkpoints "
        "need. Nothing was imported, and nothing was run. Your own classes can be allowed by name "
        f"({flags}): they are then carried along as data, still without being imported. Whoever loads the output with "
        "weights_only=False imports and calls them."
    )
