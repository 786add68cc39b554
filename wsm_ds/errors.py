"""Every error that wsm_ds raises on purpose, a closed set.

Each is a subclass of the builtin that fits, so a caller who does not know wsm_ds can catch it, and of
`WsmError`, so a caller who does can catch them all. A message says what failed, where (file, rank,
slot), what was expected and found, and what to do next.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class WsmError(Exception):
    """Base of every error raised by wsm_ds.

    `exit_code`: of the command. `may_pass`: whether the same request may succeed when it is made again.
    """

    exit_code = 2
    may_pass = False


class CurveError(WsmError, ValueError):
    """A decay curve, its decay factors, its coefficients or its grid are not valid."""


class ScheduleError(WsmError, ValueError):
    """A learning-rate schedule got a wrong parameter, or a state that contradicts its parameters."""


class RecipeError(WsmError, ValueError):
    """A recipe or a command-line option is not valid."""


class CheckpointNotFound(WsmError, FileNotFoundError):
    """A run, tag or step that was asked for does not exist."""


class WindowError(WsmError, ValueError):
    """The checkpoints asked for do not make a window that can be merged."""


class OutputExists(WsmError, FileExistsError):
    """The output is already there, or another merge has begun there."""


class OutputLocked(OutputExists):
    """Another process is writing the output now."""


class BudgetTooSmall(WsmError, ValueError):
    """The memory budget does not hold even the smallest unit of work."""


class BrokenCheckpoint(WsmError, OSError):
    """A checkpoint's files are missing, truncated or not what their names say."""

    exit_code = 3


class UnsafePickle(WsmError, ValueError):
    """A checkpoint's pickle names a global that no training checkpoint needs."""

    exit_code = 3


class UnsupportedLayout(WsmError, NotImplementedError):
    """A checkpoint is whole, but in a form that this version does not read or write."""

    exit_code = 3


class LayoutMismatch(WsmError, ValueError):
    """Checkpoints of one window do not hold the same model."""

    exit_code = 3


class NonFiniteValue(WsmError, ValueError):
    """A source holds a NaN or an infinity, or a value overflows the output's dtype."""

    exit_code = 3


class VerificationFailed(WsmError, ValueError):
    """A merged output is not what its manifest says."""

    exit_code = 3


class PeerFailed(WsmError, RuntimeError):
    """Another rank of the same merge failed; the message is its own."""

    may_pass = True

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Interrupted(WsmError, InterruptedError):
    """A signal asked the merge to end; what was staged stays for the next attempt."""

    exit_code = 130
    may_pass = True


class InsufficientCapacity(WsmError, OSError):
    """The disk has not enough bytes or inodes free, or the machine not enough memory."""

    exit_code = 3


class Superseded(WsmError, RuntimeError):
    """A newer attempt of the same run was started; this one may publish nothing more."""


class StaleLock(WsmError, FileExistsError):
    """A lock that no living process holds would be waited for without end."""

    exit_code = 3


class TrainingError(WsmError, RuntimeError):
    """A training script does what `wsm_ds.training` cannot work with."""


class NodeUnfit(WsmError, RuntimeError):
    """A node is not fit for a job; the reason is named."""

    exit_code = 3


class RanksSilent(WsmError, TimeoutError):
    """Ranks of a running job make no progress; the slowest is named."""

    exit_code = 3


def few(items: Iterable[object], limit: int = 5, total: int | None = None) -> str:
    """The first `limit` items and how many there are (`total`, if `items` are not all), for an error message."""
    shown = [str(item) for item in items]
    if len(shown) <= limit:
        return ", ".join(shown)
    return ", ".join(shown[:limit]) + f", … ({total or len(shown)} in all)"


def brief(value: object) -> str:
    """What a value is, for an error message: short whatever a file has put there, and without walking through it."""
    if isinstance(value, str | bytes):
        return repr(value[:40]) + ("…" if len(value) > 40 else "")
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, list | tuple | dict | set | frozenset):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown `name`: the known one that resembles it most, or nothing.

    >>> did_you_mean("cosin", ["linear", "cosine"])
    " (did you mean 'cosine'?)"
    """
    matches = get_close_matches(str(name)[:100], known, n=1, cutoff=0.7)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def one_line(text: str) -> str:
    """`text` with everything that is not printable written as an escape: names may come from any file."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
