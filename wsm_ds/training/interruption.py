"""A signal, or a file, asks the run to end; all ranks end at the same step."""

import logging
import signal
from collections.abc import Iterable
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 75
"""EX_TEMPFAIL: saved after a signal, start me again."""


class Interruption:
    """Remembers what interrupted this rank: by default a signal that came.

    A second one changes nothing: Slurm signals every process of a step, torchrun passes the signal on as well, so each
    rank sees it twice. Make it right before the loop: a process that only remembers SIGTERM while it starts up cannot
    be ended by anything but SIGKILL.
    """

    def __init__(self, signals: Iterable[signal.Signals] = SIGNALS) -> None:
        self.received: str | None = None
        self.previous = {number: signal.signal(number, self._receive) for number in signals}

    def ask(self, reason: str) -> None:
        """Interrupts as a signal does; the first reason counts."""
        if self.received is None:
            self.received = reason

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.ask(signal.Signals(number).name)

    def uninstall(self) -> None:
        """Puts the former handlers back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether any rank was interrupted.

        Ranks: all, at a step's boundary; it holds an all-reduce of one number.
        """
        import deepspeed.comm as dist
        import torch
        from deepspeed.accelerator import get_accelerator

        flag: Any = torch.tensor([float(self.received is not None)], device=get_accelerator().current_device_name())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
