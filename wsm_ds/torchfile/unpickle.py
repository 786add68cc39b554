"""Reads the pickle of a torch file into plain data and inert stand-ins. No class that it names is imported.

A pickle is a program: it may name any callable and call it. Here every name becomes a `Global` (data), every call of
one becomes a `Stub` (data), and every tensor becomes a `Tensor` address. Names that no training checkpoint needs are
refused, so that a crafted file is noticed instead of being copied into an output.
"""

import collections
import math
import pickle
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

from wsm_ds.dtypes import BY_TORCH_NAME, DType
from wsm_ds.errors import BrokenCheckpoint, UnsafePickle
from wsm_ds.torchfile.archive import Archive
from wsm_ds.torchfile.opcodes import InertMachine
from wsm_ds.torchfile.strides import run_count

KNOWN_MODULES = (
    "torch",
    "deepspeed",
    "megatron",
    "numpy",
    "transformers",
    "accelerate",
    "argparse",
    "collections",
)
"""Top-level packages whose names occur in checkpoints of DeepSpeed, Megatron-DeepSpeed and HF Trainer."""
KNOWN_NAMES = frozenset(
    f"{module}.{name}"
    for module, names in {
        "builtins": (
            "set",
            "frozenset",
            "bytearray",
            "complex",
            "slice",
            "range",
            "list",
            "dict",
            "tuple",
            "object",
        ),
        "__builtin__": ("set", "frozenset", "bytearray", "complex", "slice", "xrange", "object", "long"),
        "copyreg": ("_reconstructor",),
        "copy_reg": ("_reconstructor",),
        "_codecs": ("encode",),
        "datetime": ("datetime", "date", "time", "timedelta", "timezone"),
        "enum": ("Enum", "IntEnum"),
        "fractions": ("Fraction",),
        "decimal": ("Decimal",),
        "pathlib": ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"),
        "types": ("SimpleNamespace",),
        "_io": ("BytesIO",),  # extra states of modules (`get_extra_state`)
    }.items()
    for name in names
)
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
        self.entries.append((key, value))


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
    if not isinstance(values, tuple | list) or len(values) > MOST_DIMENSIONS:
        raise pickle.UnpicklingError("a shape or a stride is not a short row of numbers")
    if any(type(value) is not int or not 0 <= value <= MOST_ELEMENTS for value in values):
        raise pickle.UnpicklingError("a shape or a stride is not made of whole numbers that may be sizes")
    return tuple(values)


MOST_DIMENSIONS = 64
MOST_ELEMENTS = 1 << 58
"""Most elements of one tensor: their bytes can be counted in 64 bits."""
MOST_GLOBALS = 10_000


