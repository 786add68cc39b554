"""Ends the training on all ranks at the same step, after a signal or another request."""

import logging
import signal
from collections.abc import Iterable
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the ranks saved after a signal; start them again."""


class Interruption:
    """Whether this rank was asked to stop, by a signal or by `request_stop`.

    A second signal changes nothing: Slurm signals every process of a step, and torchrun passes the signal on as well,
    so each rank sees it twice. Make the object right before the training loop: a process that only remembers SIGTERM
    while it starts up can be ended by SIGKILL alone.

    Args:
        signals: those to catch from now on.

    Attributes:
        reason: the name of the first signal, or the reason given to `request_stop`; None before that.
        previous: the handlers that the object replaced.
    """

    def __init__(self, signals: Iterable[signal.Signals] = SIGNALS) -> None:
        self.reason: str | None = None
        self.previous = {number: signal.signal(number, self._receive) for number in signals}

    def request_stop(self, reason: str) -> None:
        """Asks this rank to stop, as a signal does. The first reason is kept."""
        if self.reason is None:
            self.reason = reason

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.request_stop(signal.Signals(number).name)

    def uninstall(self) -> None:
        """Restores the handlers that the object replaced."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def is_requested_on_any_rank(self) -> bool:
        """Whether any rank was asked to stop.

        Ranks: all, between two steps. It holds an all-reduce of one number.
        """
        import deepspeed.comm as dist
        import torch
        from deepspeed.accelerator import get_accelerator

        flag: Any = torch.tensor([float(self.reason is not None)], device=get_accelerator().current_device_name())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
