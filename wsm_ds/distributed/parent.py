"""Notices that the launcher of a rank has ended, so that the rank does not live on and meddle with the next start."""

import os
import socket

from wsm_ds.errors import PeerFailed


class Parent:
    """The parent process at the time when the object is made.

    The parent is asked for, and PR_SET_PDEATHSIG is not used: that signal also comes when only the thread ends that
    started this process (man 2 PR_SET_PDEATHSIG), and ranks that wait for their turn to end must not be killed.
    """

    def __init__(self) -> None:
        self.pid = os.getppid()

    def check(self) -> None:
        """Raises PeerFailed if the parent has ended: then the kernel has given this process another parent."""
        if os.getppid() != self.pid:
            raise PeerFailed(
                f"the launcher of this rank (process {self.pid} on {socket.gethostname()}) has ended, so this rank "
                "ends, too. Start the same command again to continue.", 3,
            )  # fmt: skip


STARTER = Parent()
"""The parent when this module was imported. Import it early: a parent that had ended before is not noticed."""
