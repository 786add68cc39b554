"""Signals are remembered, and a second one changes nothing."""

import os
import signal

from wsm_ds.training.interruption import Interruption


def test_the_first_signal_counts_and_a_second_does_no_harm() -> None:
    before = signal.getsignal(signal.SIGTERM)
    interruption = Interruption()
    try:
        assert interruption.reason is None
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert interruption.reason == "SIGUSR1"
    finally:
        interruption.uninstall()
    assert signal.getsignal(signal.SIGTERM) is before
