"""All errors that wsm_ds raises on purpose, and helpers for their messages.

Each error is a subclass of `WsmError`, so that a caller can catch all of them at once. Each is also a subclass of the
builtin exception that fits best, so that a caller who does not know wsm_ds can catch it too. A message says what
failed, where (file, rank, tensor), what was expected and what was found, and what to do next.

Exit codes of `wsm-ds`:

    0    done
    2    the request is wrong: an option, a recipe, a window, a schedule
    3    the data or the machine is not in order: a checkpoint, an output, the disk, the memory
    130  SIGINT or SIGTERM ended the command; the same command continues

A training script that uses `wsm_ds.training.TrainingJob` ends with 75 when a signal made it save and stop, and with 1
after any error.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class WsmError(Exception):
    """Base class of every error that wsm_ds raises on purpose.

    Attributes:
        exit_code: exit code of the command that ends with this error; the module's docstring lists them.
        may_pass: whether the same request can succeed when it is repeated without a change.
    """

    exit_code = 2
    may_pass = False


class CurveError(WsmError, ValueError):
    """A decay curve, decay factors, coefficients or a grid are not valid.

    Raised by `wsm_ds.schedules`. The message names the argument, the index and the value, and for an unknown curve
    the valid ones.
    """


class ScheduleError(WsmError, ValueError):
    """A learning-rate scheduler got a wrong parameter, a state that contradicts its parameters, or a wrong optimizer.

    Raised by WSMLR and WSDLR when they are made, loaded or stepped. The message names the parameter and its value; for
    a loaded state both the saved and the configured value.
    """


class RecipeError(WsmError, ValueError):
    """A recipe, a command-line option or an argument is not valid.

    Raised before anything is read or written. The message names the option or the key, and its value.
    """


class CheckpointNotFound(WsmError, FileNotFoundError):
    """A run, a tag or a step that was asked for does not exist.

    Raised when a run's folder is searched. The message names the folder, and the checkpoints that exist in it.
    """


class WindowError(WsmError, ValueError):
    """The selected checkpoints are not a window that can be merged.

    Raised when a window is chosen: too few checkpoints, a step twice, a learning rate that changes. The message names
    the checkpoints and the option that allows or avoids it.
    """


class OutputExists(WsmError, FileExistsError):
    """The output exists already, or another merge was started there.

    Raised before anything is written, because nothing is overwritten. The message names the folder and, for a
    started merge, the arguments that differ.
    """


class OutputLocked(OutputExists):
    """Another process is writing the output now.

    Raised when the output's lock is taken. The message names the lock's purpose and its holder (host and process).
    """


class UnsafePath(WsmError, PermissionError):
    """Where the tool writes, there is a link, a folder of another user, or a file that the tool did not write.

    Raised before anything is written through it; nothing of it is changed or removed. The message names the path.
    """

    exit_code = 3
    may_pass = True


class BudgetTooSmall(WsmError, ValueError):
    """The memory budget is smaller than the smallest unit of work.

    Raised when the work is divided. The message names the budget and the smallest possible one, in bytes.
    """


class BrokenCheckpoint(WsmError, OSError):
    """Files of a checkpoint are missing, truncated, damaged or have unexpected content.

    Raised when a checkpoint's metadata or elements are read. The message names the file or the missing ranks.
    """

    exit_code = 3


class UnsafePickle(WsmError, ValueError):
    """A checkpoint's pickle refers to a global that is not one of the harmless ones that checkpoints need.

    Raised before anything is imported; no pickle is ever executed. The message names the file, all such globals and the
    options that allow them.
    """

    exit_code = 3


class UnsupportedLayout(WsmError, NotImplementedError):
    """A checkpoint is complete, but this version cannot read it or cannot write the requested form.

    Raised when a layout is read or an output is planned. The message names the file or the tensor, and the feature.
    """

    exit_code = 3


class LayoutMismatch(WsmError, ValueError):
    """Checkpoints of one window do not hold the same model.

    Raised when a window is planned or read. The message names both checkpoints and the first difference.
    """

    exit_code = 3


class ModelMismatch(WsmError, ValueError):
    """A model in memory and a checkpoint do not hold the same tensors, or the model cannot be filled in place.

    Raised before anything is read or changed. The message names the tensors, and how to let some of them differ.
    """


class ForeignFiles(WsmError, ValueError):
    """A checkpoint has files of another save: of another step, another rank or another run.

    Raised when a window is planned. The message names the files, and what differs.
    """

    exit_code = 3


class NonFiniteValue(WsmError, ValueError):
    """A source holds a NaN or an infinity, or a merged value is too large for the output's dtype.

    Raised while elements are summed. The message names the tensor and the source's or the output's file.
    """

    exit_code = 3


class VerificationFailed(WsmError, ValueError):
    """A merged output differs from its manifest or from the merge of its sources.

    Raised by `verify`, and when a manifest is read. The message names the file and, if known, the byte.
    """

    exit_code = 3


class PeerFailed(WsmError, RuntimeError):
    """Another rank failed or stopped answering.

    Raised on all ranks but the one that failed. The message is that rank's own, or names the rank and its host.

    Args:
        message: the message of the failed rank.
        exit_code: the exit code of the failed rank.
    """

    may_pass = True

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Interrupted(WsmError, InterruptedError):
    """SIGINT or SIGTERM ended a command.

    Raised at the next safe point. The message names the signal and what was kept: the same command continues from it.
    """

    exit_code = 130
    may_pass = True


class TrackingFailed(WsmError, ConnectionError):
    """A tracker (TensorBoard, Weights & Biases, trackio) did not take the values of a report.

    Raised after the report is written. The message names the tracker and gives its own words.
    """

    exit_code = 3
    may_pass = True


class EvaluationError(WsmError, ValueError):
    """The held-out data, the model or the program of an evaluation cannot be used.

    Raised before anything is measured. The message names the file, the tensor or the program, and what was expected.
    """

    exit_code = 3


class InsufficientCapacity(WsmError, OSError):
    """The disk has too few free bytes or inodes, or the machine too little memory.

    Raised before the work starts. The message names the folder, the free and the needed amount.
    """

    exit_code = 3


class Superseded(WsmError, RuntimeError):
    """A newer attempt of the same training run was started, so this attempt must publish nothing more.

    Raised by an older attempt when it wants to publish. The message names the run and both attempts.
    """


class StaleLock(WsmError, FileExistsError):
    """A process that was killed left a lock, and the next start would wait for it without end.

    Raised before DeepSpeed compiles its extensions. The message names the lock's file, its age and how to remove it.
    """

    exit_code = 3


class TrainingError(WsmError, RuntimeError):
    """A training script or its run's folder is in a state that `wsm_ds.training` cannot continue from.

    Raised by `TrainingJob`. The message names the step, the file or the changed constant.
    """


class NodeUnfit(WsmError, RuntimeError):
    """A node fails a check that is made before a job starts on it.

    Raised by `wsm_ds.training.node_check`. The message names the folder, the address or the device, and the defect.
    """

    exit_code = 3


class RanksSilent(WsmError, TimeoutError):
    """Ranks of a running job make no progress.

    Raised by `wsm_ds.training.watchdog`. The message names the attempt, the run and the slowest or missing ranks.
    """

    exit_code = 3


def few(items: Iterable[object], limit: int = 5, total: int | None = None) -> str:
    """Lists items in an error message: the first ones, and the count if there are more.

    Example:
        >>> few([1, 2, 3]), few(range(7))
        ('1, 2, 3', '0, 1, 2, 3, 4, … (7 in all)')

    Args:
        items: what to list.
        limit: how many items are shown.
        total: the count to show, if `items` are only some of all.
    """
    shown = [str(item) for item in items]
    if len(shown) <= limit:
        return ", ".join(shown)
    return ", ".join(shown[:limit]) + f", … ({total or len(shown)} in all)"


def brief(value: object) -> str:
    """Describes a value in an error message: in a few characters, and without a walk through its elements.

    The value may come from a damaged or hostile file, so it may be arbitrarily large or contain itself.

    Example:
        >>> brief("step"), brief(7), brief([1, 2]), brief(2**100)
        ("'step'", '7', 'a list of 2', 'an integer of 101 bits')
    """
    if isinstance(value, str | bytes):
        return repr(value[:40]) + ("…" if len(value) > 40 else "")
    # Python refuses to print an integer of more than 4300 digits (sys.get_int_max_str_digits).
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, list | tuple | dict | set | frozenset):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: a suggestion, or "" if no known name resembles it.

    >>> did_you_mean("cosin", ["linear", "cosine"])
    " (did you mean 'cosine'?)"

    Args:
        name: the unknown name; anything with a text.
        known: the valid names.
    """
    matches = get_close_matches(str(name)[:100], known, n=1, cutoff=0.7)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def one_line(text: str) -> str:
    r"""Returns `text` with escapes for all characters that are not printable.

    Names of files and tensors may hold line breaks or terminal control sequences.

    Example:
        >>> print(one_line("weight\n\x1b[31m"))
        weight\n\x1b[31m
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