class _InertUnpickler(InertMachine):
    def __init__(self, data: bytes, where: str, allowed: frozenset[str]) -> None:
        super().__init__(data)
        self.where, self.allowed = where, allowed
        self.classes: dict[str, InertMeta] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Returns our own function for a structural name and an inert class for a known one; import nothing."""
        full = f"{module}.{name}"
        if full in _STRUCTURAL:
            return _STRUCTURAL[full]
        if not all(part.isidentifier() for part in full.split(".")):  # `repickle` writes it as a line of text
            raise pickle.UnpicklingError("it names a global that is not a Python name")
        if module.split(".")[0] in KNOWN_MODULES or full in KNOWN_NAMES or full in self.allowed:
            if full not in self.classes and len(self.classes) >= MOST_GLOBALS:
                raise pickle.UnpicklingError(f"it names more than {MOST_GLOBALS} globals")
            return self.classes.setdefault(full, _inert_class(module, name))
        raise UnsafePickle(
            f"{self.where} names the global {full}, which no training checkpoint needs. It was not imported and "
            f"nothing was run. If the class is your own, allow it by name (--allow-global {full}): it is then "
            "carried along as data, still without being imported."
        )

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
        return Storage(key, BY_TORCH_NAME[STORAGES[name]], storage_class.global_, location, numel, self.where)

    def make(self, callee: Any, args: Any, *, is_new: bool) -> Any:
        """Returns a `Stub` for an inert class; call our own function of a structural name."""
        if not isinstance(args, tuple):
            raise pickle.UnpicklingError("a call has no tuple of arguments")
        if isinstance(callee, InertMeta):
            return Stub(callee.global_, args, is_new=is_new)
        if as_global(callee) is None or (is_new and not isinstance(callee, type)):
            raise pickle.UnpicklingError("it calls an object that is not a global")
        # `torch.save` makes an empty one and fills it by SETITEMS. Arguments could hold keys that nobody has checked.
        if callee is collections.OrderedDict and args:
            raise pickle.UnpicklingError("an OrderedDict is not filled in the way that torch does")
        return callee(*args)

    def set_state(self, target: Any, state: Any) -> None:
        """Records an object's state as data. A state dict's `OrderedDict` gets its attributes (`_metadata`)."""
        if isinstance(target, Stub):
            target.state = state
        elif isinstance(target, collections.OrderedDict) and isinstance(state, dict):
            vars(target).update(state)
        else:
            raise pickle.UnpicklingError("it sets the state of an object that has none")


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


def _inert_class(module: str, name: str) -> InertMeta:
    return InertMeta(name, (_Inert,), {"global_": Global(module, name)})


def _rebuild_tensor_v2(storage: Storage, offset: int, shape: Any, stride: Any, *rest: Any) -> Any:
    # Behind requires_grad and the hooks: whether the values are the conjugates or the negatives of what is stored
    # (`torch/_utils.py`, `get_tensor_metadata`).
    if any(rest[2:]):
        return _as_stub("_rebuild_tensor_v2", storage, offset, shape, stride, *rest)
    return _rebuilt("_rebuild_tensor_v2", storage, offset, shape, stride, rest, None)


def _rebuild_tensor_v3(storage: Storage, offset: int, shape: Any, stride: Any, *rest: Any) -> Any:
    # torch uses version 3 for dtypes without a storage class of their own, with the dtype as a further argument
    # (`torch/_tensor.py`, `_reduce_ex_internal`; `torch/storage.py`, `_new_dtypes`).
    dtype_name = as_global(rest[2]) if len(rest) > 2 else None
    if any(rest[3:]) or (dtype_name is not None and dtype_name.name not in BY_TORCH_NAME):
        return _as_stub("_rebuild_tensor_v3", storage, offset, shape, stride, *rest)
    dtype = BY_TORCH_NAME[dtype_name.name] if dtype_name else None
    return _rebuilt("_rebuild_tensor_v3", storage, offset, shape, stride, rest, dtype)


def _as_stub(name: str, *args: Any) -> Stub:
    """A tensor whose values are not simply the stored elements: the call that makes it, as data."""
    return Stub(Global("torch._utils", name), args)


def _rebuilt(
    name: str, storage: Any, offset: Any, shape: Any, stride: Any, rest: tuple[Any, ...], dtype: DType | None
) -> Tensor:
    shape, stride = _sizes(shape), _sizes(stride)
    if not isinstance(storage, Storage) or len(shape) != len(stride):
        raise pickle.UnpicklingError("a tensor has no storage, or a stride of another length than its shape")
    if type(offset) is not int or not 0 <= offset <= MOST_ELEMENTS or math.prod(shape) > MOST_ELEMENTS:
        raise pickle.UnpicklingError("a tensor's offset or number of elements is beyond any file")
    call = Stub(Global("torch._utils", name), (storage, offset, shape, stride, *rest))
    return Tensor(storage, offset, shape, stride, call, dtype)


def _rebuild_parameter(data: Any, *rest: Any) -> Any:
    if not isinstance(data, Tensor):
        return _as_stub("_rebuild_parameter", data, *rest)
    return _rewrapped("torch._utils", "_rebuild_parameter", data, (data, *rest))


def _rebuild_from_type_v2(function: Any, tensor_class: Any, args: Any, state: Any) -> Any:
    """A tensor with Python attributes (stage 3's `ds_id`): a `Tensor` whose attributes are kept for `repickle`."""
    if function not in (_rebuild_tensor_v2, _rebuild_tensor_v3, _rebuild_parameter) or not isinstance(args, tuple):
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


def as_global(value: Any) -> Global | None:
    """Returns the global that a value of an unpickled tree stands for; None if it is something else."""
    if isinstance(value, InertMeta):
        return value.global_
    return STRUCTURAL_GLOBALS.get(value) if isinstance(value, type | FunctionType) else None


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
    try:
        return _InertUnpickler(data, where, allowed_globals).load()
    except (UnsafePickle, BrokenCheckpoint):
        raise
    except Exception as error:  # any fault of a malformed pickle is the file's, not ours
        fault = f"{type(error).__name__}: {error}"
        raise BrokenCheckpoint(f"{where}: data.pkl cannot be read ({fault[:200]}).") from error
