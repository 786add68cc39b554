"""What programs keep in DeepSpeed's client state: plain values of Python and of the libraries that the tests have."""

from __future__ import annotations

import argparse
import array
import collections
import datetime
import decimal
import fractions
import http
import pathlib
import random
import time
import types
import uuid
import zoneinfo
from collections.abc import Callable
from typing import Any

import numpy as np
from lazy import torch


def deepspeed_values() -> list[Any]:
    from deepspeed.checkpoint import SubparamShape
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    scalers = [LossScaler(1.0), DynamicLossScaler.__new__(DynamicLossScaler)]
    addresses = [fragment_address(1, 2), SubparamShape(["a"], (1,), 0)]
    return [*scalers, *addresses, ZeroStageEnum(2), OffloadDeviceEnum.cpu]


def transformers_values() -> list[Any]:
    from transformers import TrainerState, TrainingArguments
    from transformers.trainer_utils import IntervalStrategy, SchedulerType

    return [TrainingArguments(use_cpu=True, report_to=[]), TrainerState(), IntervalStrategy.STEPS, SchedulerType.LINEAR]


def generator() -> Any:
    made = torch.Generator()
    made.manual_seed(3)
    return made


VALUES: dict[str, Callable[[], Any]] = {
    "a defaultdict of lists": lambda: collections.defaultdict(list, loss=[1.0]),
    "defaultdicts of all factories": lambda: [
        collections.defaultdict(kind) for kind in (None, list, dict, set, int, float, str, bool, tuple, frozenset)
    ],
    "containers": lambda: [collections.deque([1], 3), collections.Counter("ab"), {1}, frozenset([2]), range(3)],
    "bytes": lambda: [b"\xff\x00", b"", bytearray(b"x"), array.array("i", [1])],
    "numbers": lambda: [1j, slice(1, 2), decimal.Decimal("1.1"), fractions.Fraction(1, 3), 1 << 200],
    "singletons": lambda: [type(None), ..., NotImplemented],
    "times": lambda: [
        datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc),
        datetime.datetime(2026, 1, 2, tzinfo=zoneinfo.ZoneInfo("UTC")),
        datetime.date(2026, 1, 2),
        datetime.timedelta(1),
        datetime.time(1),
        time.gmtime(0),
    ],
    "paths": lambda: [pathlib.Path("/a"), pathlib.PurePosixPath("b"), pathlib.PureWindowsPath("c")],
    "namespaces": lambda: [argparse.Namespace(a=1), types.SimpleNamespace(b=2)],
    "enums": lambda: [http.HTTPStatus.OK],
    "identifiers": lambda: uuid.UUID(int=5),
    "numpy": lambda: [np.float64(1.5), np.bool_(True), np.arange(3), np.dtype("f4"), np.float32, np.datetime64("2026")],
    "records": lambda: np.zeros(2, dtype=[("a", "f4"), ("b", "U3")]),
    "generators": lambda: [
        random.Random(1),
        np.random.RandomState(0),
        *map(np.random.Generator, (np.random.PCG64(1), np.random.MT19937(1), np.random.Philox(1), np.random.SFC64(1))),
        np.random.default_rng(0).bit_generator.state,
        generator(),
    ],
    "torch's values": lambda: [
        torch.bfloat16, torch.device("cpu"), torch.Size([1]), torch.strided,
        torch.torch_version.TorchVersion("2.13.0"), torch.get_rng_state()
    ],
    "torch's tensors": lambda: [
        torch.nn.Parameter(torch.ones(2)), torch.nn.Buffer(torch.ones(2)), torch.eye(2).to_sparse(),
        torch.ones(1, device="meta"),
    ],
    "deepspeed": deepspeed_values,
    "transformers": transformers_values,
}  # fmt: skip
