"""Standard streams that cannot end a command: work goes on when nobody can read what is printed."""

import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from typing_extensions import override


class Printed(io.RawIOBase):
    """A standard stream. Once it cannot be written, everything else that is printed is dropped.

    Attributes:
        failure: why it could not be written; None if everything was printed so far.

    Args:
        descriptor: of the stream; None: it was closed before the process began.
    """

    def __init__(self, descriptor: int | None) -> None:
        self.descriptor = descriptor
        self.failure = OSError(errno.EBADF, os.strerror(errno.EBADF)) if descriptor is None else None

    @override
    def write(self, data: "memoryview | bytes", /) -> int:  # type: ignore[override]
        """Writes some bytes, and returns how many. Raises nothing."""
        if self.descriptor is None or self.failure is not None:
            return len(data)
        try:
            return os.write(self.descriptor, data)
        except BlockingIOError:
            select.select([], [self.descriptor], [])
            return 0
        except OSError as error:
            self.failure = error
            return len(data)

    @override
    def writable(self) -> bool:
        """Whether it is for writing."""
        return True

    @override
    def fileno(self) -> int:
        """The stream's descriptor."""
        if self.descriptor is None:
            raise io.UnsupportedOperation("fileno")
        return self.descriptor

    @override
    def isatty(self) -> bool:
        """Whether people see it on a terminal."""
        return self.descriptor is not None and os.isatty(self.descriptor)

    @property
    def is_closed(self) -> bool:
        """Whether it failed because it was closed, here or at its reader."""
        return self.failure is not None and self.failure.errno in (errno.EPIPE, errno.EBADF)


def fill_standard_descriptors() -> None:
    """Opens /dev/null in place of descriptors 0, 1 and 2 that are closed.

    Otherwise the next file that is opened becomes standard error, and messages of libraries are written into it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            os.set_inheritable(descriptor, True)


@contextmanager
def standard_streams() -> Iterator[Printed]:
    """While the context runs, `sys.stdout` and `sys.stderr` drop what they cannot write.

    Streams that Python has not made itself, such as those of a test, are left as they are.

    Yields:
        Standard output.
    """
    previous = sys.stdout, sys.stderr
    fill_standard_descriptors()
    try:
        sys.stdout, printed = _replaced(sys.stdout)
        sys.stderr, _ = _replaced(sys.stderr)
        yield printed
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = previous


def _replaced(stream: TextIO | None) -> tuple[TextIO, Printed]:
    if stream is None:
        return _text(Printed(None), "utf-8", line_buffering=False)
    if type(stream) is not io.TextIOWrapper:
        return stream, Printed(1)
    stream.flush()
    return _text(Printed(stream.fileno()), stream.encoding, line_buffering=stream.line_buffering)


def _text(printed: Printed, encoding: str, *, line_buffering: bool) -> tuple[TextIO, Printed]:
    # File names may hold bytes that are not UTF-8.
    buffer: io.BufferedWriter[Any] = io.BufferedWriter(printed)
    errors = "backslashreplace"
    return io.TextIOWrapper(buffer, encoding=encoding, errors=errors, line_buffering=line_buffering), printed
