"""Parts of a new object tree: tensors that streams will fill, copies of tensors, and objects that DeepSpeed pickles."""

import itertools
from collections import OrderedDict
from dataclasses import replace
from typing import Any

from wsm_ds.dtypes import BY_NAME, DType
from wsm_ds.torchfile import Global, Stub, Tensor
from wsm_ds.torchfile.unpickle import STORAGES, Storage

STORAGE_NAMES = {torch_name: name for name, torch_name in reversed(STORAGES.items())}
"""The class of a torch storage, by the torch name of its dtype."""
_numbers = itertools.count(1)


def placeholder(dtype: DType, shape: tuple[int, ...]) -> Tensor:
    """Returns a contiguous tensor with its own storage, which lies in no file: streams fill it.

    Args:
        dtype: dtype of the tensor.
        shape: shape of the tensor.
    """
    numel, stride = 1, []
    for size in reversed(shape):
        stride.append(max(numel, 1))
        numel *= size
    key, strides = f"new{next(_numbers)}", tuple(reversed(stride))
    if dtype.torch_name in STORAGE_NAMES:
        storage_class = Global("torch", STORAGE_NAMES[dtype.torch_name])
        return _tensor(Storage(key, dtype, storage_class, "cpu", numel), 0, shape, strides)
    # The storage of such a dtype is saved as bytes, with the dtype beside it (`_reduce_ex_internal`, torch/_tensor.py).
    storage_class = Global("torch.storage", "UntypedStorage")
    storage = Storage(key, BY_NAME["uint8"], storage_class, "cpu", numel * dtype.itemsize)
    arguments: tuple[Any, ...] = (storage, 0, shape, strides, False, OrderedDict())
    arguments += (Global("torch", dtype.torch_name),)
    return Tensor(storage, 0, shape, strides, Stub(Global("torch._utils", "_rebuild_tensor_v3"), arguments), dtype)


def with_own_storage(value: Any) -> Any:
    """Returns a tensor with the same bytes in its own storage; returns anything else unchanged.

    Tensors that share a storage in the source (step counters) would otherwise share it in the output, too.
    """
    if not isinstance(value, Tensor):
        return value
    return _tensor(replace(value.storage, copy=next(_numbers)), value.offset, value.shape, value.stride)


def _tensor(storage: Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    arguments: tuple[Any, ...] = (storage, offset, shape, stride, False, OrderedDict())
    return Tensor(storage, offset, shape, stride, Stub(Global("torch._utils", "_rebuild_tensor_v2"), arguments))


def zero_stage(stage: int) -> Stub:
    """Returns DeepSpeed's enum value of a ZeRO stage."""
    return Stub(Global("deepspeed.runtime.zero.config", "ZeroStageEnum"), (stage,))


def static_loss_scaler() -> Stub:
    """Returns the loss scaler that bf16 and fp32 runs save: a constant 1."""
    scaler = Global("deepspeed.runtime.fp16.loss_scaler", "LossScaler")
    return Stub(scaler, (), state={"cur_scale": 1.0, "dynamic": False}, is_new=True)


def fragment_address(numel: int, start: int) -> Stub:
    """Returns DeepSpeed's address of a parameter's elements in a rank's partition, both in elements."""
    address = Global("deepspeed.utils.tensor_fragment", "fragment_address")
    return Stub(address, (), state={"numel": numel, "start": start}, is_new=True)
