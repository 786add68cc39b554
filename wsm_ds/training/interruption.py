"""Lets a signal, or a file, end the training on all ranks at the same step."""

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
    """Remembers that this rank was asked to stop.

    A second signal changes nothing: Slurm signals every process of a step, and torchrun passes the signal on as well,
    so each rank sees it twice. Make the object right before the training loop: a process that only remembers SIGTERM
    while it starts up can be ended by SIGKILL alone.

    Args:
        signals: those to catch from now on.

    Attributes:
        received: the name of the first signal, or the reason given to `ask`; None while nobody has asked.
        previous: the handlers that were there before.
    """

    def __init__(self, signals: Iterable[signal.Signals] = SIGNALS) -> None:
        self.received: str | None = None
        self.previous = {number: signal.signal(number, self._receive) for number in signals}

    def ask(self, reason: str) -> None:
        """Asks this rank to stop, as a signal does. The first reason is kept."""
        if self.received is None:
            self.received = reason

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.ask(signal.Signals(number).name)

    def uninstall(self) -> None:
        """Restores the handlers that were there before."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop.

        Ranks: all, between two steps. It holds an all-reduce of one number.
        """
        import deepspeed.comm as dist
        import torch
        from deepspeed.accelerator import get_accelerator

        flag: Any = torch.tensor([float(self.received is not None)], device=get_accelerator().current_device_name())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
